"""The ablation as a benchmark. With a GPU in full; on a CPU a short form that says so (the full one: quality.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import quality


def test_quality(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        monkeypatch.setattr(quality, "DRIFT_SAMPLES", 64)
    photos = quality.PHOTOS if on_gpu else quality.PHOTOS[:1]
    options: dict[str, Any] = {"steps": 200, "latent_steps": 200} if on_gpu else {"steps": 20, "latent_steps": 20}
    outcome = benchmark.pedantic(
        lambda: quality.ablation(photos, device="cuda" if on_gpu else "cpu", seed=0, target_psnr=35.0, **options),
        rounds=1,
    )
    benchmark.extra_info.update(outcome["about"])
    with capsys.disabled():
        print("\n" + quality.table(outcome["results"]))
        if not on_gpu:
            print("no GPU: one photo, 20 steps, drift over 64 latents; in full: python benchmarks/quality.py")
    assert all(0 < result["psnr"] < 100 for result in outcome["results"])
