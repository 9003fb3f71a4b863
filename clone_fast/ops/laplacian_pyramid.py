"""laplacian_pyramid: the bands of an image, and the loss over the bands of a difference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clone_fast.ops.checks import check_image, check_tensor
from clone_fast.ops.dispatch import resolve
from clone_fast.ops.registration import define, without_autocast
from clone_fast.reference import laplacian_pyramid as spec

__all__ = ["laplacian_pyramid", "laplacian_pyramid_loss"]


def _reference(x: Tensor, y: Tensor, levels: int, weights: list[float]) -> Tensor:
    return spec.laplacian_pyramid_loss(x, y, levels=levels, weights=weights)


def _fake(x: Tensor, y: Tensor, levels: int, weights: list[float]) -> Tensor:
    return x.new_empty([], dtype=torch.promote_types(x.dtype, torch.float32))


_op = define(
    "laplacian_pyramid",
    "(Tensor x, Tensor y, int levels, float[] weights) -> Tensor",
    reference=_reference,
    fake=_fake,
    differentiable=[0, 1],
)


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
    backend: str = "auto",
) -> Tensor:
    """Weighted sum over the levels of the mean absolute difference of two images' Laplacian pyramids.

    loss = sum_j weights[j] * mean |L_j(x) - L_j(y)|. With the default weights of 1 this is the "Lap1" loss
    sum_j 2^(2j) |L_j(x) - L_j(y)|_1 of Bojanowski et al. 2018 divided by the number of elements of x, since level j
    has 4^-j of them (where the sizes halve exactly).

    Args:
        x, y: images [N, C, H, W] of one shape, dtype and device.
        levels: of the pyramid, the low-pass residual included.
        weights: `levels` factors >= 0; None for 1 each.
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
    args = (y, levels, [float(w) for w in factors])
    return _op(resolve("laplacian_pyramid", backend, x, *args), x, *args)
