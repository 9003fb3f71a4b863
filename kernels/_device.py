"""What block sizes are chosen by. Without a GPU it is that of an H200, which tests then compile for or play."""

from __future__ import annotations

import functools

import torch


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) compute capability."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many there are."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
