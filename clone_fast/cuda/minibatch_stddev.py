"""minibatch_stddev beside CUDA: no kernel of its own. A network that is asked for on CUDA has Triton's here."""

from __future__ import annotations

from torch import Tensor

from clone_fast.cuda import dtype_reason

__all__ = ["composes"]


def composes(x: Tensor, group: int, num_channels: int) -> str | None:
    """None where Triton's launches, forward and backward, may stand for kernels here, or why they may not."""
    return dtype_reason(x)
