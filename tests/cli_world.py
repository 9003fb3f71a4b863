"""What the tests of the command line share: a tiny network, a photo, an inversion of both, and how to run a command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from click.testing import CliRunner, Result
from PIL import Image

from clone_fast import cli
from clone_fast.checkpoints import save_network
from clone_fast.edit import pca_directions
from clone_fast.nn import Architecture, Discriminator, Generator, Network

TINY = Architecture(
    img_resolution=16,
    z_dim=16,
    w_dim=16,
    mapping_layers=2,
    channel_base=256,
    channel_max=16,
    mbstd_group_size=2,
)
WRITTEN = {
    "clone.png",
    "latent_only.png",
    "report.png",
    "curve.png",
    "metrics.json",
    "generator.safetensors",
    "latent.safetensors",
}
# Options that every command with an inversion takes, and what `invert` gets of them.
GIVEN = {
    "--network": "n.pkl",
    "--discriminator": "d.pkl",
    "--steps": 7,
    "--latent-steps": 8,
    "--mode": "recon",
    "--space": "w",
    "--target-psnr": 33.5,
    "--precision": "bf16",
    "--real-images": "others",
    "--resize": "pad",
    "--device": "cpu",
    "--seed": 9,
    "--label": 3,
}
TAKEN = {
    "network": Path("n.pkl"),
    "discriminator": Path("d.pkl"),
    "steps": 7,
    "latent_steps": 8,
    "mode": "recon",
    "space": "w",
    "target_psnr": 33.5,
    "precision": "bf16",
    "recompute": True,
    "real_images": Path("others"),
    "resize": "pad",
    "device": "cpu",
    "seed": 9,
    "label": 3,
}


def arguments(options: dict[str, Any]) -> list[Any]:
    """These options, and the one without a value."""
    return ["--recompute", *(part for pair in options.items() for part in pair)]


class World(NamedTuple):
    """The files of these tests."""

    folder: Path
    photo: Path
    network: Path
    no_discriminator: Path
    inversion: Path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def short(world: World, *arguments: object, network: Path | None = None, photo: Path | None = None) -> list[object]:
    """An inversion of a few steps, its output folder still to be named."""
    start = ("invert", photo or world.photo, "--network", network or world.network)
    return [*start, "--steps", 2, "--latent-steps", 3, "--device", "cpu", *arguments]


def folder_command(world: World, photos: Path, out: Path, *arguments: object) -> list[object]:
    """An inversion of every photo in a few steps."""
    start = ("invert-folder", photos, "--out", out, "--network", world.network)
    return [*start, "--steps", 2, "--latent-steps", 3, "--device", "cpu", *arguments]


def copies(world: World, folder: Path, count: int) -> list[str]:
    """A new folder with so many photos; their names."""
    folder.mkdir()
    names = [f"{i}.png" for i in range(count)]
    for name in names:
        shutil.copy(world.photo, folder / name)
    return names


def results(out: Path) -> list[str]:
    """The results in a folder, each of them whole."""
    found = sorted(path for path in out.iterdir() if not path.name.startswith("."))
    for path in found:
        assert {file.name for file in path.iterdir()} == WRITTEN
    return [path.name for path in found]


def build(folder: Path) -> World:
    """A photo, two networks and an inversion of a few steps."""
    made = World(folder, *(folder / name for name in ("photo.png", "net.safetensors", "g.safetensors", "saved")))
    torch.manual_seed(0)
    generator, discriminator = Generator(TINY), Discriminator(TINY)
    directions = {"smile": pca_directions(generator, 1, 64)["pca1"]}
    save_network(Network(generator, discriminator, directions=directions), made.network)
    save_network(Network(generator), made.no_discriminator)
    y, x = np.mgrid[:40, :50]
    Image.fromarray(np.stack([x * 5, y * 6, x + y], axis=2).astype(np.uint8)).save(made.photo)
    outcome = run(*short(made, "--out", made.inversion))
    assert outcome.exit_code == 0, outcome.output
    return made


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def assert_one_line(result: Result, *parts: str) -> None:
    """The form of every mistake that a user can make."""
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]
    assert result.stdout == ""
