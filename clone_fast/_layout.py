"""Where the Triton kernels lie: in a wheel inside this package, in a checkout beside it."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

__all__ = ["mount_kernels"]


def mount_kernels() -> None:
    """Make `clone_fast.kernels` importable from a checkout, where its folder is `kernels/` at the root.

    A wheel carries `clone_fast/kernels/` and needs nothing. In a checkout, installed as editable or only on
    the `PYTHONPATH`, the folder becomes the namespace package that it is in a wheel. To append the root to
    `clone_fast.__path__` would be shorter, but would also make `clone_fast.setup` and `clone_fast.tests`.

    A neighbour `kernels` with an `__init__.py` is somebody else's (PyPI has one) and is left alone.
    """
    package = Path(__file__).resolve().parent
    if (package / "kernels").exists():
        return
    name = "clone_fast.kernels"
    spec = PathFinder.find_spec(name, [str(package.parent)])
    if spec is None or spec.loader is not None:  # no such folder, or a regular package: not ours
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    vars(sys.modules["clone_fast"])["kernels"] = module
