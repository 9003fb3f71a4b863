"""What a checkpoint holds: a generator, mostly its discriminator, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clone_fast.nn.architecture import Architecture
from clone_fast.nn.discriminator import Discriminator
from clone_fast.nn.generator import Generator


@dataclass
class Network:
    """A pair of networks with what else stands in their file.

    Attributes:
        generator: the one to draw with, its weights averaged over training where the file has such (G_ema).
        discriminator: None where the file has none.
        metadata: provenance as plain strings: source format, training command, seed, images seen, ...
        directions: named directions [w_dim] in W, one standard deviation long; may be empty.
        generator_raw: the generator as training left it, where the file has both.
    """

    generator: Generator
    discriminator: Discriminator | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    directions: dict[str, Tensor] = field(default_factory=dict)
    generator_raw: Generator | None = None

    @property
    def arch(self) -> Architecture:
        """The architecture of the generator; the discriminator's is the same."""
        return self.generator.arch

    def to(self, device: torch.device | str) -> Network:
        """Move everything to a device, in place."""
        for module in (self.generator, self.discriminator, self.generator_raw):
            if module is not None:
                module.to(device)
        self.directions = {name: direction.to(device) for name, direction in self.directions.items()}
        return self


Draw = Callable[[Generator, Tensor, "Mapping[str, Tensor] | None"], Tensor]
"""How images [N, C, R, R] come from a generator, ws [N, num_ws or 1, w_dim] and noise maps by layer name."""


def drawn(generator: Generator, ws: Tensor, noise: Mapping[str, Tensor] | None = None) -> Tensor:
    """The images of ws, with constant noise where there is no map."""
    images: Tensor = generator.synthesis(ws, noise_mode="const", noise=noise)
    return images


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of it wants a gradient inside the `with` block; then as it was before."""
    required = [p.requires_grad for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(module.parameters(), required, strict=True):
            parameter.requires_grad_(flag)
