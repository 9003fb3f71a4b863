"""The stand-ins of tests/targets, importable one at a time, and comparisons of a network with itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clone_fast
from clone_fast.compat.plugins import PLUGINS

Import = Callable[[str], ModuleType]
TARGETS = Path(__file__).parent / "targets"


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test file that imports this: the extensions that rosinality's import builds are there."""
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "load", lambda name, sources, **_: SimpleNamespace(**PLUGINS[name][1]))


@contextmanager
def codebase(name: str) -> Iterator[Import]:
    """`import_module` with this target on sys.path; afterwards none of its modules is left."""
    before = set(sys.modules)
    sys.path.insert(0, str(TARGETS / name))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module
    finally:
        clone_fast.uninstall()
        sys.path.remove(str(TARGETS / name))
        for module in set(sys.modules) - before:
            where = getattr(sys.modules[module], "__file__", None) or ""
            if where.startswith(str(TARGETS)) or module.startswith("_imported_module_"):
                del sys.modules[module]


def code_of(network: nn.Module) -> type:
    """The class that its forward stands in: a decorator of NVIDIA's makes a subclass, at home elsewhere."""
    return next(kind for kind in type(network).__mro__ if "forward" in vars(kind))


def run(network: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The result, the gradients to all parameters and inputs, and those of the latter's norm (second derivatives)."""
    leaves = [*inputs, *network.parameters()]
    inputs[0].requires_grad_()
    y = network(*inputs)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), leaves[1:], allow_unused=True)
    return [y.detach(), *(g.detach() for g in first), *(g for g in second if g is not None)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def bindings(*modules: ModuleType) -> list[tuple[str, str, Any]]:
    """Every global and every method of these modules' classes, to compare by identity."""
    found = []
    for module in modules:
        for name, value in vars(module).items():
            found.append((module.__name__, name, value))
            if isinstance(value, type) and value.__module__ == module.__name__:
                found += [(f"{module.__name__}.{name}", key, item) for key, item in vars(value).items()]
    return found
