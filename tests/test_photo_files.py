"""photo.py: pictures out, folders of photos in, and the photos of the demo."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clone_fast.errors import OutputError, PhotoError
from clone_fast.photo import load_photo, real_images, save_png, to_pil, to_uint8

# out


def test_uint8_inverts_load(tmp_path: Path) -> None:
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    np.testing.assert_array_equal(to_uint8(load_photo(pixels, 16)), pixels)
    image = torch.tensor(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    save_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
    assert to_pil(image[0]).mode == "RGB"


def test_uint8_clamps_and_rounds() -> None:
    image = torch.tensor([-3.0, -1.0, 0.0, 0.002, 1.0, 9.0]).reshape(1, 1, 6).expand(3, 1, 6)
    assert to_uint8(image)[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 4, 4), torch.zeros(1, 4, 4), torch.zeros(3, 4, 4).int()])
def test_uint8_refuses_shapes(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="image must be"):
        to_uint8(bad)


def test_uint8_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((3, 4, 4), float("nan")))


def test_save_replaces_and_leaves_no_part(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    save_png(tmp_path / "a.png", torch.zeros(3, 8, 8))
    assert Image.open(tmp_path / "a.png").size == (8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_failure_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")

    class HalfPicture(Image.Image):
        def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
            fp.write(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        save_png(tmp_path / "a.png", HalfPicture())
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        save_png(tmp_path / "file" / "a.png", torch.zeros(3, 8, 8))


# folders


def test_folder_of_photos(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / ".hidden").mkdir()
    for level, name in enumerate(["b.png", "a.jpg", "deeper/c.bmp", ".hidden/d.png"]):
        Image.new("L", (24, 20), 60 * level).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a photo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = real_images(tmp_path, 16)
    assert images.shape == (3, 3, 16, 16)
    levels = ((images.mean((1, 2, 3)) + 1) * 127.5).round().tolist()
    assert levels == [60, 0, 120]  # in the order of their paths


def test_folder_larger_than_the_limit_says_so(tmp_path: Path) -> None:
    for i in range(7):
        Image.new("L", (16, 16), 30 * i).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="7 images.*selection of 3"):
        images = real_images(tmp_path, 16, limit=3)
    assert ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 60, 120]


def test_damaged_photos_are_counted_and_named(tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"junk")
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 of 3 images left out.*b\.png"):
        assert len(real_images(tmp_path, 16)) == 1


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="not a folder"):
        real_images(tmp_path / "nowhere", 16)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(PhotoError, match="no image files"):
        real_images(tmp_path, 16)
    (tmp_path / "b.png").write_bytes(b"junk")
    with pytest.raises(PhotoError, match=r"none of 1.*b\.png"):
        real_images(tmp_path, 16)
    with pytest.raises(PhotoError, match="limit"):
        real_images(tmp_path, 16, limit=0)


# the photos of the demo


def test_demo_photos_are_squares_of_colour_or_grey() -> None:
    pytest.importorskip("skimage")
    from clone_fast.demo.photos import PHOTOS, photo

    assert len(PHOTOS) >= 6
    for name, (_, (_, _, size), description) in PHOTOS.items():
        image = photo(name)
        assert image.size == (size, size)
        assert image.mode == "RGB"
        assert np.asarray(image).std() > 5, f"{name} is flat"
        assert description


def test_demo_photo_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    from clone_fast.demo import photos

    with pytest.raises(PhotoError, match="there are astronaut, "):
        photos.photo("mona lisa")
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(PhotoError, match=r"pip install"):
        photos.photo("astronaut")
