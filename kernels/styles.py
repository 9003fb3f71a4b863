"""styles beside Triton: products of PyTorch's, layer by layer, and no kernel of its own.

One launch for all layers takes a table of their addresses as an argument, which Triton has not: csrc/styles.cu is that
kernel. In a CUDA graph the products take no longer than to join the weights for one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clone_fast.kernels._dense import dtype_reason


def supports(ws: Tensor, *_: object) -> str | None:
    """None: the call can run; otherwise the reason why not."""
    return dtype_reason(ws)


def launch(
    ws: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    reads: list[int],
    weight_gain: float,
    factors: list[float],
) -> list[Tensor]:
    """factor * (weight_gain * ws[:, read] W^T + b) of every layer, [N, C] each."""
    latents = (ws * weight_gain).unbind(1)
    found = [F.linear(latents[read], *layer) for read, *layer in zip(reads, weights, biases, strict=True)]
    torch._foreach_mul_(found, factors)
    return found


def launch_backward(
    ws: Tensor,
    grads: list[Tensor],
    weights: list[Tensor],
    reads: list[int],
    weight_gain: float,
    factors: list[float],
    want_ws: bool,
    want_layers: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dws, dweights, dbiases), dense; the first without elements, the others empty, where they are not wanted."""
    slopes = torch._foreach_mul(grads, factors)
    dws, dweights, dbiases = ws.new_empty([0]), [], []
    if want_ws:
        dws = ws.new_zeros(ws.shape)
        for slope, weight, read in zip(slopes, weights, reads, strict=True):
            dws[:, read].addmm_(slope, weight, alpha=weight_gain)
    if want_layers:
        latents = (ws * weight_gain).unbind(1)
        dweights = [slope.t() @ latents[read] for slope, read in zip(slopes, reads, strict=True)]
        dbiases = [slope.sum(0) for slope in slopes]
    return dws, dweights, dbiases
