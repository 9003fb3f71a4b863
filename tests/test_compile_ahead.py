"""Kernels that are compiled side by side: what is noted, that processes compile it, and that launches then find it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# In a process of its own, where Triton believes in an H200, compiles and launches nothing.
SCRIPT = """
import functools, json, sys, warnings
import torch, triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from clone_fast.kernels import _ahead, bias_act
driver.set_active(_ahead.Compiling(90))
_ahead.FEW, _ahead.SHARE = 2, 1
_ahead._processors = lambda: 2
run = JITFunction.run
JITFunction.run = functools.wraps(run)(lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k))
hits = []
def listener(*, metadata, cache_hit, **_):
    hits.append([metadata["name"], cache_hit])
triton.knobs.compilation.listener = listener

def work():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.empty(1, 8, 16, 16, device="meta", dtype=dtype)
        bias_act.launch(x, None, 1, "lrelu", 0.2, 1.0, None)

if sys.argv[1:] == ["broken"]:
    wanted = _ahead.wanted
    _ahead.wanted = lambda run: [job._replace(name="nothing") for job in wanted(run)]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    counts = [_ahead.compile_ahead(work), _ahead.compile_ahead(work)]
work()
told = [str(w.message) for w in told if "side by side" in str(w.message)]
print(json.dumps({"counts": counts, "hits": hits, "told": told}))
"""


def in_a_process(tmp_path: Path, *arguments: str) -> dict[str, list[object]]:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_launches_find_what_processes_have_compiled(tmp_path: Path) -> None:
    found = in_a_process(tmp_path)
    assert found["counts"] == [3, 0]
    assert found["hits"] == [["elementwise_kernel", True]] * 3
    assert not found["told"]


def test_what_no_process_could_compile_is_compiled_when_it_is_launched(tmp_path: Path) -> None:
    found = in_a_process(tmp_path, "broken")
    assert found["counts"] == [3, 3]
    assert found["hits"] == [["elementwise_kernel", False]] * 3
    assert all("a process failed (AttributeError" in str(text) for text in found["told"])
    assert len(found["told"]) == 2
