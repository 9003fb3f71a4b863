"""laplacian_pyramid: the bands of an image, and the loss over the bands of a difference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops.checks import check_image, check_tensor
from clone_fast.ops.dispatch import launch_step, resolve
from clone_fast.ops.registration import (
    Recorded,
    composite_gradients,
    empty_result,
    register,
    without_autocast,
)
from clone_fast.reference import laplacian_pyramid as spec

__all__ = ["laplacian_pyramid", "laplacian_pyramid_loss"]


def _reference(
    x: Tensor, y: Tensor, levels: int, weights: Sequence[float], charbonnier: float | None, mse: float
) -> Tensor:
    return spec.laplacian_pyramid_loss(x, y, levels=levels, weights=weights, charbonnier=charbonnier, mse=mse)


def _coarse_size(x: Tensor, levels: int) -> list[int]:
    """Of the second level: [N, C, ceil(H/2), ceil(W/2)]; nothing where there is none."""
    return [*x.shape[:2], *((size + 1) // 2 if levels > 1 else 0 for size in x.shape[2:])]


def _slope_dtype(x: Tensor, charbonnier: float | None) -> torch.dtype:
    """Of what is kept of the finest band: its sign, or the slope of its smooth absolute value."""
    return torch.int8 if charbonnier is None else torch.promote_types(x.dtype, torch.float32)


def _run(backend: str, x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *options, keep = args
    if keep:
        kept: tuple[Tensor, Tensor, Tensor] = launch_step("laplacian_pyramid", "keep", backend, x, y, *options)
        return kept
    run = _reference if backend == "reference" else partial(launch_step, "laplacian_pyramid", "", backend)
    _, _, charbonnier, _ = options
    slope, coarse = x.new_empty([0], dtype=_slope_dtype(x, charbonnier)), x.new_empty([0], dtype=torch.float32)
    return run(x, y, *options), slope, coarse


def _fake(
    x: Tensor, y: Tensor, levels: int, weights: list[float], charbonnier: float | None, mse: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty([], dtype=compute),
        x.new_empty(x.shape if keep else [0], dtype=_slope_dtype(x, charbonnier)),
        x.new_empty(_coarse_size(x, levels) if keep else [0], dtype=torch.float32),
    )


def _run_backward(backend: str, *args: Any) -> Tensor:
    dx: Tensor = launch_step("laplacian_pyramid", "backward", backend, *args)
    return dx


def _gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
    """To x, and with the other sign to y. Differentiable again by PyTorch's own autograd, where that is asked for."""
    *args, keep = recorded.args
    if torch.is_grad_enabled() or not keep:
        return composite_gradients(_reference, args, wanted, grads[0])
    x, y, _, weights, _, mse = args
    _, slope, coarse = recorded.results
    dx = _backward_op(grads[0], slope, coarse, weights[0], x, y, mse, recorded.backend)
    return [dx if i == 0 else -dx for i in wanted]


_op = register(
    "laplacian_pyramid",
    "(Tensor x, Tensor y, int levels, float[] weights, float? charbonnier, float mse, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    gradients=_gradients,
    differentiable=[0, 1],
    keep_results=True,
)
_backward_op = register(
    "laplacian_pyramid_backward",
    "(Tensor dloss, Tensor slope, Tensor coarse, float weight, Tensor x, Tensor y, float mse) -> Tensor",
    run=_run_backward,
    fake=lambda dloss, slope, coarse, weight, x, y, mse: empty_result(x, x.shape),
)
_exact = without_autocast(_reference)


def _check_levels(levels: int) -> None:
    if not isinstance(levels, int) or levels < 1:
        raise ValueError(f"laplacian_pyramid: levels must be an integer >= 1, got {levels!r}")


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and value >= 0


def laplacian_pyramid(x: Tensor, *, levels: int = 6) -> list[Tensor]:
    """Split images into band-pass levels and a low-pass residual (Burt and Adelson 1983).

    Band j is the image at level j minus what the next level predicts of it. The next level is the low-pass
    [1 4 6 4 1] / 16 along each axis with borders repeated, decimated by 2; the prediction is zero insertion and the
    same filter with gain 4. Adding the expanded levels up again gives the image.

    Args:
        x: [N, C, H, W], floating point, any size.
        levels: number of tensors returned, the residual included.

    Returns:
        `levels` tensors in x's dtype, [N, C, H, W], [N, C, ceil(H/2), ceil(W/2)], ...; the last is the residual.
        Plain differentiable PyTorch on every device.

    Raises:
        TypeError, ValueError: x is no image, or levels < 1.
    """
    check_image("laplacian_pyramid", "x", x)
    _check_levels(levels)
    bands: list[Tensor] = without_autocast(spec.laplacian_pyramid)(x, levels)
    return bands


def laplacian_pyramid_loss(
    x: Tensor,
    y: Tensor,
    *,
    levels: int = 6,
    weights: Sequence[float] | None = None,
    charbonnier: float | None = None,
    mse: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum over the levels of the mean absolute difference of two images' Laplacian pyramids.

    loss = sum_j weights[j] * mean |L_j(x) - L_j(y)| + mse * mean (x - y)^2. With the default weights of 1, and no mean
    square error, this is the "Lap1" loss sum_j 2^(2j) |L_j(x) - L_j(y)|_1 of Bojanowski et al. 2018 divided by the
    number of elements of x, since level j has 4^-j of them (where the sizes halve exactly). With `charbonnier` the
    absolute value |d| becomes sqrt(d^2 + charbonnier^2), smooth at 0 (Charbonnier et al. 1994; Lai et al. 2017,
    LapSRN).

    Args:
        x, y: images [N, C, H, W] of one shape, dtype and device.
        levels: of the pyramid, the low-pass residual included.
        weights: `levels` factors >= 0; None for 1 each.
        charbonnier: None for the absolute value, or a number > 0 in units of the images.
        mse: factor >= 0 of the images' mean square error; what it needs is read for the pyramid anyway.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        Scalar, float32 (float64 of float64 images); differentiable to x and y.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    check_image("laplacian_pyramid", "x", x)
    check_tensor("laplacian_pyramid", "y", y, x, x.shape, dtype=x.dtype)
    _check_levels(levels)
    factors = [1.0] * levels if weights is None else weights
    if not isinstance(factors, Sequence) or len(factors) != levels or not all(map(_is_weight, factors)):
        raise ValueError(f"laplacian_pyramid: weights must be {levels} numbers >= 0, got {weights!r}")
    if charbonnier is not None and not (isinstance(charbonnier, (int, float)) and charbonnier > 0):
        raise ValueError(f"laplacian_pyramid: charbonnier must be None or a number > 0, got {charbonnier!r}")
    if not _is_weight(mse):
        raise ValueError(f"laplacian_pyramid: mse must be a number >= 0, got {mse!r}")
    args = (y, levels, [float(w) for w in factors], None if charbonnier is None else float(charbonnier), float(mse))
    chosen = resolve("laplacian_pyramid", backend, x, *args)
    loss: Tensor
    if chosen == "reference":
        loss = _exact(x, *args)
    else:
        keep = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        loss = _op(x, *args, keep, chosen)[0]
    return loss
