"""invert-folder by one process: a result for every photo, whole, and only once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import (
    GIVEN,
    TAKEN,
    WRITTEN,
    World,
    arguments,
    assert_one_line,
    build,
    copies,
    folder_command,
    results,
    run,
    short,
    tree,
)
from PIL import Image

from clone_fast import folder
from clone_fast.errors import CloneFastError, DivergenceError, MemoryLimitError, OutputError, SettingsError
from clone_fast.inversion import Inversion


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def photos(world: World, tmp_path: Path) -> Path:
    copies(world, tmp_path / "photos", 2)
    return tmp_path / "photos"


def outcomes(world: World, *each: Exception | None) -> Any:
    """In place of `invert_each`: a photo after the other, each with this error or a result."""

    def invert_each(photos: Any, network: Any = None, **_: Any) -> Iterator[tuple[int, Inversion | Exception]]:
        for index, (_photo, error) in enumerate(zip(photos, each, strict=True)):
            yield index, error or Inversion.load(world.inversion)

    return invert_each


def test_every_photo_has_a_result(world: World, photos: Path, tmp_path: Path) -> None:
    """Named with suffix and subfolder: no two photos have the same."""
    Image.open(world.photo).save(photos / "0.gif")
    Image.open(world.photo).save(photos / "0.jpg")
    (photos / "sub").mkdir()
    shutil.copy(world.photo, photos / "sub" / "0.png")
    shutil.copy(world.photo, photos / ".hidden.png")
    (photos / "notes.txt").write_text("no photo")
    out = tmp_path / "deep" / "out"
    result = run(*folder_command(world, photos, out))
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {".lock", "0.gif", "0.jpg", "0.png", "1.png", "sub"}
    for name in ("0.gif", "0.jpg", "0.png", "1.png", "sub/0.png"):
        assert {path.name for path in (out / name).iterdir()} == WRITTEN
    # the same as invert makes of it
    alone = tmp_path / "alone"
    run(*short(world, "--out", alone, photo=photos / "0.jpg"))
    assert torch.equal(Inversion.load(out / "0.jpg").image, Inversion.load(alone).image)
    assert "done      5 in " in result.stdout
    assert " an hour" in result.stdout
    assert str(out) in result.stdout
    assert "5/5" in result.stderr
    assert len(result.stdout.splitlines()) == 2


def test_a_finished_folder_is_left_as_it_is(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(*folder_command(world, photos, out)).exit_code == 0
    before = tree(out)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(folder, "invert_each", never)
    result = run(*folder_command(world, photos, out))
    assert result.exit_code == 0, result.output
    assert "skipped   2 done before" in result.stdout
    assert tree(out) == before


def test_a_photo_that_fails_is_told_and_tried_again(world: World, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (photos / "0.png").write_text("no picture")
    result = run(*folder_command(world, photos, out))
    assert result.exit_code == 1
    reason = "0.png: is not an image that Pillow can read; convert it to PNG or JPEG"
    assert f"Failed: {reason}" in result.stderr
    assert f"failed    {reason}" in result.stdout
    assert results(out) == ["1.png"]
    shutil.copy(world.photo, photos / "0.png")
    again = run(*folder_command(world, photos, out))
    assert again.exit_code == 0, again.output
    assert "done      1 in " in again.stdout
    assert results(out) == ["0.png", "1.png"]


@pytest.mark.parametrize("error", [DivergenceError("it is\nNaN"), MemoryLimitError("too large")])
def test_an_inversion_that_fails_is_not_fatal(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: CloneFastError
) -> None:
    monkeypatch.setattr(folder, "invert_each", outcomes(world, error, None))
    result = run(*folder_command(world, photos, tmp_path / "out"))
    assert result.exit_code == 1
    assert f"failed    0.png: {' '.join(str(error).split())}" in result.stdout
    assert results(tmp_path / "out") == ["1.png"]


def test_a_result_that_cannot_be_written_is_a_failure(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = folder.save_result
    errors: list[Exception] = [torch.OutOfMemoryError("no memory to draw it"), OutputError("report.png: disk full")]

    def fail(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        raise errors.pop()

    monkeypatch.setattr(folder, "save_result", fail)
    monkeypatch.setattr(folder, "invert_each", outcomes(world, None, None))
    result = run(*folder_command(world, photos, tmp_path / "out", "--quiet"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == ["Failed: 0.png: report.png: disk full", "Failed: 1.png: no memory to draw it"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}


def test_what_is_wrong_with_every_photo_ends_the_run(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "invert_each", outcomes(world, SettingsError("no such class"), None))
    result = run(*folder_command(world, photos, tmp_path / "out", "--quiet"))
    assert_one_line(result, "no such class")
    monkeypatch.undo()
    command = folder_command(world, photos, tmp_path / "out", "--quiet", "--network", world.no_discriminator)
    assert_one_line(run(*command), "--mode recon")
    assert_one_line(run(*command, "--network", tmp_path / "nowhere.pkl"), "nowhere.pkl")


def test_what_ctrl_c_cut_short_is_not_done(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(photos: Any, network: Any = None, **_: Any) -> Iterator[tuple[int, Inversion]]:
        for index, _photo in enumerate(photos):
            inversion = Inversion.load(world.inversion)
            inversion.settings["interrupted"] = index == 1
            yield index, inversion

    monkeypatch.setattr(folder, "invert_each", cut)
    result = run(*folder_command(world, photos, tmp_path / "out"))
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
    assert results(tmp_path / "out") == ["0.png"]


def test_every_option_reaches_the_inversions(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def watched(handed: Any, network: Any = None, **options: Any) -> Iterator[Any]:
        seen.update(options, network=network, photos=list(handed))
        return iter(())

    monkeypatch.setattr(folder, "invert_each", watched)
    run("invert-folder", photos, "--out", tmp_path / "out", *arguments(GIVEN | {"--at-once": 5}))
    assert seen == TAKEN | {"photos": [photos / "0.png", photos / "1.png"], "at_once": 5}


@pytest.mark.parametrize("networks", ["generator", "none"])
def test_less_is_kept_of_the_networks(world: World, photos: Path, tmp_path: Path, networks: str) -> None:
    (photos / "1.png").unlink()
    out = tmp_path / "out"
    assert run(*folder_command(world, photos, out, "--networks", networks)).exit_code == 0
    kept = {path.name for path in (out / "0.png").iterdir()}
    assert kept == (WRITTEN if networks == "generator" else WRITTEN - {"generator.safetensors"})
    if networks == "generator":
        assert Inversion.load(out / "0.png").discriminator is None
        assert run("edit", out / "0.png", "--direction", "smile", "--strength", 1).exit_code == 0
    assert "skipped   1" in run(*folder_command(world, photos, out)).stdout


def test_results_are_no_photos(world: World, photos: Path) -> None:
    """DIR may lie within PHOTOS."""
    assert run(*folder_command(world, photos, photos / "out")).exit_code == 0
    result = run(*folder_command(world, photos, photos / "out"))
    assert result.exit_code == 0, result.output
    assert "skipped   2" in result.stdout
    assert results(photos / "out") == ["0.png", "1.png"]
    before = tree(photos)
    assert_one_line(run(*folder_command(world, photos, photos)), "another folder")
    assert tree(photos) == before


def test_no_photos(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(run(*folder_command(world, tmp_path / "nowhere", tmp_path / "out")), "not a folder of photos")
    assert_one_line(run(*folder_command(world, tmp_path / "empty", tmp_path / "out")), "holds no image files")
    assert set(tree(tmp_path)) == {"empty"}


def test_another_run_is_not_disturbed(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = tmp_path / "out" / ".0123456789abcdef.part"
    unfinished.mkdir(parents=True)

    def taken(*_: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr("clone_fast.lock.fcntl.lockf", taken)
        assert_one_line(run(*folder_command(world, photos, tmp_path / "out")), "another run is at work there")
    assert unfinished.exists()
    assert run(*folder_command(world, photos, tmp_path / "out")).exit_code == 0
    assert not unfinished.exists()
