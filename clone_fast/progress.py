"""What the two stages tell while they run, and what they leave behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Progress = Callable[[str, int, int, float, float], None]
"""progress(stage, step, total, loss, psnr), called every few steps; stage is "latent" or "tweak"."""


def quick_psnr(image: Tensor, photo: Tensor) -> Tensor:
    """PSNR in dB of images in [-1, 1] as a scalar tensor, without a host read."""
    error = F.mse_loss(image.detach().float().clamp(-1, 1), photo)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def ramp(step: int, total: int, *, up: float, down: float) -> float:
    """Factor of the learning rate: linear up over the first share of the steps, cosine down over the last."""
    position = step / max(total, 1)
    rising = min(1.0, (position + 1 / max(total, 1)) / up) if up > 0 else 1.0
    falling = min(1.0, (1 - position) / down) if down > 0 else 1.0
    return rising * (0.5 - 0.5 * math.cos(falling * math.pi))


@dataclass
class Record:
    """The curve of one stage: a row per check, on the host only where a check reads it.

    Attributes:
        stage: its name.
        total: the steps it may take.
        every: steps between two checks.
        rows: {"step", "loss", "psnr", ...} of every check.
    """

    stage: str
    total: int
    every: int
    progress: Progress | None = None
    rows: list[dict[str, float]] = field(default_factory=list)

    def due(self, step: int) -> bool:
        """Whether this step is checked: every `every`-th, the first and the last."""
        return step % self.every == 0 or step in (1, self.total)

    def add(self, step: int, loss: Tensor, psnr: Tensor, **more: Tensor) -> dict[str, float]:
        """Read the values, keep them as a row, tell them."""
        names, values = ["loss", "psnr", *more], torch.stack([v.detach().float() for v in (loss, psnr, *more.values())])
        row = {"step": float(step), **dict(zip(names, values.tolist(), strict=True))}
        self.rows.append(row)
        if self.progress is not None:
            self.progress(self.stage, step, self.total, row["loss"], row["psnr"])
        return row


class Keeper:
    """The weights of the last good check, without a decision of the host in every iteration.

    Before an iteration that will be checked, `look` copies what its values will be measured on. A good check then
    makes this copy the one to go back to, with `keep`. Copies are made on the device, of iterations that are checked
    only.

    Args:
        measured: what the iteration measures before it updates it: the generator's weights, the noise maps, a latent.
        played: what goes with it, and is updated before the others are measured: the discriminator's weights.
    """

    def __init__(self, measured: list[Tensor], played: list[Tensor]) -> None:
        self.measured, self.played = measured, played
        self.seen = [p.detach().clone() for p in measured]
        self.good = [p.detach().clone() for p in measured]
        self.good_played = [p.detach().clone() for p in played]

    @torch.no_grad()
    def look(self) -> None:
        """Copy what will be measured, as it is before the iteration."""
        _copy(self.seen, self.measured)

    @torch.no_grad()
    def keep(self) -> None:
        """The check was good: what was measured is the one to go back to, with what was played."""
        self.seen, self.good = self.good, self.seen
        _copy(self.good_played, self.played)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the last good one."""
        _copy(self.measured, self.good)
        _copy(self.played, self.good_played)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
