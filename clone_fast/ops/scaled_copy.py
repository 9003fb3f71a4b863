"""Images into another dtype and layout, with what is to be done to them on the way. In place, nothing to differentiate.

PyTorch's own copy between images that lie by planes and by pixels takes two to three times as long as their bytes, and
a factor that lies on the GPU, or a sum, is a pass more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clone_fast.ops.dispatch import is_fast, step_if_any
from clone_fast.reference import scaled_copy as spec

__all__ = ["scaled_copy_"]


def scaled_copy_(out: Tensor, x: Tensor, factor: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """out = x * factor + added, computed in float32 and rounded once.

    Args:
        out: [N, C, H, W], floating point, in any layout; a view, too. Not x's memory, and not that of `added`.
        x: of that shape, any floating-point dtype and layout.
        factor: [] or [N, 1, 1, 1]; None for 1.
        added: of that shape, any floating-point dtype and layout; None for nothing.

    Returns:
        out.

    Raises:
        ValueError: shapes are not these.
    """
    for name, one, shapes in (
        ("x", x, [out.shape]),
        ("added", added, [out.shape]),
        ("factor", factor, [(), (len(out), 1, 1, 1)]),
    ):
        if one is not None and one.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"scaled_copy_: {name} must be {wanted}, got {list(one.shape)}")
    if out.numel() and not (is_fast(out.device) and step_if_any("scaled_copy", "", "triton", out, x, factor, added)):
        spec.scaled_copy_(out, x, factor, added)
    elif out.numel():
        torch.autograd.graph.increment_version([out])  # as any operation in place
    return out
