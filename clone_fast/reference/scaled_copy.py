"""scaled_copy: images times a factor, and others added, into memory of another dtype and layout."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def scaled_copy_(out: Tensor, x: Tensor, factor: Tensor | None, added: Tensor | None) -> None:
    """See `clone_fast.ops.scaled_copy.scaled_copy_`."""
    if factor is not None or added is not None:
        compute = torch.promote_types(x.dtype, torch.float32)
        x = x.to(compute) if factor is None else x.to(compute) * factor
        x = x if added is None else x + added
    out.copy_(x)
