"""The steps of the two loops: the tweak, an iteration of Clone, the search of the latent.

    pytest benchmarks/bench_step.py --benchmark-only -k tweak-bf16-1-F

Every row runs clone_fast, the reference eagerly and the strongest plain PyTorch (benchmarks/strong.py) in one process.
First each takes three steps from the same weights with the same draws; whose losses are not those of the reference in
float32 has no time. Times on a GPU: of the baseline by captured graph, of the others by the wall, which is what an
eager loop takes, or one that replays graphs of its own. On a CPU a tiny network, to see that it works.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import clock, common, contenders, step_table, steps
from benchmarks.contenders import PRECISIONS, Contender, Row, World
from benchmarks.floors import floor
from clone_fast.nn import Architecture

GATED = 3  # steps
ONE_PASS = "bf16"  # whose tolerance a Clone iteration of one pass has, being other arithmetic than the yardstick's
# A group of five, so that D judges the clone beside four other images, as in the paper's batch of 1 + 4.
FULL = Architecture(mbstd_group_size=5)
QUARTER = Architecture(img_resolution=256, mbstd_group_size=5)
TINY = Architecture(
    img_resolution=32, z_dim=16, w_dim=16, channel_base=512, channel_max=16, mapping_layers=2, mbstd_group_size=5
)
ON_A_GPU = [
    *(
        Row(step, precision, n, "F 1024", FULL)
        for precision in ("bf16", "tf32")
        for step, n in (("tweak", 1), ("clone", 5), ("latent", 1))
    ),
    Row("tweak", "bf16", 5, "F 1024", FULL),
    Row("tweak", "fp32", 1, "F 1024", FULL),
    *(Row(step, "bf16", n, "F 256", QUARTER) for step, n in (("tweak", 1), ("clone", 5))),
]
ON_A_CPU = [
    Row(step, "fp32", n, "tiny 32", TINY) for step, n in (("tweak", 1), ("tweak", 5), ("clone", 5), ("latent", 1))
]


def released() -> None:
    """Give back what the last contender held."""
    torch._dynamo.reset()
    gc.collect()
    if common.ON_GPU:
        torch.cuda.empty_cache()


def yardstick(world: World) -> tuple[Tensor, str]:
    """Values of the first steps in full float32, by the reference or, where that needs too much memory, by the ops."""
    with contenders.arithmetic("fp32"):
        for name in ("reference", "auto"):
            with suppress(torch.OutOfMemoryError):
                networks = steps.OwnNetworks(*world.networks(), name)
                return contenders.of_step(world, networks, name).run(GATED).double().cpu(), name
            released()
    pytest.fail("no float32 run of this row fits into memory")


def gate(name: str, got: Tensor, wanted: Tensor, precision: str) -> float:
    """The largest relative difference of the values; fails where it is beyond what the precision allows."""
    wanted = wanted[: len(got)]
    error = float(((got.double().cpu() - wanted).abs() / wanted.abs()).max())
    if not error <= steps.NEAR[precision]:
        pytest.fail(f"{name} is wrong: losses {got.tolist()}, in float32 {wanted.tolist()}")
    return error


def measured(name: str, build: Callable[[], Contender], wanted: Tensor, precision: str) -> dict[str, Any]:
    """Of one contender, by keys that start with its name; where it does not fit into memory, that it does not."""
    start = time.perf_counter()
    try:
        if common.ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        contender = build()
        first = contender.run(1)
        if common.ON_GPU:
            torch.cuda.synchronize()
        found: dict[str, Any] = {f"{name}_first_s": time.perf_counter() - start, f"{name}_how": contender.how}
        values = torch.cat([first, contender.run(GATED - 1)])
        found[f"{name}_error"] = gate(name, values, wanted, precision)
        if common.ON_GPU:
            found[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found[f"{name}_ms"] = clock.by_the_wall(contender.run, 0.3 if common.ON_GPU else 0.02).p50 / 1e3
        if common.ON_GPU and name == "strong" and contender.step is not None:
            step = contender.step
            graph = clock.captured(lambda _: step(), [None])
            found |= {f"{name}_eager_ms": found[f"{name}_ms"], f"{name}_ms": graph.p50 / 1e3}
            found |= {f"{name}_p20": graph.p20 / 1e3, f"{name}_p80": graph.p80 / 1e3}
        return found
    except torch.OutOfMemoryError:
        return {f"{name}_how": "out of memory"}


@pytest.mark.parametrize("row", ON_A_GPU if common.ON_GPU else ON_A_CPU, ids=str)
def test_step(row: Row, benchmark: BenchmarkFixture) -> None:
    with mock.patch.dict("os.environ", CLONE_FAST_STRICT="1"), contenders.arithmetic(row.precision):
        world = World(row, common.DEVICE)
        about: dict[str, Any] = {"step": row.step, "precision": row.precision, "batch": row.batch}
        about |= {"network": row.network, "resolution": row.arch.img_resolution}
        about |= common.origin()
        least = floor(row.step, row.arch, row.batch, torch.finfo(PRECISIONS[row.precision]).bits // 8)
        about |= {"operations": least.operations, "bytes": least.bytes}
        wanted, about["yardstick"] = yardstick(world)
        released()
        builds: dict[str, Callable[[], Contender]] = {
            "ours": lambda: contenders.ours(world),
            "reference": lambda: contenders.reference(world),
        }
        if row.step == "clone":
            builds["turns"] = lambda: contenders.ours(world, one_pass=False)
        if common.COMPILED:
            builds["strong"] = lambda: contenders.strong(world, steps.compiled if common.ON_GPU else None)
        for name, build in builds.items():
            precision = "tf32" if (name, row.precision) == ("reference", "bf16") else row.precision
            if name == "ours" and row.step == "clone":
                precision = ONE_PASS
            about |= measured(name, build, wanted, precision)
            released()
        if common.ON_GPU:
            rate = clock.matrix_rate(PRECISIONS[row.precision], row.precision == "tf32")
            about["floor_ms"] = least.seconds(clock.copy_bandwidth(), rate) * 1e3
            step_table.ROWS.append(about)
            step_table.kept([about])  # now: what comes after may not come to its end
        shown = contenders.ours(world)
        benchmark.group = f"step, {row.step}"
        benchmark.pedantic(lambda: shown.run(1).tolist(), rounds=2, warmup_rounds=1)
        benchmark.extra_info.update(about)
        released()
