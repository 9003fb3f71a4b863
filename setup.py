"""What setuptools cannot read from pyproject.toml: where the packages lie, and how csrc/ becomes `clone_fast._C`.

The Triton kernels stand on a floor of their own, `kernels/`, and are installed as `clone_fast.kernels`. That
package is listed by hand: it has no `__init__.py` (see kernels/README.md), so `find_packages` passes it over.

The CUDA floor is compiled by nvcc through ninja: no torch header, no torch import, no download (see csrc/README.md).

    CLONE_FAST_BUILD_CUDA=auto   compile where there is an nvcc, whether a GPU is visible or not (the default)
    CLONE_FAST_BUILD_CUDA=0      leave it out; Triton and the reference remain
    CLONE_FAST_BUILD_CUDA=1      compile, and fail where there is no nvcc
    TORCH_CUDA_ARCH_LIST         the GPUs to compile for, as PyTorch reads it: "8.0;9.0+PTX", "9.0a"
    MAX_JOBS                     how many compilers at once; ninja's own choice if unset

While working on it: `TORCH_CUDA_ARCH_LIST=9.0a python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"  # A100, RTX 30, RTX 40, H100 and H200; PTX for what comes after
FLAGS = [
    *("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-cudart=static"),
    *("--expt-relaxed-constexpr", "-Xfatbin=-compress-all", "-Wno-deprecated-gpu-targets"),
]
WAY_OUT = "To install without the CUDA extension (Triton and the reference remain), set CLONE_FAST_BUILD_CUDA=0."


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME or CUDA_PATH, of the PATH, or of the usual place, in that order."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(os.path.join(home, "bin") for home in homes), None, "/usr/local/cuda/bin"]
    found = (shutil.which("nvcc", path=place) for place in places)  # None: the PATH
    return next((nvcc for nvcc in found if nvcc), None)


def is_wanted() -> bool:
    """Whether this build has the extension; CLONE_FAST_BUILD_CUDA=1 leaves it to the compilation to miss the nvcc."""
    choice = os.environ.get("CLONE_FAST_BUILD_CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"CLONE_FAST_BUILD_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0" or not any(CSRC.glob("*.cu")):
        return False
    if choice == "1" or (sys.platform == "linux" and find_nvcc()):
        return True
    print("clone_fast: no nvcc here, so the CUDA extension is left out; Triton and the reference remain")
    return False


def gencode(architectures: str) -> list[str]:
    """nvcc's flags for a list like "8.0;9.0+PTX": machine code for each entry, and PTX where the entry says so."""
    flags = []
    for entry in architectures.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0+PTX", got {entry!r}')
        number = "".join(match.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def flags_of(source: Path, architectures: list[str]) -> list[str]:
    """What one file is compiled with: `_x_sm90a.cu` for sm_90a alone, and what a line `// nvcc: ...` of it asks for."""
    if source.suffix != ".cu":
        return []
    own = re.findall(r"^// nvcc: (.+)$", source.read_text(), flags=re.MULTILINE)
    return [
        *(gencode("9.0a") if source.stem.endswith("_sm90a") else architectures),
        *(flag for line in own for flag in shlex.split(line)),
    ]


def find_tool(name: str) -> str:
    """An executable that pip installed beside this Python, or one of the PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"clone_fast: the CUDA extension needs {name}: pip install {name}. {WAY_OUT}")
    return found


def include_folders() -> list[str]:
    """Where Python.h and pybind11 lie."""
    try:
        pybind11: Any = importlib.import_module("pybind11")
    except ImportError:
        raise SystemExit(f"clone_fast: the CUDA extension needs pybind11: pip install pybind11. {WAY_OUT}") from None
    return [str(CSRC), sysconfig.get_path("include"), pybind11.get_include()]


def ninja_file(nvcc: str, sources: list[Path], target: Path) -> str:
    """One edge for each source and one for the library. Objects lie beside the ninja file."""

    def path(name: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    includes = [f"-I{folder}" for folder in include_folders()]
    architectures = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
    # Symbols of the static cudart stay inside: torch brings a cudart of its own into the same process.
    link = command(nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-Xlinker=--strip-all")
    lines = [
        f"rule compile\n  command = {command(nvcc, *FLAGS, *includes)} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in",
        f"rule link\n  command = {link} -o $out.new $in && mv $out.new $out\n  description = link $out",
    ]
    objects = [path(f"{source.stem}.o") for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        lines.append(f"build {compiled}: compile {path(source)}\n  flags = {command(*flags_of(source, architectures))}")
    lines.append(f"build {path(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One build at a time in this folder; whoever comes second waits, and then finds the work done."""
    fcntl: Any = importlib.import_module("fcntl")  # not on Windows, where there is no build
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class BuildCuda(build_ext):
    """Compiles csrc/ with nvcc through ninja, several files at once, in build/csrc: what has not changed is kept."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise SystemExit(
                "clone_fast: CLONE_FAST_BUILD_CUDA=1, but there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or "
                f"/usr/local/cuda. {WAY_OUT}"
            )
        suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
        folder = ROOT / "build" / "csrc" / suffix.removesuffix(".so").strip(".")
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / f"_C{suffix}"
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        target = os.path.abspath(self.get_ext_fullpath(ext.name))
        with alone(folder):
            (folder / "build.ninja").write_text(ninja_file(nvcc, [ROOT / name for name in ext.sources], built))
            done = subprocess.run([find_tool("ninja"), "-C", str(folder), *jobs], check=False)
            if done.returncode:
                raise SystemExit(f"clone_fast: {nvcc} could not compile the CUDA extension, see above. {WAY_OUT}")
            self.copy_file(str(built), target)

    def copy_file(self, infile: str, outfile: str, *args: Any, **kwargs: Any) -> tuple[str, bool]:
        """As setuptools', but at once: a process that has the old library loaded keeps it whole."""
        Path(outfile).parent.mkdir(parents=True, exist_ok=True)
        unfinished = f"{outfile}.{os.getpid()}"
        shutil.copyfile(infile, unfinished)
        os.replace(unfinished, outfile)
        return outfile, True


def extensions() -> list[Extension]:
    if not is_wanted():
        return []
    sources = [CSRC / "bindings.cpp", *sorted(CSRC.glob("*.cu"))]
    return [Extension("clone_fast._C", [str(source.relative_to(ROOT)) for source in sources])]


setup(
    packages=[*find_packages(include=["clone_fast", "clone_fast.*"]), "clone_fast.kernels"],
    package_dir={"clone_fast.kernels": "kernels"},
    package_data={
        "clone_fast": ["py.typed", "_C.pyi"],
        "clone_fast.demo": ["*.safetensors"],
        "clone_fast.kernels": ["README.md"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCuda},
)
