"""upfirdn2d: the blur, the upsampling and the downsampling of StyleGAN2's blocks, with their 4x4 filter."""

from __future__ import annotations

from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common import SHAPES, Case, measure, rows
from clone_fast import setup_filter

KINDS: dict[str, dict[str, Any]] = {
    "blur": {"padding": [2, 1, 2, 1]},
    "up2": {"up": 2, "padding": [2, 1, 2, 1], "gain": 4.0},
    "down2": {"down": 2, "padding": [1, 1, 1, 1]},
}
FILTER = setup_filter([1, 3, 3, 1])
CASES = [
    Case("upfirdn2d", kind, {"x": [n, c, r, r]}, {"f": FILTER, **options})
    for n, c, r in SHAPES
    for kind, options in KINDS.items()
]


@rows(CASES)
def test_upfirdn2d(case: Case, benchmark: BenchmarkFixture) -> None:
    measure(case, benchmark)
