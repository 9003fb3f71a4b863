"""A convolution with another image added: where a residual block ends.

Behind a 1x1 kernel, which is all that a skip has, the sum costs no pass of its own on a fast backend. Its gradient is
that of the convolution, and to the other image the gradient itself.
"""

from __future__ import annotations

from torch import Tensor

from clone_fast.ops.checks import check_addend, check_image, check_odd, check_tensor
from clone_fast.ops.dispatch import launch_step, resolve, step_if_any
from clone_fast.ops.finished_weights import gradients, run
from clone_fast.ops.modulated_conv2d import modulated_conv2d
from clone_fast.ops.registration import Recorded, as_result, empty_result, register

__all__ = ["conv2d_add"]

PLAIN = (None, None, None, None, 1, 1, "linear", 1.0, None)  # what else modulated_conv2d takes


def _run(backend: str, x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    if backend == "reference":
        return as_result(run(backend, x, weight, *PLAIN) + other, x)
    done: Tensor | None = step_if_any("modulated_conv2d", "conv_add", backend, x, weight, other)
    return launch_step("modulated_conv2d", "", backend, x, weight, *PLAIN).add_(other) if done is None else done


def _gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
    x, weight, other = recorded.args
    factors = [i for i in wanted if i < 2]
    found: dict[int, Tensor | None] = {2: grads[0].to(other.dtype)}
    if factors:
        dy = as_result(grads[0], x)
        # it stands in for the result, too, of which a plain convolution's gradients read nothing but its layout
        convolution = Recorded((x, weight, *PLAIN), (dy,), recorded.backend)
        found |= zip(factors, gradients(convolution, [dy], factors), strict=True)
    return [found[i] for i in wanted]


_op = register(
    "conv2d_add",
    "(Tensor x, Tensor weight, Tensor other) -> Tensor",
    run=_run,
    fake=lambda x, weight, other: empty_result(x, other.shape),
    gradients=_gradients,
    differentiable=[0, 1, 2],
    dropped=[2],
)


def conv2d_add(x: Tensor, weight: Tensor, other: Tensor, *, backend: str = "auto") -> Tensor:
    """conv(x, weight) + other: what a residual block passes on (He et al. 2016, "Deep Residual Learning").

    The convolution is a correlation that keeps the size, without bias.

    Args:
        x: [N, I, H, W], floating point.
        weight: [O, I, k, k], k odd. The sum goes along with the convolution where k is 1.
        other: [N, O, H, W], of x's dtype or one that x's has room for.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [N, O, H, W] in x's dtype and layout; differentiable to x, weight and other any number of times.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    op = "conv2d_add"
    check_image(op, "x", x)
    n, channels, height, width = x.shape
    check_tensor(op, "weight", weight, x, ["O", channels, "k", "k"])
    out_channels, _ = check_odd(op, weight, channels)
    check_addend(op, other, x, [n, out_channels, height, width])
    chosen = resolve("modulated_conv2d", backend, x, weight, *PLAIN)
    if chosen == "reference":
        return as_result(modulated_conv2d(x, weight, None, demodulate=False, backend=chosen) + other, x)
    y: Tensor = _op(x, weight.to(x.dtype), other, chosen)
    return y
