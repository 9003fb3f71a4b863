"""Graphs that are played on a CPU, for the tests of what is captured."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


class PlayedGraphs:
    """As CudaGraphs on a CPU: recording executes nothing, a replay does what was recorded. Keeps a log."""

    def __init__(self, refuse: int = 0) -> None:
        self.log: list[str] = []
        self.recorded = 0
        self.refuse = refuse  # the n-th recording raises

    def aside(self, run: Callable[[], None]) -> None:
        self.log.append("eager")
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        if self.recorded == self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        number = self.recorded
        self.log.append(f"record {number}")

        def replay() -> None:
            self.log.append(f"replay {number}")
            run()

        return replay


def play(patch: pytest.MonkeyPatch, module: ModuleType) -> list[PlayedGraphs]:
    """Whatever asks this module for graphs gets played ones, which are listed here."""
    made: list[PlayedGraphs] = []

    def graphs_of(device: torch.device) -> PlayedGraphs:
        made.append(PlayedGraphs())
        return made[-1]

    patch.setattr(module, "graphs_of", graphs_of)
    return made
