"""G's adversarial gradient out of the backward of D's own step, against an independent backward in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast.adversary import Adversary, nearest_factor
from clone_fast.nn import Discriminator, Precision
from clone_fast.settings import TweakSettings
from clone_fast.tweak import Tweak

DOUBLE = Precision("fp64", torch.float64, False)


def adversary_of(settings: TweakSettings, c_dim: int = 0, **shape: Any) -> Adversary:
    """In float64, of a D with random weights that is sure of some images."""
    torch.manual_seed(0)
    judge = Discriminator(replace(tiny.arch(c_dim=c_dim), **shape)).double()
    with torch.no_grad():
        judge.b4.out.weight.mul_(40 if c_dim else 10)
    found = Adversary(judge, settings)
    found.precision = DOUBLE
    return found


def pulls(found: Adversary, *, local: bool = True, c_dim: int = 0, n: int = 4) -> tuple[Tensor, Tensor]:
    """Of G's terms to the images [n, 3, 16, 16]: what `turn` gives, and what a backward through D gives."""
    s, source = found.settings, torch.Generator().manual_seed(1)
    real, images = (torch.randn(n, 3, 16, 16, dtype=torch.float64, generator=source) for _ in range(2))
    label = torch.eye(c_dim, dtype=torch.float64)[torch.arange(n) % c_dim] if c_dim else None
    images.requires_grad_(True)
    logits = found.original(images, label)
    assert logits.max() - logits.min() > 1
    loss = torch.zeros([], dtype=torch.float64)
    form = (lambda x: -F.softplus(x)) if s.saturating else (lambda x: F.softplus(-x))
    if local:
        loss = loss + s.adversarial_weight * form(logits[:1]).mean()
    loss = loss + s.cohesion_weight * form(logits[int(local) :]).mean()
    (want,) = torch.autograd.grad(loss, images)
    _, terms = found.turn(real, images, label, local, torch.zeros([]), penalised=True)
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(total, images)
    return got, want


ALONE = {"mbstd_num_channels": 0}
EXACT: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "without deviation": ({}, ALONE, {}),
    "without deviation, without the clone": ({}, ALONE, {"local": False}),
    "without deviation, no local term": ({"adversarial_weight": 0.0}, ALONE, {}),
    "without deviation, no global term": ({"cohesion_weight": 0.0}, ALONE, {}),
    "without deviation, saturating": ({"saturating": True}, ALONE, {}),
    "without deviation, conditional": ({}, ALONE, {"c_dim": 3}),
    "saturating": ({"saturating": True}, {}, {}),
    "saturating, two groups": ({"saturating": True, "batch": 8}, {}, {"n": 8}),
    "saturating, reals and fakes apart": ({"saturating": True}, {"mbstd_group_size": None}, {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_it_is_exact_where_the_players_gradients_are_parallel(name: str) -> None:
    changes, shape, batch = EXACT[name]
    found = adversary_of(tiny.settings(one_pass=True, **changes), c_dim=batch.get("c_dim", 0), **shape)
    got, want = pulls(found, **batch)
    assert want.any()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize("shape", [{}, {"mbstd_group_size": None}], ids=["together", "apart"])
def test_it_is_near_where_the_deviation_joins_the_images(shape: dict[str, Any]) -> None:
    got, want = pulls(adversary_of(tiny.settings(one_pass=True), **shape))
    cosines = F.cosine_similarity(got.flatten(1), want.flatten(1))
    assert cosines.min() > 0.9
    assert cosines.max() < 1 - 1e-9


def test_the_factor_projects() -> None:
    x, y = torch.randn(2, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x[1], y[2], x[3] = 0, 0, x[3] * 1e-30  # squares of the last are 0 in float32
    factor = nearest_factor(x, y)
    rest = (y - factor * x) * x
    torch.testing.assert_close(rest.double().sum(dim=[1, 2, 3]), torch.zeros(5).double(), rtol=0, atol=1e-5)
    assert factor.flatten()[[1, 2]].eq(0).all()
    assert 1e28 < factor.flatten()[3].abs() < 1e32


def test_a_d_that_is_sure_without_bounds_gives_nothing_that_is_not_finite() -> None:
    found = adversary_of(tiny.settings(one_pass=True))
    with torch.no_grad():
        found.discriminator.b4.out.bias.fill_(-1e4)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    _, terms = found.turn(images.detach(), images, None, True, torch.zeros([]), penalised=False)
    (got,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), images)
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "want"),
    [({}, [8]), ({"one_pass": False}, [8, 4]), ({"precision": "fp16"}, [8, 4]), ({"precision": "bf16"}, [8])],
    ids=str,
)
def test_d_is_run_once_but_in_float16(
    changes: dict[str, Any], want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, seen, s = tiny.network(), list[int](), tiny.settings(**{"one_pass": True, "r1_gamma": 0.0} | changes)
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), tiny.photo(), s)
    work.step(1)  # with its rehearsal
    forward = Discriminator.forward

    def counted(self: Discriminator, images: Tensor, *args: Any, **more: Any) -> Tensor:
        seen.append(len(images))
        return forward(self, images, *args, **more)

    monkeypatch.setattr(Discriminator, "forward", counted)
    work.step(1)
    assert seen == want
