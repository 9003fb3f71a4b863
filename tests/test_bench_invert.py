"""The benchmarks of the whole job: their tables, the verdict of the soak, and the rows of the precisions."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
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


# ---- the soak --------------------------------------------------------------------------------------------------------


def lines(*ms: float, **last: Any) -> list[dict[str, Any]]:
    made = [
        {"iterations": 100 * (i + 1), "ms": one, "allocated_gb": 1.0, "reserved_gb": 4.0, "finite": True, "loss": 1.0}
        for i, one in enumerate(ms)
    ]
    made[-1] |= last
    return made


def test_a_flat_run_has_no_complaint() -> None:
    assert part("soak").complaints(lines(90, 30, 31, 30, 32, 31)) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lines(90, 30, 30, 31, 32, 33), "slower: 32.50 ms"),
        (lines(90, 30, 30, 30, 30, reserved_gb=4.1), "memory grew: 4.100 GB reserved, 4.000 after the first 200"),
        (lines(90, 30, 30, 30, 30, allocated_gb=1.001), "memory grew: 1.001 GB allocated, 1.000 after the first 200"),
        (lines(90, 30, 30, 30, 30, finite=False), "not finite at iteration 500"),
        (lines(90, 30, 30, 30, 30, loss=float("nan")), "not finite at iteration 500"),
    ],
)
def test_what_is_not_flat_is_told(rows: list[dict[str, Any]], message: str) -> None:
    (found,) = part("soak").complaints(rows)
    assert message in found


def test_the_soak_runs_all_terms_and_ends_with_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak, path = part("soak"), tmp_path / "soak.json"
    arguments = {"--iterations": 5, "--every": 1, "--resolution": 8, "--precision": "fp32", "--json": path}
    monkeypatch.setattr("sys.argv", ["soak", *(str(text) for pair in arguments.items() for text in pair)])
    monkeypatch.setattr(soak, "Architecture", lambda img_resolution: tiny.arch(img_resolution))
    monkeypatch.setattr(soak, "SLOWER", 1e9)
    with pytest.raises(SystemExit) as ended:
        soak.main()
    told = json.loads(path.read_text())
    assert (ended.value.code, told["complaints"], len(told["rows"])) == (0, [], 5)
    monkeypatch.setattr(soak, "SLOWER", 0.0)
    with pytest.raises(SystemExit) as ended:
        soak.main()
    assert ended.value.code == 1


# ---- the precisions --------------------------------------------------------------------------------------------------


def test_a_precision_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    precisions, net = part("precisions"), tiny.network()
    search, take = precisions.searched, precisions.losses

    def searched(net: Any, photo: Any, name: str, steps: int) -> Any:
        if name == "fp16":
            raise RuntimeError("no fp16 here")
        return search(net, photo, name, steps)

    monkeypatch.setattr(precisions, "searched", searched)
    monkeypatch.setattr(precisions, "losses", lambda net, photo, name, *more: take(net, photo, "fp32", *more))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for values in precisions.measured(net, tiny.photo(), 2, 2):
        key = values["precision"], values["mode"]
        rows[key] = rows.get(key, {"photo": "one"}) | values
    assert len(rows) == 8
    assert [key for key, row in rows.items() if "failed" in row] == [("fp16", "recon"), ("fp16", "clone")]
    assert all(row["apart"] == 0 for row in rows.values())  # fp32 on both sides, here
    found = precisions.table(list(rows.values())).splitlines()
    assert found[2].startswith("| fp32 | ")
    assert found[-1] == "| fp16 |  |  |  | 0 | 0 |"
