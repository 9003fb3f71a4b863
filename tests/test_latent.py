"""The search of the latent: where it starts, what it moves, what it leaves alone, and how it ends."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from launches import Launches
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast.descent import Descent, FusedAdam
from clone_fast.errors import DivergenceError, SettingsError
from clone_fast.latent import Latent, LatentSettings, Outcome, optimise
from clone_fast.latent.optimise import Search, noise_structure
from clone_fast.nn import Generator, Network
from clone_fast.progress import Record, quick_psnr

PHOTO = tiny.photo()


def settings(**changes: Any) -> LatentSettings:
    """With nothing left to a default that may move."""
    values: dict[str, Any] = {
        "space": "w+",
        "steps": 12,
        "learning_rate": 0.05,
        "noise_maps": False,
        "noise_regularization": 1e3,
        "exploration": 0.05,
        "start_samples": 16,
        "similarity": "laplacian",
        "check_every": 4,
    }
    return LatentSettings(**values | changes)


def run(net: Network, photo: Tensor = PHOTO, *, start: Latent | None = None, seed: int = 0, **changes: Any) -> Outcome:
    return optimise(net.generator, photo, settings(**changes), start=start, seed=seed)


def rows_differ(latent: Latent) -> bool:
    return not torch.equal(latent.ws, latent.ws[:, :1].expand_as(latent.ws))


# ---- Latent ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16,), (1, 16), (6, 16), (1, 6, 16)])
def test_expanded_takes_every_shape_of_a_latent(shape: tuple[int, ...]) -> None:
    given = torch.randn(shape)
    ws = Latent.expanded(given, tiny.network().generator)
    assert ws.shape == (1, 6, 16)
    torch.testing.assert_close(ws[0], given.reshape(-1, 16).expand(6, 16), rtol=0, atol=0)
    ws.zero_()
    assert bool(given.any()), "the tensor given was written to"


@pytest.mark.parametrize("shape", [(15,), (2, 16), (2, 6, 16), (6, 15), (16, 1), ()])
def test_a_latent_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match=r"latent must be \[16\] or \[6, 16\], got \["):
        Latent.expanded(torch.zeros(shape), tiny.network().generator)


def test_draw_takes_the_latents_noise_maps_and_moves_with_it() -> None:
    net = tiny.network()
    latent = tiny.latent(net, noise=True)
    image = latent.draw(net.generator)
    want = net.generator.synthesis(latent.ws, noise_mode="const", noise=latent.noise)
    assert torch.equal(image, want)
    assert not torch.equal(image, Latent(latent.ws).draw(net.generator))
    there = latent.to("meta")
    assert {there.ws.device.type, *(noise.device.type for noise in there.noise.values())} == {"meta"}


# ---- where it starts, what it moves ----------------------------------------------------------------------------------


def test_w_keeps_the_rows_equal_and_w_plus_does_not() -> None:
    net = tiny.network()
    assert not rows_differ(run(net, space="w").latent)
    assert rows_differ(run(net, space="w+").latent)
    assert run(net, space="w").latent.ws.shape == (1, 6, 16)


@pytest.mark.parametrize("space", ["w", "w+"])
def test_no_steps_return_the_start(space: str) -> None:
    net = tiny.network()
    start = Latent(torch.randn(1, 6, 16), {"b8.conv0": torch.randn(8, 8)})
    done = run(net, start=start, steps=0, space=space)
    assert torch.equal(done.latent.ws, start.ws)
    assert done.latent.ws.data_ptr() != start.ws.data_ptr()
    assert list(done.latent.noise) == ["b8.conv0"]
    assert torch.equal(done.latent.noise["b8.conv0"], start.noise["b8.conv0"])
    assert (done.rows, done.interrupted) == ([], False)


def test_the_default_start_is_near_w_avg_and_the_nearest_of_its_kind() -> None:
    net = tiny.network()
    start = run(net, steps=0).latent
    assert not rows_differ(start)
    with torch.no_grad():
        w_avg = net.generator.mapping.w_avg
        z = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        tried = torch.cat([w_avg[None], (w_avg + net.generator.mapping(z)[:, 0]) / 2])
        images = net.generator.synthesis(tried[:, None].repeat(1, 6, 1))
        blocks = [x.reshape(-1, 3, 8, 2, 8, 2).mean(dim=[3, 5]) for x in (images, PHOTO)]
        errors = (blocks[0] - blocks[1]).square().mean(dim=[1, 2, 3])
    torch.testing.assert_close(start.ws[0, 0], tried[errors.argmin()])


def test_a_photo_that_w_avg_draws_starts_there() -> None:
    net = tiny.network()
    w_avg = Latent(Latent.expanded(net.generator.mapping.w_avg, net.generator))
    photo = w_avg.draw(net.generator)
    assert torch.equal(run(net, photo, steps=0).latent.ws, w_avg.ws)


def test_a_conditional_network_needs_no_label_to_start() -> None:
    assert run(tiny.network(c_dim=3)).latent.ws.shape == (1, 6, 16)


@pytest.mark.parametrize("space", ["w", "w+"])
@pytest.mark.parametrize("noise_maps", [False, True])
def test_the_latent_found_is_nearer_than_the_start(space: str, noise_maps: bool) -> None:
    net = tiny.network()
    with torch.no_grad():
        photo = tiny.latent(net, seed=5).draw(net.generator).clamp(-1, 1)  # one that can be had
    changes: dict[str, Any] = {"space": space, "noise_maps": noise_maps, "noise_regularization": 0.0}
    start = run(net, photo, steps=0).latent
    done = run(net, photo, steps=40, **changes)
    with torch.no_grad():
        before, after = (tiny.psnr(latent.draw(net.generator), photo) for latent in (start, done.latent))
    assert after > before + 1
    assert done.rows[-1]["loss"] < done.rows[0]["loss"]
    assert done.rows[-1]["psnr"] == pytest.approx(after, abs=1)  # one step of a small rate away


def test_a_search_from_a_latent_begins_at_that_latent() -> None:
    net = tiny.network()
    start = tiny.latent(net, seed=3)
    done = run(net, start=start, steps=1, exploration=0.0)
    with torch.no_grad():
        want = quick_psnr(start.draw(net.generator), PHOTO)
    assert done.rows[0]["psnr"] == pytest.approx(float(want), abs=1e-4)
    torch.testing.assert_close(done.latent.ws, start.ws, rtol=0, atol=0.0501)
    assert not torch.equal(done.latent.ws, start.ws)


def test_exploration_ends_at_three_quarters_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate of nearly nothing, what the generator sees differs from the start by the noise on w alone."""
    net = tiny.network()
    start = tiny.latent(net)
    seen: list[float] = []
    forward = net.generator.synthesis.forward

    def watched(ws: Tensor, *args: Any, **more: Any) -> Tensor:
        if ws.requires_grad:
            seen.append(float((ws - start.ws).detach().norm()))
        return forward(ws, *args, **more)

    monkeypatch.setattr(net.generator.synthesis, "forward", watched)
    run(net, start=start, steps=20, learning_rate=1e-12, exploration=1.0, start_samples=64)
    assert len(seen) == 20
    with torch.no_grad():
        w = net.generator.mapping(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))[:, 0]
        spread = float((w - w.mean(dim=0)).norm(dim=1).square().mean().sqrt())
    assert seen[0] / math.sqrt(6) == pytest.approx(spread, rel=0.25)  # a row's noise is as long as w is spread
    assert max(seen[15:]) < 1e-4 < seen[12] < seen[0]


