"""From named tensors in NVIDIA's layout to a module: find the architecture, check every shape, load.

All readers end here, so a file of any family passes the same checks. Shapes are compared with a module on
torch's meta device first: nothing of the claimed size is allocated until it is known that the file has the
numbers for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clone_fast.checkpoints.keymap import low_pass
from clone_fast.checkpoints.safe_pickle import shown
from clone_fast.checkpoints.tensors import LazyTensor
from clone_fast.errors import CheckpointError
from clone_fast.nn import Architecture, Discriminator, Generator

_FILTER = "resample_filter"
_SHOWN_NAMES = 4
Module = TypeVar("Module", Generator, Discriminator)


@dataclass
class Weights:
    """One module of a file.

    source            what messages name it: "network.pkl: G_ema"
    tensors           in NVIDIA's layout; low-pass filters are optional, and made anew
    conv_clamp        as in `Architecture`; shapes do not tell it
    mbstd_group_size  likewise
    channel_base      what the file says; shapes may leave several values open
    channel_max       likewise
    arch              where the file states it, as ours do
    """

    source: str
    tensors: dict[str, LazyTensor]
    conv_clamp: float | None = None
    mbstd_group_size: int | None = 4
    channel_base: int | None = None
    channel_max: int | None = None
    arch: Architecture | None = None

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.source}: no StyleGAN2 network: {name} is missing")
        if len(tensor.shape) != dims:
            raise CheckpointError(
                f"{self.source}: {name} must have {dims} dimensions, got {list(tensor.shape)}"
            )
        return tensor.shape

    def count(self, pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in self.tensors)


@dataclass
class Contents:
    """What a reader found. The modules that not every caller wants are read when called."""

    generator: Weights | None
    discriminator: Callable[[], Weights] | None = None
    generator_raw: Callable[[], Weights] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    directions: dict[str, LazyTensor] = field(default_factory=dict)


def architectures(
    generator: Weights, discriminator: Weights | None
) -> tuple[Architecture, Architecture | None]:
    """The `Architecture` of both, by file or by shapes; what one does not tell is taken from the other."""
    ours = generator.arch or _generator_arch(generator)
    if discriminator is None:
        return ours, None
    theirs = discriminator.arch or _discriminator_arch(discriminator)
    theirs = replace(theirs, z_dim=ours.z_dim, w_dim=ours.w_dim, mapping_layers=ours.mapping_layers)
    if not differences(theirs, ours):
        theirs = replace(theirs, channel_base=ours.channel_base, channel_max=ours.channel_max)
    ours = replace(
        ours, mbstd_group_size=theirs.mbstd_group_size, mbstd_num_channels=theirs.mbstd_num_channels
    )
    return ours, theirs


class _Shapes(TorchFunctionMode):
    """Of the operators that modules are made with, those that PyTorch has in Python for the meta device: calling one
    imports sympy and torch.compile, which takes as long as importing torch."""

    instead: ClassVar[dict[Any, Callable[..., Tensor]]] = {
        torch.randn: torch.empty,
        Tensor.div: lambda a, b: a.new_empty(a.shape),
        Tensor.mul: lambda a, b: a.new_empty(a.shape),
        Tensor.outer: lambda a, b: a.new_empty([len(a), len(b)]),
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.instead.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """What is made here, a module say, has shapes and no numbers, for `load_state_dict(..., assign=True)`."""
    with torch.device("meta"), _Shapes():
        yield


def build(kind: type[Module], arch: Architecture, weights: Weights) -> Module:
    """A `Generator` or `Discriminator` of this architecture with these weights: float32, frozen, in eval."""
    with shapes_only():
        module = kind(arch)
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    size = f"{arch.img_resolution}x{arch.img_resolution}"
    _check_names(weights, wanted, f"{size} StyleGAN2 {kind.__name__.lower()}")
    values: dict[str, Tensor] = {}
    for key in wanted:
        values[key] = low_pass() if key.endswith(_FILTER) else _float32(weights, key)
    module.load_state_dict(values, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def differences(
    discriminator: Architecture, generator: Architecture, *, channels_too: bool = True
) -> list[str]:
    """Why the two do not belong together, as phrases; empty if they do. In one file channels may differ."""
    found = [
        f"{name} {getattr(discriminator, name)} instead of {getattr(generator, name)}"
        for name in ("img_resolution", "img_channels", "c_dim")
        if getattr(discriminator, name) != getattr(generator, name)
    ]
    channels = [[arch.channels(r) for r in arch.block_resolutions] for arch in (discriminator, generator)]
    if channels_too and not found and channels[0] != channels[1]:
        found.append(f"channels {channels[0]} instead of {channels[1]}")
    return found


def _generator_arch(weights: Weights) -> Architecture:
    const = weights.shape("synthesis.b4.const", 3)
    if const[1] != const[2]:
        raise CheckpointError(
            f"{weights.source}: draws images that are not square ({const[1]}x{const[2]} at the start, as in "
            "StyleGAN-Human), which is not supported"
        )
    blocks = _block_resolutions(weights, r"synthesis\.b(\d+)\..*")
    if weights.count(r"synthesis\.b\d+\.skip\.weight"):
        raise _undrawn(weights, "generator", "resnet", "skip")
    if "synthesis.b4.torgb.weight" not in weights.tensors:
        raise _undrawn(weights, "generator", "orig", "skip")
    layers = weights.count(r"mapping\.fc\d+\.weight")
    inputs = weights.shape("mapping.fc0.weight", 2)[1]
    w_dim = weights.shape("synthesis.b4.conv1.affine.weight", 2)[1]
    embed = weights.shape("mapping.embed.weight", 2) if "mapping.embed.weight" in weights.tensors else (0, 0)
    channels = {r: weights.shape(f"synthesis.b{r}.conv1.weight", 4)[0] for r in blocks}
    return _architecture(
        weights,
        channels,
        img_channels=weights.shape("synthesis.b4.torgb.weight", 4)[0],
        z_dim=inputs - embed[0],
        w_dim=w_dim,
        c_dim=embed[1],
        mapping_layers=layers,
    )


def _discriminator_arch(weights: Weights) -> Architecture:
    blocks = _block_resolutions(weights, r"b(\d+)\..*")
    largest = blocks[-1]
    if weights.count(r"b\d+\.fromrgb\.weight") > 1:
        raise _undrawn(weights, "discriminator", "skip", "resnet")
    if f"b{largest}.skip.weight" not in weights.tensors:
        raise _undrawn(weights, "discriminator", "orig", "resnet")
    last = weights.shape("b4.conv.weight", 4)
    embedded = "mapping.embed.weight" in weights.tensors
    return _architecture(
        weights,
        {4: last[0]} | {r: weights.shape(f"b{r}.conv0.weight", 4)[0] for r in blocks[1:]},
        img_channels=weights.shape(f"b{largest}.fromrgb.weight", 4)[1],
        c_dim=weights.shape("mapping.embed.weight", 2)[1] if embedded else 0,
        mbstd_num_channels=last[1] - last[0],
    )


def _undrawn(weights: Weights, kind: str, got: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{weights.source}: a {kind} of architecture '{got}', which is not supported; only '{wanted}' is, "
        "the one of the published StyleGAN2 networks"
    )


def _block_resolutions(weights: Weights, pattern: str) -> list[int]:
    """[4, 8, ..., img_resolution], checked to be without a gap and not beyond what we build."""
    found = {match[1] for name in weights.tensors if (match := re.fullmatch(pattern, name))}
    wanted = [2**i for i in range(2, 11)][: len(found)]
    if len(found) < 2 or found != {str(r) for r in wanted}:
        listed = shown(", ".join(sorted(found, key=lambda r: (len(r), r))))
        raise CheckpointError(
            f"{weights.source}: blocks must be 4, 8, ... up to 8 to 1024 pixels, got {listed or 'none'}"
        )
    return wanted


def _architecture(weights: Weights, channels: dict[int, int], **fields: Any) -> Architecture:
    """The `Architecture` with these channels by resolution; the file's numbers where they fit."""
    largest = max(channels)
    below = [count * r for r, count in channels.items() if count < channels[4]]
    tightest = max(below, default=channels[4] * largest)
    for base in (weights.channel_base, 32768, 16384, tightest):
        for most in (weights.channel_max, 512, channels[4]):
            if base is None or most is None:
                continue
            if any(min(base // r, most) != count for r, count in channels.items()):
                continue
            try:
                return Architecture(
                    img_resolution=largest,
                    channel_base=base,
                    channel_max=most,
                    conv_clamp=weights.conv_clamp,
                    mbstd_group_size=weights.mbstd_group_size,
                    **fields,
                )
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{weights.source}: {error}") from error
    raise CheckpointError(
        f"{weights.source}: channels {list(channels.values())} at {list(channels)} pixels are not those of a "
        "StyleGAN2 network, min(channel_base // resolution, channel_max)"
    )


def _float32(weights: Weights, key: str) -> Tensor:
    tensor = weights.tensors[key]
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(f"{weights.source}: {key} must be floating point, got {tensor.dtype}")
    return tensor.load().to(torch.float32)


def _check_names(weights: Weights, wanted: dict[str, tuple[int, ...]], what: str) -> None:
    """Every tensor is there, none is left over, all shapes fit; the low-pass filters are ours."""
    for key, tensor in weights.tensors.items():
        if key.endswith(_FILTER):
            check_filter(tensor, f"{weights.source}: {shown(key)}")
    got = {key: tensor.shape for key, tensor in weights.tensors.items()}
    complaints = [
        ("missing", [key for key in wanted if key not in got and not key.endswith(_FILTER)]),
        ("unexpected", [shown(key) for key in got if key not in wanted]),
        (
            "of another shape",
            [
                f"{key} {list(got[key])} instead of {list(shape)}"
                for key, shape in wanted.items()
                if key in got and tuple(got[key]) != shape and not key.endswith(_FILTER)
            ],
        ),
    ]
    phrases = []
    for complaint, keys in complaints:
        if keys:
            more = f" and {len(keys) - _SHOWN_NAMES} more" if len(keys) > _SHOWN_NAMES else ""
            phrases.append(f"{complaint}: {', '.join(keys[:_SHOWN_NAMES])}{more}")
    if phrases:
        raise CheckpointError(f"{weights.source}: does not fit a {what}; {'; '.join(phrases)}")


def check_filter(tensor: LazyTensor, name: str, total: float = 1.0) -> None:
    """Raise unless a low-pass filter of a file is ours, [1, 3, 3, 1] both ways, with this sum."""
    values = tensor.load().to("cpu", torch.float32) if tuple(tensor.shape) == (4, 4) else None
    if values is None or not torch.allclose(values, low_pass(total), rtol=1e-3, atol=1e-4):
        raise CheckpointError(f"{name}: a low-pass filter other than [1, 3, 3, 1], which is not supported")
