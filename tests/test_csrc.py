"""The compiled floor, without a GPU: which compiler, for what, and that what it makes can be imported anywhere.

Where there is an nvcc, everything in csrc/ is compiled for real, for the GPUs of TORCH_CUDA_ARCH_LIST; what an earlier
build has left in build/csrc is used again, if it is still right.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("reads the checkout, and there is none", allow_module_level=True)

VARIABLES = ("CLONE_FAST_BUILD_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))


class Setup:
    """setup.py, run; what it gave to setuptools, and its functions."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", self.given.update)
        self.functions = runpy.run_path(str(path))

    def __getattr__(self, name: str) -> Any:
        return self.functions[name]


def no_usual_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the CUDA toolkit."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    which = shutil.which

    def elsewhere(command: str, *args: Any, path: str | None = None) -> str | None:
        return None if path in (None, "/usr/local/cuda/bin") else which(command, *args, path=path)

    monkeypatch.setattr(shutil, "which", elsewhere)


def an_nvcc(folder: Path, script: str = "exit 1") -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


# ---- what is asked for ---------------------------------------------------------------------------------------------


class TestChoice:
    @pytest.fixture(autouse=True)
    def _bare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        no_usual_nvcc(monkeypatch)

    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        return lambda: Setup(ROOT / "setup.py", monkeypatch)

    def test_auto_without_nvcc_leaves_it_out_and_says_so(self, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
        assert run().given["ext_modules"] == []
        assert "no nvcc here, so the CUDA extension is left out" in capsys.readouterr().out

    @pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
    def test_auto_with_nvcc_builds(
        self, run: Any, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nvcc = an_nvcc(tmp_path)
        monkeypatch.setenv(variable, str(tmp_path))
        (extension,) = run().given["ext_modules"]
        assert extension.name == "clone_fast._C"
        assert {Path(source).name for source in extension.sources} == {"bindings.cpp", *(path.name for path in SOURCES)}
        assert run().find_nvcc() == str(nvcc)

    def test_0_leaves_it_out(self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        an_nvcc(tmp_path)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("CLONE_FAST_BUILD_CUDA", "0")
        assert run().given["ext_modules"] == []

    def test_1_without_nvcc_is_an_error(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLONE_FAST_BUILD_CUDA", "1")
        setup = run()
        command = setup.BuildCuda(setuptools.Distribution())
        with pytest.raises(SystemExit, match="there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"):
            command.build_extension(setup.given["ext_modules"][0])

    def test_anything_else_is_an_error(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLONE_FAST_BUILD_CUDA", "yes")
        with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
            run()

    @pytest.mark.parametrize(
        ("wanted", "flags"),
        [
            ("9.0", ["arch=compute_90,code=sm_90"]),
            ("9.0a", ["arch=compute_90a,code=sm_90a"]),
            (
                "8.0;9.0+PTX",
                ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"],
            ),
            ("8.6 12.0", ["arch=compute_86,code=sm_86", "arch=compute_120,code=sm_120"]),
        ],
    )
    def test_architectures(self, run: Any, wanted: str, flags: list[str]) -> None:
        assert run().gencode(wanted) == [f"-gencode={flag}" for flag in flags]

    @pytest.mark.parametrize("wanted", ["Hopper", "90", "9.0+", "sm_90"])
    def test_unknown_architecture(self, run: Any, wanted: str) -> None:
        with pytest.raises(SystemExit, match=r'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0\+PTX"'):
            run().gencode(wanted)

    def test_flags_of_one_file(self, run: Any, tmp_path: Path) -> None:
        hopper, fast = tmp_path / "_x_sm90a.cu", tmp_path / "y.cu"
        hopper.write_text("\n")
        fast.write_text("// y\n// nvcc: --use_fast_math -maxrregcount=64\n")
        setup = run()
        assert setup.flags_of(hopper, ["-all"]) == ["-gencode=arch=compute_90a,code=sm_90a"]
        assert setup.flags_of(fast, ["-all"]) == ["-all", "--use_fast_math", "-maxrregcount=64"]


# ---- a build that fails, and one that does not ---------------------------------------------------------------------


def build(tree: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(out), "--build-temp", str(out / "temp")]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, **env}, capture_output=True, text=True, timeout=900, check=False
    )


def test_a_compiler_that_fails_is_loud(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for package in ("clone_fast", "kernels"):
        (tree / package).mkdir()
    nvcc = an_nvcc(tmp_path / "cuda", "echo 'error: this nvcc compiles nothing' >&2; exit 1")
    done = build(tree, tmp_path / "out", CUDA_HOME=str(nvcc.parent.parent), CLONE_FAST_BUILD_CUDA="auto")
    assert done.returncode != 0
    assert "this nvcc compiles nothing" in done.stdout + done.stderr
    assert f"{nvcc} could not compile the CUDA extension" in done.stderr
    assert "set CLONE_FAST_BUILD_CUDA=0" in done.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clone_fast._C, compiled from the checkout as it is."""
    if not shutil.which("nvcc") and not any(
        Path(home, "bin", "nvcc").exists() for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    ):
        pytest.skip("no nvcc")
    out = tmp_path_factory.mktemp("csrc")
    done = build(ROOT, out, CLONE_FAST_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (found,) = (out / "clone_fast").glob("_C.*.so")
    return found


def with_library(library: Path, code: str) -> str:
    """Run code where `_C` is this library, no GPU can be seen and torch is not there."""
    load = "import sys; sys.modules['torch'] = None; import _C\n"
    env = {**os.environ, "PYTHONPATH": str(library.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", load + code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestLibrary:
    def test_imports_without_torch_and_without_a_gpu(self, library: Path) -> None:
        assert int(with_library(library, "print(_C.CUDART_VERSION)")) >= 12000

    def test_leaves_use_what_it_has(self, library: Path) -> None:
        names = set(with_library(library, "print(*dir(_C))").split())
        leaves = (ROOT / "clone_fast" / "cuda").glob("*.py")
        used = {name for path in leaves for name in re.findall(r"\b_C\.(\w+)", path.read_text())}
        assert used
        assert used <= names

    def test_brings_its_own_cudart(self, library: Path) -> None:
        needs = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
        assert "cudart" not in needs
        assert "torch" not in needs

    def test_error_names_the_op(self, library: Path) -> None:
        """Without a GPU the first question to the driver is already the error."""
        code = """
try:
    _C.bias_act_partials(_C.BiasAct(0, 1, 1, 1, 0, 0.0, 1.0, 1.0))
except RuntimeError as error:
    print(error)
"""
        assert with_library(library, code).startswith("bias_act: CUDA error: ")
