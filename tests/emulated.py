"""Files of csrc without a GPU: the same source compiled for the CPU, below leaves that run on small tensors there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import clone_fast

ROOT = Path(__file__).resolve().parent.parent


def loaded(name: str, path: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension(op: str, folder: Path, part: str = "") -> ModuleType:
    """What bindings.cpp says of an op, csrc/<op>.cu, as an extension of its own, compiled into this folder.

    part: of a part of the op alone, csrc/_<part>.cu, and of the bindings that begin with its name. The header may be
    of the part alone, too.
    """
    pybind11 = pytest.importorskip("pybind11")
    if not (ROOT / "csrc").exists():
        pytest.skip("reads the checkout, and there is none")
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    name, source = f"emulated_{part or op}", f"_{part}.cu" if part else f"{op}.cu"
    for path in (*(ROOT / "csrc").glob("*.cuh"), *(ROOT / "csrc").glob("*.h"), ROOT / "csrc" / source):
        text = path.read_text()
        text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = reinterpret_cast<\1*>(dynamic_shared);", text)
        text = re.sub(r"(\w+)<<<([^;]*?)>>>\(", r'launch_early("", \1, \2, ', text)
        (folder / path.name).write_text(text)
    for stand_in in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        shutil.copy(ROOT / "tests" / "emulated_cuda.h", folder / stand_in)
    shutil.copy(ROOT / "tests" / "emulated_upfirdn2d_ptx.h", folder / "_upfirdn2d_ptx.cuh")
    header = next(name for name in (f"{op}.h", f"_{part}.h") if (ROOT / "csrc" / name).exists())
    bindings = (ROOT / "csrc" / "bindings.cpp").read_text()
    helpers = bindings[bindings.index("namespace py =") : bindings.index("PYBIND11_MODULE")]
    found = bindings[bindings.index(f"    // ---- {op}\n") :].removesuffix("}\n")
    found = found.split("\n    // ----")[0]
    entries = re.split(r"^(?=    module\.)", found, flags=re.MULTILINE)
    found = "".join(entry for entry in entries if not entry.startswith("    module.") or f'"{part}' in entry)
    (folder / "bindings.cpp").write_text(
        f'#include <pybind11/pybind11.h>\n#include <pybind11/stl.h>\n#include "{header}"\n'
        f"{helpers}\nPYBIND11_MODULE({name}, module) {{\n"
        f"const py::call_guard<py::gil_scoped_release> unlocked;\n{found}\n}}\n"
    )
    includes = ["-I.", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-x", "c++"]
    subprocess.run(["g++", *flags, *includes, source, "bindings.cpp", "-o", f"{name}.so"], cwd=folder, check=True)
    return loaded(name, folder / f"{name}.so")


def leaf(op: str, emulated: ModuleType, patch: pytest.MonkeyPatch) -> Any:
    """clone_fast/cuda/<op>.py on its extension."""
    patch.setitem(sys.modules, "clone_fast._C", emulated)
    patch.setattr(clone_fast, "_C", emulated, raising=False)
    found = loaded(f"leaf_{op}", ROOT / "clone_fast" / "cuda" / f"{op}.py")
    found.stream = lambda x: 0
    return found


def fixtures(op: str, part: str, name: str) -> tuple[Any, Any, Any]:
    """The fixtures `compiled`, `device` and `leaf` of a module that tests clone_fast/cuda/<name>.py on csrc/_<part>.cu,
    emulated and on a GPU."""

    @pytest.fixture(scope="module")
    def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
        return extension(op, tmp_path_factory.mktemp("emulated"), part)

    @pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def device(request: pytest.FixtureRequest) -> str:
        """Where the leaf runs."""
        return str(request.param)

    @pytest.fixture(name="leaf")
    def found(device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        if device == "cuda":
            return pytest.importorskip(f"clone_fast.cuda.{name}", reason="needs clone_fast._C")
        return leaf(name, request.getfixturevalue("compiled"), monkeypatch)

    return compiled, device, found
