"""Checkouts of other people's codebases, as `git clone` leaves them: where they are, and what they need to be imported.

Nothing in them is changed. What this machine lacks and the measured parts do not use is answered from outside, and so
is what would download weights; their extensions are built by their own code, into TORCH_EXTENSIONS_DIR.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import clone_fast
from benchmarks import common
from benchmarks.perceptual import LPIPS

FOLDER = "CLONE_FAST_BENCH_TARGETS"  # names the folder that holds them
COMPILED, PLAIN, OURS = "their extensions", "their plain PyTorch", "our extensions under their autograd"
OPS = ("torch_utils.ops.bias_act", "torch_utils.ops.upfirdn2d")  # NVIDIA's modules that build


@dataclass(frozen=True)
class Target:
    """One codebase.

    Attributes:
        repository: on GitHub.
        networks: the module that a process imports first.
        nvidia: whether its ops are NVIDIA's; else rosinality's.
        packages: that its measured parts use, besides torch.
    """

    repository: str
    networks: str
    nvidia: bool = True
    packages: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Its checkout, be it there or not."""
        return Path(os.environ.get(FOLDER, "")).absolute() / self.repository.partition("/")[2]


TARGETS = {
    "ada": Target("NVlabs/stylegan2-ada-pytorch", "training.networks"),
    "sg3": Target("NVlabs/stylegan3", "training.networks_stylegan2"),
    "rosinality": Target("rosinality/stylegan2-pytorch", "model", nvidia=False),
    "PTI": Target("danielroich/PTI", "training.coaches.single_id_coach", packages=("torchvision", "matplotlib")),
}


def missing(name: str) -> str | None:
    """Why this codebase cannot be measured here, and what to do; None if it can."""
    if not os.environ.get(FOLDER):
        return f"{FOLDER} names no folder of checkouts"
    target = TARGETS[name]
    if not target.folder.is_dir():
        return f"no {target.folder.name} in {FOLDER}: git clone https://github.com/{target.repository} there"
    return lacking(target.packages)


def lacking(packages: tuple[str, ...]) -> str | None:
    """The packages of these that this machine does not have, in words; None if it has all."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"needs the package {', '.join(absent)}" if absent else None


def enter(name: str, buildable: bool = True) -> tuple[ModuleType, str]:
    """Import the networks of a codebase, in a process that imports no other one.

    Args:
        name: of TARGETS.
        buildable: whether its extensions can be built here, as far as is known.

    Returns:
        The module, and what its ops are without us: one of the words above.
    """
    target = TARGETS[name]
    sys.path.insert(0, str(target.folder))
    stand_in()
    if target.nvidia:
        networks = importlib.import_module(target.networks)
        return networks, (_nvidia_ops(buildable) if common.ON_GPU else PLAIN)
    try:  # rosinality's are built at import
        if not buildable:
            raise ImportError("its extensions cannot be built")
        return importlib.import_module(target.networks), COMPILED if common.ON_GPU else PLAIN
    except (ImportError, OSError, RuntimeError):
        for module in [key for key in sys.modules if key.partition(".")[0] in ("op", target.networks)]:
            del sys.modules[module]
        with clone_fast.installed():
            return importlib.import_module(target.networks), OURS if common.ON_GPU else PLAIN


def _nvidia_ops(buildable: bool) -> str:
    """Have them build; where that fails, have them not try again at each call, which would take minutes a step."""
    for op in OPS:
        module: Any = importlib.import_module(op)
        try:
            built = buildable and module._init()
        except Exception as error:  # stylegan3's; ada's tells of it in a warning
            print(f"{op}: {error}", file=sys.stderr)
            built = False
        if not built:
            module._init = lambda: False
    return COMPILED if all(vars(sys.modules[op])["_plugin"] is not None for op in OPS) else PLAIN


def stand_in() -> None:
    """Modules that they import: what they do not use here, where it is missing, and LPIPS with random weights."""
    _provide("requests")
    _provide("wandb")
    _provide("distutils.util", strtobool=bool)
    _provide("pkg_resources", parse_version=_parse_version)
    _provide("lpips", anyway=True, LPIPS=LPIPS)


def _parse_version(version: str) -> Any:
    from packaging.version import parse

    return parse(version)


def _provide(name: str, anyway: bool = False, **contents: Any) -> None:
    try:
        present = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        parent = name.rpartition(".")[0]
        sys.modules[parent] = ModuleType(parent)
        present = False
    if anyway or not present:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)


@contextmanager
def scripting(*arguments: str) -> Iterator[None]:
    """What running a script changes in a process, put back."""
    argv, path, main = sys.argv[:], sys.path[:], sys.modules["__main__"]
    sys.argv[:] = arguments
    try:
        yield
    finally:
        sys.argv[:], sys.path[:], sys.modules["__main__"] = argv, path, main
