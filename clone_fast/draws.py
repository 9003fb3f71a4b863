"""All that is random in a tweak, drawn before it begins.

A CPU generator draws it in the order in which the iterations need it, whatever the device; the tables then lie on the
device, so that an iteration reads its row without the host. Eager and captured iterations on any device therefore see
the very same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clone_fast.capture import ROWS, Table
from clone_fast.nn import Generator


@dataclass(frozen=True)
class Wanted:
    """What an iteration draws.

    Attributes:
        local_probability: with which the local term joins; 1 where there is nothing else to do.
        batch: images at once, the clone among them where the local term joins; 0 for no images but the clone.
        reach: how far an edit goes at most; None for no edits.
        real_images: how many there are to pick from, one for each image that is not the clone; 0 for none.
        real_without_clone: whether they are picked in iterations without the local term, too.
        inputs: keep z as well as w, for a mapping network that moves.
    """

    local_probability: float
    batch: int
    reach: float | None
    real_images: int
    real_without_clone: bool
    inputs: bool


class Draws:
    """The random numbers of one tweak, from a `restart` on.

    Tables, with a row for each iteration: "rate" [], the factor of the learning rates; where `batch` > 0 "w"
    [batch, w_dim], latents that the original mapping network makes of the draws, "c" [batch, c_dim] of a conditional
    network, and "z" [batch, z_dim] if `inputs`; where there are edits "move" [w_dim], to be added to w. An iteration
    with the clone uses the first batch - 1 of a row.

    Args:
        original: the generator before the tweak.
        rate: of an iteration, counted from 0.
        total: iterations of the tweak; more may be drawn.
    """

    def __init__(self, original: Generator, wanted: Wanted, *, rate: Callable[[int], float], total: int) -> None:
        self.original, self.wanted, self.rate = original, wanted, rate
        self.device = original.mapping.w_avg.device
        self.source = torch.Generator()
        self.size, self.taken, self.first = min(total, ROWS), 0, 0
        self.local: list[bool] = []
        self.picked: list[Tensor] = []
        self.table = Table({}, self.device)

    def restart(self, seed: int) -> None:
        """Draw the first rows of this seed, in the memory of those that are there."""
        self.source.manual_seed(seed)
        self.taken = self.first = 0
        self.factor = 1.0
        self.table.refill(self._draw())

    def next(self) -> tuple[bool, Tensor | None]:
        """Whether the local term joins the next iteration, and the real images picked for it [n], on the host."""
        if self.taken == self.size:
            self.first, self.taken = self.first + self.taken, 0
            self.table.refill(self._draw())
        self.taken += 1
        return self.local[self.taken - 1], self.picked[self.taken - 1] if self.wanted.real_images else None

    def override_rate(self, rate: float) -> None:
        """Another factor of the learning rates for the iteration that `next` just gave."""
        self.table.rows["rate"][self.taken - 1] = rate

    def slow_down(self, factor: float) -> None:
        """Learning rates times this, from the next iteration on."""
        self.factor *= factor
        self.table.rows["rate"] *= factor

    @torch.no_grad()
    def _draw(self) -> dict[str, Tensor]:
        self.local.clear()
        self.picked.clear()
        rows = [self._row() for _ in range(self.size)]
        drawn = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        table = {"rate": torch.tensor([self.factor * self.rate(self.first + i) for i in range(self.size)])}
        if "z" in drawn:
            table["w"] = self._w(drawn["z"], drawn.get("c"))
            table |= {name: drawn[name] for name in ("c", *(["z"] if self.wanted.inputs else [])) if name in drawn}
        if "edit_z" in drawn:
            moves = self._w(drawn["edit_z"], drawn.get("edit_c"))[:, 0] - self.original.mapping.w_avg
            table["move"] = drawn["reach"].to(self.device)[:, None] * moves
        return table

    def _row(self) -> dict[str, Tensor]:
        """One iteration, drawn in the order in which it uses its numbers; what it does not use is 0."""
        w = self.wanted
        row: dict[str, Tensor] = {}
        local = float(torch.rand([], generator=self.source)) < w.local_probability
        others = max(w.batch - local, 0)
        self.local.append(local)
        if w.batch:
            row |= self._inputs(others, w.batch, "")
        if w.real_images:
            picks = others if local or w.real_without_clone else 0
            self.picked.append(torch.randint(w.real_images, [picks], generator=self.source))
        if w.reach is not None:
            row |= self._inputs(int(local), 1, "edit_")
            reach = w.reach * float(torch.rand([], generator=self.source)) if local else 0.0
            row["reach"] = torch.tensor(reach)
        return row

    def _inputs(self, count: int, size: int, prefix: str) -> dict[str, Tensor]:
        """`count` inputs of the generator, filled up to `size`."""
        z, c = self.original.sample(count, self.source)
        row = {f"{prefix}z": z} if c is None else {f"{prefix}z": z, f"{prefix}c": c}
        return {name: torch.cat([value, value.new_zeros(size - count, value.shape[1])]) for name, value in row.items()}

    def _w(self, z: Tensor, c: Tensor | None) -> Tensor:
        """[rows, n, z_dim] -> [rows, n, w_dim]: the same w for all layers."""
        w: Tensor = self.original.mapping(z.flatten(0, 1), None if c is None else c.flatten(0, 1))[:, 0]
        return w.unflatten(0, z.shape[:2])
