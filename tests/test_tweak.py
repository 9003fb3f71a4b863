"""A whole tweak: what it must reach, keep, count and survive. One iteration of it: test_tweak_step.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import tweak as tweak_module
from clone_fast.errors import DivergenceError, SettingsError
from clone_fast.latent import Latent
from clone_fast.nn import PRECISIONS, Discriminator, Generator, MappingNetwork, Network, SynthesisNetwork
from clone_fast.progress import Record
from clone_fast.tweak import COLLAPSE_DB, PATIENCE, Tweak, Tweaked, TweakSettings

PHOTO = tiny.photo()


def psnr(generator: Generator, latent: Latent, photo: Tensor = PHOTO) -> float:
    with torch.no_grad():
        return tiny.psnr(latent.draw(generator), photo)


def run(net: Network, s: TweakSettings, latent: Latent | None = None, photo: Tensor = PHOTO, **more: Any) -> Tweaked:
    latent = latent or tiny.latent(net)
    return tweak_module.tweak(net.generator, net.discriminator, latent, photo, s, **more)


@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_the_networks_given_stay_bit_for_bit(mode: str) -> None:
    net = tiny.network()
    g, d = tiny.state(net.generator), tiny.state(tiny.judge(net))
    flags = [p.requires_grad for p in net.generator.parameters()]
    done = run(net, tiny.settings(mode=mode, tune_mapping=True))
    tiny.assert_state(net.generator, g)
    tiny.assert_state(tiny.judge(net), d)
    assert flags == [p.requires_grad for p in net.generator.parameters()]
    assert all(p.grad is None for p in [*net.generator.parameters(), *tiny.judge(net).parameters()])
    assert tiny.changed(done.generator, g)
    assert done.discriminator is not None
    assert bool(tiny.changed(done.discriminator, d)) == (mode == "clone")
    assert done.discriminator is not net.discriminator
    for module in (done.generator, done.discriminator):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_recon_mode_uses_neither_d_nor_other_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    latent = tiny.latent(net)

    def called(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("was called")

    monkeypatch.setattr(MappingNetwork, "forward", called)
    monkeypatch.setattr(Discriminator, "forward", called)
    done = run(net, tiny.settings(mode="recon"), latent)
    assert done.steps == 3
    without = tweak_module.tweak(net.generator, None, latent, PHOTO, tiny.settings(mode="recon"))
    assert without.discriminator is None
    tiny.assert_state(without.generator, tiny.state(done.generator))


@pytest.mark.parametrize("changes", [{"mode": "recon"}, {}, {"local_probability": 0.5}, {"paired_weight": 0.0}])
def test_the_clone_comes_nearer_to_the_photo(changes: dict[str, Any]) -> None:
    net = tiny.network()
    latent = tiny.latent(net)
    done = run(net, tiny.settings(steps=30, reconstruction_weight=100.0, **changes), latent)
    assert done.stopped == "steps"
    assert psnr(done.generator, done.latent) > psnr(net.generator, latent) + 1.5


@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_the_clone_comes_nearer_in_bfloat16(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image of both networks is computed in it, the weights stay float32, and the result is drawn in float32."""
    seen: set[Any] = set()
    for network in (SynthesisNetwork, Discriminator):
        forward = network.forward

        def watched(self: Any, *args: Any, forward: Any = forward, **more: Any) -> Tensor:
            seen.add(more.get("dtype"))
            image: Tensor = forward(self, *args, **more)
            return image

        monkeypatch.setattr(network, "forward", watched)
    net = tiny.network()
    latent = tiny.latent(net)
    done = run(net, tiny.settings(steps=30, reconstruction_weight=100.0, precision="bf16", mode=mode), latent)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in done.generator.parameters()} == {torch.float32}
    assert psnr(done.generator, done.latent) > psnr(net.generator, latent) + 1.5
    assert not torch.backends.cuda.matmul.allow_tf32


