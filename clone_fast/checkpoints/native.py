"""Our own files: safetensors, with the architecture and the provenance in the header.

Keys are generator.*, discriminator.*, generator_raw.* (each a state dict in NVIDIA's layout) and
directions.*. The header has one entry, "clone_fast": JSON with `format_version`, `architecture`,
`discriminator_architecture` and `metadata`; one entry, so that equal networks give equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clone_fast.checkpoints.tensors import LazyTensor
from clone_fast.checkpoints.weights import Contents, Weights
from clone_fast.errors import CheckpointError
from clone_fast.files import write_aside
from clone_fast.nn import Architecture, Network

FORMAT_VERSION = 1
ENTRY = "clone_fast"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PARTS = ("generator", "discriminator", "generator_raw")


def is_native(head: bytes) -> bool:
    """Whether a file begins like safetensors: the size of a JSON header, then the header."""
    return len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000


def save_network(
    network: Network, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a network as one safetensors file.

    Args:
        network: what to write, everything in it.
        path: written aside first, so that a half-written file never stands there.
        dtype: how matrices and kernels are stored. Tensors with fewer than two dimensions are small and stay
            float32; loading gives float32 either way.

    Raises:
        ValueError: dtype is none of float32, float16, bfloat16.
        CheckpointError: a value does not fit the dtype.
        OutputError: the file cannot be written.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"save_network: dtype must be float32, float16 or bfloat16, got {dtype}")
    tensors: dict[str, Tensor] = {}
    for part in _PARTS:
        module = getattr(network, part)
        if module is not None:
            tensors |= {
                f"{part}.{name}": _stored(value, dtype) for name, value in module.state_dict().items()
            }
    tensors |= {
        f"directions.{name}": _stored(value, torch.float32) for name, value in network.directions.items()
    }
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name} is not finite as {value.dtype}; not written")
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "architecture": network.generator.arch.to_dict(),
        "metadata": network.metadata,
    }
    if network.discriminator is not None:
        header["discriminator_architecture"] = network.discriminator.arch.to_dict()
    content = safetensors.torch.save(tensors, metadata={ENTRY: json.dumps(header, sort_keys=True)})
    with write_aside(path) as file:
        file.write(content)


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    wanted = dtype if value.ndim >= 2 else torch.float32
    return value.detach().to("cpu", wanted, copy=True).contiguous()


@dataclass(frozen=True)
class _Entry:
    """A tensor of an open safetensors file."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> Tensor:
        value: Tensor = self.file.get_tensor(self.name)
        return value.to(torch.float32, copy=True)  # a copy, not a view of the file


def _entry(file: Any, key: str, source: str) -> _Entry:
    part = file.get_slice(key)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(part.get_dtype())
    if dtype is None:
        raise CheckpointError(f"{source}: {key!a} must be floating point, got {part.get_dtype()}")
    return _Entry(file, key, tuple(part.get_shape()), dtype)


def read(path: Path) -> Contents:
    """Contents of a file that `save_network` wrote."""
    name = path.name
    parts: dict[str, dict[str, LazyTensor]] = {part: {} for part in (*_PARTS, "directions")}
    try:
        file = safetensors.safe_open(path, framework="pt", device="cpu")
        header = _header((file.metadata() or {}).get(ENTRY), name)
        for key in file.keys():  # noqa: SIM118  (no dict)
            part, _, rest = key.partition(".")
            if part not in parts:
                raise CheckpointError(f"{name}: unexpected tensor {key!a}")
            parts[part][rest] = _entry(file, key, name)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{name}: a damaged or truncated safetensors file ({error})") from error
    arch = _arch(header, "architecture", name)
    contents = Contents(None, metadata=header["metadata"], directions=parts["directions"])
    if parts["generator"]:
        contents.generator = Weights(f"{name}: generator", parts["generator"], arch=arch)
    if parts["generator_raw"]:
        contents.generator_raw = partial(Weights, f"{name}: generator_raw", parts["generator_raw"], arch=arch)
    if parts["discriminator"]:
        theirs = _arch(header, "discriminator_architecture", name)
        contents.discriminator = partial(
            Weights, f"{name}: discriminator", parts["discriminator"], arch=theirs
        )
    for key, direction in contents.directions.items():
        if direction.shape != (arch.w_dim,):
            raise CheckpointError(
                f"{name}: direction {key!a} must be [{arch.w_dim}], got {list(direction.shape)}"
            )
    return contents


def _header(text: str | None, name: str) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(
            f"{name}: a safetensors file without clone_fast's header; give the .pkl or .pt it was made from"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: damaged: its header is no JSON") from error
    if isinstance(header, dict) and header.get("kind") == "clone":
        raise CheckpointError(
            f"{name}: a clone file, which holds only what a tweak changed; give the network that it was made from"
        )
    version = header.get("format_version") if isinstance(header, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{name}: of format {version}, newer than this clone_fast reads; update clone_fast"
        )
    metadata = header.get("metadata") if version == FORMAT_VERSION else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{name}: damaged: its header lacks the format version or the metadata")
    return dict(header)


def _arch(header: dict[str, Any], key: str, name: str) -> Architecture:
    values = header.get(key)
    if not isinstance(values, dict):
        raise CheckpointError(f"{name}: damaged: its header has no {key}")
    try:
        return Architecture.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: damaged: {key}: {error}") from error


def network_hash(network: Network) -> str:
    """SHA-256 (hex) of the generator: names, dtypes, shapes and bytes of its tensors, on whatever device."""
    digest = hashlib.sha256()
    for name, value in sorted(network.generator.state_dict().items()):
        flat = value.detach().to("cpu").contiguous()
        digest.update(f"{name} {flat.dtype} {list(flat.shape)}\n".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
