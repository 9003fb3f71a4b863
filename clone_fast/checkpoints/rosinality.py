"""Read and write rosinality/stylegan2-pytorch files, and read what stores its generator: pSp, e4e, ReStyle,
HyperStyle.

A training file holds g, d, g_ema, their optimisers and the arguments; the file of a converter g_ema and
latent_avg, and g and d where asked for. The inversion encoders keep the generator as `decoder.*` of a
state_dict, and no discriminator.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clone_fast.checkpoints import keymap
from clone_fast.checkpoints.safe_pickle import shown
from clone_fast.checkpoints.tensors import LazyTensor
from clone_fast.checkpoints.vetted import TENSORS
from clone_fast.checkpoints.weights import Contents, Weights, check_filter, shapes_only
from clone_fast.errors import CheckpointError
from clone_fast.files import write_aside
from clone_fast.nn import Architecture, MappingNetwork, Network

_MBSTD_GROUP = 4  # fixed in rosinality's discriminator
_MEAN_SAMPLES = 10_000
_MARKS = ("input.input", "conv1.conv.weight")  # names that only this family's generator has
_SHOWN_NAMES = 4
StateDict = dict[str, Any]


def is_generator(value: Any) -> bool:
    """Whether a dict is the state dict of this family's generator."""
    return isinstance(value, dict) and all(name in _plain(value) for name in _MARKS)


def read(value: StateDict, source: str) -> Contents | None:
    """Contents of an unpickled dict; None if it is none of this family."""
    decoder = _decoder(value)
    if decoder is not None:
        whole = value.get("state_dict")
        # a buffer of the encoder in some, an entry beside the state dict in most
        buffer = whole.get("latent_avg") if isinstance(whole, dict) else None
        weights, notes = generator_weights(decoder, value.get("latent_avg", buffer), f"{source}: decoder")
        metadata = {"source_format": "inversion encoder with a rosinality decoder", "source_file": source}
        return Contents(weights, metadata=metadata | notes)
    if is_generator(value):
        value = {"g_ema": value}
    best = next((name for name in ("g_ema", "g") if is_generator(value.get(name))), None)
    if best is None:
        return None
    weights, notes = generator_weights(value[best], value.get("latent_avg"), f"{source}: {best}")
    kind = "training file" if "args" in value else "file"
    contents = Contents(
        weights, metadata={"source_format": f"rosinality {kind}", "source_file": source} | notes
    )
    if best == "g_ema" and is_generator(value.get("g")):
        contents.generator_raw = lambda: generator_weights(value["g"], value.get("latent_avg"), f"{source}: g")[0]
    if isinstance(value.get("d"), dict):
        contents.discriminator = partial(discriminator_weights, value["d"], f"{source}: d")
    return contents


def _decoder(value: StateDict) -> StateDict | None:
    """The generator within a pSp-like state_dict ("decoder.*"), or under the key "decoder"."""
    if is_generator(value.get("decoder")):
        decoder: StateDict = value["decoder"]
        return decoder
    whole = value.get("state_dict")
    if not isinstance(whole, dict):
        return None
    inner = {
        name.removeprefix("decoder."): tensor
        for name, tensor in _plain(whole).items()
        if name.startswith("decoder.")
    }
    return inner if is_generator(inner) else None


def _plain(state: StateDict) -> StateDict:
    """Without the "module." of DataParallel."""
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(name, str)}


@dataclass(frozen=True)
class _Reshaped:
    tensor: LazyTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def load(self) -> Tensor:
        return self.tensor.load().reshape(self.shape)