# ---- noise maps ------------------------------------------------------------------------------------------------------


def test_noise_maps_are_kept_with_the_latent_at_zero_mean_and_unit_variance() -> None:
    net = tiny.network()
    done = run(net, noise_maps=True)
    noise = done.latent.noise
    assert list(noise) == ["b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1"]
    for name, value in noise.items():
        assert value.shape == (int(name[1 : name.index(".")]),) * 2
        assert abs(float(value.mean())) < 1e-5
        assert float(value.square().mean()) == pytest.approx(1, abs=1e-4)
        const = net.generator.synthesis.get_buffer(f"{name}.noise_const")
        assert not torch.allclose((const - const.mean()) / const.std(correction=0), value, atol=1e-3)
        assert not value.requires_grad
    assert run(net, noise_maps=False).latent.noise == {}


def test_noise_maps_go_on_from_those_of_the_start() -> None:
    net = tiny.network()
    start = tiny.latent(net, noise=True)
    before = {name: value.clone() for name, value in start.noise.items()}
    fixed = run(net, start=start).latent.noise
    assert all(torch.equal(fixed[name], value) for name, value in before.items())
    moved = run(net, start=start, noise_maps=True, steps=1, learning_rate=1e-9).latent.noise
    for name, value in before.items():
        torch.testing.assert_close(moved[name], (value - value.mean()) / value.std(correction=0), rtol=0, atol=1e-4)
        assert torch.equal(start.noise[name], value), "the map given was written to"


