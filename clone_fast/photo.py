"""Photos in, pictures out: whatever holds an image -> a tensor [1, 3, R, R] in [-1, 1], and back to a file.

Inside of the package a photo is float32, RGB, NCHW, -1 = black, 1 = white. This module is the only place that
knows about files, colour modes, orientation and 8 bits. What cannot be used raises `PhotoError` with one line
that says what to do.
"""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clone_fast.errors import PhotoError
from clone_fast.files import write_aside

MIN_SIDE = 16
"""Shortest side in pixels that is still a photo (or the generator's resolution where that is smaller)."""

MAX_FOLDER_BYTES = 2 << 30
"""`real_images` keeps at most this many bytes of float32 pixels."""

_LEVEL = 4  # of zlib: the first that looks for longer matches; photos as small as at 6, within 5%, in half the time
_OVERSHOOT = 1.5  # a generator may draw a little outside of [-1, 1]; further out it is another range

# What Pillow's decoders raise on damaged files: for a broken PNG chunk, say, a SyntaxError.
_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, RuntimeError, EOFError, MemoryError),
    struct.error,
)


def load_photo(
    photo: Any, resolution: int, *, resize: str = "crop", crop: tuple[int, int, int] | None = None
) -> Tensor:
    """Read `photo` and fit it to a square of `resolution` pixels.

    Args:
        photo: one of
            - a path (`str` or `os.PathLike`) of a file that Pillow reads; of an animation, the first frame;
            - a `PIL.Image.Image` of any mode;
            - a numpy array [H, W] or [H, W, 1, 3 or 4]: uint8, uint16, or floating point in [0, 1];
            - a tensor [3, H, W] or [1, 3, H, W]: uint8, or floating point in [-1, 1].
        resolution: R, the side of the result in pixels.
        resize: how a photo that is not square becomes one. "crop": the largest square in its centre. "pad":
            the whole photo, extended by its own mirror image, since a flat border would be one more thing
            that no generator has seen.
        crop: (left, top, size), a square of the photo in pixels of the photo as it is seen (after the EXIF
            rotation).

    Rules: the EXIF orientation is applied. Transparent pixels are composited over white. Grey, palette and
    CMYK images become RGB; 16-bit grey keeps its precision. ICC profiles are not applied. Resampling is
    Pillow's Lanczos filter in float32, whose support grows with the factor (so it is its own anti-aliasing);
    a photo of R x R pixels keeps its values exactly. Values of a floating point tensor beyond [-1, 1] (a
    generator's own overshoot) are clamped.

    Returns:
        [1, 3, R, R] float32 in [-1, 1], on the CPU, contiguous.

    Raises:
        PhotoError: the file is missing, empty, damaged, no image, or larger than Pillow's limit against
            decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`, about 89 million pixels: raise it to read
            larger photos); a side is shorter than `MIN_SIDE` (or R, if less); the array or tensor has another
            shape, dtype or range, or holds NaN; `crop` leaves the photo; `resize` is unknown.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
        raise PhotoError(f"resolution must be a positive integer, got {resolution!r}")
    if resize not in ("crop", "pad"):
        raise PhotoError(f'resize must be "crop" or "pad", got {resize!r}')
    pixels, name = _read(photo)
    minimum = min(MIN_SIDE, resolution)
    if crop is not None:
        pixels = _crop(pixels, crop, name)
    height, width = pixels.shape[:2]
    if min(height, width) < minimum:
        what = "crop of the photo" if crop is not None else "photo"
        raise PhotoError(f"{name}: the {what} is {width}x{height} pixels, at least {minimum}x{minimum} are needed")
    if resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = _resample(pixels[top : top + side, left : left + side], resolution, resolution)
    else:
        scale = resolution / max(height, width)
        inner = _resample(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
        before = [(resolution - length) // 2 for length in inner.shape[:2]]
        border = [(b, resolution - length - b) for b, length in zip(before, inner.shape[:2], strict=True)]
        square = np.pad(inner, [*border, (0, 0)], mode="symmetric")
    return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))[None]


def open_photo(path: str | os.PathLike[str]) -> Image.Image:
    """Open and decode one image file completely, upright (EXIF orientation applied), in whatever mode it has.

    Raises:
        PhotoError: see `load_photo`.
    """
    path = Path(path)
    if not path.exists():
        raise PhotoError(f"{path}: no such photo")
    if path.is_dir():
        raise PhotoError(f"{path}: is a folder, give one image file")
    if not path.is_file():
        raise PhotoError(f"{path}: is not a regular file")
    if path.stat().st_size == 0:
        raise PhotoError(f"{path}: the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _upright(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PhotoError(
            f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS), make it smaller"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise PhotoError(f"{path}: is not an image that Pillow can read; convert it to PNG or JPEG") from error
    except PermissionError as error:
        raise PhotoError(f"{path}: no permission to read it") from error
    except _UNREADABLE as error:
        raise PhotoError(f"{path}: the image is damaged or cut short ({_one_line(error)})") from error


def photo_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The photos of a folder and its subfolders: files with the suffix of an image format that Pillow knows, in the
    order of their paths. Hidden ones, and those in hidden folders, do not count.

    Raises:
        PhotoError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PhotoError(f"{folder}: is not a folder of photos")
    suffixes = Image.registered_extensions()
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and p.is_file()
    )
    if not files:
        raise PhotoError(f"{folder}: holds no image files")
    return files


def real_images(folder: str | os.PathLike[str], resolution: int, *, limit: int = 1000) -> Tensor:
    """Load the photos of a folder and its subfolders: the x ~ p_x of the global term.

    `photo_files` says which files count. If there are more than `limit`, or more than fit `MAX_FOLDER_BYTES`
    (2 GiB: 2730 images of 256x256, 170 of 1024x1024), an evenly spaced selection is taken and a warning says so. A
    file that cannot be used is left out with one warning that counts and names them.

    Returns:
        [N, 3, R, R] float32 in [-1, 1], centre crops, on the CPU.

    Raises:
        PhotoError: no such folder, no image in it, or none that can be used.
    """
    if limit < 1:
        raise PhotoError(f"limit must be at least 1, got {limit}")
    files = photo_files(folder)
    most = min(limit, max(1, MAX_FOLDER_BYTES // (12 * resolution * resolution)))
    if len(files) > most:
        warnings.warn(f"{folder}: {len(files)} images, an even selection of {most} is used", stacklevel=2)
        files = [files[i * len(files) // most] for i in range(most)]
    images: list[Tensor] = []
    failures: list[PhotoError] = []
    for file in files:
        try:
            images.append(load_photo(file, resolution))
        except PhotoError as error:
            failures.append(error)
    if not images:
        raise PhotoError(f"{folder}: none of {len(files)} images can be used; the first: {failures[0]}")
    if failures:
        warnings.warn(
            f"{folder}: {len(failures)} of {len(files)} images left out; the first: {failures[0]}",
            stacklevel=2,
        )
    return torch.cat(images)


def to_uint8(image: Tensor) -> np.ndarray:
    """[3, H, W] or [1, 3, H, W] float in [-1, 1] -> [H, W, 3] uint8: round((x + 1) * 127.5), clamped to
    0..255.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(
            f"image must be floating point [3, H, W] or [1, 3, H, W], got {image.dtype} {tuple(image.shape)}"
        )
    pixels = image.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError("image holds NaN or infinity and cannot be drawn")
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] or [1, 3, H, W] float in [-1, 1] -> an RGB `PIL.Image.Image`; see `to_uint8`."""
    return Image.fromarray(to_uint8(image))


def save_png(path: str | os.PathLike[str], image: Tensor | Image.Image) -> None:
    """Write a tensor (see `to_uint8`) or a PIL image as PNG: beside the target first, then renamed over it.

    Raises:
        OutputError: the file cannot be written.
    """
    picture = to_pil(image) if isinstance(image, Tensor) else image
    with write_aside(path) as file:
        picture.save(file, format="PNG", compress_level=_LEVEL)


# ------------------------------------------------------------------------------------------------------------
# sources -> [H, W, 3], uint8 or float32 in [-1, 1]


def _read(photo: Any) -> tuple[np.ndarray, str]:
    """The pixels [H, W, 3] (uint8, or float32 in [-1, 1]) and what to call the photo in a message."""
    if isinstance(photo, (str, os.PathLike)):
        name = os.fspath(photo)
        return _from_pil(open_photo(photo), str(name)), str(name)
    if isinstance(photo, Image.Image):
        name = f"PIL image of mode {photo.mode}"
        try:
            image = _upright(photo)
        except _UNREADABLE as error:
            raise PhotoError(f"{name}: the image is damaged or cut short ({_one_line(error)})") from error
        return _from_pil(image, name), name
    if isinstance(photo, np.ndarray):
        name = f"array {photo.dtype} {photo.shape}"
        return _from_array(photo, name), name
    if isinstance(photo, Tensor):
        name = f"tensor {photo.dtype} {tuple(photo.shape)}"
        return _from_tensor(photo, name), name
    raise PhotoError(f"photo must be a path, PIL image, numpy array or tensor, got {type(photo).__name__}")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    return image.copy() if upright is None else upright


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith(("I", "F")):  # more than 8 bits; Pillow's own conversion to RGB would clip these
        values = np.asarray(image).astype(np.float32)
        top = 1.0 if image.mode == "F" else 65535.0
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
            raise PhotoError(f"{name}: values must be in 0..{top:g}, got {values.min():g}..{values.max():g}")
        return np.repeat((values / top * 2 - 1)[..., None], 3, axis=2)
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except _UNREADABLE as error:
        raise PhotoError(f"{name}: colour mode {image.mode} cannot become RGB; convert it first") from error


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise PhotoError(f"{name}: an array must be [H, W] or [H, W, channels] with 1, 3 or 4 channels")
    if array.dtype == np.uint8 and array.shape[2] != 4:
        return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
    if array.dtype in (np.uint8, np.uint16):
        values = array.astype(np.float32) / np.iinfo(array.dtype).max
    elif np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float32)
        if not np.isfinite(values).all():
            raise PhotoError(f"{name}: holds NaN or infinity")
        if values.min() < 0 or values.max() > 1:
            raise PhotoError(
                f"{name}: a floating point array must be in [0, 1], got [{values.min():g}, {values.max():g}]"
            )
    else:
        raise PhotoError(f"{name}: an array must be uint8, uint16 or floating point")
    if values.shape[2] == 4:
        alpha = values[..., 3:]
        values = values[..., :3] * alpha + (1 - alpha)
    return np.broadcast_to(values, (*values.shape[:2], 3)) * 2 - 1


def _from_tensor(tensor: Tensor, name: str) -> np.ndarray:
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 3 or tensor.shape[0] != 3 or 0 in tensor.shape:
        raise PhotoError(f"{name}: a tensor must be [3, H, W] or [1, 3, H, W]")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise PhotoError(f"{name}: a tensor must be uint8 or floating point")
    pixels = tensor.detach().cpu().permute(1, 2, 0)
    if pixels.dtype == torch.uint8:
        return pixels.contiguous().numpy()
    pixels = pixels.float()
    if not bool(torch.isfinite(pixels).all()):
        raise PhotoError(f"{name}: holds NaN or infinity")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_OVERSHOOT or high > _OVERSHOOT:
        raise PhotoError(f"{name}: a floating point tensor must be in [-1, 1], got [{low:g}, {high:g}]")
    return pixels.clamp(-1, 1).contiguous().numpy()


# ------------------------------------------------------------------------------------------------------------
# geometry


def _crop(pixels: np.ndarray, crop: tuple[int, int, int], name: str) -> np.ndarray:
    height, width = pixels.shape[:2]
    try:
        left, top, size = (int(v) for v in crop)
        whole = all(int(v) == v for v in crop)
    except (TypeError, ValueError) as error:
        raise PhotoError(f"crop must be three integers (left, top, size), got {crop!r}") from error
    if not whole or size < 1 or left < 0 or top < 0 or left + size > width or top + size > height:
        raise PhotoError(f"{name}: crop (left, top, size) = {tuple(crop)} must lie within {width}x{height} pixels")
    return pixels[top : top + size, left : left + size]


def _resample(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, 3] uint8 or float32 in [-1, 1] -> [height, width, 3] float32 in [-1, 1]; one channel at a time
    to save memory."""
    result = np.empty((height, width, 3), dtype=np.float32)
    for c in range(3):
        plane = pixels[..., c].astype(np.float32)
        if pixels.dtype == np.uint8:
            plane = plane / np.float32(127.5) - np.float32(1)
        if plane.shape != (height, width):
            plane = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
        result[..., c] = plane
    return result.clip(-1, 1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
