"""What the benchmarks of the ops share: the shapes of StyleGAN2, the gate, the row.

A row is one call of a public op, forward or forward and backward. First its results are compared with the reference in
float64; a wrong one fails and has no time. All that a row says stands in `extra_info` of the JSON (`--benchmark-json`),
and on a GPU in benchmarks/results/ops.json, from which the README's tables are made (benchmarks/tables.py).

On a GPU the time is that of captured graphs (benchmarks/clock.py), and the baselines run in the same process: the
reference in this dtype, the reference compiled, and where it applies the bare convolution of cuDNN with nothing fused.
On a CPU it is the wall time of the call, at small shapes: it says that the benchmarks work, not how fast anything is.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import clock

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROUNDS = 5  # on a CPU
COMPILED = os.environ.get("CLONE_FAST_BENCH_COMPILED") != "0"  # without that baseline a run takes minutes less
ROWS: list[dict[str, Any]] = []  # of this run on a GPU
SAVED = {"bias_act": ("x",), "modulated_conv2d": ("x", "weight", "result")}  # what a backward must read once more


@dataclass(frozen=True)
class Format:
    """How the numbers lie in memory, and whether float32 may be multiplied as TF32."""

    dtype: torch.dtype
    layout: torch.memory_format = torch.channels_last  # of x and y; the rest is contiguous
    tf32: bool = False

    def __str__(self) -> str:
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{dtype} {'NHWC' if self.layout == torch.channels_last else 'NCHW'}"


BF16 = Format(torch.bfloat16)
FP16 = Format(torch.float16)
FP32 = Format(torch.float32)
TF32 = Format(torch.float32, tf32=True)
BF16_NCHW = Format(torch.bfloat16, torch.contiguous_format)
FP32_NCHW = Format(torch.float32, torch.contiguous_format)


@dataclass(frozen=True)
class Case:
    """One call of an op; `rows` fills in the format and the direction."""

    op: str  # its name on every floor
    name: str
    tensors: dict[str, Sequence[int]]  # shapes of the arguments that want a gradient, "x" among them
    options: dict[str, Any] = field(default_factory=dict)  # the other arguments
    fixed: Sequence[str] = ()  # of the tensors, those that want no gradient
    function: str | None = None  # where its name is not that of the op
    operations: int = 0  # the fewest of a forward, matrix products only
    bare: Callable[[dict[str, Tensor]], Tensor] | None = None  # the convolution alone
    compiled: bool = True  # whether to time the compiled reference, which takes seconds to compile
    format: Format = FP32
    backward: bool = False

    def __str__(self) -> str:
        words = [self.name, "x".join(map(str, self.tensors["x"])), self.format]
        return "-".join([str(word) for word in words] + ["backward"] * self.backward)

    def on(self, floor: str) -> Callable[..., Tensor]:
        """The function on a floor of clone_fast, "ops" or "reference", with the options."""
        found = getattr(importlib.import_module(f"clone_fast.{floor}.{self.op}"), self.function or self.op)
        return partial(found, **{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in self.options.items()})

    def inputs(self) -> dict[str, Tensor]:
        """Random: weights of unit norm, channels of different strength, or demodulation would undo every style."""
        drawn = {}
        for name, shape in self.tensors.items():
            value = torch.randn(list(shape), device=DEVICE)
            if name == "weight":
                value *= math.prod(shape[1:]) ** -0.5
            elif name == "x":
                value *= 2 * torch.rand(shape[1], 1, 1, device=DEVICE)
            layout = self.format.layout if name in ("x", "y") else torch.contiguous_format
            value = value.to(self.format.dtype, memory_format=layout)
            drawn[name] = value if name in self.fixed else value.requires_grad_()
        return drawn


def rows(cases: Sequence[Case], formats: Sequence[Format], *, backward: bool = True) -> list[Case]:
    """Every case in every format, forward alone and with backward."""
    every = itertools.product(cases, formats, (False, True) if backward else (False,))
    return [replace(case, format=found, backward=back) for case, found, back in every]


def parametrized(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Give a test these rows."""
    return pytest.mark.parametrize("case", cases, ids=str)


def run(function: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor | None) -> dict[str, Tensor]:
    """The result and, where there is a dy, the gradients to the inputs that want one."""
    with torch.set_grad_enabled(dy is not None):
        y = function(**inputs)
    wanted = {name: value for name, value in inputs.items() if value.requires_grad}
    grads = {} if dy is None else dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in grads.items()}}


def dy_of(y: Tensor, x: Tensor) -> Tensor:
    """As of a sum of squares: small at an activation's kink, where rounding picks the side; scaled for float16."""
    return y * (x.numel() ** 0.5 / y.numel())


