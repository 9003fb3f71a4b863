"""The styles of all layers of a generator: the affine layers that read its latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def styles(
    ws: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    reads: Sequence[int],
    weight_gain: float,
    factors: Sequence[float],
) -> list[Tensor]:
    """factor * (weight_gain * ws[:, read] W^T + b) of every layer: [N, L, w_dim] to [N, C] for each W [C, w_dim].

    Layer by layer also on a CPU: one product for all would read every weight once more to join them, and multiply each
    with every latent.
    """
    latents = (ws * weight_gain).unbind(1)
    found = []
    for weight, bias, read, factor in zip(weights, biases, reads, factors, strict=True):
        style = F.linear(latents[read], weight, bias)
        found.append(style if factor == 1 else style * factor)
    return found
