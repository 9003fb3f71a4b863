"""What stands for a photo: the latents of all layers, and noise maps where they were optimised, too."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clone_fast.errors import SettingsError
from clone_fast.nn import Draw, Generator, drawn


@dataclass(frozen=True)
class Latent:
    """A point of W+, with the noise maps that belong to it.

    Attributes:
        ws: [1, num_ws, w_dim] float32; all rows equal for a point of W.
        noise: [r, r] by layer name, in place of the generator's own; empty to keep those.
    """

    ws: Tensor
    noise: dict[str, Tensor] = field(default_factory=dict)

    def draw(self, generator: Generator) -> Tensor:
        """The image [1, C, R, R] that a generator draws for it, with constant noise."""
        return drawn(generator, self.ws, self.noise)

    @torch.no_grad()
    def picture(self, generator: Generator, draw: Draw = drawn) -> Tensor:
        """The same as a finished picture: limited to [-1, 1], without a graph."""
        return draw(generator, self.ws, self.noise).clamp(-1, 1)

    def to(self, device: torch.device | str) -> Latent:
        """The same on another device."""
        return Latent(self.ws.to(device), {name: noise.to(device) for name, noise in self.noise.items()})

    @torch.no_grad()
    def settle(self, generator: Generator) -> None:
        """Put the noise maps in the place of the generator's constant ones, for who has no others."""
        for name, value in self.noise.items():
            generator.synthesis.get_buffer(f"{name}.noise_const").copy_(value)

    @staticmethod
    def of(given: Latent | Tensor, generator: Generator) -> Latent:
        """What was given as a latent of this generator, on its device; of a tensor, any shape that `expanded` takes.

        Raises:
            SettingsError: it is none.
        """
        if not isinstance(given, Latent | Tensor):
            raise SettingsError(f"latent must be a tensor or a Latent, got {type(given).__name__}")
        latent = given if isinstance(given, Latent) else Latent(given)
        ws = latent.ws.detach().to(torch.float32)
        return Latent(Latent.expanded(ws, generator), latent.noise).to(generator.mapping.w_avg.device)

    @staticmethod
    def expanded(ws: Tensor, generator: Generator) -> Tensor:
        """w [w_dim], [1, w_dim], [num_ws, w_dim] or [1, num_ws, w_dim] as ws [1, num_ws, w_dim] of the generator.

        Raises:
            SettingsError: it has none of these shapes.
        """
        num_ws, w_dim = generator.num_ws, generator.w_dim
        if tuple(ws.shape) in ((w_dim,), (1, w_dim)):
            return ws.reshape(1, 1, w_dim).repeat(1, num_ws, 1)
        if tuple(ws.shape) in ((num_ws, w_dim), (1, num_ws, w_dim)):
            return ws.reshape(1, num_ws, w_dim).clone()
        raise SettingsError(f"latent must be [{w_dim}] or [{num_ws}, {w_dim}], got {list(ws.shape)}")
