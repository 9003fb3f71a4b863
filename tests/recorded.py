"""What a GPU test replays."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clone_fast.capture import CudaGraphs


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """What replays it, after one eager call."""
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    graphs.aside(run)
    return graphs.record(run)


def repeated(run: Callable[[], None], times: int, *, replayed: bool) -> None:
    """Call it so many times, and replay all but the first one if it shall be captured."""
    if replayed:
        run, times = captured(run), times - 1
    for _ in range(times):
        run()
