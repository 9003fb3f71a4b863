"""Write networks as NVIDIA's codebases and those built on them read them: into the user's own pickle.

Such a pickle holds modules of classes whose source text it carries. That text is NVIDIA's, so we neither have it nor
make it up: `save_nvidia` overwrites the bytes of the tensors in a copy of the user's file, of which everything else
stays as it is, and `save_pti` takes the generator's opcodes out of that (pickle_slice.py). Nothing is executed.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clone_fast.checkpoints import nvidia
from clone_fast.checkpoints.pickle_slice import value_of
from clone_fast.checkpoints.safe_pickle import shown
from clone_fast.checkpoints.sniff import map_file
from clone_fast.checkpoints.tensors import StoredTensor
from clone_fast.checkpoints.torch_file import MAGIC, PROTOCOL, is_legacy, is_zip, read_pickle
from clone_fast.errors import CheckpointError
from clone_fast.files import write_aside
from clone_fast.nn import Network

StrPath = str | os.PathLike[str]
_OTHERS_WANT = ("G", "D", "G_ema")  # loaders of DragGAN and of NVIDIA's own tools insist on all three
_SHOWN = 4


def save_nvidia(network: Network, path: StrPath, base: StrPath) -> None:
    """Write a copy of an NVIDIA pickle with other numbers in its tensors.

    G_ema and G both become the network's generator, D its discriminator where it has one. Every opcode, shape and dtype
    of the base stays, and so do its low-pass filters.

    Args:
        path: written aside first.
        base: a .pkl of stylegan2-ada-pytorch or stylegan3 (StyleGAN2) of this architecture; pickle protocol 3 to 5.

    Raises:
        CheckpointError: the base is damaged, of another kind or of another architecture.
        OutputError: the file cannot be written.
    """
    file = Path(base)
    content, names = _patched(network, file)
    missing = [name for name in _OTHERS_WANT if name not in names]
    if missing:
        warnings.warn(
            f"{file.name} has no {', '.join(missing)}, and so the copy has none; some tools want G, D and G_ema",
            UserWarning,
            stacklevel=2,
        )
    with write_aside(path) as out:
        out.write(content)


def save_pti(network: Network, path: StrPath, base: StrPath) -> None:
    """Write the generator alone, as a module saved whole: what `torch.load(path, weights_only=False)` gives where
    NVIDIA's `torch_utils` and `dnnlib` can be imported, as in PTI.

    The class, with its source text, is that of G_ema in the base. It is a torch file of the container before 1.6, whose
    tensors bring their bytes along as in the base.

    Args and raises: as `save_nvidia`.
    """
    file = Path(base)
    content, names = _patched(network, file)
    with _rewriting(file.name):
        parts = value_of(content, "G_ema" if "G_ema" in names else "G")
    sizes = {"short": 2, "int": 4, "long": 4}
    system = {"protocol_version": PROTOCOL, "little_endian": sys.byteorder == "little", "type_sizes": sizes}
    with write_aside(path) as out:
        for value in (MAGIC, PROTOCOL, system):
            out.write(pickle.dumps(value, 2))
        for part in parts:
            out.write(part)
        out.write(pickle.dumps([], 2))  # the storages that follow: none


@contextmanager
def _rewriting(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{name}: cannot be rewritten: {shown(error)}") from error


def _patched(network: Network, file: Path) -> tuple[bytearray, list[str]]:
    """The bytes of the file with the network's numbers, and the names of the modules in it."""
    data = map_file(file)
    if is_zip(data) or is_legacy(data) or data[0] != 0x80:
        raise CheckpointError(f"{file.name}: not an NVIDIA .pkl; give the one that the network came from")
    value: Any = read_pickle(data, file.name)
    if not isinstance(value, dict) or not nvidia.is_nvidia(value):
        raise CheckpointError(f"{file.name}: a pickle, but not NVIDIA's dict of G, D and G_ema")
    names = [name for name in _OTHERS_WANT if value.get(name) is not None]
    if "G_ema" not in names and "G" not in names:
        raise CheckpointError(f"{file.name}: holds no generator")
    content = bytearray(data)
    for name in names:
        source = f"{file.name}: {name}"
        if name == "D":
            if network.discriminator is not None:
                _overwrite(content, data, value[name], network.discriminator, source)
            continue
        clamp = nvidia.generator_weights(value[name], source).conv_clamp
        if clamp != network.arch.conv_clamp:
            raise CheckpointError(f"{source}: has conv_clamp {clamp}, the network {network.arch.conv_clamp}")
        _overwrite(content, data, value[name], network.generator, source)
    return content, names


def _overwrite(content: bytearray, data: memoryview, stored: Any, module: nn.Module, source: str) -> None:
    """Put the module's numbers where the file has those of `stored`."""
    tensors = nvidia.flatten(stored, source)[0]
    state = {name: value for name, value in module.state_dict().items() if not name.endswith("resample_filter")}
    wrong = [
        name for name, value in state.items() if name not in tensors or tuple(tensors[name].shape) != value.shape
    ] + [name for name in tensors if name not in state and not name.endswith("resample_filter")]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        listed = ", ".join(shown(name) for name in wrong[:_SHOWN])
        raise CheckpointError(f"{source}: of another architecture than the network; different: {listed}{more}")
    for name, value in state.items():
        target = tensors[name]
        if not isinstance(target, StoredTensor) or target.storage.read is None:
            raise CheckpointError(f"{source}: {name} is not a tensor of torch, which cannot be overwritten")
        held = target.storage.read()
        start = _position(memoryview(held), data)
        if start is None:
            raise CheckpointError(
                f"{source}: its tensors are written as text, as pickle protocol 2 does; save it once with protocol 4"
            )
        region = bytearray(content[start : start + len(held)])
        numbers = torch.frombuffer(region, dtype=target.dtype)
        numbers.as_strided(target.shape, target.stride, target.offset).copy_(value)
        if not torch.isfinite(numbers).all():
            raise CheckpointError(f"{source}: {name} is not finite as {target.dtype}; not written")
        content[start : start + len(held)] = region


def _position(part: memoryview, whole: memoryview) -> int | None:
    """Where `part` begins in `whole`, by address; None if it is a copy from elsewhere."""
    addresses = [np.frombuffer(view, np.uint8).__array_interface__["data"][0] for view in (part, whole)]
    start = int(addresses[0] - addresses[1])
    return start if 0 <= start <= len(whole) - len(part) else None
