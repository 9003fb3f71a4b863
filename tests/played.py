"""Graphs that are played on a CPU, for the tests of what is captured."""

from __future__ import annotations

from collections.abc import Callable


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
