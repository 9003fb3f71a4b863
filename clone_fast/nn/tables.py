"""What an architecture says of each of its channels, as tensors, made once for every device.

They are no buffers: no file knows them, and a network that is built without memory and then filled from a file would
be left without. A device's first call moves memory there, and so must not be captured in a CUDA graph; no later one
does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clone_fast._compiler import constant_result
from clone_fast.nn.architecture import Architecture

COUNTS = ("img_resolution", "img_channels", "channel_base", "channel_max", "mbstd_num_channels")

_made: dict[tuple[str, tuple[int, ...], torch.device], tuple[Tensor, ...]] = {}


def _styles(arch: Architecture) -> tuple[list[int], list[int]]:
    """For b4.conv1, b4.torgb, b8.conv0, b8.conv1, b8.torgb, ..., as often as each has input channels."""
    reads: list[int] = []
    fan_in: list[int] = []
    for resolution in arch.block_resolutions:
        channels, below = arch.channels(resolution), arch.channels(max(resolution // 2, 4))
        last = 2 * (resolution.bit_length() - 2) - 1  # the latent of torgb, which the next conv0 reads too
        first = [] if resolution == 4 else [(last - 2, below, 1)]
        for latent, size, fan in [*first, (last - 1, channels, 1), (last, channels, channels)]:
            reads += [latent] * size
            fan_in += [fan] * size
    return reads, fan_in


def _biases(arch: Architecture) -> tuple[list[int]]:
    """For fromrgb and conv0, conv1 of every block from the largest, then b4.conv; as often as each has outputs."""
    largest = arch.channels(arch.img_resolution)
    fan_in = [arch.img_channels] * largest
    for resolution in arch.block_resolutions[:0:-1]:
        channels, below = arch.channels(resolution), arch.channels(resolution // 2)
        fan_in += [channels * 9] * (channels + below)
    return ([*fan_in, *[(arch.channels(4) + arch.mbstd_num_channels) * 9] * arch.channels(4)],)


def _shape(arch: Architecture) -> tuple[int, ...]:
    return tuple(getattr(arch, name) for name in COUNTS)


@constant_result
def _table(name: str, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """shape: the arguments of an architecture that count here. A compiler keeps the result as a constant."""
    key = name, shape, device
    if key in _made:
        return _made[key]
    arch = Architecture(**dict(zip(COUNTS, shape, strict=True)))
    columns = _styles(arch) if name == "styles" else _biases(arch)
    with torch.inference_mode(False):
        made = tuple(torch.tensor(column, device=device) for column in columns)
    if type(made[0]) is Tensor:  # not what a tracer takes for one
        _made[key] = made
    return made


def style_table(arch: Architecture, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every style of every layer of the generator, in the order the layers run, int64: which latent it reads, and
    the number by whose root it is divided (the channels of torgb, which is not demodulated; else 1)."""
    reads, fan_in = _table("styles", _shape(arch), device)
    return reads, fan_in


def bias_table(arch: Architecture, device: torch.device) -> Tensor:
    """For every bias of the discriminator's convolutions, in their order, int64: the fan-in of the weights beside."""
    (fan_in,) = _table("biases", _shape(arch), device)
    return fan_in
