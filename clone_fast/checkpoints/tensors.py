"""Tensors as a file describes them: checked when the file is parsed, read when they are used; or of a module in memory.

A trainer's file holds three times as much optimiser state as weights. So parsing builds `StoredTensor`s,
which know shape and dtype and where their bytes are, and only the ones that end up in a network are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from clone_fast.errors import CheckpointError

_MAX_DIMS = 8
_MAX_COUNT = 1 << 48  # of elements; a bound that keeps the arithmetic below small
Buffer = memoryview | bytes | bytearray


class LazyTensor(Protocol):
    """What readers hand on: shape and dtype now, the values by `load()` (contiguous; of a file, on the CPU)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def load(self) -> Tensor: ...


@dataclass
class Storage:
    """A run of numbers in a file. `read` gives a view of its bytes, and may be set after parsing."""

    source: str
    dtype: torch.dtype
    numel: int
    read: Callable[[], Buffer] | None = None

    def span(self, start: int, stop: int) -> Tensor:
        """A copy of the elements [start, stop), 1-D."""
        data = memoryview(self.read()) if self.read is not None else memoryview(b"")
        size = self.dtype.itemsize
        if len(data) != self.numel * size:
            wanted = f"{self.numel * size} bytes of a tensor wanted, got {len(data)}"
            raise CheckpointError(f"{self.source}: damaged or truncated: {wanted}")
        if stop == start:
            return torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(bytearray(data[start * size : stop * size]), dtype=self.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A view of a `Storage` with any strides, of which `stored_tensor` has checked that they stay inside."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def load(self) -> Tensor:
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        span = self.storage.span(self.offset, self.offset + _reach(self.shape, self.stride))
        return torch.empty(self.shape, dtype=self.dtype).copy_(span.as_strided(self.shape, self.stride))


@dataclass(frozen=True)
class HeldTensor:
    """A tensor of a module in memory. `load` copies it, and leaves the copy on its device."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def load(self) -> Tensor:
        return self.tensor.detach().clone(memory_format=torch.contiguous_format)


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(item) is int and 0 <= item < _MAX_COUNT for item in value)


def stored_tensor(storage: Any, offset: Any, shape: Any, stride: Any, source: str) -> StoredTensor:
    """A checked `StoredTensor`: all of it lies in the storage, of which it has no more elements."""
    if not isinstance(storage, Storage):
        raise CheckpointError(f"{source}: damaged: a tensor without a storage")
    if not (_counts((offset,)) and _counts(shape) and _counts(stride)):
        raise CheckpointError(f"{source}: damaged: a tensor whose offset, shape or strides are no counts")
    if len(shape) != len(stride) or len(shape) > _MAX_DIMS:
        raise CheckpointError(
            f"{source}: damaged: a tensor of {len(shape)} dimensions and {len(stride)} strides"
        )
    elements = math.prod(shape)
    beyond = offset + _reach(shape, stride) > storage.numel if elements else False
    if elements > storage.numel or beyond:
        raise CheckpointError(
            f"{source}: refused: a tensor asks for {elements} elements of a storage with {storage.numel}"
        )
    return StoredTensor(storage, offset, shape, stride)
