"""What the two players of the adversarial game minimise, of all their logits in a few launches.

The formulas are those of `losses`; a launch for each of their negations, means, weights and sums, and for each of their
gradients, was a chain of a hundred small ones between D's forward and its backward. Here the signs of the logits and
the weights of the samples are tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_made: dict[tuple[Game, bool, bool, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}


@dataclass(frozen=True)
class Game:
    """Which terms there are, and of which samples: the first is the clone, or the photo, where the local term joins.

    local_weight, global_weight: without a positive one that term is not there. count: fakes. local: whether the first
    of them is the clone. saturating: G's form, see `generator_adversarial`.
    """

    local_weight: float
    global_weight: float
    count: int
    local: bool
    saturating: bool

    @cached_property
    def terms(self) -> dict[str, list[float]]:
        """By name the weight of each sample."""
        first, rest = int(self.local), self.count - self.local
        found = {}
        if self.local and self.local_weight > 0:
            found["local"] = [self.local_weight] + [0.0] * rest
        if self.global_weight > 0:
            found["global"] = [0.0] * first + [self.global_weight / max(rest, 1)] * rest
        return found

    def of_d(self, logits: Tensor) -> Tensor:
        """[], the sum of the terms of `discriminator_adversarial`; logits [2 N, 1], a fake behind each real image."""
        return self._minimised(logits, True, True).reshape([])

    def of_g(self, logits: Tensor) -> Tensor:
        """[terms], those of `generator_adversarial`; logits [N, 1] of the fakes, or [2 N, 1] as for D."""
        return self._minimised(logits, False, len(logits) > self.count)

    def _minimised(self, logits: Tensor, is_d: bool, pairs: bool) -> Tensor:
        signs, weights = self._tables(is_d, pairs, logits.dtype, logits.device)
        return torch.mv(weights, F.softplus(logits.flatten() * signs))

    def _tables(
        self, is_d: bool, pairs: bool, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """What a logit is multiplied by, and the softplus of that, by term; kept, as making them moves memory."""
        key = self, is_d, pairs, dtype, device
        if key in _made:
            return _made[key]
        rows, sign = list(self.terms.values()), 1.0 if self.saturating else -1.0
        if is_d:
            signs = [-1.0, 1.0] * self.count
            rows = [[sum(weights) for weights in zip(*rows, strict=True) for _ in range(2)]]
        else:
            signs = [sign] * self.count * (1 + pairs)
            factors = [0.0, -sign] if pairs else [-sign]
            rows = [[weight * factor for weight in row for factor in factors] for row in rows]
        with torch.inference_mode(False):
            made = torch.tensor(signs, dtype=dtype, device=device), torch.tensor(rows, dtype=dtype, device=device)
        if type(made[0]) is Tensor:  # not what a tracer takes for one
            _made[key] = made
        return made
