"""Names and what they are bound to: exchanged wherever a function is bound by value, and put back exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

__all__ = ["Bindings"]

Function = Callable[..., Any]


class Bindings:
    """Pairs of a function and the one in its place, and the classes whose methods were exchanged."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[Function, Function]] = {}  # (theirs, ours) by the id of ours
        self._methods: list[tuple[type, str, Function, Function]] = []
        self._elsewhere: list[ModuleType] = []

    def is_ours(self, value: object) -> bool:
        """Whether this stands in another's place."""
        return id(value) in self._pairs

    def also_in(self, module: ModuleType) -> None:
        """A module that sys.modules does not list."""
        if sys.modules.get(module.__name__) is not module and not any(module is known for known in self._elsewhere):
            self._elsewhere.append(module)

    def exchange(self, theirs: Function, ours: Function) -> None:
        """Wherever a module's global is theirs, it is ours from now on."""
        self._pairs[id(ours)] = theirs, ours
        self._rebind({id(theirs): ours})

    def exchange_method(self, owner: type, name: str, theirs: Function, ours: Function) -> None:
        """The same for a method, which subclasses find in its class."""
        self._pairs[id(ours)] = theirs, ours
        self._methods.append((owner, name, theirs, ours))
        setattr(owner, name, ours)

    def restore(self) -> None:
        """Bind everything as it was; also in modules that took ours by value since. What others rebound stays."""
        for owner, name, theirs, ours in self._methods:
            if vars(owner).get(name) is ours:
                setattr(owner, name, theirs)
        self._rebind({key: theirs for key, (theirs, _) in self._pairs.items()})

    def _rebind(self, instead: dict[int, Function]) -> None:
        for module in self._modules():
            names = vars(module)
            for name, value in list(names.items()):
                if id(value) in instead:
                    names[name] = instead[id(value)]

    def _modules(self) -> Iterator[ModuleType]:
        yield from (module for module in list(sys.modules.values()) if isinstance(module, ModuleType))
        yield from self._elsewhere
