"""Adam, in plain PyTorch: its own fused function, by which `torch.optim.Adam` steps, too.

The class imports torch._dynamo, which takes as long as a hundred iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


@torch.no_grad()
def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    rate: Tensor,
    betas: tuple[float, float],
    epsilon: float,
    **scaled: Any,
) -> None:
    """See `clone_fast.ops.adam`. scaled: `grad_scale` and `found_inf` of a GradScaler."""
    lists = [list(tensors) for tensors in (parameters, gradients, means, squares)]
    adam(
        lists[0], lists[1], lists[2], lists[3], [], list(steps), fused=True, capturable=True, amsgrad=False,
        beta1=betas[0], beta2=betas[1], lr=rate, weight_decay=0.0, eps=epsilon, maximize=False, **scaled,
    )  # fmt: skip
