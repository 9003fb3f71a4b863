"""photo.py: every kind of source, the geometry, and an error of one line for each that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clone_fast.errors import PhotoError
from clone_fast.photo import (
    MIN_SIDE,
    load_photo,
    open_photo,
)


def gradient(height: int = 40, width: int = 40) -> np.ndarray:
    """[height, width, 3] uint8: red grows to the right, green downwards, blue along the diagonal."""
    y, x = np.mgrid[:height, :width]
    red, green = x * 255 // (width - 1), y * 255 // (height - 1)
    return np.stack([red, green, (red + green) // 2], axis=2).astype(np.uint8)


def as_tensor(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 -> [1, 3, H, W] float32 in [-1, 1], by the definition."""
    return torch.tensor(pixels / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]


def saved(folder: Path, image: Image.Image, name: str = "photo.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


# sources


@pytest.mark.parametrize("kind", ["str", "path", "pil", "uint8", "uint16", "float64", "float16", "chw", "u8 chw"])
def test_every_source_gives_the_same_tensor(tmp_path: Path, kind: str) -> None:
    pixels = gradient()
    path = saved(tmp_path, Image.fromarray(pixels))
    exact = as_tensor(pixels)
    source = {
        "str": str(path),
        "path": path,
        "pil": Image.fromarray(pixels),
        "uint8": pixels,
        "uint16": pixels.astype(np.uint16) * 257,
        "float64": pixels / 255,
        "float16": (pixels / 255).astype(np.float16),
        "chw": exact[0].double(),
        "u8 chw": torch.tensor(pixels).permute(2, 0, 1)[None],
    }[kind]
    image = load_photo(source, 40)
    assert image.shape == (1, 3, 40, 40)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    torch.testing.assert_close(image, exact, rtol=0, atol=1e-3 if kind == "float16" else 5e-7)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "F"])
def test_every_colour_mode_is_seen_as_grey(tmp_path: Path, mode: str) -> None:
    """A picture of black and white, which every mode can express, comes out the same."""
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:, 10:] = 255
    grey = pixels[..., 0]
    special = {"I;16": grey.astype(np.uint16) * 257, "F": grey.astype(np.float32) / 255}
    image = Image.fromarray(special[mode]) if mode in special else Image.fromarray(pixels).convert(mode)
    assert image.mode == mode
    torch.testing.assert_close(load_photo(image, 20), as_tensor(pixels), rtol=0, atol=1e-6)


def test_16_bit_grey_keeps_its_precision(tmp_path: Path) -> None:
    values = (np.arange(400, dtype=np.uint16) + 30_000).reshape(20, 20)
    image = load_photo(saved(tmp_path, Image.fromarray(values)), 20)
    expected = torch.tensor(values / 65535 * 2 - 1, dtype=torch.float32).expand(1, 3, 20, 20)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    red = Image.new("RGB", (32, 32), (220, 20, 30)).convert("CMYK")
    image = load_photo(saved(tmp_path, red, "photo.jpg", quality=98), 32)
    torch.testing.assert_close(
        image.mean((0, 2, 3)), as_tensor(np.array([[[220, 20, 30]]]))[0, :, 0, 0], rtol=0, atol=0.03
    )


@pytest.mark.parametrize("kind", ["rgba file", "palette file", "array", "la"])
def test_transparent_pixels_lie_on_white(tmp_path: Path, kind: str) -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)  # black
    pixels[..., 3] = 255
    pixels[:, :8, 3] = 0  # left half transparent
    if kind == "rgba file":
        source: Any = saved(tmp_path, Image.fromarray(pixels))
    elif kind == "palette file":
        palette = Image.new("P", (16, 16), 1)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(0, (0, 0, 8, 16))
        source = saved(tmp_path, palette, transparency=0)
    elif kind == "array":
        source = pixels / 255
    else:
        source = Image.fromarray(pixels).convert("LA")
    image = load_photo(source, 16)
    assert bool((image[..., :8] == 1).all())
    assert bool((image[..., 8:] == -1).all())


