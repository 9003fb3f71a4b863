"""What fits into the device's memory, by an estimate: so many photos at once, or settings when it is full."""

from __future__ import annotations

import gc
import traceback
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from clone_fast.nn import Architecture, Network, Precision
from clone_fast.settings import TweakSettings

Error = TypeVar("Error", bound=BaseException)

# Tensors of a network's width at every resolution that an image leaves behind until its backward is done. Counted in
# the layers, and rounded up so that what config F took on an H200 stays below: results and inputs of two convolutions,
# the filtered one of the resampling, the noise; in D results alone.
IN_GENERATOR, IN_DISCRIMINATOR = 6, 3
RECOMPUTED = 0.85  # share that recomputing leaves: of a Clone iteration of config F 0.8 on an H200
SMALLER = "use a smaller network, or device='cpu'"
SAFE = 0.8  # share of the free memory that an estimate may fill: eight clones of config F estimated at 0.85 did not fit


def activations(arch: Architecture, element_size: int = 4) -> int:
    """Bytes of one tensor at every resolution, for one image."""
    return sum(arch.channels(r) * r * r for r in arch.block_resolutions) * element_size


def iteration_bytes(arch: Architecture, settings: TweakSettings) -> int:
    """About what an iteration of the tweak needs besides weights and optimisers."""
    size = Precision.named(settings.precision).dtype.itemsize
    one = activations(arch, size)
    if settings.recompute:
        one = int(RECOMPUTED * one)
    if settings.mode == "recon":
        return one * IN_GENERATOR
    drawn = (settings.batch if settings.others else 1) + settings.edits
    forwards = 2 + 2 * (settings.r1_gamma > 0)  # of real images and of fakes; R1 counts twice, with its own gradient
    judged = forwards * settings.batch if settings.adversarial else 0
    return one * (IN_GENERATOR * drawn + IN_DISCRIMINATOR * judged)


def photo_bytes(network: Network, settings: TweakSettings) -> int:
    """About what a photo needs from its start to its end.

    Networks of its own, each with a gradient and Adam's two moments; the last good check, which of the generator is
    kept twice; and an iteration of the tweak and one of the search, whose memory their graphs hold.
    """

    def weights(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    judged = 5 * weights(network.discriminator) if network.discriminator is not None and settings.adversarial else 0
    search = iteration_bytes(network.arch, replace(settings, mode="recon"))
    return 6 * weights(network.generator) + judged + search + iteration_bytes(network.arch, settings)


def photos_that_fit(network: Network, settings: TweakSettings, device: torch.device) -> int:
    """How many photos should fit into the free memory at once, at least 1; 1 where nobody can say."""
    free = free_bytes(device)
    return 1 if free is None else max(1, int(SAFE * free) // photo_bytes(network, settings))


def free_bytes(device: torch.device) -> int | None:
    """Memory that an iteration could have, with what PyTorch keeps for reuse given back; None where nobody can say."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)  # set_per_process_memory_fraction
    return max(0, min(free, allowed - torch.cuda.memory_reserved(index)))


def without_frames(error: Error) -> Error:
    """The error without what the frames of its traceback hold: networks, graphs, all the memory of a photo."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return error


def advice(arch: Architecture, settings: TweakSettings, free: int | None) -> str:
    """A line that names what should fit into so many bytes: half precision, recomputing, the largest batch, or mode
    recon."""
    choices: list[dict[str, Any]] = []
    if Precision.named(settings.precision).dtype == torch.float32:
        choices.append({"precision": "bf16"})
    if not settings.recompute:
        choices.append({"recompute": True})
    if settings.mode == "clone":
        group = arch.mbstd_group_size or 1
        smaller = (batch for batch in range(settings.batch - 1, 1, -1) if batch <= group or batch % group == 0)
        choices += [*({"batch": batch} for batch in smaller), {"mode": "recon"}]
    for choice in choices:
        needed = iteration_bytes(arch, replace(settings, **choice))
        if free is None or needed <= SAFE * free:
            ((name, value),) = choice.items()
            return f"{name}={value!r} should fit (about {gib(needed)} for an iteration)"
    return SMALLER


def gib(count: int) -> str:
    """Bytes as a text in GiB."""
    return f"{count / 2**30:.1f} GiB"


def full(stage: str, arch: Architecture, device: torch.device, settings: TweakSettings | None = None) -> str:
    """The message of a stage that ran out of memory; settings: of the tweak."""
    free = free_bytes(device)
    what = f"an iteration at {arch.img_resolution}x{arch.img_resolution}"
    if settings is not None and settings.others:
        what += f" with batch={settings.batch}"
    room = "" if free is None else f", of which {gib(free)} are free"
    hint = SMALLER if settings is None else advice(arch, settings, free)
    return f"{stage}: {what} does not fit into the memory of {device}{room}; {hint}"
