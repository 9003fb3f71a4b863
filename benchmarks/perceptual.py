"""LPIPS (Zhang et al. 2018, arXiv:1801.03924) with AlexNet's layers and random weights, for what would download them.

As costly as the real one, and nothing to look at: it stands in where the time of a step is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LAYERS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
POOLED = (1, 2)  # before these


class LPIPS(nn.Module):
    """`lpips.LPIPS(net="alex")`; of other arguments nothing is heard.

    forward: images [N, 3, H, W] in [-1, 1], float32, from 32 pixels on; returns [N, 1, 1, 1].
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():  # the same weights each time
            torch.manual_seed(0)
            self.features = nn.ModuleList(nn.Conv2d(i, o, k, s, p) for i, o, k, s, p in LAYERS)
            for layer in self.features:
                nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    def _activations(self, x: Tensor) -> list[Tensor]:
        """Of every layer, of unit length in each pixel."""
        x, found = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(nn.functional.max_pool2d(x, 3, 2) if i in POOLED else x).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        pairs = zip(self._activations(one), self._activations(other), strict=True)
        return sum((a - b).square().mean([1, 2, 3], keepdim=True) for a, b in pairs)  # type: ignore[return-value]
