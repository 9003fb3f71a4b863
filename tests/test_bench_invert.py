"""The benchmarks of the whole job: their tables, the verdict of the soak, and the rows of the precisions."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import one_thread  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "invert_table.py").exists():
    pytest.skip("tests the checkout's benchmarks, and there is none", allow_module_level=True)


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def part(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def row(name: str, **values: Any) -> dict[str, Any]:
    made = {"row": name, "network": "F 1024", "precision": "bf16", "mode": "recon", "device": "GPU", "torch": "2.11"}
    return made | {"commit": "abc", "latent_steps": 200, "steps": 100, "seconds": 4.0} | values


def rate(name: str, per_hour: float, **values: Any) -> dict[str, Any]:
    return row(name, per_hour=per_hour, photos=8, **values)


# ---- the tables of the whole job -------------------------------------------------------------------------------------


def test_a_row_is_written_in_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    table, path = part("invert_table"), tmp_path / "results" / "invert.json"
    table.kept([row("photo"), row("command")], path)
    table.kept([row("photo", seconds=3.0)], path)
    assert [(r["row"], r["seconds"]) for r in json.loads(path.read_text())] == [("photo", 3.0), ("command", 4.0)]


def test_a_photo_tells_its_stages_and_whether_it_ended_early() -> None:
    stages = {"load": 0.5, "latent": 1.0, "tweak": 2.0, "metrics": 0.25}
    text = part("invert_table").photos(
        [row("photo", stages=stages, peak_gb=7.96), row("command", stages=stages, steps=40, stopped="diverged")]
    )
    lines = text.splitlines()
    assert lines[2] == "| photo | F 1024 | bf16 | 200 + 100 | 4.00 | 0.50 | 1.00 | 2.00 | 0.25 | 8.0 |"
    assert lines[3].startswith("| command (diverged at 40) | F 1024 | bf16 | 200 + 40 |")


def test_rates_are_held_against_the_loop_and_against_one_gpu() -> None:
    rows = [rate("each, recon, loop", 1000, at_once="loop"), rate("each, recon, 4", 2500, at_once="4", all_steps=7)]
    rows += [rate("folder, recon, 1", 2000, processes=1), rate("folder, recon, 2", 3900, processes=2)]
    rows += [rate("each, clone, 8", 300, at_once="8", mode="clone", warned=["photo 3 does not fit"])]
    lines = part("invert_table").rates(rows).splitlines()[2:]
    assert lines[0].startswith("| `invert` in a loop | recon | 100 | 8 | 1000 | 1.00 |")
    assert lines[1].startswith("| `invert_each`, at_once=4 (1 stopped early) | recon | 100 | 8 | 2500 | 2.50 |")
    assert lines[2].startswith("| `invert-folder`, 1 GPU | recon | 100 | 8 | 2000 | 1.00 |")
    assert lines[3].startswith("| `invert-folder`, 2 GPUs | recon | 100 | 8 | 3900 | 1.95 |")
    assert lines[4].startswith("| `invert_each`, at_once=8 (fewer at once: memory) | clone | 100 | 8 | 300 |  |")


def test_a_curve_tells_when_it_was_how_near() -> None:
    curve = {"latent": [[0.5, 15.0], [1.0, 20.0]], "tweak": [[1.5, 24.0], [2.0, 31.0], [3.0, 33.0]]}
    table = part("invert_table")
    text = table.curves([row("curve, fp32", curve=curve)])
    assert text.splitlines()[2] == "| bf16 | 20.0 dB at 1.00 s | 2.00 s | 2.00 s |  | 33.0 dB at 3.00 s |"
    assert table.block([row("curve, fp32", curve=curve)]).count("\n\n") == 1  # the others have no rows
