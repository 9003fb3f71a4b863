"""How an op becomes known to PyTorch: schema, kernels, fake and autograd, once for every backend.

Every op is functional and takes the resolved backend as its last argument, a str, so that the choice stands in a
compiled graph and the backward uses the same one. The implementation for "reference" is the specification itself; the
others are the leaves that `clone_fast.ops.dispatch` finds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops.dispatch import leaf

LIBRARY = torch.library.Library("clone_fast", "DEF")


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of (x, ...), computed in the dtypes of its arguments whatever autocast would make of them."""

    @functools.wraps(function)
    def exact(x: Tensor, *args: Any) -> Any:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(x, *args)
        with torch.autocast(device_type=kind, enabled=False):
            return function(x, *args)

    return exact


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout of an op's result: channels_last where x is so and only so, contiguous otherwise."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def empty_result(x: Tensor, shape: Sequence[int]) -> Tensor:
    """What a fake returns: nothing in it, x's dtype and device, the layout that the op promises."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def composite_gradients(
    function: Callable[..., Tensor], args: Sequence[Any], wanted: Sequence[int], dy: Tensor
) -> list[Tensor | None]:
    """Gradients of function(*args) to args[i] for i in wanted, differentiable again under create_graph.

    Every wanted tensor is aliased first: otherwise, where one is computed from another (styles from x, say), its path
    would be counted twice.
    """
    differentiable_again = torch.is_grad_enabled()
    with torch.enable_grad():
        aliased = list(args)
        for i in wanted:
            aliased[i] = args[i].view_as(args[i]) if args[i].requires_grad else args[i].detach().requires_grad_()
        y = function(*aliased)
        found = torch.autograd.grad(
            y, [aliased[i] for i in wanted], dy, create_graph=differentiable_again, allow_unused=True
        )
    return list(found)


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    differentiable: Sequence[int],
) -> Callable[..., Tensor]:
    """Register `clone_fast::<name>` and return a function (backend, *args) that runs it.

    On "reference" that function is the specification itself, with PyTorch's own autograd; on any other backend it is
    the registered op. `torch.ops.clone_fast.<name>` runs all of them as a registered op.

    Args:
        name: of the op, as on every other floor.
        schema: arguments and result without the backend, e.g. "(Tensor x, Tensor f, int[] up) -> Tensor".
        reference: the specification, taking the schema's arguments by position.
        fake: an empty result from fake inputs, taking the same; see `empty_result`.
        differentiable: positions of the tensor arguments that may want a gradient.
    """
    before, after = schema.split(")")
    LIBRARY.define(f"{name}{before}, str backend){after}")
    qualified = f"clone_fast::{name}"

    @without_autocast
    def exact(*args: Any) -> Tensor:
        y = reference(*args)
        return y.contiguous(memory_format=layout_of(args[0])) if y.ndim == args[0].ndim else y

    @without_autocast
    def gradients(dy: Tensor, inputs: Sequence[Any], wanted: Sequence[int]) -> list[Tensor | None]:
        return composite_gradients(reference, inputs, wanted, dy)

    def run(*args: Any) -> Tensor:
        *inputs, backend = args
        if backend == "reference":
            y: Tensor = exact(*inputs)
            return y
        found = leaf(name, backend)
        if isinstance(found, str):
            raise NotImplementedError(f"{name}: {found}")
        return found.launch(*inputs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [
            next(tensors) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        grads: list[Tensor | None] = [None] * len(inputs)
        wanted = [i for i in differentiable if ctx.needs_input_grad[i]]
        for i, grad in zip(wanted, gradients(dy, inputs[:-1], wanted), strict=True):
            grads[i] = grad
        return tuple(grads)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(qualified, lambda *args: fake(*args[:-1]), lib=LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    op = getattr(torch.ops.clone_fast, name).default

    def call(backend: str, *args: Any) -> Tensor:
        y: Tensor = exact(*args) if backend == "reference" else op(*args, backend)
        return y

    return call
