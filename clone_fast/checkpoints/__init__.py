"""Read and write network files of every StyleGAN2 family, and modules in memory. Nothing in a file is ever executed.

`load_network` tells the format from the content: ours (native.py), NVIDIA's (nvidia.py), rosinality's and the
encoders built on it (rosinality.py). `counterparts` takes modules of these families in place of files
(modules.py). Pickles go through a machine that cannot call anything (safe_pickle.py, vetted.py), and all tensors
through the same checks against a `StyleGAN2` of the architecture they imply (weights.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clone_fast.checkpoints import native, nvidia, rosinality
from clone_fast.checkpoints.clone_file import Clone, load_clone, save_clone
from clone_fast.checkpoints.foreign import refuse_foreign
from clone_fast.checkpoints.modules import Counterpart, counterparts, write_back
from clone_fast.checkpoints.native import network_hash, save_network
from clone_fast.checkpoints.rewrite import save_nvidia, save_pti
from clone_fast.checkpoints.rosinality import save_rosinality
from clone_fast.checkpoints.safe_pickle import shown
from clone_fast.checkpoints.sniff import map_file
from clone_fast.checkpoints.torch_file import is_legacy, is_zip, read_pickle
from clone_fast.checkpoints.weights import Contents, Weights, architectures, build, differences
from clone_fast.errors import CheckpointError
from clone_fast.nn import Architecture, Discriminator, Generator, Network

__all__ = [
    "Clone",
    "Counterpart",
    "counterparts",
    "load_clone",
    "load_generator",
    "load_network",
    "network_hash",
    "require_discriminator",
    "save_clone",
    "save_network",
    "save_nvidia",
    "save_pti",
    "save_rosinality",
    "write_back",
]

StrPath = str | os.PathLike[str]


def load_network(
    path: StrPath, *, device: torch.device | str = "cpu", discriminator: StrPath | None = None
) -> Network:
    """Load a generator, its discriminator where the file has one, and what else the file tells.

    Args:
        path: a file of this package (safetensors), of stylegan2-ada-pytorch or stylegan3's StyleGAN2 (.pkl),
            a module saved whole, as PTI does (.pt), of rosinality or of an encoder with its decoder (.pt).
            The content decides, not the name.
        device: where to put the network.
        discriminator: another file to take the discriminator from; it must be of the same architecture.

    Returns:
        The network in float32 and eval mode, with gradients off.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or asks for something that a
            checkpoint does not need. The message says what it is and what to do. Nothing of the file was
            executed.
    """
    file = Path(path)
    other = None if discriminator is None else Path(discriminator)
    with _damage(file.name):
        contents = _read(file)
        weights = _generator_weights(contents, file)
        critic = _own_discriminator(contents) if other is None else _discriminator_of(other)
        arch, critic_arch = architectures(weights, critic)
        if critic_arch is not None:
            _check_belongs(file, arch, other or file, critic_arch)
        network = Network(build(Generator, arch, weights), metadata=dict(contents.metadata))
        if critic is not None and critic_arch is not None:
            network.discriminator = build(Discriminator, critic_arch, critic)
        if contents.generator_raw is not None:
            network.generator_raw = build(Generator, arch, contents.generator_raw())
        network.directions = {name: direction.load() for name, direction in contents.directions.items()}
    if other is not None:
        network.metadata["discriminator_file"] = other.name
    return network.to(device)


def load_generator(path: StrPath, *, device: torch.device | str = "cpu") -> Generator:
    """Load the generator alone (G_ema where the file has it); otherwise as `load_network`."""
    file = Path(path)
    with _damage(file.name):
        weights = _generator_weights(_read(file), file)
        generator = build(Generator, architectures(weights, None)[0], weights)
    return generator.to(device)


def require_discriminator(network: Network, path: StrPath) -> Discriminator:
    """The network's discriminator; raises CheckpointError, saying what to do, if `path` had none."""
    if network.discriminator is None:
        raise CheckpointError(
            f"{Path(path).name}: holds no discriminator; give the network it was made from as "
            "--discriminator base.pkl, or use --mode recon, which needs none"
        )
    return network.discriminator


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn whatever a damaged file causes into a CheckpointError: this is where untrusted bytes stop."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name}: damaged ({type(error).__name__}: {shown(error)})") from error


def _read(file: Path) -> Contents:
    data = map_file(file)
    head = bytes(data[:16])
    if native.is_native(head):
        return native.read(file)
    # protocols 2 and up begin with 0x80; older pickles with an opcode that makes or names something
    if not (is_zip(data) or is_legacy(data) or head[0] == 0x80 or head[:1] in b"(c]}lid"):
        raise CheckpointError(f"{file.name}: neither a pickle nor a torch or safetensors file")
    value: Any = read_pickle(data, file.name)
    if nvidia.is_nvidia(value):
        return nvidia.read(value, file.name)
    contents = rosinality.read(value, file.name) if isinstance(value, dict) else None
    if contents is None:
        refuse_foreign(value, file.name)
    return contents


def _generator_weights(contents: Contents, file: Path) -> Weights:
    if contents.generator is None:
        raise CheckpointError(
            f"{file.name}: holds no generator, only a discriminator; give the network's own file"
        )
    return contents.generator


def _own_discriminator(contents: Contents) -> Weights | None:
    return None if contents.discriminator is None else contents.discriminator()


def _discriminator_of(file: Path) -> Weights:
    with _damage(file.name):
        weights = _own_discriminator(_read(file))
    if weights is None:
        raise CheckpointError(
            f"{file.name}: holds no discriminator either; NVIDIA .pkl and rosinality training files do"
        )
    return weights


def _check_belongs(file: Path, arch: Architecture, critic_file: Path, critic_arch: Architecture) -> None:
    found = differences(critic_arch, arch, channels_too=critic_file is not file)
    if found:
        raise CheckpointError(
            f"{critic_file.name}: its discriminator does not belong to {file.name}: {', '.join(found)}"
        )
