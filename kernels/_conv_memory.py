"""Images and weights as the convolution wants them: described for the copy engine, weights by taps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clone_fast.kernels._tf32 import hopper_tf32

COPIED = 64  # channels of half precision from which on a copy for the copy engine is soon earned


def on_16_bytes(x: Tensor) -> bool:
    """Whether the copy engine can read x [N, C, H, W]: channels innermost, everything else on 16 bytes."""
    x_n, x_c, x_h, x_w = x.stride()
    return x_c == 1 and x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in (x_n, x_h, x_w))


def padded(count: int, size: int) -> int:
    """So many numbers of `size` bytes, and as many more as fill up 16 bytes."""
    return triton.cdiv(count * size, 16) * 16 // size


def copied_on_16_bytes(x: Tensor) -> Tensor:
    """x [N, C, H, W] once more, as the copy engine can read it: channels that end elsewhere have a gap behind them."""
    n, channels, height, width = x.shape
    memory = x.new_empty([n, height, width, padded(channels, x.element_size())])
    return memory[..., :channels].permute(0, 3, 1, 2).copy_(x)


def describable(image: Tensor) -> Tensor:
    """The image, or a copy, in channels_last as the copy engine reads it."""
    if image.shape[1] * image.element_size() % 16:
        return copied_on_16_bytes(image)
    image = image.contiguous(memory_format=torch.channels_last)
    return image if image.data_ptr() % 16 == 0 else image.clone()


def columns(a: Tensor, start: int, step: int, block: list[int]) -> TensorDescriptor:
    """A descriptor of the columns start, start + step, ... of what `describable` made, as [N, H, W, C]."""
    n, channels, height, width = a.shape
    pixel = padded(channels, a.element_size())  # strides of dimensions of size 1 tell nothing
    row = width * pixel
    return TensorDescriptor(
        a.permute(0, 2, 3, 1)[:, :, start:],
        [n, height, (width - start + step - 1) // step, channels],
        [height * row, row, step * pixel, 1],
        block,
    )


def described_image(x: Tensor, block: list[int], pairs: bool) -> list[TensorDescriptor] | None:
    """x [N, C, H, W] for the copy engine as [N, H, W, C], or None where it cannot take it.

    Args:
        block: rows, columns and channels of a tile.
        pairs: tiles take every other row and column; then there is one descriptor for each parity of both.
    """
    n, channels, height, width = x.shape
    x_n, _, x_h, x_w = x.stride()
    if not on_16_bytes(x):
        return None
    step = 2 if pairs else 1
    if min(height, width) < step:
        return None
    return [
        TensorDescriptor(
            x[:, :, y::step, z::step],
            [n, (height - y + step - 1) // step, (width - z + step - 1) // step, channels],
            [x_n, step * x_h, step * x_w, 1],
            [1, *block],
        )
        for y in range(step)
        for z in range(step)
    ]


def described_weight(w: Tensor, block: list[int], transposed: bool) -> TensorDescriptor | None:
    """w [N|1, taps, O, I] for the copy engine as [N * taps, O, I] or, transposed, [N * taps, I, O]; or None.

    block: channels O and I of a tile.
    """
    n, taps = w.shape[:2]
    size = w.element_size()
    if w.data_ptr() % 16 or (n > 1 and w.stride(0) != taps * w.stride(1)) or w.stride(1) * size % 16:
        return None
    outer, inner = (3, 2) if transposed else (2, 3)
    if w.stride(inner) != 1 or w.stride(outer) * size % 16:
        return None
    tile = [1, *(reversed(block) if transposed else block)]
    return TensorDescriptor(w, [n * taps, w.shape[outer], w.shape[inner]], [w.stride(1), w.stride(outer), 1], tile)


@triton.jit
def _pack_kernel(
    w, packed, o_size, i_size, row, w_n, w_o, w_i, w_y, w_x, K: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    IN_TF32: tl.constexpr,
):  # fmt: skip
    """packed [N, k * k, O, I], rows of I `row` apart, from w [N, O, I, k, k]: one tap of one n, BO x BI channels."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)[None, :]
    o = tl.program_id(1) * BO + tl.arange(0, BO)[:, None]
    n = tl.program_id(2) // (K * K)
    tap = tl.program_id(2) % (K * K)
    mask = (i < i_size) & (o < o_size)
    value = tl.load(w + n * w_n + o * w_o + i * w_i + (tap // K * w_y + tap % K * w_x), mask=mask)
    if IN_TF32:
        value = hopper_tf32(value)
    tl.store(packed + ((n * K * K + tap) * o_size + o) * row + i, value, mask=mask)


def taps_first(weight: Tensor, half: bool, rounded: bool = False) -> tuple[Tensor, bool]:
    """weight [O, I, k, k] or [N, O, I, k, k] as [N|1, k * k, O, I], and whether O is its innermost axis.

    Nothing is copied where the memory has that order already and shall not be rounded, to TF32. Half precision may be
    multiplied from either order, float32 only with I innermost. A copy's rows begin on 16 bytes.
    """
    w = weight if weight.ndim == 5 else weight[None]
    n, o, i, k, _ = w.shape
    ordered = k == 1 or w.stride(3) == k * w.stride(4)
    strides = (w.stride(0), w.stride(4) if k > 1 else o * i, w.stride(1), w.stride(2))
    aligned = all(stride * w.element_size() % 16 == 0 or stride == 1 for stride in strides)
    usable = ordered and aligned and (w.stride(2) == 1 or (half and w.stride(1) == 1))
    if not rounded and usable and (n == 1 or w.stride(0) == k * k * strides[1]):
        return w.as_strided([n, k * k, o, i], strides), w.stride(2) != 1
    row = padded(i, w.element_size())
    packed = torch.empty([n, k * k, o, row], dtype=w.dtype, device=w.device)[..., :i]
    grid = (triton.cdiv(i, 64), triton.cdiv(o, 32), n * k * k)
    _pack_kernel[grid](w, packed, o, i, row, *w.stride(), K=k, BO=32, BI=64, IN_TF32=rounded)
    return packed, False
