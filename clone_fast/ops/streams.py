"""Work that goes side by side on the GPU.

The layers of low resolution leave most of a GPU idle. In a CUDA graph what does not depend on one another runs at the
same time, which costs nothing there; launched kernel by kernel, the host is slower than the GPU anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

First = TypeVar("First")
Second = TypeVar("Second")


_lanes: dict[tuple[torch.device, int, str], torch.cuda.Stream] = {}


def _beside(device: torch.device, stream: int, lane: str) -> torch.cuda.Stream:
    """A stream beside this one, the same every time; one lane does not wait for another."""
    key = device, stream, lane
    if key not in _lanes:
        _lanes[key] = torch.cuda.Stream(device)
    return _lanes[key]


def beside(
    device: torch.device,
    lane: str,
    run: Callable[[], First],
    meanwhile: Callable[[], Second],
    reads: Sequence[Tensor] = (),
) -> tuple[First, Second]:
    """What `run` and `meanwhile` return. In a capture neither waits for the other, and what follows waits for both.

    What they make may be used, and its memory used again, as if it came from the current stream: that waits here, and
    whatever goes beside it later waits for it first. PyTorch runs the gradient of an operation on the stream that the
    operation ran on, so that of `run`'s goes beside the others, too.

    Args:
        device: of all that is launched.
        lane: its name; of one name work goes one after the other.
        run, meanwhile: what goes there, and what stays on the current stream.
        reads: what the gradient of `run` reads of the current stream's. That frees it as soon as the gradient is
            launched, and in a capture would give its memory to others who do not wait.
    """
    if torch.compiler.is_compiling() or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return run(), meanwhile()
    current = torch.cuda.current_stream(device)
    other = _beside(device, current.cuda_stream, lane)
    other.wait_stream(current)
    for tensor in reads:
        tensor.record_stream(other)
    with torch.cuda.stream(other):
        one = run()
    two = meanwhile()
    current.wait_stream(other)
    return one, two


def rejoin(device: torch.device) -> None:
    """After an error in a capture: the current stream waits for every lane that takes part, or it could not end.

    A capture that ends with lanes of its own under way is an error itself, which would hide the first one and keep
    the memory of the graph.
    """
    current = torch.cuda.current_stream(device)
    for (where, _, _), lane in list(_lanes.items()):
        if where == device and lane != current:
            with torch.cuda.stream(lane):
                takes_part = torch.cuda.is_current_stream_capturing()
            if takes_part:
                with suppress(RuntimeError):  # a capture that CUDA has given up already has nothing to wait for
                    current.wait_stream(lane)
