"""bias_act: what stands behind a convolution, and the bare bias behind ToRGB."""

from __future__ import annotations

from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common import SHAPES, Case, measure, rows

KINDS: dict[str, dict[str, Any]] = {
    "lrelu": {"act": "lrelu", "clamp": 256.0},
    "linear": {"act": "linear", "clamp": 256.0},
}
CASES = [
    Case("bias_act", kind, {"x": [n, c, r, r], "b": [c]}, options)
    for n, c, r in SHAPES
    for kind, options in KINDS.items()
]


@rows(CASES)
def test_bias_act(case: Case, benchmark: BenchmarkFixture) -> None:
    measure(case, benchmark)
