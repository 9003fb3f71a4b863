"""modulated_conv2d: the layers of StyleGAN2, each as the networks call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common import SHAPES, Case, measure, rows
from clone_fast import setup_filter

FILTER = setup_filter([1, 3, 3, 1])
ACT = {"act": "lrelu", "clamp": 256.0}


def layers(n: int, c: int, r: int) -> list[Case]:
    """Generator: same size, upsampling from half of it, ToRGB. Discriminator: downsampling."""
    noise: dict[str, Sequence[int]] = {"noise": [r, r], "noise_strength": []}
    table: list[tuple[str, dict[str, Sequence[int]], dict[str, Any]]] = [
        ("conv3x3", {"x": [n, c, r, r], "weight": [c, c, 3, 3], "styles": [n, c], **noise}, ACT),
        (
            "up2",
            {"x": [n, c, r // 2, r // 2], "weight": [c, c, 3, 3], "styles": [n, c], **noise},
            {"up": 2, "resample_filter": FILTER, **ACT},
        ),
        ("torgb", {"x": [n, c, r, r], "weight": [3, c, 1, 1], "styles": [n, c]}, {"demodulate": False, "clamp": 256.0}),
        (
            "down2",
            {"x": [n, c, r, r], "weight": [c, c, 3, 3]},
            {"styles": None, "demodulate": False, "down": 2, "resample_filter": FILTER, **ACT},
        ),
    ]
    return [
        Case("modulated_conv2d", name, {**tensors, "bias": [tensors["weight"][0]]}, options)
        for name, tensors, options in table
    ]


@rows([case for shape in SHAPES for case in layers(*shape)])
def test_modulated_conv2d(case: Case, benchmark: BenchmarkFixture) -> None:
    measure(case, benchmark)
