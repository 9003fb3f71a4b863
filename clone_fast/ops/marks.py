"""Marks on disk: rehearsals of which everything is compiled, so that a later process need not run them to find that.

A mark is an empty file beside those of `clone_fast.kernels._ahead` for single kernels, and is gone when Triton's cache
is. Where other parts of the cache are deleted and a mark is left, kernels are compiled as they are launched, one after
the other; so are the few of a rehearsal that were not worth a process. Its name is a digest of whatever decides which
kernels those are: what was rehearsed, versions and sources, the GPU, and what the environment and PyTorch are set to.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
from collections.abc import Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from clone_fast.ops.dispatch import compiles, installed

PLAIN = frozenset([bool, int, float, str, type(None), torch.dtype])


def name(device: torch.device, kind: Hashable) -> str | None:
    """The path of the mark for a kind of rehearsal, with what is set now; None where there can be none: nothing is
    compiled on this device, or part of the kind has no words that would be the same in another process."""
    if not compiles(device):
        return None
    try:
        words = _words(kind)
    except TypeError:
        return None
    about = repr((words, _built(), _gpu(device), installed(), _settings(device)))
    ahead = importlib.import_module("clone_fast.kernels._ahead")
    return str(ahead.folder() / f"{hashlib.sha256(about.encode()).hexdigest()}.all")


def found(path: str | None) -> bool:
    """Whether there is such a mark."""
    return path is not None and os.path.exists(path)


def leave(paths: Iterable[str | None]) -> None:
    """Leave these marks. A folder that cannot be written has none, and rehearsals run there as ever."""
    with suppress(OSError):
        for path in filter(None, paths):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()


def _words(value: Any) -> str:
    """The same in every process; raises TypeError for what may be told by its address alone, or has no order."""
    if type(value) in PLAIN:
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_words, value))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}={_words(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__qualname__}({', '.join(fields)})"
    raise TypeError(f"no words for a {type(value).__name__}")


@functools.cache
def _built() -> tuple[str, ...]:
    """Versions, a digest of this package's sources, and which extension there is."""
    import triton

    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.find_spec("clone_fast.kernels")
    kernels = (spec.submodule_search_locations if spec is not None else None) or []
    extension = importlib.util.find_spec("clone_fast._C")
    about = os.stat(extension.origin) if extension is not None and extension.origin else None
    native = "" if about is None else f"{about.st_size} {about.st_mtime_ns}"
    return torch.__version__, triton.__version__, _digest([package, *map(Path, kernels)]), native


def _digest(folders: Iterable[Path]) -> str:
    """Of the contents of all sources in these folders: a few milliseconds for 1 MB."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            text = path.read_bytes()
            found.update(f"{path.relative_to(folder)} {len(text)} ".encode() + text)
    return found.hexdigest()


def _gpu(device: torch.device) -> tuple[Any, ...]:
    """What leaves and their tables ask of it."""
    if device.type != "cuda":
        return (device.type,)
    about = torch.cuda.get_device_properties(device)
    return about.name, about.major, about.minor, about.multi_processor_count


def _settings(device: torch.device) -> tuple[Any, ...]:
    """What may be set around a rehearsal, by the user or a stage, and changes what it launches."""
    kind = device.type
    return (
        sorted(item for item in os.environ.items() if item[0].startswith("CLONE_FAST_")),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )
