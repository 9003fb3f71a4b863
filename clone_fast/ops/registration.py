"""How an op becomes known to PyTorch: schema, kernels, fake and autograd, once for every backend.

Every op is functional and takes the resolved backend as its last argument, a str, so that the choice stands in a
compiled graph and the backward uses the same one. Below "reference" lies the specification itself; below the other
names lie the leaves that `clone_fast.ops.dispatch` finds. A gradient with a kernel of its own is an op of its own,
registered the same way, so that it stands in a compiled graph too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clone_fast._compiler import constant_result
from clone_fast.reference.convolution import fast_double_backward

LIBRARY = torch.library.Library("clone_fast", "DEF")


@constant_result
def _has_autocast(kind: str) -> bool:
    """PyTorch 2.11's compiler does not trace this question."""
    return torch.amp.is_autocast_available(kind)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of (x, ...), computed in the dtypes of its arguments whatever autocast would make of them."""

    @functools.wraps(function)
    def exact(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = x.device.type
        if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
            return function(x, *args, **kwargs)
        with torch.autocast(device_type=kind, enabled=False):
            return function(x, *args, **kwargs)

    return exact


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout of an op's result: channels_last where x is so and only so, contiguous otherwise."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def empty_result(x: Tensor, shape: Sequence[int]) -> Tensor:
    """What a fake returns: nothing in it, x's dtype and device, the layout that the op promises."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def as_result(y: Tensor, x: Tensor) -> Tensor:
    """y in the layout that the op promises for x."""
    return y.contiguous(memory_format=layout_of(x)) if y.ndim == x.ndim else y


def like(grad: Tensor | None, value: Tensor) -> Tensor:
    """A gradient in the dtype and the memory order of what it is of."""
    out = torch.empty_like(value)
    if grad is None:
        return out.zero_()
    strides = zip(grad.stride(), out.stride(), grad.shape, strict=True)
    same = grad.dtype == out.dtype and all(one == other for one, other, size in strides if size > 1)
    return grad if same else out.copy_(grad)


class _Weighed(torch.autograd.Function):
    """(gradients, *results): a scalar of no value, whose gradients to the results are these."""

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *results: Tensor) -> Tensor:
        ctx.grads = grads  # not as arguments: what they depend on is no part of what is differentiated
        return results[0].new_empty([])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


