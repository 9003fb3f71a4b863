"""Other people's StyleGAN2 code, unmodified, without us and with us: steps, scripts, and `tune` against their loop.

    export CLONE_FAST_BENCH_TARGETS=~/targets     # a folder; in it, git clone what is to be measured:
    git clone https://github.com/NVlabs/stylegan2-ada-pytorch
    git clone https://github.com/NVlabs/stylegan3
    git clone https://github.com/rosinality/stylegan2-pytorch
    git clone https://github.com/danielroich/PTI  # it needs stylegan2-ada-pytorch, and torchvision
    pytest benchmarks/bench_compat.py --benchmark-only                      # all, or those of -k:
    pytest benchmarks/bench_compat.py --benchmark-only -k "ada or tune"

A codebase that is not there is skipped. On a GPU networks are config F at 1024x1024 with random weights; before all
else the extensions of those that were asked for are built, side by side, and the rows say what theirs ran on. Each
codebase is measured in a process of its own, which has its time and no more; each row is written to
benchmarks/results/compat.json, and one that fails costs no other. What is compared with what: benchmarks/compat.py.
On a CPU tiny networks, to see that it works.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import common, compat, compat_table, targets

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = {"build": 300, "rows": 240}  # seconds of a process


def absent(name: str) -> str | None:
    """Why this cannot be measured here; PTI's generator comes out of stylegan2-ada-pytorch's."""
    codebases = ("PTI", "ada") if name == "PTI" else (compat.MEASURED[name][0],)
    return next(filter(None, map(targets.missing, codebases)), None)


def command(job: str, name: str, out: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start a process of `benchmarks.compat`; what it says goes into a file beside `out`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path}
    if common.ON_GPU:
        major, minor = torch.cuda.get_device_capability()
        environment |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    line = [sys.executable, "-m", "benchmarks.compat", job, name, str(out), *options]
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            line, cwd=folder, env=os.environ | environment, stdout=log, stderr=log, text=True, start_new_session=True
        )


def ended(process: subprocess.Popen[str], seconds: float, log: Path) -> str | None:
    """Why a process came to no good end in its time, with the end of what it said; None if it did."""
    try:
        code: object = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers that it started, too
        process.wait()
        code = f"no end after {seconds:.0f} s"
    return f"{code}: {log.read_text()[-2000:]}" if code else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compat")


@pytest.fixture(scope="module")
def builds(folder: Path, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """By codebase the seconds that its extensions took and what became of them, of those that this run measures."""
    chosen = {item.callspec.params["name"] for item in request.session.items if hasattr(item, "callspec")}
    codebases = {compat.MEASURED[name][0] for name in chosen & set(compat.MEASURED) if absent(name) is None}
    found: dict[str, dict[str, Any]] = {}
    if common.ON_GPU:
        outs = {name: folder / f"build-{name}.json" for name in sorted(codebases)}
        started = {name: command("build", name, out, folder) for name, out in outs.items()}
        for name, process in started.items():
            wrong = ended(process, PATIENCE["build"], outs[name].with_suffix(".log"))
            found[name] = {"ops": targets.PLAIN, "build": wrong} if wrong else json.loads(outs[name].read_text())
    return found


def measured(name: str, folder: Path, build: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one process, those of one that did not come to its end, too."""
    out = folder / f"{name}.jsonl"
    options = () if build.get("ops", targets.COMPILED) == targets.COMPILED else ("--unbuilt",)
    wrong = ended(command("rows", name, out, folder, *options), PATIENCE["rows"], out.with_suffix(".log"))
    rows = []
    for line in out.read_text().splitlines() if out.exists() else []:
        with suppress(json.JSONDecodeError):  # the last one of a process that was ended
            rows.append(json.loads(line))
    if wrong:
        rows.append({"target": compat.MEASURED[name][0], "row": f"process {name}", "failed": wrong})
    more = {key: value for key, value in build.items() if key != "ops"} | common.origin()
    return [compat_table.whole(row | more) for row in rows]


@pytest.mark.parametrize("name", list(compat.MEASURED))
def test_codebase(name: str, folder: Path, builds: dict[str, dict[str, Any]], benchmark: BenchmarkFixture) -> None:
    if reason := absent(name):
        pytest.skip(reason)
    found: list[dict[str, Any]] = []

    def run() -> None:
        found.extend(measured(name, folder, builds.get(compat.MEASURED[name][0], {})))

    benchmark.group = "other codebases"
    benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info["rows"] = found
    compat_table.ROWS.extend(found)
    if common.ON_GPU:
        compat_table.kept([row for row in found if "failed" not in row])
    failures = [f"{row['row']}: {row['failed']}" for row in found if "failed" in row]
    failures += [f"{compat_table.name(row)}: {wrong}" for row in found if (wrong := compat_table.wrong(row))]
    if failures:
        pytest.fail("\n".join(failures))