def test_half_transparent_is_half_white() -> None:
    pixels = np.zeros((16, 16, 4))
    pixels[..., 3] = 0.25
    torch.testing.assert_close(load_photo(pixels, 16), torch.full((1, 3, 16, 16), 0.5), rtol=0, atol=1e-6)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = gradient(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    path = saved(tmp_path, Image.fromarray(pixels), exif=exif)
    upright = np.rot90(pixels, -1)
    torch.testing.assert_close(load_photo(path, 20, crop=(0, 5, 20)), as_tensor(upright[5:25]), rtol=0, atol=1e-6)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("L", (16, 16), level) for level in (255, 0)]
    path = saved(tmp_path, frames[0], "photo.gif", save_all=True, append_images=frames[1:])
    assert float(load_photo(path, 16).min()) == 1


def test_gradient_and_caller_are_left_alone() -> None:
    source = torch.full((3, 16, 16), 1.2, requires_grad=True)
    image = load_photo(source, 16)
    assert not image.requires_grad
    assert float(image.max()) == 1  # a generator's overshoot is clamped
    assert float(source.detach().max()) == pytest.approx(1.2)


# geometry


def test_centre_square_of_a_wide_photo() -> None:
    pixels = gradient(20, 33)
    torch.testing.assert_close(load_photo(pixels, 20), as_tensor(pixels[:, 6:26]), rtol=0, atol=1e-6)


