"""cli.py: for every mistake one line on stderr, exit code 2, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import World, assert_one_line, build, run, short, tree
from PIL import Image

from clone_fast import cli
from clone_fast.errors import DivergenceError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))


CUT = 600


@pytest.fixture
def mistakes(world: World, tmp_path: Path) -> Path:
    """A folder of files that are no use."""
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8))
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:CUT])
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "cut.safetensors").write_bytes(world.network.read_bytes()[:CUT])
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "many.npz", a=np.ones(16), b=np.ones(16))
    np.save(tmp_path / "short.npy", np.ones(3))
    return tmp_path


PHOTOS = {
    "nowhere.png": "no such photo",
    "folder": "is a folder",
    "text.png": "not an image",
    "empty.png": "is empty",
    "cut.png": "damaged or cut short",
    "dot.png": "1x1 pixels",
}


@pytest.mark.parametrize("name", PHOTOS)
def test_unusable_photo(world: World, mistakes: Path, name: str) -> None:
    before = tree(mistakes)
    assert_one_line(run(*short(world, "--out", mistakes / "out", photo=mistakes / name)), name, PHOTOS[name])
    assert tree(mistakes) == before


def test_decompression_bomb(world: World, mistakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_one_line(run(*short(world, "--out", mistakes / "out")), "more than 100 pixels")
    assert not (mistakes / "out").exists()


@pytest.mark.parametrize("name", ["nowhere.pkl", "text.png", "empty.png", "cut.safetensors", "folder", "whole.png"])
def test_unusable_network(world: World, mistakes: Path, name: str) -> None:
    before = tree(mistakes)
    assert_one_line(run(*short(world, "--out", mistakes / "out", network=mistakes / name)), name)
    assert_one_line(run("convert", mistakes / name, mistakes / "out.safetensors"), name)
    assert tree(mistakes) == before


def test_network_without_a_discriminator(world: World, tmp_path: Path) -> None:
    result = run(*short(world, "--out", tmp_path / "out", network=world.no_discriminator))
    assert_one_line(result, "discriminator", "--mode recon")
    assert tree(tmp_path) == {}


OPTIONS = {
    "--steps 0": "--steps",
    "--steps -3": "--steps",
    "--steps many": "--steps",
    "--latent-steps 0": "--latent-steps",
    "--device tpu": "must be auto, cpu, cuda or cuda:<index>",
    "--device cuda:": "must be auto",
    "--target-psnr 0": "--target-psnr",
    "--target-psnr nan": "finite",
    "--mode other": "--mode",
    "--precision fp8": "--precision",
    "--space z": "--space",
    "--resize stretch": "--resize",
    "--crop 1,2": "LEFT,TOP,SIZE",
    "--crop 0,0,41": "within 50x40",
    "--seed -1": "--seed",
    "--real-images nowhere": "not a folder of photos",
    "--discriminator nowhere.pkl": "nowhere.pkl",
    "--unknown 1": "--unknown",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_unusable_option(world: World, tmp_path: Path, option: str) -> None:
    assert_one_line(run(*short(world, "--out", tmp_path / "out", *option.split())), OPTIONS[option])
    assert tree(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_where_there_is_none(world: World, tmp_path: Path, name: str) -> None:
    assert_one_line(run(*short(world, "--out", tmp_path / "out", "--device", name)), name, "no CUDA device")


def test_gpu_that_is_not_there(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert_one_line(run(*short(world, "--device", "cuda:2", "--out", tmp_path / "out")), "cuda:0 to cuda:1")


@pytest.mark.parametrize("command", ["invert", "demo", "edit", "convert"])
@pytest.mark.parametrize("obstacle", ["a file", "read-only"])
def test_output_that_cannot_be_written(
    world: World, tmp_path: Path, command: str, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told at once: the work has not begun."""
    out = tmp_path / "out"
    if obstacle == "a file":
        out.write_text("")
    else:  # as the superuser sees it, whom permissions do not stop

        def refuse(dir: Path) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(cli.tempfile, "TemporaryFile", refuse)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    for name in ("run_inversion", "load_network"):
        monkeypatch.setattr(cli, name, never)
    monkeypatch.setattr(cli.Inversion, "load", never)
    below = out / "deeper"
    arguments: dict[str, list[object]] = {
        "invert": short(world, "--out", below),
        "demo": ["demo", "--out", below],
        "edit": ["edit", world.inversion, "--direction", "smile", "--strength", 1, "--out", below / "e.png"],
        "convert": ["convert", world.network, below / "n.safetensors"],
    }
    message = "is a file" if obstacle == "a file" else "Read-only file system"
    assert_one_line(run(*arguments[command]), str(below), message)


EDITS: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "--direction and --strength, or --list"),
    "no strength": (["--direction", "smile"], "--direction and --strength, or --list"),
    "unknown": (["--direction", "simle", "--strength", "1"], "known: pca1"),
    "nan": (["--direction", "smile", "--strength", "nan"], "finite"),
    "missing file": (["--direction", "{}/nowhere.npy", "--strength", "1"], "no such file"),
    "several": (["--direction", "{}/many.npz", "--strength", "1"], "of a, b"),
    "not in the file": (["--direction", "{}/many.npz:c", "--strength", "1"], "known: a, b"),
    "wrong size": (["--direction", "{}/short.npy", "--strength", "1"], "got [3]"),
}


@pytest.mark.parametrize("name", EDITS)
def test_unusable_edit(world: World, mistakes: Path, name: str) -> None:
    arguments, message = EDITS[name]
    before = tree(world.inversion)
    assert_one_line(run("edit", world.inversion, *(a.format(mistakes) for a in arguments)), message)
    assert tree(world.inversion) == before


def test_edit_of_no_inversion(mistakes: Path) -> None:
    assert_one_line(run("edit", mistakes / "folder", "--list"), "folder")
    assert_one_line(run("edit", mistakes / "nowhere", "--list"), "nowhere")


@pytest.mark.parametrize(("target", "message"), [("a.pkl", "not written"), ("a.onnx", ".safetensors"), ("a", ".pt")])
def test_convert_to_what_is_not_written(world: World, tmp_path: Path, target: str, message: str) -> None:
    assert_one_line(run("convert", world.network, tmp_path / target), message)
    assert tree(tmp_path) == {}


def test_unknown_command_and_demo_photo(tmp_path: Path) -> None:
    assert_one_line(run("invrt"), "invrt")
    assert_one_line(run("demo", "--photo", "mona lisa", "--out", tmp_path / "out"), "there are astronaut, ")
    assert tree(tmp_path) == {}


def test_message_of_several_lines_becomes_one(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise DivergenceError("the loss is NaN;\n  lower the rate")

    monkeypatch.setattr(cli, "run_inversion", diverge)
    assert_one_line(run(*short(world, "--out", tmp_path / "out")), "the loss is NaN; lower the rate")


def test_unexpected_errors_keep_their_traceback(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "run_inversion", break_down)
    assert isinstance(run(*short(world, "--out", tmp_path / "out")).exception, ZeroDivisionError)


def test_no_folder_is_left_by_the_check(tmp_path: Path) -> None:
    cli._check_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
