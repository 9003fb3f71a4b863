"""Triton kernels compiled for an H100 or H200 where there is none: which registers, what spills.

A test names a function of its module that calls the leaf as a user would, on tensors of the meta device, which have a
shape and no memory. It runs in a process of its own, where Triton believes in a GPU of compute capability 9.0, compiles
each kernel that is launched, specialised as for a real call, and launches none.

    def every_launch() -> None:                     # in tests/test_kernels_<op>.py
        leaf = importlib.import_module("clone_fast.kernels.<op>")
        leaf.launch(meta(1, 32, 1024, 1024, dtype=torch.bfloat16), ...)

    def test_compiles_for_sm_90() -> None:
        for kernel in compiled_launches(__file__, "every_launch"):
            assert kernel.spilled == 0, kernel
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CAPABILITY = 90


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel."""

    name: str
    arguments: str  # constants that it was compiled with, to tell variants apart
    registers: int
    spilled: int  # bytes of local memory for each thread
    shared: int  # bytes for each block
    warps: int


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor without memory, of any size."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def compiled_launches(module: str, function: str) -> list[Compiled]:
    """One entry for each kernel, and specialisation of it, that `function` of the file `module` launches."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__).resolve()
    env["PYTHONPATH"] = os.pathsep.join([str(here.parent), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report.json")
        command = [sys.executable, str(here), module, function, str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"{function} of {module} did not compile:\n{done.stdout}\n{done.stderr}")
        return [Compiled(**row) for row in json.loads(out.read_text())]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (what spills lies there) of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return int(values["REG"]), int(values["STACK"]) + int(values["LOCAL"])


def collect(module: str, function: str) -> list[Compiled]:
    """In the process that compiles: run the function, note what it launches."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from clone_fast.kernels._ahead import Compiling

    driver.set_active(Compiling(CAPABILITY))
    found: dict[int, tuple[Any, dict[str, Any]]] = {}
    run = JITFunction.run

    @functools.wraps(run)
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = {name: value for name, value in kwargs.items() if isinstance(value, bool | int | str)}
        found.setdefault(id(kernel), (kernel, constants))
        return kernel

    JITFunction.run = compile_only
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    if spec is None or spec.loader is None:
        raise ImportError(module)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    getattr(loaded, function)()
    rows = []
    for kernel, constants in found.values():
        registers, spilled = resources(kernel.asm["cubin"])
        about = kernel.metadata
        rows.append(Compiled(about.name, str(constants), registers, spilled, about.shared, about.num_warps))
    return rows


if __name__ == "__main__":
    # A test module that asks for the interpreter when it is imported must not get it here.
    os.environ["TRITON_INTERPRET"] = "0"
    report = [dataclasses.asdict(row) for row in collect(sys.argv[1], sys.argv[2])]
    Path(sys.argv[3]).write_text(json.dumps(report))
