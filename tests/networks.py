"""Networks small enough for float64 numpy and finite differences."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from clone_fast.nn import Architecture

TINY = Architecture(img_resolution=16, z_dim=5, w_dim=6, channel_base=64, channel_max=6)
CONDITIONAL = Architecture(img_resolution=8, z_dim=5, w_dim=6, c_dim=3, channel_base=64, channel_max=6)

Module = TypeVar("Module", bound=nn.Module)


def randomised(module: Module) -> Module:
    """Biases and noise strengths start at a constant; give each a value of its own, so that it counts."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return module
