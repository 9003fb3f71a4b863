"""Kernels that are compiled side by side: what is noted, that processes compile it and that launches then find it, that
each job is done once, and that no process stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# In a process of its own, where Triton believes in an H200, compiles and launches nothing.
SCRIPT = """
import functools, json, os, sys, warnings
import torch, triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from clone_fast.kernels import _ahead, bias_act
driver.set_active(_ahead.Compiling(90))
_ahead.FEW = 4 if sys.argv[1:] == ["few"] else 2
_ahead._processors = lambda: 2
run = JITFunction.run
JITFunction.run = functools.wraps(run)(lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k))
hits = []
def listener(*, metadata, cache_hit, **_):
    hits.append([metadata["name"], cache_hit])
triton.knobs.compilation.listener = listener

threads = -len(os.listdir("/proc/self/task"))
def work():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.empty(1, 8, 16, 16, device="meta", dtype=dtype)
        for act in acts:
            bias_act.launch(x, None, 1, act, 0.2, 1.0, None)
acts = ["lrelu"]

if sys.argv[1:] == ["launchers"]:
    driver.set_active(type("Linked", (), {"__getattr__": lambda self, name: getattr(_ahead.Compiling(90), name)})())
    acts, jobs = ["lrelu", "relu"], []
    _ahead.wanted(work, jobs.append)
    print(json.dumps({"launchers": [job.launcher for job in jobs]}))
    sys.exit()
if sys.argv[1:] == ["broken"]:
    wanted = _ahead.wanted
    _ahead.wanted = lambda run, note: wanted(run, lambda job: note(job._replace(name="nothing")))
started, start = [], _ahead._start
_ahead._start = lambda *arguments: started.append(None) or start(*arguments)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    outcomes = [_ahead.compile_ahead(work), _ahead.compile_ahead(work)]
work()
told = [str(w.message) for w in told if "side by side" in str(w.message)]
threads += len(os.listdir("/proc/self/task"))
print(json.dumps({"outcomes": outcomes, "hits": hits, "told": told, "started": len(started), "threads": threads}))
"""

# Jobs that compile nothing, of the kinds in the arguments, one after the other.
PLAYED = """
import json, sys, warnings
from triton.runtime.driver import driver
from clone_fast.kernels import _ahead
driver.set_active(_ahead.Compiling(90))
_ahead.FEW, _ahead._processors = 2, lambda: 2
folder, *kinds = sys.argv[1:]
jobs = [_ahead.Job("stand_in", kind, str(i), False, f"{folder}/{i}.done") for i, kind in enumerate(kinds)]
_ahead.wanted = lambda run, note: [note(job) for job in jobs]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    count, failed = _ahead.compile_ahead(lambda: None)
told = [str(w.message) for w in told if "side by side" in str(w.message)]
print(json.dumps({"count": count, "failed": failed, "told": told}))
"""
STAND_IN = """
import os, signal, time
from pathlib import Path
said = Path(__file__).with_name("said")
class quick:
    @classmethod
    def preload(cls, data):
        threads = len(os.listdir("/proc/self/task"))
        with said.open("a") as file:
            file.write(f"{data} {os.getpid()} {threads}\\n")
class long(quick):  # as long as all others together
    @classmethod
    def preload(cls, data):
        while said.read_text().count("\\n") < 9:
            time.sleep(0.01)
        super().preload(data)
class endless(quick):
    @classmethod
    def preload(cls, data):
        super().preload(data)
        time.sleep(600)
class deadly(quick):
    @classmethod
    def preload(cls, data):
        super().preload(data)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def start(folder: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code, *arguments]
    # who is in the background of a shell without job control ignores interrupts, and hands that on
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=heeds, **pipes)


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def in_a_process(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    return ended(start(tmp_path, SCRIPT, *arguments))


def play(folder: Path, *kinds: str) -> subprocess.Popen[str]:
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "said").touch()
    return start(folder, PLAYED, str(folder), *kinds)


def heard(folder: Path) -> list[tuple[int, int, int]]:
    """Of each job that began: its number, its process, and how many threads that had."""
    rows = [line.split() for line in (folder / "said").read_text().splitlines()]
    return [(int(number), int(process), int(threads)) for number, process, threads in rows]


def runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_launches_find_what_processes_have_compiled(tmp_path: Path) -> None:
    found = in_a_process(tmp_path)
    assert found["outcomes"] == [[3, ""], [0, ""]]
    assert found["hits"] == [["elementwise_kernel", True]] * 3
    assert found["started"] == 1  # and none the second time
    assert not found["told"]


def test_few_are_compiled_when_they_are_launched(tmp_path: Path) -> None:
    found = in_a_process(tmp_path, "few")
    assert (found["outcomes"], found["started"]) == ([[0, ""], [0, ""]], 0)
    assert found["hits"] == [["elementwise_kernel", False]] * 3
    assert found["threads"] == 0  # that compiling has left behind: a process that has compiled may fork


def test_what_no_process_could_compile_is_compiled_when_it_is_launched(tmp_path: Path) -> None:
    found = in_a_process(tmp_path, "broken")
    assert [kernels for kernels, _ in found["outcomes"]] == [3, 3]
    assert all(failed.startswith("AttributeError") for _, failed in found["outcomes"])
    assert found["hits"] == [["elementwise_kernel", False]] * 3
    assert all("a process failed (AttributeError" in str(text) for text in found["told"])
    assert len(found["told"]) == 2


def test_what_is_called_alike_shares_a_launcher(tmp_path: Path) -> None:
    assert in_a_process(tmp_path, "launchers")["launchers"] == [True, False] * 3


def test_each_job_is_done_once_by_who_is_ready(tmp_path: Path) -> None:
    found = ended(play(tmp_path, "quick", "long", *["quick"] * 8))
    assert found == {"count": 10, "failed": "", "told": []}
    said = heard(tmp_path)
    assert sorted(number for number, *_ in said) == list(range(10))
    assert {threads for *_, threads in said} == {1}  # the first one's process is that which forks
    order = defaultdict(list)
    for number, process, _ in said:
        order[process].append(number)
    # one imports and begins, one is long at work, and one takes in turn what there is
    assert sorted(order.values()) == [[0], [1], [2, 3, 4, 5, 6, 7, 8, 9]]
    assert len(list(tmp_path.glob("*.done"))) == 10


def test_a_process_that_is_killed_takes_only_its_job_along(tmp_path: Path) -> None:
    found = ended(play(tmp_path, *["quick"] * 3, "deadly", *["quick"] * 6))
    assert found["told"] == ["compiling kernels side by side: a process failed (ended by signal 9)"]
    assert found["failed"] == "ended by signal 9"
    assert {path.stem for path in tmp_path.glob("*.done")} == set("012456789")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_who_wants_them_ends_and_nothing_runs_on(tmp_path: Path, end: signal.Signals) -> None:
    with play(tmp_path, "quick", *["endless"] * 4) as process:
        limit = time.monotonic() + 300
        while len(heard(tmp_path)) < 3 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        compiling = {number for _, number, _ in heard(tmp_path)}
        assert len(compiling) == 3
        assert all(map(runs, compiling))
        process.send_signal(end)
        process.wait(timeout=60)
    limit = time.monotonic() + 60
    while any(map(runs, compiling)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(runs, compiling))
