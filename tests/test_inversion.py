"""The result of an inversion: its edits, and its folder."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from PIL import Image
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import inversion
from clone_fast.checkpoints import load_network
from clone_fast.errors import CheckpointError, OutputError, SettingsError
from clone_fast.inversion import Inversion
from clone_fast.latent import Latent
from clone_fast.photo import to_uint8


@pytest.fixture(scope="module")
def done() -> Inversion:
    return tiny.inverted()


@pytest.fixture
def folder(done: Inversion, tmp_path: Path) -> Path:
    done.save(tmp_path / "out")
    return tmp_path / "out"


# ---- edits -----------------------------------------------------------------------------------------------------------


def test_edits_move_the_latent_along_a_name_or_a_tensor(done: Inversion) -> None:
    move = done.directions["pca2"]
    edited = done.edit("pca2", 1.5)
    with torch.no_grad():
        want = Latent(done.latent.ws + 1.5 * move, done.latent.noise).draw(done.generator).clamp(-1, 1)
    assert torch.equal(edited, want)
    assert torch.equal(done.edit(move, 1.5), edited)
    assert not edited.requires_grad
    assert torch.equal(done.edit("pca1", 0.0), done.image)
    layers = torch.zeros(6, 16)
    layers[3] = move
    assert not torch.equal(done.edit(layers, 1.5), edited)


def test_an_unknown_direction_is_told_with_those_that_are_known(done: Inversion) -> None:
    with pytest.raises(SettingsError, match=r"no direction named 'smile'; known: pca1, "):
        done.edit("smile", 1.0)
    with pytest.raises(SettingsError, match="direction must be"):
        done.edit(torch.zeros(5), 1.0)


def test_the_directions_of_a_network_are_taken_instead_of_pca() -> None:
    net = tiny.network()
    net.directions = {"smile": torch.randn(16)}
    made = tiny.inverted(net, latent_steps=0, steps=1)
    assert set(made.directions) == {"smile"}
    assert made.edit("smile", 1.0).shape == (1, 3, 16, 16)


# ---- save and load ---------------------------------------------------------------------------------------------------


def strict(text: str) -> Any:
    """JSON without the NaN and Infinity that only Python reads."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_saved_is_loaded(done: Inversion, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "clone.png",
        "latent_only.png",
        "generator.safetensors",
        "latent.safetensors",
        "metrics.json",
    }
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loaded = Inversion.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.image, done.image)
    assert torch.equal(loaded.latent.ws, done.latent.ws)
    tiny.assert_state(loaded.generator, tiny.state(done.generator))
    assert loaded.discriminator is not None
    assert done.discriminator is not None
    tiny.assert_state(loaded.discriminator, tiny.state(done.discriminator))
    for got, want in ((loaded.photo, done.photo), (loaded.latent_only, done.latent_only)):
        torch.testing.assert_close(got, want, rtol=0, atol=0.5 / 127.5 + 1e-6)
    assert loaded.metrics == done.metrics
    assert loaded.history == done.history
    assert loaded.seconds == done.seconds
    assert loaded.settings == done.settings
    assert loaded.original is None
    assert torch.equal(loaded.edit("pca1", 2.0), done.edit("pca1", 2.0))
    for name, want in (("clone", done.image), ("latent_only", done.latent_only)):
        with Image.open(folder / f"{name}.png") as picture:
            assert (picture.size, picture.mode) == ((16, 16), "RGB")
            np.testing.assert_array_equal(np.asarray(picture), to_uint8(want))


def test_noise_maps_are_saved_with_the_latent(tmp_path: Path) -> None:
    net = tiny.network()
    made = tiny.inverted(net, latent=tiny.latent(net, noise=True), steps=1, mode="recon")
    made.save(tmp_path)
    loaded = Inversion.load(tmp_path)
    assert set(loaded.latent.noise) == set(net.generator.synthesis.noise_names())
    assert torch.equal(loaded.image, made.image)