def test_crop_is_left_top_size() -> None:
    pixels = gradient(40, 60)
    torch.testing.assert_close(
        load_photo(pixels, 20, crop=(31, 7, 20)), as_tensor(pixels[7:27, 31:51]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("transpose", [False, True])
def test_pad_mirrors_the_photo(transpose: bool) -> None:
    pixels = gradient(20, 40)
    expected = np.concatenate([pixels[9::-1], pixels, pixels[:9:-1]])
    if transpose:
        pixels, expected = pixels.swapaxes(0, 1), expected.swapaxes(0, 1)
    torch.testing.assert_close(load_photo(pixels, 40, resize="pad"), as_tensor(expected), rtol=0, atol=1e-6)


def test_pad_of_a_very_long_photo_has_no_flat_border() -> None:
    image = load_photo(gradient(16, 400), 64, resize="pad")
    assert image.shape == (1, 3, 64, 64)
    assert bool(torch.isfinite(image).all())


def test_reducing_does_not_alias() -> None:
    """The finest stripes average to grey; picking every fourth pixel would give black or white."""
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[:, ::2] = 255
    image = load_photo(pixels, 32)[..., 2:-2]
    assert float(image.abs().max()) < 0.02


def test_resampling_is_lanczos_in_floating_point() -> None:
    pixels = gradient(37, 37)
    image = load_photo(pixels, 64)
    eight_bit = Image.fromarray(pixels).resize((64, 64), Image.Resampling.LANCZOS)
    difference = (image - as_tensor(np.asarray(eight_bit))).abs() * 127.5
    assert 0.05 < float(difference.max()) < 1.01  # Pillow's own result is this one, rounded


# what cannot be used


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def noise() -> Image.Image:
    """A picture that no format can shorten, so that every cut takes pixels away."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def png_bytes(folder: Path) -> bytes:
    return saved(folder, noise(), "whole.png").read_bytes()


FILES: dict[str, Any] = {
    "no such photo": lambda d: d / "nowhere.png",
    "is a folder": lambda d: d,
    "empty": lambda d: write(d / "a.png", b""),
    "not an image": lambda d: write(d / "a.png", b"hello, this is text"),
    "damaged or cut short": lambda d: write(d / "a.png", png_bytes(d)[:400]),
    "1x1 pixels": lambda d: saved(d, Image.new("RGB", (1, 1))),
    "15x40 pixels": lambda d: saved(d, Image.new("RGB", (15, 40))),
}


@pytest.mark.parametrize("message", FILES)
def test_unusable_file(tmp_path: Path, message: str) -> None:
    path = FILES[message](tmp_path)
    with pytest.raises(PhotoError, match=message) as caught:
        load_photo(path, 32)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_every_cut_is_a_photo_error(tmp_path: Path, suffix: str) -> None:
    content = saved(tmp_path, noise(), f"whole.{suffix}").read_bytes()
    for share in (0.02, 0.3, 0.7, 0.95):
        with pytest.raises(PhotoError):
            load_photo(write(tmp_path / f"cut.{suffix}", content[: int(len(content) * share)]), 32)


@pytest.mark.parametrize("factor", [1.5, 3])
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Pillow warns above its limit and raises above twice the limit: both are errors here."""
    path = saved(tmp_path, Image.new("L", (60, 60)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(3600 / factor))
    with pytest.raises(PhotoError, match="more than"):
        open_photo(path)


def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PhotoError, match="not a regular file"):
        load_photo(tmp_path / "pipe", 32)


OBJECTS: dict[str, tuple[Any, str]] = {
    "none": (None, "got NoneType"),
    "list": ([[0.0]], "got list"),
    "nan array": (np.full((20, 20, 3), np.nan), "NaN"),
    "array of 0..255 floats": (gradient().astype(np.float32), r"must be in \[0, 1\]"),
    "negative floats": (np.full((20, 20), -0.1), r"must be in \[0, 1\]"),
    "two channels": (np.zeros((20, 20, 2), np.uint8), "1, 3 or 4 channels"),
    "channels first": (np.zeros((3, 20, 20), np.uint8), "1, 3 or 4 channels"),
    "four axes": (np.zeros((1, 20, 20, 3), np.uint8), "an array must be"),
    "empty array": (np.zeros((0, 20, 3), np.uint8), "an array must be"),
    "int64 array": (np.zeros((20, 20, 3), np.int64), "uint8, uint16 or floating"),
    "bool array": (np.zeros((20, 20, 3), bool), "uint8, uint16 or floating"),
    "complex array": (np.zeros((20, 20, 3), complex), "uint8, uint16 or floating"),
    "nan tensor": (torch.full((3, 20, 20), float("nan")), "NaN"),
    "tensor of 0..255 floats": (torch.full((3, 20, 20), 200.0), r"must be in \[-1, 1\]"),
    "channels last": (torch.zeros(20, 20, 3), r"\[3, H, W\]"),
    "two images": (torch.zeros(2, 3, 20, 20), r"\[3, H, W\]"),
    "int64 tensor": (torch.zeros(3, 20, 20, dtype=torch.int64), "uint8 or floating"),
    "small tensor": (torch.zeros(3, 8, 8), "at least 16x16"),
    "float image out of range": (Image.fromarray(np.full((20, 20), 7, np.float32)), r"0\.\.1"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_unusable_object(name: str) -> None:
    source, message = OBJECTS[name]
    with pytest.raises(PhotoError, match=message) as caught:
        load_photo(source, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "stretch"}, "crop.*pad"),
        ({"crop": (0, 0, 41)}, "within 40x40"),
        ({"crop": (-1, 0, 20)}, "within 40x40"),
        ({"crop": (30, 0, 20)}, "within 40x40"),
        ({"crop": (0, 0, 0)}, "within"),
        ({"crop": (0, 0, 20.5)}, "within"),
        ({"crop": (0, 0)}, "three integers"),
        ({"crop": "abc"}, "three integers"),
        ({"crop": (0, 0, 10)}, "crop of the photo is 10x10"),
        ({"resolution": 0}, "positive integer"),
        ({"resolution": 32.0}, "positive integer"),
    ],
)
def test_unusable_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PhotoError, match=message):
        load_photo(gradient(), **{"resolution": 32, **options})


def test_small_generators_take_small_photos() -> None:
    assert MIN_SIDE == 16
    assert load_photo(np.zeros((8, 8, 3), np.uint8), 8).shape == (1, 3, 8, 8)
