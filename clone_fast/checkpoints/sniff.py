"""Opening a file, and telling by its first bytes what is no checkpoint at all."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from clone_fast.errors import CheckpointError

_HEAD = 512
_OTHERS = (  # how files begin that are no checkpoint, and what to do about each
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes, not a StyleGAN2 network of PyTorch"),
    (b"\x89PNG", "a PNG image, not a network; photos are given without --network"),
    (b"\xff\xd8\xff", "a JPEG image, not a network; photos are given without --network"),
)


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read when touched; CheckpointError, saying what to do, where there are none."""
    if path.is_dir():
        raise CheckpointError(f"{path}: a directory; give the network file within")
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                raise CheckpointError(f"{path.name}: an empty file; copy or download it again")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    refuse_others(bytes(data[:_HEAD]), path.name)
    return data


def refuse_others(head: bytes, name: str) -> None:
    """Raise where a file begins like something that is often mistaken for a network."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{name}: a Git LFS pointer, not the network itself; fetch it with 'git lfs pull' or download it"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{name}: a web page saved under this name, not a network; the download link led to a page "
            "(a quota or login notice, say): open it in a browser and download the file itself"
        )
    for magic, what in _OTHERS:
        if head.startswith(magic):
            raise CheckpointError(f"{name}: {what}")