@dataclass(frozen=True)
class _Drawn:
    """A constant noise map for a file of before they were stored."""

    shape: tuple[int, ...]
    seed: int
    dtype: torch.dtype = torch.float32

    def load(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class _MeanLatent:
    """latent_avg as rosinality's mean_latent finds it, for a file without: the mean of w over normal z."""

    layers: dict[str, LazyTensor]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def load(self) -> Tensor:
        values = {name: tensor.load().to(torch.float32) for name, tensor in self.layers.items()}
        z_dim = values["fc0.weight"].shape[1]
        with shapes_only():
            mapping = MappingNetwork(z_dim, 0, self.shape[0], None, num_layers=len(values) // 2)
        mapping.load_state_dict(values, assign=True)
        z = torch.randn(_MEAN_SAMPLES, z_dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            mean: Tensor = mapping(z.to(values["fc0.weight"].device)).mean(dim=0)
        return mean


@dataclass(frozen=True)
class _OneRow:
    """latent_avg [n, w_dim] as encoders store it: the repeated row, or the mean of rows that differ."""

    tensor: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def load(self) -> Tensor:
        rows = self.tensor.load()
        return rows[0] if bool((rows == rows[0]).all()) else rows.float().mean(dim=0)


def _tensors(state: StateDict, source: str) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for name, value in _plain(state).items():
        if not isinstance(value, TENSORS):
            raise CheckpointError(f"{source}: {shown(name)} is a {shown(type(value).__name__)}, not a tensor")
        found[name] = value
    return found


def _last_index(tensors: dict[str, LazyTensor], pattern: str) -> int:
    """The largest number that a name has at the place of the pattern's group; -1 if none."""
    return max((int(m[1]) for name in tensors if (m := re.fullmatch(pattern, name))), default=-1)


def _renamed(
    tensors: dict[str, LazyTensor], pairs: list[keymap.Pair], kernels: dict[str, float], source: str
) -> dict[str, LazyTensor]:
    """The tensors in NVIDIA's layout; checks that names are complete and low-pass filters the usual ones."""
    for name, total in kernels.items():
        if name in tensors:
            check_filter(tensors[name], f"{source}: {name}", total)
    known = {pair.rosinality for pair in pairs}
    missing = [pair.rosinality for pair in pairs if pair.rosinality not in tensors]
    extra = [shown(name) for name in tensors if name not in known and name not in kernels]
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            listed = ", ".join(names[:_SHOWN_NAMES]) + more
            raise CheckpointError(f"{source}: does not fit rosinality's StyleGAN2; {what}: {listed}")
    renamed: dict[str, LazyTensor] = {}
    for pair in pairs:
        tensor = tensors[pair.rosinality]
        shape = pair.to_nvidia(tuple(tensor.shape))
        if shape is None:
            raise CheckpointError(
                f"{source}: {pair.rosinality} has the unexpected shape {list(tensor.shape)}"
            )
        renamed[pair.nvidia] = _Reshaped(tensor, shape)
    return renamed


def generator_weights(state: StateDict, latent_avg: Any, source: str) -> tuple[Weights, dict[str, str]]:
    """The generator of a state dict, and notes on what the file lacks and was made up."""
    tensors = _tensors(state, source)
    notes: dict[str, str] = {}
    layers = sum(re.fullmatch(r"style\.\d+\.weight", name) is not None for name in tensors)
    blocks = _last_index(tensors, r"to_rgbs\.(\d{1,3})\.bias") + 1
    if not 1 <= blocks <= 8:
        raise CheckpointError(f"{source}: {blocks + 1} resolutions; a generator has 2 (8 px) to 9 (1024 px)")
    resolution = 4 << blocks
    pairs = keymap.generator_pairs(resolution, layers)
    for pair in pairs:
        if pair.nvidia.endswith(".noise_const") and pair.rosinality not in tensors:
            name = pair.nvidia.split(".")[1]
            size = int(name[1:])
            tensors[pair.rosinality] = _Drawn(
                (1, 1, size, size), seed=int(pair.rosinality.rpartition("_")[2])
            )
            notes["noise_const"] = "drawn with fixed seeds; the file has no noises"
    renamed = _renamed(tensors, pairs, keymap.generator_kernels(resolution), source)
    if isinstance(latent_avg, TENSORS):
        usable = len(latent_avg.shape) == 2 and latent_avg.shape[0] > 0
        renamed["mapping.w_avg"] = _OneRow(latent_avg) if usable else latent_avg
    elif layers:
        mapping = {
            name.removeprefix("mapping."): t for name, t in renamed.items() if name.startswith("mapping.")
        }
        last = mapping[f"fc{layers - 1}.bias"]
        renamed["mapping.w_avg"] = _MeanLatent(mapping, tuple(last.shape))
        notes["w_avg"] = f"mean of {_MEAN_SAMPLES} samples; the file has no latent_avg"
    return Weights(source, renamed, conv_clamp=None), notes


def discriminator_weights(state: StateDict, source: str) -> Weights:
    """The discriminator of a state dict."""
    tensors = _tensors(state, source)
    blocks = _last_index(tensors, r"convs\.(\d{1,3})\.conv1\.0\.weight")
    if not 1 <= blocks <= 8:
        raise CheckpointError(f"{source}: not a StyleGAN2 discriminator of rosinality")
    resolution = 4 << blocks
    pairs = keymap.discriminator_pairs(resolution)
    renamed = _renamed(tensors, pairs, keymap.discriminator_kernels(resolution), source)
    return Weights(source, renamed, conv_clamp=None, mbstd_group_size=_MBSTD_GROUP)


def save_rosinality(network: Network, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Write a file that rosinality's code, and what builds on it, loads: g_ema, latent_avg, and g and d where
    there.

    rosinality has no clamp, and a fixed minibatch group of 4; a network with another is written with a
    warning.

    Args:
        network: what to write; metadata and directions have no place in the format.
        path: written aside first, so that a half-written file never stands there.
        strict: refuse sizes that rosinality's own classes cannot be built with: they have 512 channels up to
            32 px and 16384 m / r at r >= 64 px for a whole m, RGB images, one size of z and w, and one
            minibatch feature. False writes the file anyway; `load_network` reads it.

    Raises:
        CheckpointError: there is no such network in rosinality (class labels), or strict refuses it.
        OutputError: the file cannot be written.
    """
    arch = network.arch
    reasons = _inexpressible(arch) + (_unbuildable(arch, network) if strict else [])
    if reasons:
        hint = "; strict=False (convert --force) writes it anyway" if strict and not _inexpressible(arch) else ""
        raise CheckpointError(f"rosinality's StyleGAN2 has no such network: {', '.join(reasons)}{hint}")
    for lost in _lost(network):
        warnings.warn(f"save_rosinality: {lost}", UserWarning, stacklevel=2)
    pairs = keymap.generator_pairs(arch.img_resolution, arch.mapping_layers)
    kernels = keymap.generator_kernels(arch.img_resolution)
    content: dict[str, Any] = {"g_ema": _state_dict(network.generator, pairs, kernels)}
    content["latent_avg"] = network.generator.mapping.w_avg.detach().to("cpu", torch.float32).clone()
    if network.generator_raw is not None:
        content["g"] = _state_dict(network.generator_raw, pairs, kernels)
    if network.discriminator is not None:
        size = network.discriminator.arch.img_resolution
        content["d"] = _state_dict(
            network.discriminator, keymap.discriminator_pairs(size), keymap.discriminator_kernels(size)
        )
    with write_aside(path) as file:
        torch.save(content, file)


def _inexpressible(arch: Architecture) -> list[str]:
    return [f"class labels (c_dim {arch.c_dim})"] if arch.c_dim else []


def _unbuildable(arch: Architecture, network: Network) -> list[str]:
    reasons = []
    if arch.img_channels != 3:
        reasons.append(f"{arch.img_channels} image channels instead of 3")
    if arch.z_dim != arch.w_dim:
        reasons.append(f"z_dim {arch.z_dim} other than w_dim {arch.w_dim}")
    parts = [arch] if network.discriminator is None else [arch, network.discriminator.arch]
    for part in parts:
        low = [r for r in part.block_resolutions if r <= 32 and part.channels(r) != 512]
        if low:
            reasons.append(f"{part.channels(low[0])} channels at {low[0]} px instead of 512")
        multipliers = {part.channels(r) * r / 16384 for r in part.block_resolutions if r >= 64}
        if len(multipliers) > 1 or not all(m >= 1 and m.is_integer() for m in multipliers):
            reasons.append("channels from 64 px up that are not 16384 m / r for one whole m")
    if parts[-1].mbstd_num_channels != 1 and network.discriminator is not None:
        reasons.append(f"{parts[-1].mbstd_num_channels} minibatch features instead of 1")
    return list(dict.fromkeys(reasons))


def _lost(network: Network) -> list[str]:
    lost = []
    if network.arch.conv_clamp is not None:
        lost.append(f"rosinality does not clamp; conv_clamp {network.arch.conv_clamp:g} is dropped")
    part = network.discriminator
    if part is not None and part.arch.mbstd_group_size != _MBSTD_GROUP:
        lost.append(
            f"rosinality's minibatch group is {_MBSTD_GROUP}; {part.arch.mbstd_group_size} is dropped"
        )
    return lost


def _state_dict(
    module: torch.nn.Module, pairs: list[keymap.Pair], kernels: dict[str, float]
) -> OrderedDict[str, Tensor]:
    ours = module.state_dict()
    state: OrderedDict[str, Tensor] = OrderedDict()
    for pair in pairs:
        value = ours[pair.nvidia].detach().to("cpu", torch.float32)
        state[pair.rosinality] = value.reshape(pair.to_rosinality(tuple(value.shape))).clone()
    for name, total in kernels.items():
        state[name] = keymap.low_pass(total)
    return state
