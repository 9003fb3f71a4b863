"""One iteration of the tweak against the method's formulas, written out by hand in float64 with log and sigmoid."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
import tiny
import torch
from launches import Launches
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import adversary
from clone_fast.latent import Latent
from clone_fast.nn import Generator, Network
from clone_fast.tweak import Tweak, TweakSettings

PHOTO = tiny.photo()


def laplacian_bands(x: Tensor, y: Tensor) -> list[Tensor]:
    """Three levels (16x16) of the difference, with a gradient: each band is a matrix product."""
    difference = (x - y).double()
    size = difference.shape[-1]
    basis = naive.laplacian_pyramid(np.eye(size * size).reshape(-1, 1, size, size), 3)
    planes = difference.reshape(-1, size * size)
    return [planes @ torch.from_numpy(band.reshape(size * size, -1)) for band in basis]


def laplacian_loss(x: Tensor, y: Tensor) -> Tensor:
    """Sum over the levels of the mean absolute difference."""
    return torch.stack([band.abs().mean() for band in laplacian_bands(x, y)]).sum()


def soft_laplacian_loss(x: Tensor, y: Tensor) -> Tensor:
    """The same with sqrt(d^2 + s^2) - s for |d|, s being one of 255 grey levels of a range of 2."""
    s = 2 / 255
    return torch.stack([(torch.sqrt(band**2 + s**2) - s).mean() for band in laplacian_bands(x, y)]).sum()


def log_d(logits: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(logits.double()))


def log_not_d(logits: Tensor) -> Tensor:
    return torch.log(1 - torch.sigmoid(logits.double()))


def gradients(loss: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def one_step_by_hand(
    net: Network,
    moved: Generator,
    latent: Latent,
    s: TweakSettings,
    *,
    seed: int,
    rate: float,
    real_images: Tensor | None = None,
    label: Tensor | None = None,
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """What the first iteration of this seed must report, and its gradients of D and of G, which is `moved`, and of the
    photo's noise maps by their names."""
    g = copy.deepcopy(moved).requires_grad_(True)
    d = copy.deepcopy(tiny.judge(net)).requires_grad_(True)
    source = torch.Generator().manual_seed(seed)
    joins = float(torch.rand([], generator=source)) < s.local_probability
    z = torch.randn(s.batch - joins, g.z_dim, generator=source)
    c = None
    if g.c_dim:
        c = torch.eye(g.c_dim)[torch.randint(g.c_dim, [len(z)], generator=source)]
    others = g.synthesis(g.mapping(z, c).detach())
    before = net.generator.synthesis(net.generator.mapping(z, c))
    real = before
    if real_images is not None:
        real = real_images[torch.randint(len(real_images), [len(z)], generator=source)]
    fake, labels = others, c
    maps = dict(latent.noise)
    if s.noise_lr:
        const = {name: net.generator.synthesis.get_buffer(f"{name}.noise_const") for name in g.synthesis.noise_names()}
        maps = {name: maps.get(name, const[name]).clone().requires_grad_(True) for name in const}
    if joins:
        clone = g.synthesis(latent.ws, noise=maps)
        fake, real = torch.cat([clone, others]), torch.cat([PHOTO, real])
        labels = None if c is None or label is None else torch.cat([label, c])
    mine, rest = slice(0, int(joins)), slice(int(joins), None)

    # what G minimises in D, in the non-saturating form or as it stands
    def pulling(logits: Tensor) -> dict[str, Tensor]:
        form = log_not_d if s.saturating else lambda logits: -log_d(logits)
        found = {}
        if joins and s.adversarial_weight:
            found["local"] = s.adversarial_weight * form(logits[mine]).mean()
        if s.cohesion_weight:
            found["global"] = s.cohesion_weight * form(logits[rest]).mean()
        return found

    below: list[Tensor] = []
    fresh = fake.detach().requires_grad_(True)

    # D maximises 1_p[lambda (log D(x) + log(1 - D(G(latent))))] + E log D(x) + E log(1 - D(G(z)))
    judged, judged_real = d(fresh, labels, watch=below.append), d(real, labels)
    objective = s.cohesion_weight * (log_d(judged_real[rest]).mean() + log_not_d(judged[rest]).mean())
    if joins:
        local = log_d(judged_real[mine]).mean() + log_not_d(judged[mine]).mean()
        objective = objective + s.adversarial_weight * local
    images = real.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(d(images, labels).sum(), images, create_graph=True)
    penalty = s.r1_gamma / 2 * slope.square().sum(dim=[1, 2, 3]).mean() * s.r1_interval
    d_gradients = gradients(-objective + penalty, dict(d.named_parameters()))
    pull = torch.zeros([])
    if s.one_pass and pulling(judged):  # G's gradients are D's, each times the factor that fits best at the features
        brought = gradients(-objective, {"features": below[0], "images": fresh})
        wanted = gradients(torch.stack(list(pulling(judged).values())).sum(), {"features": below[0]})
        for i, image in enumerate(fake):
            pair = (found["features"][i].reshape(-1, 1) for found in (brought, wanted))
            pull = pull + (torch.linalg.lstsq(*pair).solution * brought["images"][i] * image).sum()
    with torch.no_grad():  # Adam's first step without momentum: the sign of the gradient, nearly
        for name, parameter in d.named_parameters():
            slope = d_gradients[name]
            parameter.sub_(s.discriminator_lr * rate * slope / (slope.abs() + 1e-8))

    # G minimises 1_p[L_recon + lambda L_adv_local] + L_global, in the non-saturating form or as it stands
    judged = judged if s.one_pass else d(fake, labels)
    terms: dict[str, Tensor] = {}
    if joins:
        reconstruction = laplacian_loss(clone, PHOTO) + (clone - PHOTO).double().square().mean()
        terms["recon"] = s.reconstruction_weight * reconstruction
    terms |= pulling(judged)
    if s.paired_weight:
        terms["paired"] = s.paired_weight * soft_laplacian_loss(others, before)
    if s.edit_weight and joins:
        z = torch.randn(1, g.z_dim, generator=source)
        c = torch.eye(g.c_dim)[torch.randint(g.c_dim, [1], generator=source)] if g.c_dim else None
        reach = s.edit_reach * torch.rand([], generator=source)
        moved_ws = latent.ws + reach * (net.generator.mapping(z, c) - net.generator.mapping.w_avg)
        change = Latent(moved_ws, latent.noise).draw(net.generator) - latent.draw(net.generator)
        terms["edit"] = s.edit_weight * soft_laplacian_loss(g.synthesis(moved_ws, noise=maps), PHOTO + change)
    loss = torch.stack(list(terms.values())).sum()
    values = {name: term.item() for name, term in terms.items()} | {"loss": loss.item()}
    if s.adversarial and (joins or s.cohesion_weight):
        values["loss_d"] = -objective.item()
    if joins:
        values["psnr"] = tiny.psnr(clone.detach(), PHOTO)
    return values, gradients(loss + pull, {**dict(g.named_parameters()), **(maps if s.noise_lr else {})}), d_gradients


