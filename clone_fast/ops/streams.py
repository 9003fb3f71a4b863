"""Work that goes side by side on the GPU.

The layers of low resolution leave most of a GPU idle. In a CUDA graph what does not depend on one another runs at the
same time, which costs nothing there; launched kernel by kernel, the host is slower than the GPU anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")


@functools.cache
def _beside(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The stream beside this one, the same every time."""
    return torch.cuda.Stream(device)


def side_by_side(
    device: torch.device, first: Callable[[], First], second: Callable[[], Second]
) -> tuple[First, Second]:
    """Both results. In a capture neither waits for the other, and what follows waits for both.

    What they make may be used, and its memory used again, as if it came from the current stream: that waits here, and
    whatever goes beside it later waits for it first.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return first(), second()
    current = torch.cuda.current_stream(device)
    beside = _beside(device, current.cuda_stream)
    beside.wait_stream(current)
    with torch.cuda.stream(beside):
        one = first()
    other = second()
    current.wait_stream(beside)
    return one, other
