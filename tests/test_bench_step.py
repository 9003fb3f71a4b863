"""The benchmark of the steps: its contenders do the same work, its gate shuts, its floor and its table count right."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_thread  # noqa: F401 (a fixture)

from clone_fast.nn import Architecture, Discriminator, Generator

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "bench_step.py").exists():
    pytest.skip("tests the checkout's benchmarks, and there is none", allow_module_level=True)


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("CLONE_FAST_BENCH_RGB", raising=False)


def part(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize(("step", "batch"), [("tweak", 1), ("tweak", 2), ("clone", 5), ("latent", 1)])
def test_the_contenders_do_the_same_work(step: str, batch: int) -> None:
    bench, contenders = part("bench_step"), part("contenders")
    row = contenders.Row(step, "fp32", batch, "tiny 32", bench.TINY)
    world = contenders.World(row, torch.device("cpu"))
    wanted, name = bench.yardstick(world)
    assert name == "reference"
    assert wanted.shape == ((3, 2) if step == "clone" else (3,))
    builds = {
        "ours": lambda: contenders.ours(world, one_pass=False),
        "reference": lambda: contenders.reference(world),
        "strong": lambda: contenders.strong(world, None),
    }
    for name, build in builds.items():
        found = bench.measured(name, build, wanted, "fp32")
        assert found[f"{name}_error"] < 1e-4
        assert found[f"{name}_ms"] > 0
    assert bench.measured("ours", lambda: contenders.ours(world), wanted, bench.ONE_PASS)["ours_ms"] > 0


def test_wrong_values_have_no_time() -> None:
    bench = part("bench_step")
    wanted = torch.tensor([3.0, 2.0], dtype=torch.float64)
    assert bench.gate("ours", torch.tensor([3.0]), wanted, "fp32") == 0
    assert bench.gate("ours", torch.tensor([3.0, 2.02]), wanted, "bf16") == pytest.approx(0.01, rel=1e-4)
    for wrong in (2.02, float("nan")):
        with pytest.raises(pytest.fail.Exception, match="ours is wrong"):
            bench.gate("ours", torch.tensor([3.0, wrong]), wanted, "fp32")


def test_too_little_memory_is_said() -> None:
    def build() -> Any:
        raise torch.OutOfMemoryError("no")

    assert part("bench_step").measured("reference", build, torch.ones(3), "fp32") == {"reference_how": "out of memory"}


def test_the_floor_counts_the_networks_layers() -> None:
    """Weights as the networks have them, operations as a convolution of these sizes has them."""
    floors = part("floors")
    arch = Architecture(img_resolution=32, w_dim=16, channel_base=256, channel_max=16)
    for module, layers in (
        (Generator(arch).synthesis, floors.generator_layers(arch)),
        (Discriminator(arch), floors.discriminator_layers(arch)),
    ):
        weights = [p for name, p in module.named_parameters() if name.endswith("weight")]
        assert sum(layer.weights for layer in layers) == sum(p.numel() for p in weights)
    first = floors.generator_layers(arch)[0]
    assert first == floors.Layer(16 * 16, 16 * 16, 16 * 16 * 9, 2 * 16 * 16 * 9 * 16)
    full = Architecture()
    tweak, latent, clone = (floors.floor(step, full, n, 2) for step, n in (("tweak", 1), ("latent", 1), ("clone", 5)))
    assert tweak.operations == pytest.approx(3 / 2 * latent.operations)
    assert clone.operations == pytest.approx(8.4e12, rel=0.01)
    assert tweak.bytes == pytest.approx(2.87e9, rel=0.01)
    assert tweak.seconds(4e12, 8e14) >= max(tweak.bytes / 4e12, tweak.operations / 8e14)


def row(**changes: Any) -> dict[str, Any]:
    made = {"step": "tweak", "precision": "bf16", "batch": 1, "network": "F 1024", "device": "GPU", "ours_ms": 2.0}
    made |= {"strong_ms": 6.0, "strong_peak_gb": 1.25, "reference_how": "out of memory", "floor_ms": 1.0}
    return made | changes


def test_the_table_has_a_line_a_row() -> None:
    lines = part("step_table").table([row(), row(step="clone", batch=5)]).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith(
        "| F 1024 | bf16 | 1 | 2.00 ms | out of memory | 6.00 ms, 1.2 GB | 1.00 ms | 3.00 | 2.00 |"
    )
    assert "global 4" in lines[3]


def test_a_later_run_replaces_its_rows_and_keeps_the_others(tmp_path: Path) -> None:
    table, path = part("step_table"), tmp_path / "results" / "step.json"
    table.kept([row(), row(batch=5)], path)
    both = table.kept([row(ours_ms=1.5)], path)
    assert [(r["batch"], r["ours_ms"]) for r in both] == [(1, 1.5), (5, 2.0)]
    assert json.loads(path.read_text()) == both
