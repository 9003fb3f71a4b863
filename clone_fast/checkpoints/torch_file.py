"""Files of `torch.save`, zip (since torch 1.6) or a run of pickles (before), without torch's unpickler.

The layouts are those of `torch.serialization`. Storages stay in the file (a memory map) until a tensor is
loaded.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

from clone_fast.checkpoints.safe_pickle import Global, Machine
from clone_fast.checkpoints.tensors import Storage
from clone_fast.checkpoints.vetted import TABLE
from clone_fast.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container
_MAGIC_HEAD = b"\x80\x02\x8a\n" + MAGIC.to_bytes(10, "little") + b"."
PROTOCOL = 1001
_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name


def is_zip(data: memoryview) -> bool:
    return bytes(data[:4]) == b"PK\x03\x04"


def is_legacy(data: memoryview) -> bool:
    return bytes(data[: len(_MAGIC_HEAD)]) == _MAGIC_HEAD


def read_pickle(data: memoryview, source: str) -> Any:
    """A plain pickle, such as NVIDIA's `.pkl`, or a torch file of either container, as inert objects."""
    if is_zip(data):
        return _read_zip(data, source)
    if is_legacy(data):
        return _read_legacy(data, source, _nested)[0]
    return Machine(data, source=source, table=TABLE, nested=_nested).run()


def _nested(outer: Machine, data: memoryview) -> Any:
    """A storage pickled on its own. It cannot hold another one, so an attacker cannot nest them."""
    if is_zip(data):
        outer.charge(len(data))
        return _read_zip(data, outer.source, None)
    value, used = _read_legacy(data, outer.source, None)
    outer.charge(used)
    return value


Nested = Callable[[Machine, memoryview], Any] | None


def _storage_of(pid: Any, source: str, fields: int) -> tuple[str, Storage]:
    """(key, storage without bytes) of a persistent id ("storage", type, key, location, count[, view])."""
    if not isinstance(pid, tuple) or len(pid) != fields or pid[0] != "storage":
        raise CheckpointError(f"{source}: refused: a persistent id that is no storage; nothing was executed")
    kind, key, count = pid[1], pid[2], pid[4]
    if not isinstance(kind, Global) or not isinstance(kind.value, torch.dtype):
        raise CheckpointError(f"{source}: refused: a storage of an unknown type; nothing was executed")
    if not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 48:
        raise CheckpointError(f"{source}: damaged: a storage without a key or a size")
    return key, Storage(source, kind.value, count)


def _view_end(pid: Any, source: str) -> None:
    if pid[5] is not None:
        raise CheckpointError(f"{source}: holds a view of a storage, which torch has not written since 0.4")


def _read_legacy(data: memoryview, source: str, nested: Nested) -> tuple[Any, int]:
    """The object, and how many bytes its pickles took."""
    storages: dict[str, Storage] = {}

    def persistent_load(pid: Any) -> Storage:
        key, storage = _storage_of(pid, source, 6)
        _view_end(pid, source)
        known = storages.setdefault(key, storage)
        if (known.dtype, known.numel) != (storage.dtype, storage.numel):
            raise CheckpointError(f"{source}: damaged: one storage with two sizes")
        return known

    position = 0

    def pickle(load: Callable[[Any], Any] | None = None) -> Any:
        nonlocal position
        machine = Machine(
            data, source=source, table=TABLE, position=position, persistent_load=load, nested=nested
        )
        value, position = machine.run(), machine.position
        return value

    magic, protocol, system = pickle(), pickle(), pickle()
    if magic != MAGIC or protocol != PROTOCOL:
        raise CheckpointError(f"{source}: not a torch file of a known version")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{source}: was written on a big-endian machine, which is not supported")
    value, keys = pickle(persistent_load), pickle()
    used = position
    for key in keys if isinstance(keys, list) else [None]:
        if not isinstance(key, str) or key not in storages:
            raise CheckpointError(f"{source}: damaged: its list of storages does not fit its tensors")
        storage, position = storages[key], _attach(storages[key], data, position)
    for storage in storages.values():
        if storage.read is None:
            raise CheckpointError(f"{source}: damaged: a storage is missing")
    return value, used


def _attach(storage: Storage, data: memoryview, position: int) -> int:
    """Point `storage` at its bytes: a count of elements (int64), then the elements. Returns the end."""
    start = position + 8
    end = start + storage.numel * storage.dtype.itemsize
    if end > len(data):
        raise CheckpointError(
            f"{storage.source}: truncated: {end - len(data)} bytes are missing; copy or download it again"
        )
    if struct.unpack_from("<q", data, position)[0] != storage.numel:
        raise CheckpointError(f"{storage.source}: damaged: a storage with two sizes")
    storage.read = lambda: data[start:end]
    return end


def _entries(data: memoryview, source: str) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(io.BufferedReader(_View(data))) as archive:
            return {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{source}: a damaged or truncated torch file ({error}); copy or download it again"
        ) from error


class _View(io.RawIOBase):
    """A memoryview as a file, without a copy, for `zipfile`."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._data))[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _entry_bytes(data: memoryview, info: zipfile.ZipInfo, source: str) -> memoryview:
    """A view of one entry, checked against its CRC; torch stores entries uncompressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(
            f"{source}: refused: a compressed or encrypted entry, which torch.save does not write"
        )
    name_size, extra_size = struct.unpack_from("<HH", data, info.header_offset + 26)
    start = info.header_offset + _LOCAL_HEADER + name_size + extra_size
    piece = data[start : start + info.file_size]
    if len(piece) != info.file_size or zlib.crc32(piece) != info.CRC:
        raise CheckpointError(
            f"{source}: damaged: a part of it does not fit its checksum; copy or download it again"
        )
    return piece


def _read_zip(data: memoryview, source: str, nested: Nested = _nested) -> Any:
    entries = _entries(data, source)
    roots = [
        name.removesuffix("data.pkl") for name in entries if name == "data.pkl" or name.endswith("/data.pkl")
    ]
    if any("/code/" in f"/{name}" for name in entries):
        raise CheckpointError(
            f"{source}: a TorchScript archive, which is a program; give the checkpoint it came from"
        )
    if len(roots) != 1:
        raise CheckpointError(
            f"{source}: a zip file, but not one of torch.save; unpack it and give the file inside"
        )
    root = roots[0]
    order = entries.get(f"{root}byteorder")
    if order is not None and bytes(_entry_bytes(data, order, source)) != b"little":
        raise CheckpointError(f"{source}: was written on a big-endian machine, which is not supported")
    storages: dict[tuple[str, torch.dtype, int], Storage] = {}

    def persistent_load(pid: Any) -> Storage:
        key, storage = _storage_of(pid, source, 5)
        info = entries.get(f"{root}data/{key}")
        if info is None or info.file_size != storage.numel * storage.dtype.itemsize:
            raise CheckpointError(f"{source}: damaged: a storage is missing or has the wrong size")
        storage.read = lambda: _entry_bytes(data, info, source)
        return storages.setdefault((key, storage.dtype, storage.numel), storage)

    program = _entry_bytes(data, entries[f"{root}data.pkl"], source)
    return Machine(program, source=source, table=TABLE, persistent_load=persistent_load, nested=nested).run()
