"""bias_act: bias, activation, gain and clamp in one op."""

from __future__ import annotations

from torch import Tensor

from clone_fast.ops.checks import INT_MAX, check_activation, check_number, check_tensor, describe
from clone_fast.ops.dispatch import resolve
from clone_fast.ops.registration import define, empty_result
from clone_fast.reference import bias_act as spec
from clone_fast.reference.bias_act import ACTIVATIONS, Activation

__all__ = ["ACTIVATIONS", "Activation", "bias_act"]


def _reference(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    return spec.bias_act(x, b, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp)


_op = define(
    "bias_act",
    "(Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float? clamp) -> Tensor",
    reference=_reference,
    fake=lambda x, *args: empty_result(x, x.shape),
    differentiable=[0, 1],
)


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
    return _op(resolve("bias_act", backend, x, *args), x, *args)
