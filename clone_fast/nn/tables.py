"""Tensors of numbers that are known beforehand, made once for every device; what an architecture says of each of its
channels is one.

It is no buffer: no file knows it, and a network that is built without memory and then filled from a file would be left
without. A device's first call moves memory there, and so must not be captured in a CUDA graph; no later one does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from clone_fast._compiler import constant_result
from clone_fast.nn.architecture import Architecture

COUNTS = ("img_resolution", "img_channels", "channel_base", "channel_max", "mbstd_num_channels")

_made: dict[tuple[Hashable, torch.device, torch.dtype], Tensor] = {}


def made_once(key: Hashable, numbers: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of these numbers, which the key tells from others: the same one for every call that is alike."""
    place = key, device, dtype
    if place in _made:
        return _made[place]
    with torch.inference_mode(False):
        made = torch.tensor(numbers(), device=device, dtype=dtype)
    if type(made) is Tensor:  # not what a tracer takes for one
        _made[place] = made
    return made


def _biases(arch: Architecture) -> list[int]:
    """For fromrgb and conv0, conv1 of every block from the largest, then b4.conv; as often as each has outputs."""
    largest = arch.channels(arch.img_resolution)
    fan_in = [arch.img_channels] * largest
    for resolution in arch.block_resolutions[:0:-1]:
        channels, below = arch.channels(resolution), arch.channels(resolution // 2)
        fan_in += [channels * 9] * (channels + below)
    return [*fan_in, *[(arch.channels(4) + arch.mbstd_num_channels) * 9] * arch.channels(4)]


@constant_result
def _table(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """shape: the arguments of an architecture that count here. A compiler keeps the result as a constant."""

    def numbers() -> list[int]:
        return _biases(Architecture(**dict(zip(COUNTS, shape, strict=True))))

    return made_once(shape, numbers, device, torch.int64)


def bias_table(arch: Architecture, device: torch.device) -> Tensor:
    """For every bias of the discriminator's convolutions, in their order, int64: the fan-in of the weights beside."""
    return _table(tuple(getattr(arch, name) for name in COUNTS), device)
