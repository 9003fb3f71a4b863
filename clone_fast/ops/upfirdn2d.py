"""upfirdn2d: upsample, filter with a FIR and downsample an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from clone_fast.ops.checks import check_filter, check_image, check_number, check_result, describe
from clone_fast.ops.dispatch import launch_step, resolve
from clone_fast.ops.registration import Recorded, as_result, empty_result, register, without_autocast
from clone_fast.reference import upfirdn2d as spec
from clone_fast.reference.upfirdn2d import Pair, setup_filter

__all__ = ["downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upsample2d"]


def _run(backend: str, x: Tensor, *args: Any) -> Tensor:
    y: Tensor = _exact(x, *args) if backend == "reference" else launch_step("upfirdn2d", "", backend, x, *args)
    return y


@without_autocast
def _exact(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float
) -> Tensor:
    y = spec.upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip_filter, gain=gain)
    return as_result(y, x)


def _output_size(x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int]) -> tuple[int, int]:
    (fw, fh), (x0, x1, y0, y1) = spec.filter_size(f), padding
    return (
        spec.output_size(x.shape[2], fh, up[1], down[1], y0, y1),
        spec.output_size(x.shape[3], fw, up[0], down[0], x0, x1),
    )


def _fake(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float
) -> Tensor:
    return empty_result(x, [x.shape[0], x.shape[1], *_output_size(x, f, up, down, padding)])


def adjoint(
    size: Sequence[int], result: Sequence[int], f: Tensor, up: list[int], down: list[int], padding: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """(up, down, padding) with which the op, its filter flipped, takes gradients [*result] back to [*size] (y, x)."""
    (fw, fh), (x0, _, y0, _) = spec.filter_size(f), padding
    pads = []
    for axis, taps, before in ((1, fw, x0), (0, fh, y0)):
        u, d = up[1 - axis], down[1 - axis]  # up and down are x, y
        # so that size * u of the zero-filled image are left, of which every u-th is wanted
        pads += [taps - before - 1, size[axis] * u - result[axis] * d + before - u + 1]
    return down, up, pads


def _gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
    """The op is linear, and its adjoint is the same op: so its gradients are differentiable as often as wanted."""
    x, f, up, down, padding, flip_filter, gain = recorded.args
    others = adjoint(x.shape[2:], grads[0].shape[2:], f, up, down, padding)
    return [registered(grads[0], f, *others, not flip_filter, gain, recorded.backend) for _ in wanted]


registered = register(
    "upfirdn2d",
    "(Tensor x, Tensor f, int[] up, int[] down, int[] padding, bool flip_filter, float gain) -> Tensor",
    run=_run,
    fake=_fake,
    gradients=_gradients,
    differentiable=[0],
    dropped=[0],
)


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    *,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Upsample, filter and downsample a batch of images (Karras et al. 2020, StyleGAN2, and 2019, blur pooling).

    In this order: insert up-1 zeros behind every sample; pad with zeros, or crop where the padding is negative;
    convolve with f (correlate if flip_filter), keeping what is covered by the image; keep every down-th sample.

    Args:
        x: images [N, C, H, W], floating point. Half precision is accumulated in float32.
        f: filter float32 [fh, fw], or [taps] for a separable one; see `setup_filter`. Gets no gradient.
        up, down: integers >= 1, one for both axes or [x, y].
        padding: pixels with respect to the upsampled image: one number, [x, y], or [x0, x1, y0, y1].
        flip_filter: correlate instead of convolve.
        gain: factor on the result.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [N, C, (H * up + y0 + y1 - fh + down) // down, (W * up + x0 + x1 - fw + down) // down] in x's dtype and layout;
        differentiable to x any number of times.

    Raises:
        TypeError, ValueError: an argument is not as above, or nothing is left of the image.
        BackendError: the backend was named and cannot run this call.
    """
    check_image("upfirdn2d", "x", x)
    check_filter("upfirdn2d", "f", f, x)
    up_xy, down_xy = list(spec.parse_scaling(up, "up")), list(spec.parse_scaling(down, "down"))
    pads = list(spec.parse_padding(padding))
    size = _output_size(x, f, up_xy, down_xy, pads)
    check_result("upfirdn2d", [x.shape[0], x.shape[1], *size])
    if min(size) < 1:
        raise ValueError(
            f"upfirdn2d: nothing is left of x {describe(x)} with f {describe(f)}, up={up}, down={down}, "
            f"padding={padding}"
        )
    check_number("upfirdn2d", "gain", gain)
    args = (f, up_xy, down_xy, pads, bool(flip_filter), float(gain))
    chosen = resolve("upfirdn2d", backend, x, *args)
    y: Tensor = _exact(x, *args) if chosen == "reference" else registered(x, *args, chosen)
    return y


def filter2d(
    x: Tensor, f: Tensor, *, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Filter [N, C, H, W] and keep its size, plus the padding. Arguments and errors as in `upfirdn2d`."""
    pads = _centred(x, f, padding, lambda taps, _: (taps // 2, (taps - 1) // 2))
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain, backend=backend)


def upsample2d(
    x: Tensor,
    f: Tensor,
    *,
    up: Pair = 2,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Enlarge [N, C, H, W] to [N, C, H * up, W * up], keeping brightness. Arguments and errors as in `upfirdn2d`."""
    factors = spec.parse_scaling(up, "up")
    check_number("upfirdn2d", "gain", gain)
    pads, gain = enlarging_padding(x, f, factors, padding), gain * factors[0] * factors[1]
    return upfirdn2d(x, f, up=factors, padding=pads, flip_filter=flip_filter, gain=gain, backend=backend)


def downsample2d(
    x: Tensor,
    f: Tensor,
    *,
    down: Pair = 2,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Shrink [N, C, H, W] to [N, C, H // down, W // down]. Arguments and errors as in `upfirdn2d`."""
    factors = spec.parse_scaling(down, "down")
    pads = shrinking_padding(x, f, factors, padding)
    return upfirdn2d(x, f, down=factors, padding=pads, flip_filter=flip_filter, gain=gain, backend=backend)


def enlarging_padding(x: Tensor, f: Tensor, factors: Sequence[int], padding: Pair = 0) -> list[int]:
    """The padding with which up=factors keeps the image where it is, plus the caller's."""
    return _centred(x, f, padding, lambda taps, axis: ((taps + factors[axis] - 1) // 2, (taps - factors[axis]) // 2))


def shrinking_padding(x: Tensor, f: Tensor, factors: Sequence[int], padding: Pair = 0) -> list[int]:
    """The padding with which down=factors keeps the image where it is, plus the caller's."""
    return _centred(x, f, padding, lambda taps, axis: ((taps - factors[axis] + 1) // 2, (taps - factors[axis]) // 2))


def _centred(x: Tensor, f: Tensor, padding: Pair, around: Callable[[int, int], tuple[int, int]]) -> list[int]:
    """The padding that keeps the image where it is, around(taps, axis) with axis 0 for x, plus the caller's."""
    check_image("upfirdn2d", "x", x)
    check_filter("upfirdn2d", "f", f, x)
    fw, fh = spec.filter_size(f)
    x0, x1, y0, y1 = spec.parse_padding(padding)
    (left, right), (top, bottom) = around(fw, 0), around(fh, 1)
    return [x0 + left, x1 + right, y0 + top, y1 + bottom]
