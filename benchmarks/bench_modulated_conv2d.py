"""modulated_conv2d: the layers of StyleGAN2 config F, each as the networks call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.common import BF16, FP16, FP32, ON_GPU, TF32, Case, measure, parametrized, rows
from clone_fast import setup_filter

FILTER = setup_filter([1, 3, 3, 1])
ACT = {"act": "lrelu", "clamp": 256.0}


def channels(resolution: int) -> int:
    """Of config F at this resolution; on a CPU a quarter."""
    return min(32768 // resolution, 512) if ON_GPU else min(4096 // resolution, 128)


def _bare(tensors: dict[str, Tensor], *, up: int, down: int, k: int) -> Tensor:
    """The convolution of a layer with nothing around it, in cuDNN's favourite layout."""
    x, weight = tensors["x"], tensors["weight"]
    if up == 2:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2, padding=1, output_padding=1)
    return F.conv2d(x, weight, stride=down, padding=k // 2)


def layers(n: int, r: int) -> list[Case]:
    """Those whose result is r x r (of down2: whose input is), as in the generator, and in the discriminator."""
    c, coarser = channels(r), channels(r // 2)
    noise: dict[str, Sequence[int]] = {"noise": [r, r], "noise_strength": []}
    resampling = {"resample_filter": FILTER, **ACT}
    table: list[tuple[str, int, int, int, dict[str, Any], dict[str, Any]]] = [
        ("conv3x3", c, c, 3, {"styles": [n, c], **noise}, ACT),
        ("up2", coarser, c, 3, {"styles": [n, coarser], **noise}, {"up": 2, **resampling}),
        ("torgb", c, 3, 1, {"styles": [n, c]}, {"demodulate": False, "clamp": 256.0}),
        ("down2", c, coarser, 3, {}, {"styles": None, "demodulate": False, "down": 2, **resampling}),
    ]
    found = []
    for name, i, o, k, tensors, options in table:
        if r == 4 and name in ("up2", "down2"):
            continue
        up, down = options.get("up", 1), options.get("down", 1)
        size = r // up
        case = Case(
            "modulated_conv2d",
            name,
            {"x": [n, i, size, size], "weight": [o, i, k, k], **tensors, "bias": [o]},
            options,
            operations=2 * n * (size // down) ** 2 * i * o * k * k,
            bare=partial(_bare, up=up, down=down, k=k),
            compiled=ON_GPU and n == 1 and r in (64, 256, 1024) and name != "torgb",
        )
        found.append(case)
    return found


def chosen() -> list[Case]:
    """bf16: everything at batch 1 and, from 64^2, at 4. TF32 and fp16: the large layers at batch 1."""
    if not ON_GPU:
        return rows([case for r in (16, 64) for case in layers(1, r)], [FP32])
    resolutions = [2**i for i in range(2, 11)]
    found = rows([case for r in resolutions for case in layers(1, r)], [BF16])
    found += rows([case for r in resolutions if r >= 64 for case in layers(4, r)], [BF16])
    large = [replace(case, compiled=False) for r in resolutions if r >= 64 for case in layers(1, r)]
    return found + rows(large, [TF32]) + rows(large, [FP16], backward=False)


@parametrized(chosen())
def test_modulated_conv2d(case: Case, benchmark: BenchmarkFixture) -> None:
    measure(case, benchmark)