def test_a_second_save_takes_the_place_of_the_first(folder: Path) -> None:
    other = tiny.inverted(seed=9)
    other.save(folder)
    assert torch.equal(Inversion.load(folder).image, other.image)
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("slow", ["save_network", "save_png", "write_aside"])
def test_the_numbers_come_last(done: Inversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """Who finds metrics.json finds all, however long another file takes."""
    late: list[bool] = []
    write = getattr(inversion, slow)

    def slowly(*arguments: Any) -> Any:
        if not str(arguments[0]).endswith("metrics.json"):
            time.sleep(0.3)
            late.append((tmp_path / "metrics.json").exists())
        return write(*arguments)

    monkeypatch.setattr(inversion, slow, slowly)
    done.save(tmp_path)
    assert late
    assert not any(late)
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "name", ["generator.safetensors", "latent.safetensors", "clone.png", "latent_only.png", "metrics.json"]
)
def test_a_file_that_cannot_be_written_is_told(done: Inversion, tmp_path: Path, name: str) -> None:
    (tmp_path / name / "in the way").mkdir(parents=True)
    with pytest.raises(OutputError, match=f"{name}: a directory"):
        done.save(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"generator.safetensors", "latent.safetensors", "clone.png", "latent_only.png", name}


def test_a_disk_that_is_full_leaves_no_part(done: Inversion, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"generator\.safetensors: cannot be written \(File too large\)"):
            done.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"clone.png", "latent_only.png", "latent.safetensors"}  # the small ones


def test_a_block_beside_it_can_fail(done: Inversion, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="beside"), done.saving(tmp_path):
        raise RuntimeError("beside")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"generator.safetensors", "latent.safetensors", "clone.png", "latent_only.png"}


def test_less_can_be_kept_of_the_networks(done: Inversion, folder: Path) -> None:
    done.save(folder, networks="generator")
    loaded = Inversion.load(folder)
    assert loaded.discriminator is None
    assert torch.equal(loaded.image, done.image)
    assert torch.equal(loaded.edit("pca1", 2.0), done.edit("pca1", 2.0))
    done.save(folder, networks="none")
    assert "generator.safetensors" not in {path.name for path in folder.iterdir()}
    assert (folder / "latent.safetensors").exists()
    with pytest.raises(SettingsError, match="both, generator, delta, none"):
        done.save(folder, networks="all")


def test_the_numbers_are_json_that_any_program_reads(done: Inversion, folder: Path, tmp_path: Path) -> None:
    content = strict((folder / "metrics.json").read_text())
    assert set(done.metrics) | {"steps", "seconds", "settings", "history"} == set(content)
    assert content["psnr"] == done.metrics["psnr"]
    # what is not finite: the PSNR of equal images, a loss that diverged, a clone that has not been drawn yet
    made = tiny.inverted(tweak_settings=tiny.settings(local_probability=0.6), seed=1)
    assert math.isnan(made.history[3]["psnr"])
    made.metrics["psnr"] = math.inf
    made.save(tmp_path / "other")
    content = strict((tmp_path / "other" / "metrics.json").read_text())
    assert content["psnr"] is None
    assert content["history"][3]["psnr"] is None
    assert math.isnan(Inversion.load(tmp_path / "other").history[3]["psnr"])


@pytest.mark.parametrize("name", ["generator.safetensors", "latent.safetensors", "latent_only.png", "metrics.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_a_folder_that_is_not_whole_is_refused(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": b"\xff\x00" * 500}[damage])
    with pytest.raises(CheckpointError) as caught:
        Inversion.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"seconds": {}, "settings": {}, "history": [3]}'])
def test_numbers_of_another_kind_are_refused(folder: Path, content: str) -> None:
    (folder / "metrics.json").write_text(content)
    with pytest.raises(CheckpointError, match="not an inversion that was saved whole"):
        Inversion.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"ws": torch.zeros(1, 3, 16)},
        {"photo": torch.zeros(16, 16, dtype=torch.uint8)},
        {"noise.b99.conv0": torch.zeros(8, 8)},
        {"noise.b8.conv0": torch.zeros(5, 5)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_latent_of_another_network_is_refused(folder: Path, changes: dict[str, Tensor]) -> None:
    file = folder / "latent.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | changes, file)
    with pytest.raises(CheckpointError, match="not an inversion that was saved whole"):
        Inversion.load(folder)


def test_a_folder_that_is_none_is_refused(done: Inversion, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Inversion.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be a folder"):
        done.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_the_generator_that_is_saved_is_a_network_of_its_own(done: Inversion, folder: Path) -> None:
    """What was tweaked for one photo can be the start for another."""
    net = load_network(folder / "generator.safetensors")
    assert net.metadata["network"] == "tiny0"
    assert set(net.directions) == set(done.directions)
    assert tiny.inverted(folder / "generator.safetensors", latent_steps=0, steps=1).settings["steps"] == 1