# seed 0 draws 0.496 and seed 1 draws 0.758 for the indicator
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "all terms": (0, {}),
    "indicator joins": (0, {"local_probability": 0.6}),
    "indicator stays out": (1, {"local_probability": 0.6}),
    "no local adversarial term": (0, {"adversarial_weight": 0.0}),
    "no local adversarial term, stays out": (1, {"adversarial_weight": 0.0, "local_probability": 0.6}),
    "no global term": (0, {"cohesion_weight": 0.0}),
    "the paper's terms": (
        0,
        {"paired_weight": 0.0, "edit_weight": 0.0, "adversarial_weight": 1.0, "cohesion_weight": 1.0, "noise_lr": 0.0},
    ),
    "saturating": (0, {"saturating": True}),
    "saturating, stays out": (1, {"saturating": True, "local_probability": 0.6}),
    "without R1": (0, {"r1_gamma": 0.0}),
    "without edits": (0, {"edit_weight": 0.0}),
    "noise maps stay": (0, {"noise_lr": 0.0}),
    "two images": (0, {"batch": 2}),
    "two images without edits": (0, {"batch": 2, "edit_weight": 0.0}),
    "two groups": (0, {"batch": 8}),
    "in turns": (0, {"one_pass": False}),
    "in turns, stays out": (1, {"one_pass": False, "local_probability": 0.6}),
    "one pass, no local adversarial term": (0, {"one_pass": True, "adversarial_weight": 0.0}),
    "one pass, no global term": (0, {"one_pass": True, "cohesion_weight": 0.0}),
    "one pass, saturating": (0, {"one_pass": True, "saturating": True}),
    "one pass, two images": (0, {"one_pass": True, "batch": 2}),
    "one pass, two groups": (0, {"one_pass": True, "batch": 8}),
}


