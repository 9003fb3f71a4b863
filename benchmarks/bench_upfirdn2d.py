"""upfirdn2d: the blur, the upsampling and the downsampling of StyleGAN2's blocks, with their 4x4 filter."""

from __future__ import annotations

from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common import BF16, BF16_NCHW, FP32, FP32_NCHW, ON_GPU, Case, measure, parametrized, rows
from clone_fast import setup_filter

KINDS: dict[str, dict[str, Any]] = {
    "blur": {"padding": [2, 1, 2, 1]},
    "up2": {"up": 2, "padding": [2, 1, 2, 1], "gain": 4.0},
    "down2": {"down": 2, "padding": [1, 1, 1, 1]},
}
SHAPES = [(1, 32, 1024), (4, 32, 1024), (1, 64, 512), (1, 128, 256)] if ON_GPU else [(1, 32, 128), (1, 128, 16)]
FORMATS = [BF16, BF16_NCHW, FP32, FP32_NCHW] if ON_GPU else [FP32]
CASES = [
    Case(
        "upfirdn2d",
        kind,
        {"x": [n, c, r, r]},
        {"f": setup_filter([1, 3, 3, 1]), **options},
        compiled=ON_GPU and (n, r) == (1, 1024),
    )
    for n, c, r in SHAPES
    for kind, options in KINDS.items()
]
ROWS = [case for case in rows(CASES, FORMATS) if not (case.backward and ON_GPU and case.format != BF16)]


@parametrized(ROWS)
def test_upfirdn2d(case: Case, benchmark: BenchmarkFixture) -> None:
    measure(case, benchmark)