def gate(case: Case, inputs: dict[str, Tensor], dy: Tensor | None) -> float:
    """The largest error against the reference in float64, relative to the largest value; fails where a result is wrong.

    Wrong: beyond twice the error of the reference in this format plus one rounding, in TF32 one of TF32, as cuDNN's
    fastest algorithm may multiply in full float32; or a cosine below 0.99.
    """
    exact = {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    wanted = run(case.on("reference"), exact, None if dy is None else dy.double())
    got, plain = run(case.on("ops"), inputs, dy), run(case.on("reference"), inputs, dy)
    worst = 0.0
    for name, want in wanted.items():
        error, allowed = (float((v[name].double() - want).abs().max() / want.abs().max()) for v in (got, plain))
        cosine = float(torch.cosine_similarity(got[name].double().flatten(), want.flatten(), dim=0))
        rounding = 2.0**-10 if case.format.tf32 else torch.finfo(got[name].dtype).eps
        if not (error <= 2 * allowed + rounding and cosine >= 0.99):
            pytest.fail(f"{case.op}: {name} is wrong: error {error:.2g}, reference {allowed:.2g}, cosine {cosine:.4f}")
        worst = max(worst, error)
    return worst


def fewest_bytes(case: Case, inputs: dict[str, Tensor], y: Tensor) -> int:
    """Every input read and every result written once; backward, dy and what it needs read, every gradient written."""
    held = {name: value.nbytes for name, value in inputs.items()} | {"result": y.nbytes}
    moved = sum(held.values())
    if case.backward:
        moved += y.nbytes + sum(held[name] for name in SAVED.get(case.op, ()))
        moved += sum(value.nbytes for value in inputs.values() if value.requires_grad)
    return moved


def measure(case: Case, benchmark: BenchmarkFixture) -> None:
    """The gate, the time, and the row."""
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=ON_GPU, allow_tf32=case.format.tf32)
    module = importlib.import_module(f"clone_fast.ops.{case.op}")
    with mock.patch.dict("os.environ", CLONE_FAST_STRICT="1"), flags:
        torch.manual_seed(0)
        inputs, function = case.inputs(), case.on("ops")
        with mock.patch.object(module, "resolve", side_effect=module.resolve) as resolve:
            y = function(**inputs).detach()
        backend = module.resolve(*resolve.call_args.args)  # of the very call that the op made
        dy = dy_of(y, inputs["x"]) if case.backward else None
        about: dict[str, Any] = {"op": case.op, "case": case.name, "backend": backend, "torch": torch.__version__}
        about |= {"shape": list(case.tensors["x"]), "result": list(y.shape), "format": str(case.format)}
        about |= {"backward": case.backward, "error": gate(case, inputs, dy)}
        about |= {"bytes": fewest_bytes(case, inputs, y), "operations": case.operations * (3 if case.backward else 1)}
        about |= {"device": device_name()}
        if ON_GPU:
            about |= _gpu_times(case, inputs, dy, about)
            ROWS.append(about)
        benchmark.group = f"{case.op}, forward" + " and backward" * case.backward
        benchmark.pedantic(lambda: _synchronized(run, function, inputs, dy), rounds=ROUNDS, warmup_rounds=2)
        benchmark.extra_info.update(about)


def _synchronized(function: Callable[..., Any], *args: Any) -> None:
    function(*args)
    if ON_GPU:
        torch.cuda.synchronize()


def _gpu_times(case: Case, inputs: dict[str, Tensor], dy: Tensor | None, about: dict[str, Any]) -> dict[str, Any]:
    """Ours, the floor, and the baselines, in microseconds."""
    held = sum(value.nbytes for value in inputs.values())
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    rotation = [inputs, *(case.inputs() for _ in range(min(2 * cache // held + 1, 15)))]

    def timed(function: Callable[..., Tensor], names: Sequence[str] = tuple(inputs)) -> clock.Times:
        return clock.captured(lambda one: run(function, {name: one[name] for name in names}, dy), rotation)

    torch.cuda.reset_peak_memory_stats()
    run(case.on("ops"), inputs, dy)
    peak = torch.cuda.max_memory_allocated() / 2**20
    ours = timed(case.on("ops"))
    bandwidth = clock.copy_bandwidth()
    by_bytes, by_operations = about["bytes"] / bandwidth * 1e6, 0.0
    if about["operations"]:
        dtype = torch.float32 if case.format.tf32 else case.format.dtype
        by_operations = about["operations"] / clock.matrix_rate(dtype, case.format.tf32) * 1e6
    floor = max(by_bytes, by_operations)
    row: dict[str, Any] = {"p20": ours.p20, "us": ours.p50, "p80": ours.p80, "peak_mb": peak, "floor_us": floor}
    row |= {"bound": "bytes" if by_bytes >= by_operations else "operations", "over_floor": ours.p50 / floor}
    row |= {
        "gb_per_s": about["bytes"] / ours.p50 / 1e3,
        "of_copy_bandwidth": about["bytes"] / ours.p50 * 1e6 / bandwidth,
    }
    row |= {"tflop_per_s": about["operations"] / ours.p50 / 1e6, "copy_us": clock.copy_time(about["bytes"])}
    row["eager_us"] = timed(case.on("reference")).p50
    if case.compiled and COMPILED:
        torch._dynamo.reset()
        row["compiled_us"] = timed(torch.compile(case.on("reference"), dynamic=False)).p50
    if case.bare is not None:
        bare = case.bare
        row["cudnn_us"] = timed(lambda **tensors: bare(tensors), ("x", "weight")).p50
    return row


def device_name() -> str:
    """What the rows ran on."""
    return torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"


def origin() -> dict[str, str]:
    """What the rows ran on, and of which state of things, for the files of results."""
    return {"device": device_name(), "torch": torch.__version__, "commit": commit()}


@functools.cache
def commit() -> str:
    """Of the checkout, for the file of results."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