def test_the_regularisation_keeps_structure_out_of_the_maps() -> None:
    net = tiny.network()
    structure = []
    for weight in (0.0, 1e5):
        noise = run(net, noise_maps=True, noise_regularization=weight, steps=40).latent.noise
        structure.append(float(noise_structure(list(noise.values()))))
    assert structure[1] < 0.2 * structure[0]


@pytest.mark.parametrize("sizes", [[4], [8], [16], [32], [4, 8, 8, 32, 32], [64, 16]], ids=str)
def test_noise_structure_is_the_squared_autocorrelation_over_the_pyramid(sizes: list[int]) -> None:
    source = torch.Generator().manual_seed(1)
    maps = [torch.randn(size, size, generator=source, dtype=torch.float64).requires_grad_() for size in sizes]
    want = 0.0
    for noise in maps:
        level = noise.detach().numpy()
        while True:
            side = len(level)
            places = [(y, x) for y in range(side) for x in range(side)]
            for dy, dx in ((0, 1), (1, 0)):
                want += np.mean([level[y, x] * level[(y - dy) % side, (x - dx) % side] for y, x in places]) ** 2
            if side <= 8:
                break
            level = level.reshape(side // 2, 2, side // 2, 2).mean(axis=(1, 3))
    assert noise_structure(maps).item() == pytest.approx(want, rel=1e-10)
    if max(sizes) <= 16:
        assert torch.autograd.gradcheck(lambda *maps: noise_structure(maps), maps, fast_mode=True)


def test_the_structure_of_all_maps_of_config_f_takes_few_launches() -> None:
    maps = [torch.empty(2**i, 2**i, device="meta") for i in range(2, 11) for _ in range(1 + (i > 2))]
    with Launches() as launches:
        noise_structure(maps)
    assert launches.total <= 75, launches.found


@pytest.mark.parametrize("noise_maps", [False, True])
def test_behind_the_step_come_the_maps_alone(noise_maps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lane has done meanwhile is not waited for: the board, the next row."""
    net = tiny.network()
    work = Search(net.generator, PHOTO, settings(noise_maps=noise_maps), start=None, seed=0)
    launches, step = Launches(), Descent.step

    def watched(self: Descent, *args: Tensor) -> None:
        step(self, *args)
        launches.__enter__()

    monkeypatch.setattr(Descent, "step", watched)
    work.step()
    launches.__exit__(None, None, None)
    assert launches.total == (4 * len(work.maps) if noise_maps else 0), launches.found
    assert work.table.index.item() == 1
    assert bool(work.board.values.isfinite().all())


# ---- the generator, the seed -----------------------------------------------------------------------------------------


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def fail(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("progress", [None, interrupt, fail])
def test_the_generator_stays_as_it_is_however_the_search_ends(progress: Any) -> None:
    net = tiny.network()
    before = tiny.state(net.generator)
    flags = []
    for i, parameter in enumerate(net.generator.parameters()):
        parameter.requires_grad_(i % 3 == 0)
        flags.append(i % 3 == 0)
    try:
        optimise(net.generator, PHOTO, settings(noise_maps=True), progress=progress)
    except ZeroDivisionError:
        assert progress is fail
    tiny.assert_state(net.generator, before)
    assert [p.requires_grad for p in net.generator.parameters()] == flags
    assert all(p.grad is None for p in net.generator.parameters())


@pytest.mark.parametrize("noise_maps", [False, True])
def test_the_seed_decides_everything(noise_maps: bool) -> None:
    net = tiny.network()
    found = []
    for seed, disturb in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(disturb)  # the global generator plays no part
        before = torch.get_rng_state()
        found.append(run(net, seed=seed, noise_maps=noise_maps))
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = found
    assert torch.equal(first.latent.ws, again.latent.ws)
    assert all(torch.equal(first.latent.noise[name], value) for name, value in again.latent.noise.items())
    assert first.rows == again.rows
    assert not torch.equal(first.latent.ws, other.latent.ws)


# ---- how it ends -----------------------------------------------------------------------------------------------------


def test_losses_are_read_at_the_checks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    add = Record.add

    def counted(self: Record, step: int, *args: Any, **more: Any) -> dict[str, float]:
        reads.append(step)
        return add(self, step, *args, **more)

    monkeypatch.setattr(Record, "add", counted)
    told: list[tuple[Any, ...]] = []
    done = optimise(tiny.network().generator, PHOTO, settings(steps=10), progress=lambda *a: told.append(a))
    assert reads == [1, 4, 8, 10]
    assert [row["step"] for row in done.rows] == reads
    assert [a[:3] for a in told] == [("latent", step, 10) for step in reads]
    assert [a[3:] for a in told] == [(row["loss"], row["psnr"]) for row in done.rows]


@pytest.mark.parametrize("at", [1, 8])
def test_ctrl_c_gives_the_latent_so_far(at: int) -> None:
    net = tiny.network()

    def progress(stage: str, step: int, total: int, loss: float, psnr: float) -> None:
        if step == at:
            raise KeyboardInterrupt

    done = optimise(net.generator, PHOTO, settings(noise_maps=True), progress=progress)
    assert done.interrupted
    assert [row["step"] for row in done.rows] == [step for step in (1, 4, 8) if step <= at]
    assert bool(done.latent.draw(net.generator).isfinite().all())
    start = run(net, steps=0).latent.ws
    assert torch.equal(done.latent.ws, start) == (at == 1)


def spoil(monkeypatch: pytest.MonkeyPatch, generator: Generator, at: int) -> None:
    """From the at-th image with a gradient on, everything is NaN."""
    forward, calls = generator.synthesis.forward, 0

    def spoilt(ws: Tensor, *args: Any, **more: Any) -> Tensor:
        nonlocal calls
        calls += ws.requires_grad
        image = forward(ws, *args, **more)
        return image * math.nan if ws.requires_grad and calls >= at else image

    monkeypatch.setattr(generator.synthesis, "forward", spoilt)


def test_nan_from_the_first_step_on_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    spoil(monkeypatch, net.generator, at=1)
    with pytest.raises(DivergenceError, match="first step"):
        run(net)


def test_nan_on_the_way_gives_the_last_good_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.network()
    want: list[Tensor] = []
    step = FusedAdam.step

    def watched(self: FusedAdam, *args: Any) -> None:
        want.append(self.param_groups[0]["params"][0].detach().clone())
        step(self, *args)

    monkeypatch.setattr(FusedAdam, "step", watched)
    spoil(monkeypatch, net.generator, at=6)
    done = run(net)
    assert [row["step"] for row in done.rows] == [1, 4, 8]
    assert math.isnan(done.rows[-1]["loss"])
    assert not done.interrupted
    assert torch.equal(done.latent.ws, want[3])  # as it was when the fourth step was checked


# ---- lpips, settings -------------------------------------------------------------------------------------------------


def test_lpips_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SettingsError, match=r"pip install 'clone_fast\[lpips\]'"):
        run(tiny.network(), similarity="lpips")


def test_lpips_without_its_weights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("lpips")

    def unreachable(**_: Any) -> None:
        raise OSError("no route to host")

    package.LPIPS = unreachable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(SettingsError, match=r"weights .* cannot be loaded \(OSError\)"):
        run(tiny.network(), similarity="lpips")


def test_lpips_takes_the_place_of_the_pyramid(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, 3, 1, 1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert not self.weight.requires_grad
            return ((x - y).square() * self.weight).mean(dim=[1, 2, 3], keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS = Distance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    start = tiny.latent(tiny.network())
    done = run(tiny.network(), start=start, similarity="lpips", steps=4, exploration=0.0)
    with torch.no_grad():
        want = (start.draw(tiny.network().generator) - PHOTO).square().mean()
    assert done.rows[0]["loss"] == pytest.approx(float(want), rel=1e-5)
    assert done.rows[-1]["loss"] < done.rows[0]["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"space": "z"},
        {"precision": "int8"},
        {"steps": -1},
        {"similarity": "vgg"},
        {"start_samples": 0},
        {"check_every": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(SettingsError, match=f"{name}.* must be"):
        settings(**changes)
