"""laplacian_pyramid: the loss between an image and a fixed target, six levels."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common import BF16_NCHW, FP32_NCHW, ON_GPU, Case, measure, parametrized, rows

IMAGES = [(1, 3, 256), (1, 3, 1024), (4, 3, 1024)] if ON_GPU else [(1, 3, 64), (1, 3, 128), (1, 3, 256)]
FORMATS = [FP32_NCHW, BF16_NCHW] if ON_GPU else [FP32_NCHW]
CASES = [
    Case(
        "laplacian_pyramid",
        "loss",
        {"x": [n, c, r, r], "y": [n, c, r, r]},
        {"levels": 6},
        fixed=["y"],
        function="laplacian_pyramid_loss",
        compiled=ON_GPU and (n, r) == (1, 1024),
    )
    for n, c, r in IMAGES
]


@parametrized(rows(CASES, FORMATS))
def test_laplacian_pyramid(case: Case, benchmark: BenchmarkFixture) -> None:
    measure(case, benchmark)