def gradients_through(
    results: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """What `torch.autograd.grad(results, inputs, grads, allow_unused=True)` returns, bit for bit.

    That imports sympy where it is given gradients, to compare their shapes, and with it takes a second or more of every
    process; of a scalar's it wants none. Each gradient must be of its result's shape.
    """
    some, theirs = ([x] if isinstance(x, Tensor) else list(x) for x in (results, grads))
    with torch.enable_grad():
        scalar = _Weighed.apply(theirs, *some)
    return list(torch.autograd.grad(scalar, list(inputs), create_graph=create_graph, allow_unused=True))


def composite_gradients(
    function: Callable[..., Any], args: Sequence[Any], wanted: Sequence[int], grads: Tensor | Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of function(*args) to args[i] for i in wanted, differentiable again under create_graph.

    Every wanted tensor is aliased first: otherwise, where one is computed from another (styles from x, say), its path
    would be counted twice.
    """
    differentiable_again = torch.is_grad_enabled()
    # Here and not only around the forward: on a GPU the backward has a thread of its own, where no context reaches.
    with torch.enable_grad(), fast_double_backward() if differentiable_again else nullcontext():
        aliased = list(args)
        for i in wanted:
            aliased[i] = args[i].view_as(args[i]) if args[i].requires_grad else args[i].detach().requires_grad_()
        y = function(*aliased)
        return gradients_through(y, [aliased[i] for i in wanted], grads, create_graph=differentiable_again)


@dataclass(frozen=True)
class Outline:
    """What is left of a tensor that the backward does not need."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Recorded:
    """What the backward of an op knows of its forward."""

    args: tuple[Any, ...]  # without the backend; an Outline where a tensor was not kept
    results: tuple[Tensor, ...]  # () unless they were to be kept
    backend: str


@dataclass(frozen=True)
class Kept:
    """Where among the saved tensors an argument is."""

    place: int


Gradients = Callable[[Recorded, list[Any], list[int]], Sequence["Tensor | list[Tensor | None] | None"]]


def _replaced(value: Any, one: Callable[[Any], Any]) -> Any:
    """one(value), or a list of that of each."""
    return [one(each) for each in value] if isinstance(value, list) else one(value)


def _flat(values: Iterable[Any]) -> list[Any]:
    """Results, or their gradients, one after the other: those of a list where it stands."""
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def register(
    name: str,
    schema: str,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradients: Gradients | None = None,
    differentiable: Sequence[int] = (),
    dropped: Sequence[int] = (),
    keep_results: bool = False,
) -> Callable[..., Any]:
    """Register `clone_fast::<name>` and return it, taking (*args, backend).

    Args:
        name: of the op.
        schema: arguments and results without the backend, e.g. "(Tensor x, Tensor f, int[] up) -> Tensor".
            The first argument is a Tensor; others may be Tensor[], and so may results.
        run: (backend, *args) -> results, new tensors; called with autocast off and x's device current.
        fake: (*args) -> empty results.
        gradients: (recorded, gradients of the results, positions wanted) -> a gradient or None for each position, a
            list of these for a Tensor[]. Of several results some may have none; those of a Tensor[] stand one after
            the other. With grad mode on, what it returns must be differentiable again, or it must raise. None: no
            gradient.
        differentiable: positions of the arguments that may want a gradient.
        dropped: positions of arguments whose values the gradients do not need.
        keep_results: whether the gradients need the results.
    """
    before, after = schema.split(") -> ")
    lists = [i for i, argument in enumerate(before.split(",")) if "Tensor[]" in argument]
    LIBRARY.define(f"{name}{before}, str backend) -> {after}")
    qualified = f"clone_fast::{name}"

    @without_autocast
    def implementation(*args: Any) -> Any:
        *inputs, backend = args
        if inputs[0].is_cuda and inputs[0].device.index != torch.cuda.current_device():
            with torch.cuda.device(inputs[0].device):
                return run(backend, *inputs)
        return run(backend, *inputs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept: list[Tensor] = _flat(output if isinstance(output, tuple) else (output,)) if keep_results else []
        ctx.results = len(kept)

        def noted(value: Tensor, keep: bool) -> Kept | Outline:
            if not keep:
                return Outline(value.shape, value.dtype, value.device)
            kept.append(value)
            return Kept(len(kept) - 1)

        ctx.args = [
            _replaced(value, functools.partial(noted, keep=i not in dropped))
            if isinstance(value, Tensor) or i in lists
            else value
            for i, value in enumerate(inputs)
        ]
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)  # what no one used costs nothing

    @without_autocast
    def evaluate(_: Tensor, recorded: Recorded, grads: list[Tensor | None], wanted: list[int]) -> Sequence[Any]:
        if gradients is None:
            raise NotImplementedError(f"clone_fast::{name} has no gradient")
        return gradients(recorded, grads, wanted)

    def backward(ctx: Any, *results: Any) -> tuple[Any, ...]:
        kept, grads = ctx.saved_tensors, _flat(results)
        *args, backend = (
            _replaced(value, lambda one: kept[one.place] if isinstance(one, Kept) else one) for value in ctx.args
        )
        recorded = Recorded(tuple(args), tuple(kept[: ctx.results]), backend)
        wanted = [i for i in differentiable if any(_flat([ctx.needs_input_grad[i]]))]
        found: list[Any] = [[None] * len(value) if i in lists else None for i, value in enumerate(ctx.args)]
        some = next((grad for grad in grads if grad is not None), None)
        if some is not None:
            for i, grad in zip(wanted, evaluate(some, recorded, grads, wanted), strict=True):
                found[i] = found[i] if grad is None else grad
        return tuple(found)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(qualified, lambda *args: fake(*args[:-1]), lib=LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.clone_fast, name).default
    return op
