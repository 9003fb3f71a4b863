"""Whose code a loaded network runs: its classes, and the modules where they and what they call are at home."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from types import FunctionType, ModuleType

from torch import nn

from clone_fast.compat.signatures import home

__all__ = ["classes_of", "modules_behind"]

OTHERS = ("builtins", "torch", "clone_fast")  # packages without a dialect


def classes_of(network: nn.Module) -> list[type]:
    """Of all its modules and their bases, in the order of the network but for PyTorch's and ours."""
    kinds = dict.fromkeys(kind for part in network.modules() for kind in type(part).__mro__)
    return [kind for kind in kinds if _is_theirs(kind.__module__)]


def modules_behind(kinds: Iterable[type], functions: Collection[str]) -> list[ModuleType]:
    """Where these classes are defined, and the ops that they call, however they are bound there.

    These are the modules that the former bind as a whole, and those where functions of these names are at home.
    """
    found: dict[str, ModuleType] = {}
    for name in dict.fromkeys(kind.__module__ for kind in kinds):
        module = sys.modules.get(name)
        for value in (module, *vars(module).values()) if module else ():
            if isinstance(value, FunctionType) and value.__name__ in functions:
                value = sys.modules.get(home(value))
            if isinstance(value, ModuleType) and _is_theirs(value.__name__):
                found.setdefault(value.__name__, value)
    return list(found.values())


def _is_theirs(name: str) -> bool:
    return name.partition(".")[0] not in OTHERS
