"""The command line of clone files and exports: `--networks delta`, `edit --network`, `export`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import nvidia_dict, write_pickle
from cli_world import WRITTEN, World, assert_one_line, build, folder_command, run, short
from PIL import Image

from clone_fast.checkpoints import load_generator, load_network
from clone_fast.inversion import Inversion

DELTA = WRITTEN - {"generator.safetensors", "latent.safetensors"} | {"clone.safetensors", "photo.png"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def delta(world: World, tmp_path: Path) -> Path:
    result = run(*short(world, "--out", tmp_path / "delta", "--networks", "delta"))
    assert result.exit_code == 0, result.output
    return tmp_path / "delta"


def test_a_clone_file_is_edited_with_its_network(world: World, delta: Path, tmp_path: Path) -> None:
    assert {path.name for path in delta.iterdir()} == DELTA
    move = ("--direction", "smile", "--strength", 0, "--out", tmp_path / "e.png")
    for network in ((), ("--network", world.network)):  # where it was; where the user says
        result = run("edit", delta, *move, *network)
        assert result.exit_code == 0, result.output
        clone, edited = (np.asarray(Image.open(path)) for path in (delta / "clone.png", tmp_path / "e.png"))
        assert np.abs(clone.astype(int) - edited).mean() < 10
    other = world.inversion / "generator.safetensors"
    assert_one_line(run("edit", delta, *move, "--network", other), "another network")


def test_a_network_that_has_moved_is_asked_for(world: World, tmp_path: Path) -> None:
    moved = shutil.copy(world.network, tmp_path / "moved.safetensors")
    run(*short(world, "--out", tmp_path / "out", "--networks", "delta", network=moved))
    Path(moved).unlink()
    assert_one_line(run("edit", tmp_path / "out", "--list"), "moved.safetensors", "--network")
    assert run("edit", tmp_path / "out", "--list", "--network", world.network).exit_code == 0


def test_a_folder_of_clone_files(world: World, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(world.photo, tmp_path / "photos")
    result = run(*folder_command(world, tmp_path / "photos", tmp_path / "out", "--networks", "delta"))
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out" / world.photo.name).iterdir()} == DELTA


@pytest.mark.parametrize("kind", ["nvidia", "pti", "rosinality"])
@pytest.mark.filterwarnings("ignore:save_rosinality")
def test_export(world: World, delta: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / ("clone.pkl" if kind == "nvidia" else "clone.pt")
    base = write_pickle(nvidia_dict(load_network(world.network)), tmp_path / "base.pkl")
    more = ("--force",) if kind == "rosinality" else ("--base", base)
    for folder in (world.inversion, delta):
        result = run("export", folder, "--to", kind, "--out", out, *more)
        assert result.exit_code == 0, result.output
        written, beside = (Path(line) for line in result.stdout.split())
        assert written == out
        ws = torch.from_numpy(np.load(beside)["w"]) if kind == "nvidia" else torch.load(beside, weights_only=True)
        want = Inversion.load(folder)
        picture = load_generator(out).synthesis(ws).clamp(-1, 1)
        torch.testing.assert_close(picture, want.image, rtol=0, atol=1e-5)


def test_mistakes_of_an_export_are_told(world: World, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x.pkl")
    assert_one_line(run("export", world.inversion, "--to", "nvidia", *out), "nvidia needs base")
    assert_one_line(run("export", world.inversion, "--to", "nvidia", *out, "--base", world.photo), "a PNG image")
    assert_one_line(run("export", world.inversion, "--to", "pti", *out, "--base", world.network), "not an NVIDIA .pkl")
    assert_one_line(run("export", world.inversion, "--to", "rosinality", *out), "no such network")
    assert_one_line(run("export", tmp_path / "nothing", "--to", "nvidia", *out, "--base", world.network), "nothing")
    assert not (tmp_path / "x.pkl").exists()