def assert_gradients(named: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    floor = 1e-4 * float(max(g.abs().max() for g in want.values()))
    got = {name: value.grad for name, value in named.items() if value.grad is not None}
    assert all(not want[name].any() for name in set(want) - set(got))
    torch.testing.assert_close(got, {name: want[name] for name in got}, rtol=1e-3, atol=floor)


def assert_step_is_the_formula(
    net: Network, latent: Latent, s: TweakSettings, *, seed: int, **inputs: Any
) -> dict[str, Tensor]:
    """Of a generator that has moved: where it still equals the original, |x| of paired cohesion has no slope."""
    work = Tweak(net.generator, net.discriminator, latent, PHOTO, s, seed=seed, **inputs)
    with torch.no_grad():
        for parameter in work.generator.synthesis.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    want, g_gradients, d_gradients = one_step_by_hand(net, work.generator, latent, s, seed=seed, rate=0.5, **inputs)
    got = work.step(0.5)
    assert {key: value.item() for key, value in got.items()} == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert_gradients({**dict(work.generator.named_parameters()), **work.maps}, g_gradients)
    assert work.adversary is not None
    assert_gradients(dict(work.adversary.discriminator.named_parameters()), d_gradients)
    return got


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_noise", [False, True], ids=["", "noise"])
def test_one_step_is_the_formula(name: str, with_noise: bool) -> None:
    seed, changes = CASES[name]
    net = tiny.network()
    got = assert_step_is_the_formula(net, tiny.latent(net, noise=with_noise), tiny.settings(**changes), seed=seed)
    assert ("recon" in got) == ("stays out" not in name)


def test_one_step_with_real_images_is_the_formula() -> None:
    net, real = tiny.network(), torch.cat([tiny.photo(seed=i) for i in range(5)])
    assert_step_is_the_formula(net, tiny.latent(net), tiny.settings(), seed=2, real_images=real)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(("seed", "joins"), [(0, True), (1, False)])
def test_one_step_of_a_conditional_network_is_the_formula(seed: int, joins: bool, one_pass: bool) -> None:
    net, s = tiny.network(c_dim=3), tiny.settings(local_probability=0.6, one_pass=one_pass)
    got = assert_step_is_the_formula(net, tiny.latent(net), s, seed=seed, label=torch.eye(3)[1:2])
    assert ("recon" in got) == joins


@pytest.mark.parametrize("one_pass", [True, False])
def test_the_saturating_objective_is_the_papers_up_to_what_g_does_not_move(one_pass: bool) -> None:
    """With weights of 1 the loss is L_recon + lambda log(1 - D(G(latent))) + E log(1 - D(G(z))), of D before its step
    or after it."""
    net = tiny.network()
    s = tiny.settings(
        one_pass=one_pass,
        saturating=True,
        reconstruction_weight=1.0,
        adversarial_weight=0.7,
        cohesion_weight=1.0,
        paired_weight=0.0,
        edit_weight=0.0,
    )
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, s)
    generator = copy.deepcopy(work.generator)
    values = work.step(1)
    assert work.adversary is not None
    source = torch.Generator().manual_seed(0)
    torch.rand([], generator=source)
    with torch.no_grad():
        clone = tiny.latent(net).draw(generator)
        others = generator.synthesis(generator.mapping(torch.randn(3, 16, generator=source)))
        judge = tiny.judge(net) if one_pass else work.adversary.discriminator
        logits = judge(torch.cat([clone, others]))
        recon = laplacian_loss(clone, PHOTO) + (clone - PHOTO).double().square().mean()
        want = recon + 0.7 * log_not_d(logits[:1]).mean() + log_not_d(logits[1:]).mean()
    assert values["loss"].item() == pytest.approx(want.item(), rel=1e-5)


def test_recon_mode_is_the_reconstruction_alone() -> None:
    net = tiny.network()
    work = Tweak(net.generator, None, tiny.latent(net), PHOTO, tiny.settings(mode="recon"))
    generator = copy.deepcopy(work.generator)
    values = work.step(1)
    clone = tiny.latent(net).draw(generator)
    want = 10 * (laplacian_loss(clone, PHOTO) + (clone - PHOTO).double().square().mean())
    assert set(values) == {"loss", "recon", "psnr"}
    assert values["loss"].item() == values["recon"].item() == pytest.approx(want.item(), rel=1e-5)
    assert work.adversary is None


