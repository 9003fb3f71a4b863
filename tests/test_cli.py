"""cli.py on a tiny network: every command does what it says, and Ctrl-C keeps what there is."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import GIVEN, TAKEN, WRITTEN, World, arguments, build, run, short, tree
from PIL import Image

from clone_fast import cli
from clone_fast.checkpoints import load_network
from clone_fast.inversion import Inversion


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))


def test_invert_writes_everything(world: World) -> None:
    assert {path.name for path in world.inversion.iterdir()} == WRITTEN
    values = json.loads((world.inversion / "metrics.json").read_text())
    assert values["steps"] == 2
    assert values["settings"]["seed"] == 0
    assert Image.open(world.inversion / "clone.png").size == (16, 16)
    assert Image.open(world.inversion / "report.png").size[0] >= 1400
    assert Inversion.load(world.inversion).image.shape == (1, 3, 16, 16)


def test_summary_and_progress(world: World, tmp_path: Path) -> None:
    result = run(*short(world, "--out", tmp_path / "deep" / "out"))
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "deep" / "out" / "metrics.json").read_text())
    assert f"{values['latent_psnr']:.2f} dB latent only -> {values['psnr']:.2f} dB clone" in result.stdout
    assert f"{values['drift_psnr']:.1f} dB, SSIM {values['drift_ssim']:.3f}" in result.stdout
    assert f"correlate {values['editability']:.2f}" in result.stdout
    assert str(tmp_path / "deep" / "out") in result.stdout
    assert len(result.stdout.splitlines()) == 5
    for part in ("latent search", "tweak", "3/3", "2/2", "dB, loss"):
        assert part in result.stderr


def test_what_draws_the_report_is_imported_beside_the_tweak(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []

    def watched(name: str) -> None:
        seen.append((name, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(cli, "import_module", watched)
    assert run(*short(world, "--out", tmp_path / "out")).exit_code == 0
    assert not seen  # two steps are over too soon
    monkeypatch.setattr(cli, "CAPTURED", 2)
    assert run(*short(world, "--out", tmp_path / "out")).exit_code == 0
    assert seen == [("clone_fast.report", False)]


def test_python_ends_without_a_search_for_garbage(world: World, tmp_path: Path) -> None:
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 100_000)); "
        "from clone_fast.cli import main; main(sys.argv[1:])"
    )
    arguments = [str(argument) for argument in short(world, "--quiet", "--out", tmp_path / "out")]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n"


def test_quiet_says_nothing(world: World, tmp_path: Path) -> None:
    result = run(*short(world, "--quiet", "--out", tmp_path / "out"))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_every_option_reaches_invert(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def watched(photo: Any, **options: Any) -> Inversion:
        seen.update(options, photo=photo)
        return Inversion.load(world.inversion)

    monkeypatch.setattr(cli, "run_inversion", watched)
    result = run("invert", world.photo, "--out", tmp_path, *arguments(GIVEN | {"--crop": "1,2,30"}))
    assert result.exit_code == 0, result.output
    assert callable(seen.pop("progress"))
    assert seen == TAKEN | {"photo": world.photo, "crop": (1, 2, 30)}


def test_same_seed_same_clone(world: World, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(*short(world, "--seed", seed, "--out", tmp_path / name)).exit_code == 0
    a, b, c = (load_network(tmp_path / name / "generator.safetensors").generator for name in "abc")
    equal = [torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)]
    assert all(equal)
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


def test_recon_needs_no_discriminator(world: World, tmp_path: Path) -> None:
    result = run(*short(world, "--mode", "recon", "--out", tmp_path / "out", network=world.no_discriminator))
    assert result.exit_code == 0, result.output


def test_discriminator_from_another_file(world: World, tmp_path: Path) -> None:
    options = ("--discriminator", world.network, "--out", tmp_path / "out")
    result = run(*short(world, *options, network=world.no_discriminator))
    assert result.exit_code == 0, result.output


def test_real_images(world: World, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("L", (20, 20), 80 * i).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"junk")
    result = run(*short(world, "--real-images", tmp_path / "photos", "--out", tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "Warning: " in result.stderr
    assert "1 of 4 images left out" in result.stderr


def test_demo(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr("clone_fast.demo.DEMO_NETWORK", world.network)
    result = run(
        "demo",
        "--photo",
        "cat",
        "--out",
        tmp_path / "out",
        "--steps",
        1,
        "--latent-steps",
        1,
        "--device",
        "cpu",
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN


# editing


def test_list_names_the_directions(world: World) -> None:
    result = run("edit", world.inversion, "--list")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [*(f"pca{i}" for i in range(1, 9)), "smile"]


def test_natural_order() -> None:
    assert sorted(["pca10", "pca2", "age", "pca1"], key=cli._natural) == ["age", "pca1", "pca2", "pca10"]


@pytest.mark.parametrize("direction", ["smile", "pca2"])
def test_edit_by_name(world: World, tmp_path: Path, direction: str) -> None:
    result = run("edit", world.inversion, "--direction", direction, "--strength", -2.5, "--out", tmp_path / "e.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "e.png")
    assert Image.open(tmp_path / "e.png").size == (16, 16)


def test_edit_of_nothing_is_the_clone(world: World, tmp_path: Path) -> None:
    run("edit", world.inversion, "--direction", "smile", "--strength", 0, "--out", tmp_path / "e.png")
    clone, edited = (np.asarray(Image.open(path)) for path in (world.inversion / "clone.png", tmp_path / "e.png"))
    np.testing.assert_array_equal(clone, edited)


def test_edit_is_named_after_what_it_is(world: World) -> None:
    result = run("edit", world.inversion, "--direction", "smile", "--strength", 2)
    target = world.inversion / "edit_smile_+2.png"
    assert result.exit_code == 0, result.output
    assert target.exists()
    target.unlink()


@pytest.mark.parametrize("choice", ["one.npy", "many.npz:b"])
def test_edit_by_file_in_standard_deviations(world: World, tmp_path: Path, choice: str) -> None:
    """Whatever the length in the file, the strength counts standard deviations."""
    direction = np.random.default_rng(0).normal(size=16)
    pictures = []
    for scale in (1, 50):
        np.save(tmp_path / "one.npy", scale * direction)
        np.savez(tmp_path / "many.npz", a=direction[::-1], b=scale * direction)
        out = tmp_path / f"{scale}.png"
        result = run("edit", world.inversion, "--direction", tmp_path / choice, "--strength", 2, "--out", out)
        assert result.exit_code == 0, result.output
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


# info and convert


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    for part in ("torch", torch.__version__, "python", "triton", "upfirdn2d", "reference available"):
        assert part in result.stdout


def test_convert_there_and_back(world: World, tmp_path: Path) -> None:
    assert run("convert", world.network, tmp_path / "a.pt", "--force").exit_code == 0
    result = run("convert", tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "b.safetensors")
    before, after = (load_network(path).generator for path in (world.network, tmp_path / "b.safetensors"))
    w = torch.randn(1, before.num_ws, 16)
    torch.testing.assert_close(after.synthesis(w), before.synthesis(w), rtol=1e-4, atol=1e-5)


def test_help_and_module() -> None:
    for command in ("invert", "demo", "edit", "info", "convert", "run"):
        assert "Usage: " in run(command, "--help").stdout
    shown = subprocess.run([sys.executable, "-m", "clone_fast", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: clone-fast" in shown.stdout


# Ctrl-C


@pytest.mark.parametrize("stage", ["latent", "tweak"])
def test_interrupted_stage_keeps_the_best_so_far(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    report = cli.Progress.__call__

    def press(self: cli.Progress, name: str, step: int, *rest: Any) -> None:
        report(self, name, step, *rest)
        if name == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.Progress, "__call__", press)
    result = run(*short(world, "--out", tmp_path / "out"))
    assert result.exit_code == 130, result.output
    assert "best so far" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert settings["interrupted"] is True


def test_interrupted_before_there_is_a_result(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_inversion", press)
    result = run(*short(world, "--out", tmp_path / "out"))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted."
    assert tree(tmp_path) == {}


def test_progress_is_a_bar_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    progress = cli.Progress(quiet=False)
    for stage, total in (("latent", 20), ("tweak", 10)):
        for step in range(5, total + 1, 5):
            progress(stage, step, total, 0.5, 20.25)
    progress.close()
    progress.close()
    shown = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert any("latent search" in line and "20/20" in line for line in shown)
    assert any("tweak" in line and "10/10" in line and "20.25 dB, loss 0.5" in line for line in shown)
