"""The training of the demo network: its phases, its average, its stream of portraits, its runs, its directions."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor, nn

from clone_fast.checkpoints import load_network
from clone_fast.demo import export
from clone_fast.demo import train as train_module
from clone_fast.demo.directions import EDITABLE, AttributeReader, fit_directions
from clone_fast.demo.train import PortraitStream, Recipe, Training, sample_sheet, train

CPU = torch.device("cpu")
ARCH = replace(tiny.arch(16), w_dim=32)  # as many dimensions as there are attributes, at least
RECIPE = Recipe(batch=4, path_batch=2, r1_interval=3, path_interval=2, chunk=8, pool=16, reuse=2)


def training(**changes: Any) -> Training:
    torch.manual_seed(0)
    made = Training(replace(RECIPE, **changes), ARCH, CPU)
    made.real.copy_(torch.rand(made.real.shape) * 2 - 1)
    return made


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}


# ---- phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["d_main", "d_r1", "g_main", "g_path"])
def test_a_phase_moves_its_own_network_and_no_other(phase: str) -> None:
    work = training()
    g, d, average = (parameters(m) for m in (work.generator, work.discriminator, work.average))
    work.phases[phase]()
    of_g, of_d = moved(work.generator, g), moved(work.discriminator, d)
    assert not (of_d if phase.startswith("g") else of_g)
    assert not moved(work.average, average)
    if phase == "g_main":
        assert of_g == set(g)
    elif phase == "d_main":
        assert of_d == set(d)
    elif phase == "g_path":
        assert {"synthesis.b16.conv1.weight", "synthesis.b4.const", "mapping.fc0.weight"} <= of_g
        assert "synthesis.b16.torgb.bias" not in of_g  # what shifts the image is not in its derivative
    else:
        assert {"b16.conv0.weight", "b4.out.weight"} <= of_d
        assert "b4.out.bias" not in of_d
    for module in (work.generator, work.discriminator):
        assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_the_statistics_are_those_of_the_formulas() -> None:
    work = training()
    generator, judge = copy.deepcopy(work.generator), copy.deepcopy(work.discriminator)
    torch.manual_seed(8)
    work.phases["d_main"]()
    torch.manual_seed(8)
    with torch.no_grad():  # the same draws in the same order: two latents, the cut, the share, the noise
        first, second = (generator.mapping(torch.randn(4, 16)) for _ in range(2))
        cut = torch.randint(1, 6, [4, 1])
        cut = torch.where(torch.rand([4, 1]) < RECIPE.mixing, cut, torch.tensor(6))
        ws = torch.where((torch.arange(6) < cut)[:, :, None], first, second)
        fake = judge(generator.synthesis(ws, noise_mode="random")).double()
        real = judge(work.real).double()
    want = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
    assert float(work.stats["loss_d"]) == pytest.approx(float(want), rel=1e-5)
    assert float(work.stats["real"]) == pytest.approx(float(real.mean()), rel=1e-4, abs=1e-5)
    assert float(work.stats["fake"]) == pytest.approx(float(fake.mean()), rel=1e-4, abs=1e-5)
    w_avg = generator.mapping.w_avg.lerp(first[:, 0].mean(dim=0), 0.002)
    torch.testing.assert_close(work.generator.mapping.w_avg, w_avg)


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_styles_are_mixed_at_one_layer(mixing: float) -> None:
    work = training(mixing=mixing)
    changes = (work._mixed_ws(16).diff(dim=1).abs().amax(dim=2) > 1e-6).sum(dim=1)
    assert changes.tolist() == [int(mixing)] * 16


def test_regularisers_are_applied_on_their_intervals() -> None:
    work = training()
    called: list[str] = []
    for name in work.phases:
        work.phases[name] = lambda name=name: called.append(name)  # type: ignore[misc]
    for iteration in range(6):
        work.step(iteration, work.real)
        called.append("|")
    regularised = "d_main d_r1 g_main g_path | d_main g_main | d_main g_main g_path | d_main d_r1 g_main |"
    assert " ".join(called) == regularised + " d_main g_main g_path | d_main g_main |"
    assert work.images_seen == 24


def test_lazy_regularisation_adjusts_the_optimisers_and_the_weights() -> None:
    """Karras et al. 2020, appendix B: c = k / (k + 1), lr * c, beta ** c; and the term times k."""
    work = training()
    for name, interval in (("g", 2), ("d", 3)):
        group = work.optimizers[name].param_groups[0]
        ratio = interval / (interval + 1)
        assert group["lr"] == pytest.approx(0.0025 * ratio)
        assert group["betas"] == pytest.approx((0, 0.99**ratio))
    seen: list[Tensor] = []
    work._step = lambda name, loss: seen.append(loss.detach())  # type: ignore[method-assign]
    work._d_r1()
    assert float(seen[0]) == pytest.approx(float(work.stats["r1"]) * 0.1 / 2 * 3, rel=1e-5)
    work._g_path()
    assert float(seen[1]) == pytest.approx(float(work.stats["path"]) * 2.0 * 2, rel=1e-5)


def test_the_average_follows_the_generator_by_its_half_life() -> None:
    work = training(ema_kimg=0.01, ema_rampup=0.05)
    before, generator = parameters(work.average), parameters(work.generator)
    with torch.no_grad():
        for parameter in work.generator.parameters():
            parameter.add_(1)
        work.generator.mapping.w_avg.fill_(3)
    for seen, half_life in ((100, 5), (10_000, 10)):  # 5 % of the images seen, then 10 images
        work.images_seen = seen
        for parameter, value in zip(work.average.parameters(), before.values(), strict=True):
            parameter.copy_(value)
        work._update_average()
        beta = 0.5 ** (4 / half_life)
        for name, value in work.average.named_parameters():
            torch.testing.assert_close(value, before[name] * beta + (generator[name] + 1) * (1 - beta))
        assert torch.equal(work.average.mapping.w_avg, work.generator.mapping.w_avg)
    assert not any(p.requires_grad for p in work.average.parameters())


# ---- snapshots and runs ----------------------------------------------------------------------------------------------


def test_a_snapshot_resumes_to_the_identical_state(tmp_path: Path) -> None:
    work = training()
    real = [torch.rand(work.real.shape) * 2 - 1 for _ in range(4)]
    for i in (0, 1):
        work.step(i, real[i])
    work.commands.append("first")
    work.save(tmp_path)
    assert not list(tmp_path.glob(".*")), "a file that was written aside is left over"
    resumed = Training(RECIPE, ARCH, CPU)
    resumed.load(tmp_path)
    assert (resumed.images_seen, resumed.commands) == (8, ["first"])
    assert torch.equal(resumed.path_mean, work.path_mean)
    for each in (work, resumed):
        torch.manual_seed(5)
        for i in (2, 3):
            each.step(i, real[i])
    for part in ("generator", "discriminator", "average"):
        tiny.assert_state(getattr(resumed, part), tiny.state(getattr(work, part)))
    for name, optimizer in work.optimizers.items():
        assert repr(resumed.optimizers[name].state_dict()) == repr(optimizer.state_dict())
    assert {n: float(v) for n, v in resumed.stats.items()} == {n: float(v) for n, v in work.stats.items()}


def run(out: Path, kimg: float, **more: Any) -> Training:
    options: dict[str, Any] = {"minutes": math.inf, "seed": 0, "device": CPU, "recipe": RECIPE, "arch": ARCH}
    return train(out, kimg=kimg, **options | more)


def test_a_run_stops_at_its_images_and_goes_on_from_there(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 0.012)
    assert first.images_seen == 12
    assert len(first.commands) == 1
    assert first.commands[0].endswith("# 0 to 12 images")
    assert json.loads((tmp_path / "a" / "counters.json").read_text())["images_seen"] == 12
    on = run(tmp_path / "a", 0.02)
    assert on.images_seen == 20
    assert [command.rpartition("# ")[2] for command in on.commands] == ["0 to 12 images", "12 to 20 images"]
    assert tiny.changed(on.generator, tiny.state(first.generator))
    assert run(tmp_path / "a", 0.02).images_seen == 20
    assert (tmp_path / "a" / "samples-00000.png").exists()
    again = run(tmp_path / "b", 0.012)
    tiny.assert_state(again.average, tiny.state(first.average))
    assert run(tmp_path / "c", 1.0, minutes=0).images_seen == 0


def test_a_run_that_diverged_leaves_the_last_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 0.008)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(train_module, "generator_adversarial", lambda logits: logits.mean() * math.nan)
    with pytest.raises(RuntimeError, match=r"diverged by image 16.*snapshot"):
        run(tmp_path, 0.016)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_trains_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def instead(out: Path, **options: Any) -> Any:
        seen.update(options, out=out)
        return SimpleNamespace(images_seen=7)

    monkeypatch.setattr(train_module, "train", instead)
    options = ["--kimg", "5", "--batch", "6", "--seed", "3", "--device", "cpu"]
    outcome = CliRunner().invoke(train_module.main, ["--out", str(tmp_path / "run"), *options])
    assert outcome.exit_code == 0, outcome.output
    assert "7 images seen" in outcome.output
    recipe = seen.pop("recipe")
    assert (recipe.batch, recipe.path_batch) == (6, 3)
    assert seen == {"out": tmp_path / "run", "kimg": 5.0, "minutes": math.inf, "seed": 3, "device": CPU}


def test_a_sample_sheet_shows_the_images_in_their_order(tmp_path: Path) -> None:
    generator = tiny.network().generator
    sample_sheet(generator, tmp_path / "sheet.png", columns=3, rows=2, seed=4)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (48, 32)
        pixels = torch.from_numpy(np.array(picture)).float()
    z = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        image = generator(z, noise_mode="const")[4]  # second row, second column
    want = ((image.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    assert (pixels[16:, 16:32] - want).abs().max() <= 1


# ---- portraits -------------------------------------------------------------------------------------------------------


def test_the_stream_shows_portraits_in_range() -> None:
    stream = PortraitStream(RECIPE, 16, 0, CPU)
    batch = next(stream)
    assert (batch.shape, batch.dtype) == ((4, 3, 16, 16), torch.float32)
    assert -1 <= float(batch.min()) < 0 < float(batch.max()) <= 1
    levels = (batch + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)  # kept as uint8
    assert float(batch.std(dim=0).max()) > 0.1


def test_each_portrait_is_shown_about_reuse_times() -> None:
    stream = PortraitStream(RECIPE, 16, 0, CPU)
    drawn = []
    for _ in range(16):
        next(stream)
        drawn.append(stream.drawn)
    # chunks of 8 shown twice are 16 images, or 4 batches; the pool has room for two chunks and is then written over
    assert drawn == [8] * 4 + [16] * 4 + [24] * 4 + [32] * 4
    assert stream.shown == 64


def test_the_pool_is_renewed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def render(attributes: dict[str, Tensor], resolution: int) -> Tensor:
        nonlocal count
        count += 1
        return torch.full([8, 3, resolution, resolution], count / 127.5 - 1)

    monkeypatch.setattr(train_module.portraits, "render", render)
    stream = PortraitStream(RECIPE, 16, 0, CPU)
    contents = []
    for _ in range(16):
        batch = next(stream)
        contents.append([int(stream.pool[i, 0, 0, 0]) for i in (0, 8)])
        assert set(((batch + 1) * 127.5).round().unique().int().tolist()) <= set(contents[-1])
    assert contents[3][0] == 1
    assert contents[4:8] == [[1, 2]] * 4
    assert contents[8:12] == [[3, 2]] * 4
    assert contents[12:] == [[3, 4]] * 4


def test_the_seed_decides_the_stream() -> None:
    a, b, c = (next(PortraitStream(RECIPE, 16, seed, CPU)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_pool_that_is_no_multiple_of_its_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match="pool must be a multiple of chunk, 8, got 20"):
        PortraitStream(replace(RECIPE, pool=20), 16, 0, CPU)


# ---- export ---------------------------------------------------------------------------------------------------------


def test_export_writes_a_network_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(tmp_path / "run", 0.008)
    monkeypatch.setattr(export, "ARCHITECTURE", ARCH)
    reader = AttributeReader(width=2).eval()
    monkeypatch.setattr(export, "train_reader", lambda **_: (reader, dict.fromkeys(EDITABLE, 0.5)))
    monkeypatch.setattr(export, "fit_directions", lambda g, r, seed: fit_directions(g, r, samples=64, seed=seed))
    out = tmp_path / "net.safetensors"
    outcome = CliRunner().invoke(export.main, [str(tmp_path / "run"), str(out), "--device", "cpu"])
    assert outcome.exit_code == 0, outcome.output
    assert f"{out}: " in outcome.output
    net = load_network(out)
    assert set(net.directions) == set(EDITABLE)
    assert net.metadata["images_seen"] == "8"
    assert net.metadata["commands"].endswith("# 0 to 8 images")
    for got, want in ((net.generator, made.average), (tiny.judge(net), made.discriminator)):
        for name, value in want.state_dict().items():
            torch.testing.assert_close(got.state_dict()[name], value, rtol=1e-3, atol=1e-3)
