"""bias_act: what stands behind a convolution."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common import BF16, BF16_NCHW, FP32, FP32_NCHW, ON_GPU, Case, measure, parametrized, rows

SHAPES = [(1, 32, 1024), (4, 32, 1024), (1, 64, 512), (4, 512, 64)] if ON_GPU else [(1, 32, 128), (1, 128, 16)]
FORMATS = [BF16, BF16_NCHW, FP32, FP32_NCHW] if ON_GPU else [FP32]
CASES = [
    Case(
        "bias_act",
        "lrelu",
        {"x": [n, c, r, r], "b": [c]},
        {"act": "lrelu", "clamp": 256.0},
        compiled=ON_GPU and (n, r) == (1, 1024),
    )
    for n, c, r in SHAPES
]


@parametrized(rows(CASES, FORMATS))
def test_bias_act(case: Case, benchmark: BenchmarkFixture) -> None:
    measure(case, benchmark)
