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

from clone_fast.nn.tables import made_once


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
        """By term the weighted sum of the softplus of the logits, each with its sign."""

        def table(which: int) -> Tensor:
            key = self, is_d, pairs, which
            return made_once(key, lambda: self._numbers(is_d, pairs)[which], logits.device, logits.dtype)

        signs, weights = table(0), table(1)
        return torch.mv(weights, F.softplus(logits.flatten() * signs))

    def _numbers(self, is_d: bool, pairs: bool) -> tuple[list[float], list[list[float]]]:
        """What a logit is multiplied by, and the softplus of that, by term."""
        rows, sign = list(self.terms.values()), 1.0 if self.saturating else -1.0
        if is_d:
            return [-1.0, 1.0] * self.count, [[sum(weights) for weights in zip(*rows, strict=True) for _ in range(2)]]
        factors = [0.0, -sign] if pairs else [-sign]
        return [sign] * self.count * len(factors), [[weight * one for weight in row for one in factors] for row in rows]
