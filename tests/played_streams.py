"""Streams that are played on a CPU, for the tests of what goes side by side in a capture.

What is launched is a name. A stream knows all that is done before whatever comes next on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from clone_fast.ops import streams


class PlayedEvent:
    """What a stream has done at a time."""

    def __init__(self, done: frozenset[str]) -> None:
        self.done = done


class PlayedStream:
    """As torch.cuda.Stream, of a machine that executes nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.done: set[str] = set()

    def record_event(self) -> PlayedEvent:
        return PlayedEvent(frozenset(self.done))

    def wait_event(self, event: PlayedEvent) -> None:
        self.done |= event.done

    def wait_stream(self, other: PlayedStream) -> None:
        self.done |= other.done


class Machine:
    """A capture that is under way, its streams by name, and the current one. Attribute `told`: names of the streams
    that a tensor's memory was recorded for, by the address of that memory."""

    def __init__(self) -> None:
        self.main = self.now = PlayedStream("main")
        self.lanes: dict[str, PlayedStream] = {}
        self.told: dict[int, set[str]] = {}

    def lane(self, _: Any, name: str) -> PlayedStream:
        return self.lanes.setdefault(name, PlayedStream(name))

    def launch(self, name: str) -> None:
        """On the current stream."""
        self.now.done.add(name)

    @contextmanager
    def on(self, stream: PlayedStream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def tell(self, tensor: Tensor, stream: PlayedStream) -> None:
        self.told.setdefault(tensor.untyped_storage().data_ptr(), set()).add(stream.name)


def play_streams(patch: pytest.MonkeyPatch) -> Machine:
    """From now on `clone_fast.ops.streams` takes everything for captured, on streams of this machine."""
    machine = Machine()
    patch.setattr(streams, "_capturing", lambda device: True)
    patch.setattr(streams, "_lane", machine.lane)
    patch.setattr(streams, "_takes_part", lambda lane: bool(lane.done))
    patch.setattr(torch.cuda, "Event", PlayedEvent)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: machine.now)
    patch.setattr(torch.cuda, "stream", machine.on)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: machine.tell(tensor, stream))
    return machine
