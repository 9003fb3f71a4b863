"""What both players minimise, of all logits in a few launches: the formulas of `losses`, and their gradients."""

from __future__ import annotations

import pytest
import torch
from launches import Launches
from torch import Tensor

from clone_fast.losses import discriminator_adversarial, generator_adversarial
from clone_fast.players import Game

WEIGHTS = [(1.0, 1.0), (0.3, 2.5), (0.0, 1.5), (0.7, 0.0)]
PLAYED = [(weights, local) for weights in WEIGHTS for local in (True, False) if local or weights[1]]


def logits(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of pairs; some of them sure."""
    return (torch.randn(2 * count, 1, dtype=dtype) * 8).requires_grad_(True)


def formulas(game: Game, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What D minimises, and G's terms."""
    real, fake, first = values[::2], values[1::2], int(game.local)
    parts = {"local": (slice(0, 1), game.local_weight * game.local), "global": (slice(first, None), game.global_weight)}
    found = {name: (part, weight) for name, (part, weight) in parts.items() if weight > 0}
    of_d = sum(weight * discriminator_adversarial(real[part], fake[part]) for part, weight in found.values())
    assert isinstance(of_d, Tensor)
    return of_d, {
        name: weight * generator_adversarial(fake[part], saturating=game.saturating)
        for name, (part, weight) in found.items()
    }


@pytest.mark.parametrize("saturating", [False, True])
@pytest.mark.parametrize(("weights", "local"), PLAYED, ids=str)
@pytest.mark.parametrize("count", [2, 5])
def test_both_are_the_formulas(count: int, weights: tuple[float, float], local: bool, saturating: bool) -> None:
    game, values = Game(*weights, count, local, saturating), logits(count)
    of_d, terms = formulas(game, values)
    assert list(game.terms) == list(terms)
    pairs = [
        (game.of_d(values), of_d),
        *zip(game.of_g(values), terms.values(), strict=True),
        *zip(game.of_g(values[1::2]), terms.values(), strict=True),
    ]
    for got, want in pairs:
        assert got.shape == ()
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
        slopes = (torch.autograd.grad(one, values, retain_graph=True)[0] for one in (got, want))
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-300)


def test_a_logit_that_is_sure_keeps_its_gradient() -> None:
    game = Game(1.0, 1.0, 2, True, False)
    values = torch.tensor([[60.0], [-60.0], [-60.0], [60.0]], requires_grad=True)
    for player, signs in ((game.of_d, [-1, 1, -1, 1]), (lambda x: game.of_g(x).sum(), [0, -1, 0, -1])):
        (slope,) = torch.autograd.grad(player(values), values)
        want = torch.sigmoid(values.detach() * torch.tensor(signs)[:, None]) * torch.tensor(signs)[:, None]
        torch.testing.assert_close(slope, want, rtol=1e-5, atol=0)
        assert slope[1].abs() > 0


def test_few_launches() -> None:
    """Forward and backward, where the formulas have 56 and 38 between D's forward and its backward."""
    game, values = Game(1.0, 1.0, 5, True, False), logits(5, torch.float32)
    game.of_d(values), game.of_g(values)  # with the tables
    counts = []
    for both in (lambda: (game.of_d(values), game.of_g(values).sum()), lambda: formulas(game, values)):
        with Launches() as found:
            of_d, of_g = both()
            of_g = sum(of_g.values()) if isinstance(of_g, dict) else of_g
            torch.autograd.grad(of_d, values, retain_graph=True)
            torch.autograd.grad(of_g, values)
        counts.append(found.total)
    assert counts[0] <= 20
    assert counts[0] < counts[1] / 2