def test_float16_keeps_small_gradients() -> None:
    """Those of a mean over a million pixels are below its range, unless the loss is scaled."""
    net, found = tiny.network(), {}
    for name, scale in (("fp32", 1.0), ("fp16", 1.0), ("fp16", None)):  # None: that of the precision
        with pytest.MonkeyPatch.context() as patch:
            if scale:
                patch.setitem(PRECISIONS, name, replace(PRECISIONS[name], loss_scale=scale))
            s = tiny.settings(mode="recon", precision=name, reconstruction_weight=1e-5)
            work = Tweak(net.generator, None, tiny.latent(net), PHOTO, s)
        work.step(1.0)
        grads = [p.grad.flatten() for p in work.moved() if p.grad is not None]
        found[name, scale] = torch.cat(grads).double()
    want = found["fp32", 1.0]
    apart = {scale: float((found["fp16", scale] - want).norm() / want.norm()) for scale in (1.0, None)}
    assert apart[1.0] > 0.1
    assert apart[None] < 0.1 * apart[1.0]


@pytest.mark.parametrize(
    "changes", [{"mode": "recon"}, {"r1_interval": 2, "tune_mapping": True}, {"one_pass": False}], ids=str
)
def test_recomputing_changes_nothing_but_what_is_kept(changes: dict[str, Any]) -> None:
    """Nor what has a gradient: D's weights have none while it judges for G, in the backward neither."""
    net, kept = tiny.network(), []
    latent = tiny.latent(net, noise=True)

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    runs = []
    for recompute in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            runs.append(run(net, tiny.settings(steps=5, recompute=recompute, **changes), latent))
    plain, again = runs
    tiny.assert_state(again.generator, tiny.state(plain.generator))
    if again.discriminator is not None and plain.discriminator is not None:
        tiny.assert_state(again.discriminator, tiny.state(plain.discriminator))
    assert repr(again.rows) == repr(plain.rows)
    assert kept[1] < kept[0]


def test_cohesion_keeps_other_images_nearer_to_where_they_were() -> None:
    net = tiny.network()
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(77))
    drifts = []
    for changes in ({"mode": "recon"}, {"paired_weight": 100.0, "reconstruction_weight": 30.0}):
        done = run(net, tiny.settings(steps=25, generator_lr=0.01, **changes))
        with torch.no_grad():
            drifts.append(F.mse_loss(done.generator(z, noise_mode="const"), net.generator(z, noise_mode="const")))
    assert drifts[1] < 0.5 * drifts[0]


@pytest.mark.parametrize(
    ("probability", "check_every", "seed"),
    [(1.0, 1, 0), (1.0, 4, 0), (0.5, 1, 0), (0.5, 4, 0), (0.5, 4, 1), (0.5, 4, 2)],
)
def test_the_target_is_reached_by_the_weights_that_are_returned(
    probability: float, check_every: int, seed: int
) -> None:
    net = tiny.network()
    latent = tiny.latent(net)
    target = psnr(net.generator, latent) + 1
    s = tiny.settings(steps=200, target_psnr=target, check_every=check_every, local_probability=probability)
    done = run(net, s, latent, seed=seed)
    assert done.stopped == "target"
    assert "recon" in done.rows[-1]  # not the PSNR of an earlier iteration
    assert 1 < done.steps < 200
    assert done.rows[-1]["step"] == done.steps
    assert psnr(done.generator, done.latent) >= target
    assert psnr(done.generator, done.latent) == pytest.approx(done.rows[-1]["psnr"], abs=1e-3)


def test_a_target_that_is_met_at_the_start_leaves_all_as_it_was() -> None:
    net = tiny.network()
    latent = tiny.latent(net)
    done = run(net, tiny.settings(target_psnr=1.0), latent)
    assert (done.stopped, done.steps) == ("target", 1)
    tiny.assert_state(done.generator, tiny.state(net.generator))
    assert torch.equal(done.latent.draw(done.generator), latent.draw(net.generator))


