"""How time is taken on a GPU, and the two ceilings that times are held against."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REPLAYS = 25
TARGET_MS = 2.0  # of one replay: well above the cost of starting one


@dataclass(frozen=True)
class Times:
    """Microseconds of one call."""

    p20: float
    p50: float
    p80: float


def captured(function: Callable[[Any], Any], inputs: Sequence[Any]) -> Times:
    """The GPU's time for function(one of inputs): CUDA events around replays of a graph that goes round the inputs.

    The inputs together should exceed the L2 cache, so that no call finds its own there. The function is run before, on
    a side stream, so that nothing is compiled, tuned or allocated for the first time inside the capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in (*inputs, *inputs[:2]):
            function(one)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for one in inputs:
            function(one)
        end.record(stream)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    rough = start.elapsed_time(end) / len(inputs)  # of an eager call: at least the GPU's time
    rounds = max(1, min(40, round(TARGET_MS / max(rough, 0.02)))) / len(inputs)
    order = list(itertools.islice(itertools.cycle(inputs), len(inputs) * max(1, round(rounds))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in order:
            function(one)
    times = []
    for _ in range(REPLAYS + 3):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(order))
    found = statistics.quantiles(times[3:], n=5)
    return Times(found[0], statistics.median(times[3:]), found[3])


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy kernel over 2 GiB (a captured copy_ is no kernel, and slower)."""
    source = torch.rand(2**29, device="cuda")
    target = torch.empty_like(source)
    time = captured(lambda _: torch.add(source, 0.0, out=target), [None]).p50
    return 2 * source.nbytes / time * 1e6


@functools.cache
def copy_time(nbytes: int) -> float:
    """Microseconds of a copy kernel that reads and writes this many bytes together, from memory."""
    half = max(nbytes // 8, 1)
    count = min(32, 2 + 2**27 // (8 * half))
    pairs = [(torch.rand(half, device="cuda"), torch.empty(half, device="cuda")) for _ in range(count)]
    return captured(lambda pair: torch.add(pair[0], 0.0, out=pair[1]), pairs).p50


@functools.cache
def matrix_rate(dtype: torch.dtype, tf32: bool) -> float:
    """Operations per second of an 8192^3 product of random matrices."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        time = captured(lambda _: a @ b, [None]).p50
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / time * 1e6


def by_the_wall(run: Callable[[int], Any], seconds: float = 0.3, rounds: int = 5) -> Times:
    """Microseconds of one of the steps of run(n), from a synchronised start to a synchronised end.

    The larger of the CPU's time and the GPU's: what an eager loop takes, or a loop that replays a graph of its own. It
    has run before; a round is as many steps as fit into `seconds`.
    """

    def timed(n: int) -> float:
        _synchronize()
        start = time.perf_counter()
        run(n)
        _synchronize()
        return (time.perf_counter() - start) / n

    n = max(1, min(50, round(seconds / timed(2))))
    found = sorted(timed(n) * 1e6 for _ in range(rounds))
    quantiles = statistics.quantiles(found, n=5)
    return Times(quantiles[0], statistics.median(found), quantiles[3])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
