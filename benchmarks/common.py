"""What the benchmarks of the ops share: the shapes of StyleGAN2, the gate, the clock.

A row is one call of a public op, forward or forward and backward. First its results are compared with the reference in
float64; a wrong one fails and has no time. All that a row says stands in `extra_info` of the JSON (`--benchmark-json`).

The time is the wall time of the eager call, on CUDA with a `torch.cuda.synchronize` inside: what Python and launches
cost is in it, and at small shapes is most of it. CUDA events around captured graphs come in the next release. No TF32.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Activations and images, (N, C, size), and the formats that they come in.
SHAPES = [(1, 32, 128), (1, 64, 64), (1, 128, 32), (1, 128, 16)]
IMAGES = [(1, 3, 64), (1, 3, 128), (1, 3, 256)]
FORMATS = [(torch.float32, torch.channels_last)]  # the networks' own on a CPU
ROUNDS = 5
WORKING_SET = 0  # bytes of inputs to go round, so that no L2 cache holds the next ones
if DEVICE.type == "cuda":
    SHAPES = [(1, 32, 1024), (1, 64, 512), (1, 128, 256), (1, 256, 128), (1, 512, 64), (4, 32, 1024), (4, 512, 64)]
    IMAGES = [(1, 3, 256), (1, 3, 1024), (4, 3, 1024)]
    FORMATS = [(torch.float32, torch.contiguous_format), (torch.float16, torch.contiguous_format)]
    FORMATS += [(torch.float16, torch.channels_last), (torch.bfloat16, torch.channels_last)]
    ROUNDS = 30
    WORKING_SET = 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size


@dataclass(frozen=True)
class Case:
    """One call of an op; `rows` fills in the format and the direction."""

    op: str  # its name on every floor
    name: str
    tensors: dict[str, Sequence[int]]  # shapes of the arguments that want a gradient, "x" among them
    options: dict[str, Any] = field(default_factory=dict)  # the other arguments
    function: str | None = None  # where its name is not that of the op
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format  # of x and y; the rest is contiguous
    backward: bool = False

    def __str__(self) -> str:
        words = [self.name, "x".join(map(str, self.tensors["x"])), self.dtype, self.layout]
        return "-".join([str(word).removeprefix("torch.") for word in words] + ["backward"] * self.backward)

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
            layout = self.layout if name in ("x", "y") else torch.contiguous_format
            drawn[name] = value.to(self.dtype, memory_format=layout).requires_grad_()
        return drawn


def rows(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Give a test every case in every format, forward alone and with backward."""
    every = itertools.product(cases, FORMATS, (False, True))
    found = [replace(case, dtype=dtype, layout=layout, backward=back) for case, (dtype, layout), back in every]
    return pytest.mark.parametrize("case", found, ids=str)


def run(function: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor | None) -> dict[str, Tensor]:
    """The result and, where there is a dy, the gradients to the inputs."""
    with torch.set_grad_enabled(dy is not None):
        y = function(**inputs)
    grads = {} if dy is None else dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in grads.items()}}


def dy_of(y: Tensor, x: Tensor) -> Tensor:
    """As of a sum of squares: small at an activation's kink, where rounding picks the side; scaled for float16."""
    return y * (x.numel() ** 0.5 / y.numel())


def gate(case: Case, inputs: dict[str, Tensor], dy: Tensor | None) -> float:
    """The largest error against the reference in float64, relative to the largest value; fails where a result is wrong.

    Wrong: beyond twice the error of the reference in this dtype plus one rounding; or a cosine below 0.99.
    """
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    wanted = run(case.on("reference"), exact, None if dy is None else dy.double())
    got, plain = run(case.on("ops"), inputs, dy), run(case.on("reference"), inputs, dy)
    worst = 0.0
    for name, want in wanted.items():
        error, allowed = (float((v[name].double() - want).abs().max() / want.abs().max()) for v in (got, plain))
        cosine = float(torch.cosine_similarity(got[name].double().flatten(), want.flatten(), dim=0))
        if not (error <= 2 * allowed + torch.finfo(got[name].dtype).eps and cosine >= 0.99):
            pytest.fail(f"{case.op}: {name} is wrong: error {error:.2g}, reference {allowed:.2g}, cosine {cosine:.4f}")
        worst = max(worst, error)
    return worst


def measure(case: Case, benchmark: BenchmarkFixture) -> None:
    """The gate, the time, and the row. Bytes, at least: inputs and dy read once, result and gradients written once."""
    no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    module = importlib.import_module(f"clone_fast.ops.{case.op}")
    with mock.patch.dict("os.environ", CLONE_FAST_STRICT="1"), no_tf32:
        torch.manual_seed(0)
        inputs, function, on_gpu = case.inputs(), case.on("ops"), DEVICE.type == "cuda"
        with mock.patch.object(module, "resolve", side_effect=module.resolve) as resolve:
            y = function(**inputs).detach()
        backend = module.resolve(*resolve.call_args.args)  # of the very call that the op made
        dy = dy_of(y, inputs["x"]) if case.backward else None
        held = sum(value.nbytes for value in inputs.values())
        moved = (held + y.nbytes) * (2 if case.backward else 1)
        about: dict[str, Any] = {"torch": torch.__version__, "backend": backend, "case": case.name}
        about["device"] = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        about |= {"shape": list(case.tensors["x"]), "dtype": str(case.dtype), "layout": str(case.layout)}
        about |= {"backward": case.backward, "error": gate(case, inputs, dy), "bytes": moved}

        def timed(inputs: dict[str, Tensor]) -> None:
            run(function, inputs, dy)
            if on_gpu:
                torch.cuda.synchronize()

        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            timed(inputs)
            about["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        rotation = itertools.cycle([inputs, *(case.inputs() for _ in range(min(WORKING_SET // held, ROUNDS - 1)))])
        benchmark.group = f"{case.op}, forward" + " and backward" * case.backward
        benchmark.pedantic(timed, setup=lambda: ((next(rotation),), {}), rounds=ROUNDS, warmup_rounds=2)
        benchmark.extra_info.update(about)
        if benchmark.stats is not None:  # there is none under --benchmark-disable
            benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9