def test_losses_are_read_at_the_checks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    reads = 0
    add = Record.add

    def counted(self: Record, *args: Any, **more: Any) -> dict[str, float]:
        nonlocal reads
        reads += 1
        return add(self, *args, **more)

    monkeypatch.setattr(Record, "add", counted)
    told: list[tuple[str, int, int]] = []
    done = run(net, tiny.settings(steps=11, check_every=4), progress=lambda *a: told.append(a[:3]))
    assert [row["step"] for row in done.rows] == [1, 4, 8, 11]
    assert reads == 4
    assert told == [("tweak", step, 11) for step in (1, 4, 8, 11)]
    assert (done.stopped, done.steps) == ("steps", 11)
    assert set(done.rows[0]) == {"step", "loss", "psnr", "recon", "local", "global", "paired", "edit", "loss_d"}


def test_an_iteration_without_the_clone_repeats_its_last_psnr() -> None:
    net = tiny.network()
    done = run(net, tiny.settings(steps=12, local_probability=0.5), seed=1)
    assert math.isnan(done.rows[0]["psnr"])  # seed 1 stays out of the first iteration: nothing is known yet
    last = math.nan
    for row in done.rows:
        if "recon" in row:
            last = row["psnr"]
        elif not math.isnan(last):
            assert row["psnr"] == last
    assert not math.isnan(last)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


