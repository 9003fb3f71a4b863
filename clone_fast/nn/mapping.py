"""StyleGAN2's mapping network (Karras et al. 2019, "A Style-Based Generator Architecture")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clone_fast.nn.layers import FullyConnectedLayer, normalize_2nd_moment


class MappingNetwork(nn.Module):
    """z and class label to w: [N, z_dim], [N, c_dim] -> [N, num_ws, w_dim], or [N, out_dim] if num_ws is None."""

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        out_dim: int,
        num_ws: int | None,
        *,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, out_dim
        self.num_ws, self.num_layers, self.w_avg_beta = num_ws, num_layers, w_avg_beta
        embedded = out_dim if c_dim > 0 else 0
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embedded)
        features = [z_dim + embedded] + [out_dim] * num_layers
        for i in range(num_layers):
            layer = FullyConnectedLayer(features[i], features[i + 1], activation="lrelu", lr_multiplier=lr_multiplier)
            self.add_module(f"fc{i}", layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(out_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """Map latents.

        Args:
            z: [N, z_dim], or None where z_dim is 0.
            c: [N, c_dim], or None where c_dim is 0.
            truncation_psi: 1 for w itself, 0 for the mean; in between, w_avg + psi * (w - w_avg).
            truncation_cutoff: truncate only the first so many layers; None for all.

        Raises:
            ValueError: z or c has another shape, or is missing.
        """
        inputs = []
        for name, value, size in (("z", z, self.z_dim), ("c", c, self.c_dim)):
            if size == 0:
                continue
            if value is None or value.ndim != 2 or value.shape[1] != size:
                got = "None" if value is None else list(value.shape)
                raise ValueError(f"{name} must be [N, {size}], got {got}")
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            inputs.append(normalize_2nd_moment(value if name == "z" else self.embed(value)))
        x = torch.cat(inputs, dim=1)
        for i in range(self.num_layers):
            x = self.get_submodule(f"fc{i}")(x)
        if self.num_ws is None:
            return x
        w = x[:, None]
        truncated = w if truncation_psi == 1 else self.w_avg.lerp(w, truncation_psi)
        ws = truncated.expand(-1, self.num_ws, -1)
        if truncation_psi == 1 or truncation_cutoff is None:
            return ws
        return torch.cat([ws[:, :truncation_cutoff], w.expand(-1, self.num_ws, -1)[:, truncation_cutoff:]], dim=1)

    @torch.no_grad()
    def update_w_avg(self, ws: Tensor) -> None:
        """Move w_avg towards the mean of ws [N, num_ws, w_dim]; only training calls this, a forward never does."""
        if self.w_avg_beta is not None:
            self.w_avg.lerp_(ws[:, 0].mean(dim=0), 1 - self.w_avg_beta)
