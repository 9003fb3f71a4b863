"""bias_act: bias, activation, gain and clamp in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clone_fast.ops.checks import INT_MAX, check_activation, check_number, check_tensor, describe
from clone_fast.ops.dispatch import launch_step, resolve
from clone_fast.ops.registration import (
    Recorded,
    as_result,
    composite_gradients,
    empty_result,
    register,
    without_autocast,
)
from clone_fast.reference import bias_act as spec
from clone_fast.reference.bias_act import ACTIVATIONS, Activation

__all__ = ["ACTIVATIONS", "Activation", "bias_act"]


def _reference(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    return spec.bias_act(x, b, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp)


def _reference_backward(dy: Tensor, x: Tensor, b: Tensor | None, *options: Any) -> tuple[Tensor, Tensor | None]:
    """(dx, db), differentiable again where grad mode is on."""
    wanted = [0] if b is None else [0, 1]
    dx, *db = composite_gradients(_reference, (x, b, *options), wanted, dy)
    return dx, db[0] if db else None  # type: ignore[return-value]  # dx is never None: x is always used


def _run(backend: str, *args: Any) -> Tensor:
    y: Tensor
    if backend == "reference":
        y = as_result(_reference(*args), args[0])
    else:
        y = launch_step("bias_act", "", backend, *args)
    return y


def _run_backward(backend: str, dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dx, db = launch_step("bias_act", "backward", backend, dy, x, *args)
    return dx, x.new_empty([0]) if db is None else db


def _run_second(backend: str, *args: Any) -> Tensor:
    y: Tensor = launch_step("bias_act", "second", backend, *args)
    return y


def _over_channels(x: Tensor, dim: int) -> Tensor:
    """The sum of x over all axes but dim, accumulated in float32 where x is of half precision."""
    others = [i for i in range(x.ndim) if i != dim]
    return x.sum(others, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype) if others else x


def _gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
    if recorded.backend == "reference":
        return composite_gradients(_reference, recorded.args, wanted, grads[0])
    dx, db = _backward_op(grads[0], *recorded.args, 1 in wanted, recorded.backend)
    return [dx if i == 0 else db for i in wanted]


def _second_gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
    """Of (dx, db) to dy, x and b. They are linear in dy: what comes to dx goes to dy by the same slopes."""
    *args, want_db = recorded.args
    _, x, b, dim, act = args[:5]
    v, to_db = grads[0], grads[1] if want_db else None
    if torch.is_grad_enabled():  # a third derivative: rare, by PyTorch's own autograd
        used = [i for i, grad in enumerate((v, to_db)) if grad is not None]
        return composite_gradients(
            lambda *a: [_reference_backward(*a)[i] for i in used], args, wanted, [grads[i] for i in used]
        )
    if to_db is not None:
        spread = to_db.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
        v = spread.expand_as(x).contiguous() if v is None else v + spread
    found: dict[int, Tensor | None] = {}
    if 0 in wanted:
        found[0] = _backward_op(v, *args[1:], False, recorded.backend)[0]
    if 1 in wanted or 2 in wanted:
        piecewise_linear = ACTIVATIONS[act].homogeneous
        dxx = None if piecewise_linear else _second_op(v, *args, recorded.backend)
        found |= {1: dxx, 2: None if dxx is None or b is None else _over_channels(dxx, dim)}
    return [found[i] for i in wanted]


_ARGUMENTS = "Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float? clamp"

_op = register(
    "bias_act",
    f"({_ARGUMENTS}) -> Tensor",
    run=_run,
    fake=lambda x, *args: empty_result(x, x.shape),
    gradients=_gradients,
    differentiable=[0, 1],
)
_backward_op = register(
    "bias_act_backward",
    f"(Tensor dy, {_ARGUMENTS}, bool want_db) -> (Tensor, Tensor)",
    run=_run_backward,
    fake=lambda dy, x, b, *args: (
        empty_result(x, x.shape),
        x.new_empty([0] if b is None or not args[-1] else b.shape),
    ),
    gradients=_second_gradients,
    differentiable=[0, 1, 2],
)
_second_op = register(
    "bias_act_second",
    f"(Tensor v, Tensor dy, {_ARGUMENTS}) -> Tensor",
    run=_run_second,
    fake=lambda v, dy, x, *args: empty_result(x, x.shape),
)
_exact = without_autocast(lambda *args: as_result(_reference(*args), args[0]))


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """clamp(gain * act(x + b)), elementwise.

    Args:
        x: any shape, floating point. Half precision is computed in float32 and rounded once.
        b: bias [x.shape[dim]] in x's dtype, or None.
        dim: the axis that the bias belongs to.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: shape parameter of the activation, by default its own (lrelu: slope 0.2).
        gain: factor after the activation, by default its own (sqrt(2) for relu, lrelu and swish, else 1).
        clamp: limit the result to [-clamp, clamp] after the gain; the gradient is 0 beyond.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        Shape, dtype and layout of x, always a new tensor; differentiable to x and b, twice and more.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"bias_act: x must be a floating-point tensor, got {describe(x)}")
    if x.numel() == 0 or x.numel() > INT_MAX:
        raise ValueError(f"bias_act: x must have 1 to 2^31 - 1 elements, got {describe(x)}")
    if b is not None:
        if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
            raise ValueError(f"bias_act: dim must be an axis of x {describe(x)}, got {dim!r}")
        check_tensor("bias_act", "b", b, x, [x.shape[dim]], dtype=x.dtype)
    check_activation("bias_act", act, clamp, ACTIVATIONS)
    check_number("bias_act", "alpha", alpha)
    check_number("bias_act", "gain", gain)
    alpha_value, gain_value = spec.activation_defaults(act, alpha, gain)
    args = (b, 0 if b is None else dim % x.ndim, act, alpha_value, gain_value, None if clamp is None else float(clamp))
    chosen = resolve("bias_act", backend, x, *args)
    y: Tensor = _exact(x, *args) if chosen == "reference" else _op(x, *args, chosen)
    return y
