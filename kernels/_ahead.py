"""Kernels compiled side by side, before the first run that needs them.

Triton compiles a kernel when it is first launched, one after the other: a first iteration of Clone at 1024x1024 wants
more than two hundred, a minute and more. `compile_ahead` lets a function launch nothing and notes what it would launch,
and hands that to another process, which imports Triton once, forks and leaves the results in Triton's cache on disk.
The launches that follow find them there.

    python -m clone_fast.kernels._ahead 90 16 JOB     # that process: further jobs on its standard input
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import cache
from triton.runtime.driver import driver

log = logging.getLogger("clone_fast")

PACKAGE = "clone_fast.kernels."
MOST_PROCESSES = 32
FEW = 8  # kernels: the process that wants them compiles these before another one has imported what it needs
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class Job(NamedTuple):
    """A kernel that is not compiled yet.

    Attributes:
        module, name: where it stands.
        data: Triton's description of what it is compiled for.
        launcher: whether that is to be built, too; one serves all that are called alike.
        done: a file that says that all this was done.
    """

    module: str
    name: str
    data: str
    launcher: bool
    done: str


class Outcome(NamedTuple):
    """Of compiling side by side.

    Attributes:
        kernels: how many were to be compiled.
        failed: why a process failed, "" if none did.
    """

    kernels: int
    failed: str


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


def folder() -> Path:
    """Where empty files tell what is compiled: within Triton's cache, so that they are gone when it is."""
    return Path(knobs.cache.dir) / "clone_fast"


def compile_ahead(run: Callable[[], None]) -> Outcome:
    """Compile what `run` launches, unless that is less than FEW kernels.

    `run` is called once, and its kernels that are not compiled yet do nothing: what they should have written is
    undefined, so it must not keep what it computes. Where a process fails, a launch compiles as ever.
    """
    jobs: list[Job] = []
    started: list[subprocess.Popen[str]] = []
    processes = min(MOST_PROCESSES, _processors()) if sys.platform == "linux" else 1  # fork, and prctl
    with ExitStack() as stack:

        def note(job: Job) -> None:
            if Path(job.done).exists():
                return
            jobs.append(job)
            if len(jobs) == FEW and processes > 1:  # it imports while the run goes on
                started.append(_start(jobs[0], processes, stack))

        began = time.perf_counter()
        wanted(run, note)
        if not started:
            return Outcome(0, "")
        noted = time.perf_counter()
        failed = _finish(started[0], jobs[1:])
    if failed:
        warnings.warn(f"compiling kernels side by side: a process failed ({failed})", RuntimeWarning, stacklevel=2)
    ended = time.perf_counter()
    log.info(
        "compiled %d kernels in %d processes: %.1f s, after %.1f s in which they were noted",
        len(jobs), min(processes, len(jobs)), ended - noted, noted - began,
    )  # fmt: skip
    return Outcome(len(jobs), failed)


def _start(first: Job, processes: int, stack: ExitStack) -> subprocess.Popen[str]:
    """The process that compiles, at work on its first job; the stack ends it."""
    capability = str(driver.active.get_current_target().arch)
    command = [sys.executable, "-m", __name__, capability, str(processes), json.dumps(first)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # what forks has neither a GPU nor threads
    process = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    stack.callback(process.wait)
    stack.callback(process.kill)  # first, as the last one in is the first one out
    return process


def _finish(process: subprocess.Popen[str], jobs: Sequence[Job]) -> str:
    """Hand over the other jobs, and wait. Why a process failed, "" if none did."""
    # Triton's hash of all of itself, which the first launch wants: it takes a part of a second, and here no one's time
    own = [threading.Thread(target=cache.triton_key)] if hasattr(cache, "triton_key") else []
    for thread in own:
        thread.start()
    said = process.communicate(json.dumps(jobs))[1]
    for thread in own:
        thread.join()
    return (said.strip().splitlines() or ["without a word"])[-1] if process.returncode else ""


def wanted(run: Callable[[], None], note: Callable[[Job], None]) -> None:
    """Note, once each, the kernels of this project that `run` launches and this process has not compiled; they are not
    launched."""
    found: set[str] = set()
    called: set[Hashable] = set()
    linked = not isinstance(driver.active, Compiling)
    owner, before = threading.get_ident(), knobs.runtime.jit_cache_hook
    place = folder()

    def hook(**about: Any) -> bool:
        mine = threading.get_ident() == owner or threading.current_thread().name.startswith("Dummy-")  # autograd's
        fn = about["fn"]
        if not mine or not fn.module.startswith(PACKAGE):
            return bool(before(**about)) if before is not None else False
        data = about["compile"]["specialization_data"]
        digest = hashlib.sha256(f"{triton.__version__} {fn.jit_function.cache_key} {data}".encode()).hexdigest()
        if digest not in found:
            found.add(digest)
            call = fn.module, fn.name, str(about["compile"]["signature"])
            note(Job(fn.module, fn.name, data, linked and call not in called, str(place / digest)))
            called.add(call)
        return True

    knobs.runtime.jit_cache_hook = hook
    try:
        run()
    finally:
        knobs.runtime.jit_cache_hook = before


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


def compile_one(job: Job) -> bool:
    """Whether it went well; if not, the reason is on standard error."""
    try:
        kernel = getattr(importlib.import_module(job.module), job.name).preload(job.data)
        if job.launcher:
            build_launcher(kernel)
        Path(job.done).parent.mkdir(parents=True, exist_ok=True)
        Path(job.done).touch()
    except Exception:  # whatever it is: the launch that wants the kernel works or raises the same
        sys.stderr.write(traceback.format_exc())
        return False
    return True


def compile_all(jobs: Sequence[Job], processes: int) -> bool:
    """Whether processes, forked from this one, could compile all of the jobs. Each takes the next one as it is ready:
    the longest takes ten times as long as most, and nothing tells before which one that is."""
    parent = os.getpid()
    queue, numbers = os.pipe()
    os.write(numbers, b"".join(i.to_bytes(4, "little") for i in range(len(jobs))))  # a pipe holds 16384
    os.close(numbers)

    def work() -> int:
        end_with(parent)
        well = True
        while number := os.read(queue, 4):
            well &= compile_one(jobs[int.from_bytes(number, "little")])
        return 0 if well else 1

    children = []
    for _ in range(min(processes, len(jobs))):
        child = os.fork()
        if not child:
            code = 1
            try:
                code = work()
            finally:
                os._exit(code)  # nothing of what its parent has yet to do
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for code in codes:
        if code < 0:
            sys.stderr.write(f"ended by signal {-code}\n")
    return not any(codes)


def end_with(parent: int) -> None:
    """Have the kernel end this process when its parent has ended, however that came."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Compile the job in the third argument, and then those of standard input in as many processes as the second one
    says, for the capability in the first.

    What any compilation wants, Triton's modules and a hash of all of them, is there after the first job for all others.
    """
    end_with(os.getppid())
    driver.set_active(Compiling(int(sys.argv[1])))
    well = compile_one(Job(*json.loads(sys.argv[3])))
    jobs = [Job(*fields) for fields in json.loads(sys.stdin.read() or "[]")]  # nothing: who wanted them has ended
    for module in {job.module for job in jobs}:
        importlib.import_module(module)
    sys.exit(0 if compile_all(jobs, int(sys.argv[2])) and well else 1)


if __name__ == "__main__":
    main()