@pytest.mark.parametrize("mode", ["recon", "clone"])
def test_nothing_comes_behind_the_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lane has done meanwhile is not waited for: the board, the next row."""
    net = tiny.network()
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, tiny.settings(mode=mode))
    launches, step = Launches(), work.descent.step

    def watched(*args: Tensor) -> None:
        step(*args)
        launches.__enter__()

    monkeypatch.setattr(work.descent, "step", watched)
    values = work.step(1)
    launches.__exit__(None, None, None)
    assert launches.total == 0, launches.found
    assert work.draws.table.index.item() == 1
    assert all(bool(value.isfinite()) for value in values.values())


def test_the_indicator_joins_with_its_probability() -> None:
    net = tiny.network()
    s = tiny.settings(local_probability=0.3, adversarial_weight=0.0, cohesion_weight=0.0, batch=2)
    work = Tweak(net.generator, None, tiny.latent(net), PHOTO, s)
    joined = sum("recon" in work.step(0) for _ in range(60))
    assert 9 <= joined <= 27  # 18, plus or minus 2.5 standard deviations; the seed is fixed


def test_without_any_cohesion_term_every_iteration_is_local() -> None:
    net = tiny.network()
    s = tiny.settings(local_probability=0.01, cohesion_weight=0.0, paired_weight=0.0)
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, s)
    assert all("local" in work.step(1) for _ in range(3))


def test_an_iteration_of_paired_cohesion_alone_leaves_d_alone() -> None:
    net = tiny.network()
    s = tiny.settings(local_probability=0.6, cohesion_weight=0.0)
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, s, seed=1)
    assert set(work.step(1)) == {"loss", "paired"}
    assert work.adversary is not None
    tiny.assert_state(work.adversary.discriminator, tiny.state(tiny.judge(net)))


@pytest.mark.parametrize(("gamma", "want"), [(0.5, [0, 4]), (0.0, [])])
def test_r1_is_applied_on_its_interval_only(gamma: float, want: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    work = Tweak(
        net.generator, net.discriminator, tiny.latent(net), PHOTO, tiny.settings(r1_gamma=gamma, r1_interval=4)
    )
    at: list[int] = []
    step = 0
    penalty = adversary.r1_penalty

    def counted(judge: Callable[[Tensor], Tensor], real: Tensor, *, scale: float) -> Tensor:
        at.append(step)
        return penalty(judge, real, scale=scale)

    monkeypatch.setattr(adversary, "r1_penalty", counted)
    for step in range(7):  # noqa: B007
        work.step(1)
    assert at == want


def test_the_latents_noise_maps_draw_the_clone_and_no_other_image() -> None:
    net = tiny.network()
    latent = tiny.latent(net, noise=True)
    for noise in latent.noise.values():
        noise.fill_(math.nan)
    work = Tweak(net.generator, net.discriminator, latent, PHOTO, tiny.settings())
    images, before, *_ = work._draw(1)
    assert bool(images[0].isnan().all())
    torch.testing.assert_close(images[1:], before)


def test_the_clone_in_a_batch_is_the_image_that_its_latent_draws() -> None:
    net = tiny.network()
    latent = tiny.latent(net, noise=True)
    work = Tweak(net.generator, net.discriminator, latent, PHOTO, tiny.settings())
    torch.testing.assert_close(work._draw(1)[0][:1], latent.draw(net.generator))


def test_d_wants_gradients_in_its_update_alone() -> None:
    """G's step leaves no gradient in D, and the learning rates follow the ramp."""
    net = tiny.network()
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), PHOTO, tiny.settings())
    assert work.adversary is not None
    judge = work.adversary.discriminator
    work.step(0.25)
    kept = {name: p.grad.clone() for name, p in judge.named_parameters() if p.grad is not None}
    assert len(kept) == len(list(judge.parameters()))
    work.adversary.judge(work._draw(1)[0], None).sum().backward()
    assert all(torch.equal(p.grad, kept[name]) for name, p in judge.named_parameters() if p.grad is not None)
    assert not any(p.requires_grad for p in judge.parameters())  # nor in a backward that computes its blocks once more
    assert [float(rate) for rate in work.descent.rates] == pytest.approx([0.25 * 0.003, 0.25 * 0.1])
    assert float(work.adversary.descent.rates[0]) == pytest.approx(0.25 * 0.002)
