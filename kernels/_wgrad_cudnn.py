"""The gradient of a convolution to its weight by PyTorch's own convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from clone_fast.kernels._tf32 import nearest


def is_convolution(a: Tensor, b: Tensor, k: int, stride: int, padding: int) -> bool:
    """Whether b has the size of a convolution of a, as PyTorch wants it."""
    return all((a.shape[i] + 2 * padding - k) // stride + 1 == b.shape[i] for i in (2, 3))


def cudnn_wgrad(a: Tensor, b: Tensor, k: int, stride: int, padding: int, per_sample: bool) -> Tensor:
    """What `launch_wgrad` of `_wgrad.py` returns, in the images' dtype, and in no particular memory order.

    In TF32 cuDNN cuts the factors of most shapes, all to the same side: the gradient of the styles, a sum of these, was
    off by 7e-4 of its largest value. So they are rounded first.
    """
    if a.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        a, b = nearest(a), nearest(b)
    parts = zip(a.split(1), b.split(1), strict=True) if per_sample and len(a) > 1 else [(a, b)]
    weight = a.new_empty([b.shape[1], a.shape[1], k, k])
    options = ([stride, stride], [padding, padding], [1, 1], False, [0, 0], 1, [False, True, False])
    found = [torch.ops.aten.convolution_backward(y, x, weight, None, *options)[1] for x, y in parts]
    whole = found[0][None] if len(found) == 1 else torch.stack(found)  # of a single one a copy
    return whole if per_sample else found[0]
