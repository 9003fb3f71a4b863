"""Look at every module right after it was imported, before whoever imports it reads a name of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader, SourcelessFileLoader
from types import ModuleType
from typing import Any

__all__ = ["ImportHook"]

OLD_MODULE = "pkg_resources"  # setuptools dropped it; stylegan3 reads one function of it, in modules of these names:
READERS = "_gradfix"


class ImportHook:
    """A finder that finds nothing by itself: it asks the others, and has the module looked at that they load.

    The loader that they found stays the module's, with its type and its abilities; its `exec_module` is covered for one
    call.
    """

    def __init__(self, look: Callable[[ModuleType], None]) -> None:
        self._look = look
        self._asking: set[str] = set()

    def install(self) -> None:
        """Be asked before all others."""
        sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Be asked no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders say."""
        if name in self._asking:
            return None
        self._asking.add(name)
        try:
            spec = self._ask(name, path, target)
        finally:
            self._asking.discard(name)
        if spec is not None and isinstance(spec.loader, (SourceFileLoader, SourcelessFileLoader)):
            self._cover(spec.loader)
        return spec

    def _ask(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None

    def _cover(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # once: the class's own from now on
            with _old_modules(module.__name__):
                execute(module)
            if self in sys.meta_path:
                self._look(sys.modules.get(module.__name__, module))

        loader.exec_module = exec_module


@contextmanager
def _old_modules(name: str) -> Iterator[None]:
    """For a module that asks it for PyTorch's version, and as long as it is imported: the function that it wants."""
    if not name.endswith(READERS) or OLD_MODULE in sys.modules or importlib.util.find_spec(OLD_MODULE) is not None:
        yield
        return
    from torch.torch_version import TorchVersion

    stand_in = ModuleType(OLD_MODULE)
    vars(stand_in)["parse_version"] = TorchVersion
    sys.modules[OLD_MODULE] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(OLD_MODULE) is stand_in:
            del sys.modules[OLD_MODULE]