class History:
    """States of G, D and the noise maps before every step of the tweaks that run while it is in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generator: list[dict[str, Tensor]] = []
        self.discriminator: list[dict[str, Tensor]] = []
        self.noise: list[dict[str, Tensor]] = []
        original = Tweak.step

        def step(work: Tweak, *args: Any) -> dict[str, Tensor]:
            self.generator.append(tiny.state(work.generator))
            self.noise.append({name: value.detach().clone() for name, value in work.maps.items()})
            if work.adversary is not None:
                self.discriminator.append(tiny.state(work.adversary.discriminator))
            return original(work, *args)

        monkeypatch.setattr(Tweak, "step", step)

    def assert_restored(self, done: Tweaked, updates: int) -> None:
        """G and the maps are as they were after so many updates; D had one more, since it goes first."""
        tiny.assert_state(done.generator, self.generator[updates])
        assert set(done.latent.noise) == set(self.noise[updates])
        assert all(torch.equal(done.latent.noise[name], value) for name, value in self.noise[updates].items())
        if self.discriminator:
            assert done.discriminator is not None
            tiny.assert_state(done.discriminator, self.discriminator[updates + 1])


class Spoilt:
    """The mean square error, and from the n-th call (to another) on something else."""

    def __init__(self, at: int, then: Callable[[Tensor], Tensor], until: float = math.inf) -> None:
        self.at, self.then, self.until, self.calls = at, then, until, 0

    def __call__(self, image: Tensor, photo: Tensor) -> Tensor:
        self.calls += 1
        loss = F.mse_loss(image, photo)
        return self.then(loss) if self.at <= self.calls <= self.until else loss


@pytest.mark.parametrize("mode", ["clone", "recon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_brings_the_last_good_weights_back(
    mode: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, history = tiny.network(), History(monkeypatch)
    done = run(
        net, tiny.settings(mode=mode, steps=20, check_every=2), similarity=Spoilt(5, lambda loss: loss * value)
    )
    assert done.stopped == "diverged"
    assert done.steps == 6 + 2 * PATIENCE  # seen at the first check after the fifth step, and at so many more
    assert done.slowed == PATIENCE
    history.assert_restored(done, updates=3)  # as it was when the fourth step was checked
    assert [row["step"] for row in done.rows] == [1, *range(2, done.steps + 1, 2)]


@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_after_a_bad_check_it_goes_on_from_the_last_good_one_at_half_the_rates(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    iterate = Tweak._iterate

    def noted(self: Tweak, local: bool, penalised: bool) -> None:
        rates.append(float(self.draws.table["rate"]))
        iterate(self, local, penalised)

    monkeypatch.setattr(Tweak, "_iterate", noted)
    settings = tiny.settings(mode=mode, steps=20, check_every=2, r1_gamma=0.0)
    plain = run(tiny.network(), settings, similarity=F.mse_loss)
    usual, rates[:] = rates[-20:], []
    done = run(tiny.network(), settings, similarity=Spoilt(5, lambda loss: loss * math.nan, until=6))
    assert (done.stopped, done.slowed, done.steps) == ("steps", 1, 20)
    assert rates[-20:] == pytest.approx([*usual[:6], *(rate / 2 for rate in usual[6:])])
    assert [row["loss"] for row in done.rows[:3]] == pytest.approx([row["loss"] for row in plain.rows[:3]])
    assert all(math.isfinite(row["loss"]) for row in done.rows[4:])
    assert done.rows[-1]["psnr"] > done.rows[0]["psnr"]


def test_a_loss_that_is_never_finite_is_an_error() -> None:
    net = tiny.network()
    g = tiny.state(net.generator)
    with pytest.raises(DivergenceError, match="first step"):
        run(net, tiny.settings(), similarity=Spoilt(1, lambda loss: loss * math.nan))
    tiny.assert_state(net.generator, g)


def test_a_clone_that_collapses_brings_the_last_good_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net, history = tiny.network(), History(monkeypatch)
    latent = tiny.latent(net)
    s = tiny.settings(mode="recon", steps=60)
    photo = latent.draw(net.generator).clamp(-1, 1) * 0.9  # near: there is room to fall
    done = run(net, s, latent, photo, similarity=Spoilt(10, lambda loss: -100 * loss))
    assert done.stopped == "diverged"
    assert 10 < done.steps < 60
    best = max(row["psnr"] for row in done.rows)
    assert done.rows[-1]["psnr"] < best - COLLAPSE_DB
    assert psnr(done.generator, done.latent, photo) >= best - COLLAPSE_DB
    history.assert_restored(done, updates=done.steps - 2)


def test_ctrl_c_keeps_the_weights_of_the_last_check(monkeypatch: pytest.MonkeyPatch) -> None:
    net, history = tiny.network(), History(monkeypatch)

    def progress(stage: str, step: int, total: int, loss: float, psnr: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    done = run(net, tiny.settings(steps=20, check_every=2), progress=progress)
    assert (done.stopped, done.steps) == ("interrupted", 4)
    history.assert_restored(done, updates=1)
    assert done.discriminator is not None
    assert not any(p.requires_grad for p in done.discriminator.parameters())


def test_ctrl_c_before_the_first_check_gives_copies_as_they_were() -> None:
    net = tiny.network()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for done in (run(net, tiny.settings(), progress=interrupt), run(net, tiny.settings(), interrupted=True)):
        assert done.stopped == "interrupted"
        tiny.assert_state(done.generator, tiny.state(net.generator))
        assert done.generator is not net.generator
        assert torch.equal(done.latent.draw(done.generator), tiny.latent(net).draw(net.generator))
    assert (done.steps, done.rows) == (0, [])


def test_other_exceptions_pass() -> None:
    def fail(*_: Any) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tiny.network(), tiny.settings(), similarity=fail)


# ---- seeds, parameters, settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"local_probability": 0.5}])
def test_the_seed_decides_everything(changes: dict[str, Any]) -> None:
    net, s = tiny.network(), tiny.settings(steps=4, **changes)
    runs = []
    for seed, disturb in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(disturb)  # the global generator plays no part
        before = torch.get_rng_state()
        runs.append(run(net, s, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = runs
    tiny.assert_state(again.generator, tiny.state(first.generator))
    assert first.discriminator is not None
    assert again.discriminator is not None
    tiny.assert_state(again.discriminator, tiny.state(first.discriminator))
    assert all(torch.equal(first.latent.noise[name], value) for name, value in again.latent.noise.items())
    assert repr(first.rows) == repr(again.rows)  # a PSNR may be NaN
    assert tiny.changed(other.generator, tiny.state(first.generator))


@pytest.mark.parametrize("tune_mapping", [False, True])
def test_the_mapping_network_moves_only_if_asked(tune_mapping: bool) -> None:
    net = tiny.network()
    before = tiny.state(net.generator)
    moved = tiny.changed(run(net, tiny.settings(tune_mapping=tune_mapping)).generator, before)
    assert any(name.startswith("mapping.fc") for name in moved) == tune_mapping
    synthesis = {name for name, _ in net.generator.named_parameters() if name.startswith("synthesis.")}
    assert synthesis <= moved
    assert not moved - {name for name, _ in net.generator.named_parameters()}, "buffers moved"


@pytest.mark.parametrize("noise_lr", [0.1, 0.0])
def test_the_latent_is_fixed_and_its_noise_maps_move_as_copies(noise_lr: float) -> None:
    net = tiny.network()
    latent = tiny.latent(net, noise=True)
    ws, noise = latent.ws.clone(), {name: value.clone() for name, value in latent.noise.items()}
    done = run(net, tiny.settings(noise_lr=noise_lr), latent)
    assert torch.equal(latent.ws, ws)
    assert torch.equal(done.latent.ws, ws)
    assert set(done.latent.noise) == set(noise)
    for name, value in noise.items():
        assert torch.equal(latent.noise[name], value), "the map given was written to"
        assert torch.equal(done.latent.noise[name], value) == (noise_lr == 0)
        assert not done.latent.noise[name].requires_grad


def test_a_latent_without_noise_maps_gets_those_of_the_generator() -> None:
    net = tiny.network()
    done = run(net, tiny.settings(noise_lr=1e-9))
    assert list(done.latent.noise) == net.generator.synthesis.noise_names()
    for name, value in done.latent.noise.items():
        torch.testing.assert_close(value, net.generator.synthesis.get_buffer(f"{name}.noise_const"))
    assert run(net, tiny.settings(noise_lr=0.0)).latent.noise == {}


def test_a_conditional_network_needs_the_label() -> None:
    net = tiny.network(c_dim=3)
    latent, label = tiny.latent(net), torch.eye(3)[:1]
    with pytest.raises(SettingsError, match="label"):
        run(net, tiny.settings(), latent)
    with pytest.raises(SettingsError, match="real images"):
        run(net, tiny.settings(), latent, label=label, real_images=PHOTO)
    assert run(net, tiny.settings(), latent, label=label).stopped == "steps"
    unjudged = tiny.settings(adversarial_weight=0.0, cohesion_weight=0.0)
    for s in (unjudged, tiny.settings(mode="recon")):
        assert run(net, s, latent).stopped == "steps"


def test_the_adversarial_terms_need_a_discriminator() -> None:
    net = tiny.network()
    latent = tiny.latent(net)
    with pytest.raises(SettingsError, match="discriminator"):
        tweak_module.tweak(net.generator, None, latent, PHOTO, tiny.settings())
    paired = tiny.settings(adversarial_weight=0.0, cohesion_weight=0.0)
    done = tweak_module.tweak(net.generator, None, latent, PHOTO, paired)
    assert done.discriminator is None
    assert "paired" in done.rows[-1]


@pytest.mark.parametrize("batch", [5, 6])
def test_a_batch_that_ds_groups_do_not_divide_is_refused(batch: int) -> None:
    with pytest.raises(SettingsError, match=r"batch must be <= 4, .* got"):
        run(tiny.network(), tiny.settings(batch=batch))
    assert run(tiny.network(), tiny.settings(batch=3, steps=1)).steps == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "pti"},
        {"precision": "int8"},
        {"steps": 0},
        {"local_probability": 0.0},
        {"local_probability": 1.1},
        {"batch": 1},
        {"adversarial_weight": -1.0},
        {"cohesion_weight": math.nan},
        {"paired_weight": -0.1},
        {"edit_weight": -1.0},
        {"reconstruction_weight": -1.0},
        {"r1_gamma": -1.0},
        {"r1_interval": 0},
        {"check_every": 0},
    ],
    ids=str,
)
def test_settings_outside_of_the_method_are_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(SettingsError, match=f"^{name} must be"):
        tiny.settings(**changes)
