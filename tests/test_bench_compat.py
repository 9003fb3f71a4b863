"""The benchmark of other codebases: what it needs, how it compares, and its tables; without any of their code."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign import codebase
from tiny import one_thread  # noqa: F401 (a fixture)

import clone_fast

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "bench_compat.py").exists():
    pytest.skip("tests the checkout's benchmarks, and there is none", allow_module_level=True)


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("foreign", "compat"):
        importlib.import_module(f"benchmarks.{name}")


def part(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def row(**values: Any) -> dict[str, Any]:
    made = {"target": "ada", "row": "tuning step", "arithmetic": "fp32", "how": "install", "network": "F 1024"}
    made |= {"device": "GPU", "torch": "2.11", "commit": "abc", "ops": "their extensions", "build_s": 61.4, "steps": 20}
    made |= {"theirs_ms": 60.0, "ours_ms": 15.0, "speedup": 4.0, "worst": 1e-5, "allowed": 2e-3}
    return made | {"theirs_peak_gb": 9.0, "ours_peak_gb": 7.5} | values


# ---- where the code is -----------------------------------------------------------------------------------------------


def test_what_is_not_there_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    targets, bench = part("targets"), part("bench_compat")
    monkeypatch.delenv(targets.FOLDER, raising=False)
    assert bench.absent("tune") == "CLONE_FAST_BENCH_TARGETS names no folder of checkouts"
    monkeypatch.setenv(targets.FOLDER, str(tmp_path))
    assert "git clone https://github.com/NVlabs/stylegan3 there" in bench.absent("sg3")
    (tmp_path / "stylegan3").mkdir()
    assert bench.absent("sg3") is None
    (tmp_path / "PTI").mkdir()
    monkeypatch.setattr(targets, "lacking", lambda packages: None)
    assert "no stylegan2-ada-pytorch" in bench.absent("PTI")


def test_stand_ins_leave_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = part("targets")
    for name in ("requests", "wandb", "distutils", "distutils.util", "pkg_resources", "lpips"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())  # put back afterwards
        monkeypatch.delitem(sys.modules, name)
    targets._provide("json", loads=None)
    targets._provide("nobody.nothing", answer=42)
    assert json.loads("1") == 1
    assert importlib.import_module("nobody.nothing").answer == 42
    for name in ("nobody", "nobody.nothing"):
        del sys.modules[name]
    targets.stand_in()
    assert importlib.import_module("lpips").LPIPS is part("perceptual").LPIPS


def test_a_script_leaves_the_process_as_it_was() -> None:
    before = sys.argv[:], sys.path[:], sys.modules["__main__"]
    with part("targets").scripting("script.py", "--step", "1"):
        assert sys.argv == ["script.py", "--step", "1"]
        sys.path.insert(0, "elsewhere")
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


def test_the_stand_in_for_lpips_is_always_the_same() -> None:
    kind, state = part("perceptual").LPIPS, torch.random.get_rng_state()
    one, other = kind(net="alex"), kind()
    assert torch.equal(state, torch.random.get_rng_state())
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    value = one(image, torch.zeros(1, 3, 32, 32))
    value.sum().backward()
    assert value.shape == (1, 1, 1, 1)
    assert value.item() > 0 == one(image, image).item()
    assert image.grad is not None
    assert value.item() == other(image, torch.zeros(1, 3, 32, 32)).item()


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_the_steps_of_a_stand_in_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    compat, kind = part("compat"), part("foreign").Drawn
    with codebase("nvidia") as load:
        generator = load("training.networks").Generator().eval()
        w, photo = torch.randn(1, 3), torch.randn(1, 4, 16, 16)
        world = kind(generator, lambda g, **_: g(w), w, photo)
        monkeypatch.setattr(compat.targets, "enter", lambda name, buildable: (None, "theirs"))
        monkeypatch.setattr(compat.foreign, "drawn", lambda networks, nvidia: world)
        monkeypatch.setitem(compat.MEASURED, "ada", ("ada", (compat.tuning, compat.half)))
        *rows, half = compat.rows("ada", True)
    assert [(r["arithmetic"], r["how"]) for r in rows] == [
        (arithmetic, how) for arithmetic in ("fp32", "tf32") for how in ("install", "accelerate")
    ]
    assert all(r["served"] > 0 and r["worst"] < 1e-4 and part("compat_table").wrong(r) is None for r in rows)
    assert half["cosine"] > 0.9999


def test_a_loop_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compat = part("compat")

    def broken(*_: Any) -> Any:
        raise RuntimeError("no plugin here")

    monkeypatch.setattr(compat.targets, "enter", lambda name, buildable: (None, "theirs"))
    monkeypatch.setattr(compat.foreign, "drawn", lambda networks, nvidia: None)
    monkeypatch.setitem(compat.MEASURED, "ada", ("ada", (broken, lambda *_: iter([{"row": "another"}]))))
    first, second = compat.rows("ada", True)
    assert (first["row"], first["failed"]) == ("broken", "RuntimeError: no plugin here")
    assert second["row"] == "another"
    monkeypatch.setattr(compat.targets, "enter", broken)
    assert [r["row"] for r in compat.rows("ada", True)] == ["import"]


def test_a_time_in_which_nothing_was_ours_is_none() -> None:
    foreign = part("foreign")
    with pytest.raises(RuntimeError, match="nothing was served"), foreign.with_us("install"):
        torch.zeros(1)
    clone_fast.uninstall()


def test_the_difference_of_two_runs_is_that_of_their_worst_step() -> None:
    run = part("foreign").Run
    theirs = run([torch.tensor(2.0), torch.tensor([1.0])], [9.0, 4.0, 5.0, 6.0])
    ours = run([torch.tensor(2.0), torch.tensor([1.5])], [9.0, 2.0, 2.5, 3.0])
    assert ours.apart(theirs) == 0.5
    assert part("compat").compared(theirs, ours, 0.1)["speedup"] == 2.0


def test_a_process_that_hangs_is_ended_and_its_rows_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = part("bench_compat")
    code = "import time; print('so far', flush=True); time.sleep(60)"

    def command(job: str, name: str, out: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
        out.write_text(json.dumps(row()) + '\n{"row": "half a l')
        with out.with_suffix(".log").open("w") as log:
            return subprocess.Popen([sys.executable, "-c", code], stdout=log, start_new_session=True, text=True)

    monkeypatch.setattr(bench, "command", command)
    monkeypatch.setitem(bench.PATIENCE, "rows", 1)
    whole, lost = bench.measured("ada", tmp_path, {"build_s": 3.0, "ops": "their extensions"})
    assert (whole["row"], whole["build_s"]) == ("tuning step", 3.0)
    assert (lost["row"], lost["failed"]) == ("process ada", "no end after 1 s: so far\n")


# ---- the tables ------------------------------------------------------------------------------------------------------


def test_a_step_tells_both_times_and_the_aim() -> None:
    text = part("compat_table").steps([row(), row(row="coach step", target="PTI", arithmetic="tf32")])
    lines = text.splitlines()
    assert lines[2] == (
        "| stylegan2-ada-pytorch | PTI's tuning step, the generator's part | fp32 | `install()` "
        "| 60.0 | 15.0 | 4.0x (>= 3x) | 1.0e-05 | 9.0, 7.5 |"
    )
    assert lines[3].endswith("| 60.0 | 15.0 | 4.0x | 1.0e-05 | 9.0, 7.5 |")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"worst": 0.01}, "the values differ by 0.01, allowed is 0.002"),
        ({"worst": float("nan")}, "the values differ by nan"),
        ({"cosine": 0.5}, "the gradients' cosine is 0.5000"),
        ({"ours_steps": 7, "stopped": "diverged"}, "tune took 7 of 20 steps: diverged"),
    ],
)
def test_what_is_wrong_has_no_time(values: dict[str, Any], message: str) -> None:
    table = part("compat_table")
    found = row(**values)
    assert table.wrong(found).startswith(message)
    assert message in table.steps([found])
    assert "15.0" not in table.steps([found])


def test_tune_is_held_against_the_loop_of_its_arithmetic() -> None:
    seconds = {"theirs_s": 21.0, "theirs_psnr": 20.0, "theirs_tf32_s": 15.0, "theirs_tf32_psnr": 20.1, "ours_s": 1.5}
    made = {"row": "tune", "how": "tune", "first_s": 9.0, "ours_psnr": 22.0, "speedup": 10.0, "steps": 350}
    rows = [{**row(), **made, **seconds, "arithmetic": name} for name in ("bf16", "tf32")]
    for one in rows:
        del one["theirs_ms"]
    lines = part("compat_table").loops(rows).splitlines()[2:]
    start = "| 350 steps of PTI's tuning"
    assert lines[0] == f"{start} | bf16 | 21.0 s, 20.0 dB | 1.5 s, 22.0 dB | 9.0 s | 10.0x (>= 10x) |"
    assert lines[1].startswith(f"{start} | tf32 | 15.0 s, 20.1 dB |")


def test_the_block_says_what_the_baselines_ran_on(tmp_path: Path) -> None:
    table = part("compat_table")
    rows = table.kept([row(), row(speedup=3.0), row(target="sg3", ops="their plain PyTorch")], tmp_path / "compat.json")
    assert [r["speedup"] for r in rows] == [3.0, 4.0]
    assert "stylegan2-ada-pytorch on their extensions, built in 61 s; stylegan3's" in table.block(rows)


def test_a_row_that_failed_has_a_place() -> None:
    table = part("compat_table")
    failed = table.whole({"target": "sg3", "row": "import", "failed": "no"})
    assert table.name(failed) == "sg3 import"
    assert table.steps([failed]) == table.loops([failed]) == ""
