"""Kernels compiled side by side, before the first run that needs them.

Triton compiles a kernel when it is first launched, one after the other: a first iteration of Clone at 1024x1024 wants
more than two hundred, a minute and more. `compile_ahead` lets a function launch nothing and notes what it would launch,
and hands that to processes of their own, which leave the results in Triton's cache on disk. The launches that follow
find them there.

    python -m clone_fast.kernels._ahead 90 launchers     # one of these processes: jobs on its standard input
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

log = logging.getLogger("clone_fast")

PACKAGE = "clone_fast.kernels."
MOST_PROCESSES = 32
FEW = 8  # kernels: the process that wants them compiles these before others have started
SHARE = 4  # kernels, for which a process more is worth its start


class Job(NamedTuple):
    """A kernel that is not compiled yet: its module and name, Triton's description, and a file that says it is done."""

    module: str
    name: str
    data: str
    done: str


class Compiling:
    """As much of a Triton driver as compilation asks for, where no GPU is to be touched.

    Args:
        capability: of the GPU that is compiled for, 90 for 9.0.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_ahead(run: Callable[[], None]) -> int:
    """Compile what `run` launches; how many kernels that were.

    `run` is called once, and its kernels that are not compiled yet do nothing: what they should have written is
    undefined, so it must not keep what it computes. Where a process fails, a launch compiles as ever.
    """
    jobs = [job for job in wanted(run) if not Path(job.done).exists()]
    processes = min(MOST_PROCESSES, _processors(), math.ceil(len(jobs) / SHARE))
    if len(jobs) < FEW or processes < 2:
        return 0
    began = time.perf_counter()
    command = [sys.executable, "-m", __name__, str(driver.active.get_current_target().arch)]
    command += [] if isinstance(driver.active, Compiling) else ["launchers"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    with ExitStack() as stack:
        started = []
        for _ in range(processes):
            process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)  # first, as the last one in is the first one out
            started.append(process)
        for i, process in enumerate(started):
            if process.stdin is not None:
                json.dump(jobs[i::processes], process.stdin)
                process.stdin.close()
                process.stdin = None
        said = [process.communicate()[1] for process in started]
    failed = [text for text, process in zip(said, started, strict=True) if process.returncode]
    if failed:
        reason = (failed[0].strip().splitlines() or ["without a word"])[-1]
        warnings.warn(f"compiling kernels side by side: a process failed ({reason})", RuntimeWarning, stacklevel=2)
    log.info("compiled %d kernels in %d processes: %.1f s", len(jobs), processes, time.perf_counter() - began)
    return len(jobs)


def wanted(run: Callable[[], None]) -> list[Job]:
    """The kernels of this project that `run` launches and this process has not compiled; they are not launched."""
    found: dict[str, Job] = {}
    owner, before = threading.get_ident(), knobs.runtime.jit_cache_hook
    folder = Path(knobs.cache.dir) / "clone_fast"

    def note(**about: Any) -> bool:
        mine = threading.get_ident() == owner or threading.current_thread().name.startswith("Dummy-")  # autograd's
        fn = about["fn"]
        if not mine or not fn.module.startswith(PACKAGE):
            return bool(before(**about)) if before is not None else False
        data = about["compile"]["specialization_data"]
        digest = hashlib.sha256(f"{triton.__version__} {fn.jit_function.cache_key} {data}".encode()).hexdigest()
        found[digest] = Job(fn.module, fn.name, data, str(folder / digest))
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found.values())


def _processors() -> int:
    """Of this process, if as many others as torchrun says share the machine."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ours // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def build_launcher(kernel: Any) -> None:
    """Have the C compiler make what launches a kernel of this signature: up to Triton 3.6 a module of its own, which
    takes about as long as the kernel. Later versions need none."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def main() -> None:
    """Compile the jobs of standard input, a list in JSON, for the capability in the first argument; with a second one,
    where there is a driver to link them with, their launchers, too."""
    driver.set_active(Compiling(int(sys.argv[1])))
    for job in [Job(*fields) for fields in json.load(sys.stdin)]:
        kernel = getattr(importlib.import_module(job.module), job.name).preload(job.data)
        if sys.argv[2:]:
            build_launcher(kernel)
        Path(job.done).parent.mkdir(parents=True, exist_ok=True)
        Path(job.done).touch()


if __name__ == "__main__":
    main()
