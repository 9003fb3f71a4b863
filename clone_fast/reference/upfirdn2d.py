"""upfirdn2d: upsample by zero insertion, pad, filter with a FIR, downsample by decimation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | Sequence[int]
INTEGERS = (int, torch.SymInt)  # the latter while a graph of unknown sizes is traced


def _integers(value: object) -> tuple[int, ...]:
    """The integers that value is made of, () where it is none and holds none."""
    values = (value,) if isinstance(value, INTEGERS) else tuple(value) if isinstance(value, Sequence) else ()
    return values if all(isinstance(v, INTEGERS) for v in values) else ()


def parse_scaling(scaling: Pair, name: str) -> tuple[int, int]:
    """An int or [x, y], each >= 1, as (x, y)."""
    values = _integers(scaling)
    if len(values) not in (1, 2) or not all(v >= 1 for v in values):
        raise ValueError(f"upfirdn2d: {name} must be an integer >= 1 or [x, y] of such, got {scaling!r}")
    return values[0], values[-1]


def parse_padding(padding: Pair) -> tuple[int, int, int, int]:
    """An int, [x, y] or [x0, x1, y0, y1], negative to crop, as (x0, x1, y0, y1)."""
    values = _integers(padding)
    if len(values) not in (1, 2, 4):
        raise ValueError(f"upfirdn2d: padding must be an int, [x, y] or [x0, x1, y0, y1], got {padding!r}")
    if len(values) < 4:
        values = (values[0], values[0], values[-1], values[-1])
    return values[0], values[1], values[2], values[3]


def filter_size(f: Tensor) -> tuple[int, int]:
    """(width, height) of a filter [fh, fw], or of a separable one [taps]."""
    return int(f.shape[-1]), int(f.shape[0])


def output_size(size: int, taps: int, up: int, down: int, pad0: int, pad1: int) -> int:
    """Samples along one axis after upsampling, padding, filtering and downsampling; < 1 if nothing is left."""
    return (size * up + pad0 + pad1 - taps + down) // down


def setup_filter(
    f: Tensor | Sequence[float] | Sequence[Sequence[float]] | float | None,
    *,
    device: torch.device | str | None = None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1.0,
    separable: bool | None = None,
) -> Tensor:
    """Make a FIR filter for `upfirdn2d`.

    Args:
        f: taps [taps] of a separable filter, a filter [fh, fw], a number, or None for the identity.
        device: where the filter shall live.
        normalize: divide by the sum, so that a constant image keeps its value.
        flip_filter: reverse the taps along each axis.
        gain: overall factor on the image, applied as gain**(ndim / 2) so that both forms agree.
        separable: keep 1-D taps as they are (True) or multiply them out (False); by default, eight taps or more
            stay separable.

    Returns:
        float32 [taps] or [fh, fw].

    Raises:
        ValueError: f is empty, or has more than two dimensions, or a separable filter is to have a negative gain.
    """
    taps = torch.as_tensor(1.0 if f is None else f, dtype=torch.float32, device=device)
    if taps.ndim > 2 or taps.numel() == 0:
        raise ValueError(f"setup_filter: f must be a number, [taps] or [fh, fw], not empty, got {list(taps.shape)}")
    if taps.ndim == 0:
        taps = taps[None]
    if separable is None:
        separable = taps.ndim == 1 and taps.numel() >= 8
    if taps.ndim == 1 and not separable:
        taps = taps.outer(taps)
    if gain < 0 and taps.ndim == 1:
        raise ValueError(f"setup_filter: gain must be >= 0 for a separable filter, got {gain!r}")
    if normalize:
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    return taps * gain ** (taps.ndim / 2)


Axes = tuple[int, int]  # y, x


def _pad(x: Tensor, y_pads: tuple[int, int], x_pads: tuple[int, int]) -> Tensor:
    """Zeros before and after along each axis; negative to crop."""
    pads = [*x_pads, *y_pads]
    if any(p > 0 for p in pads):
        x = F.pad(x, [max(p, 0) for p in pads])
    if any(p < 0 for p in pads):
        left, right, top, bottom = (max(-p, 0) for p in pads)
        x = x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]
    return x


def _split(before: int, after: int) -> tuple[int, tuple[int, int]]:
    """What a convolution can do itself, the same on both sides and not negative; and the rest."""
    both = max(min(before, after), 0)
    return both, (before - both, after - both)


def _filter(x: Tensor, taps: Tensor, up: Axes, down: Axes, y_pads: tuple[int, int], x_pads: tuple[int, int]) -> Tensor:
    """The definition with taps [fh, fw], as one convolution of every channel by itself."""
    kernel = taps.expand(x.shape[1], 1, *taps.shape)
    if up == (1, 1):
        (py, y_rest), (px, x_rest) = _split(*y_pads), _split(*x_pads)
        x = _pad(x, y_rest, x_rest)
        return F.conv2d(x, kernel.flip([2, 3]), stride=down, padding=(py, px), groups=x.shape[1])  # a correlation
    # The transposed convolution spares itself the zeros. It gives all the samples in which the image has a part; what
    # is wanted of them begins and ends so many later and earlier:
    (cy, y_rest), (cx, x_rest) = (
        _split(n - 1 - before, n - u - after)
        for n, u, (before, after) in zip(taps.shape, up, (y_pads, x_pads), strict=True)
    )
    y = F.conv_transpose2d(x, kernel, stride=up, padding=(cy, cx), groups=x.shape[1])
    y = _pad(y, (-y_rest[0], -y_rest[1]), (-x_rest[0], -x_rest[1]))
    return y[:, :, :: down[0], :: down[1]]


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    *,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """See `clone_fast.ops.upfirdn2d.upfirdn2d`. Half precision is computed in float32 and rounded once."""
    up_x, up_y = parse_scaling(up, "up")
    down_x, down_y = parse_scaling(down, "down")
    x0, x1, y0, y1 = parse_padding(padding)
    compute = torch.promote_types(x.dtype, torch.float32)
    y, taps = x.to(compute), f.to(compute)
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    if taps.ndim == 2:
        y = _filter(y, gain * taps, (up_y, up_x), (down_y, down_x), (y0, y1), (x0, x1))
    else:
        y = _filter(y, gain * taps[None, :], (1, up_x), (1, down_x), (0, 0), (x0, x1))
        y = _filter(y, taps[:, None], (up_y, 1), (down_y, 1), (y0, y1), (0, 0))
    return y.to(x.dtype)
