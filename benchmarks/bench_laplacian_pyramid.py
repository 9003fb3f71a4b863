"""laplacian_pyramid: the loss between two images, six levels."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common import IMAGES, Case, measure, rows

CASES = [
    Case(
        "laplacian_pyramid",
        "loss",
        {"x": [n, c, r, r], "y": [n, c, r, r]},
        {"levels": 6},
        function="laplacian_pyramid_loss",
    )
    for n, c, r in IMAGES
]


@rows(CASES)
def test_laplacian_pyramid(case: Case, benchmark: BenchmarkFixture) -> None:
    measure(case, benchmark)
