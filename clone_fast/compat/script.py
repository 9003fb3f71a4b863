"""Run a script or a module as Python would, with other codebases on our ops."""

from __future__ import annotations

import builtins
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType

from clone_fast.compat.installation import installed

__all__ = ["run_script"]


def run_script(target: str, args: Sequence[str] = (), *, module: bool = False, report: bool = False) -> None:
    """`python target args...`, or `python -m target args...`, after `install`.

    sys.argv, sys.path[0] and `__main__` are what Python makes them; what the script raises, SystemExit included, comes
    through.

    Args:
        target: a file, a folder or zip with a __main__.py, or the dotted name of a module.
        args: the script's.
        module: whether target is a module's name.
        report: print the report on stderr when it ends, however it ends.
    """
    with installed() as account:
        sys.argv[:] = [target, *args]
        if not getattr(sys.flags, "safe_path", False):  # python -P: no folder at all
            del sys.path[0]  # of the command that we are
            if module:
                sys.path.insert(0, os.getcwd())
            elif pkgutil.get_importer(target) is None:
                sys.path.insert(0, os.path.dirname(os.path.realpath(target)))
        try:
            if module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            elif pkgutil.get_importer(target) is None:
                _run_file(os.path.abspath(target))
            else:  # a folder or a zip, which run_path puts onto sys.path
                runpy.run_path(target, run_name="__main__")
        finally:
            if report:
                print(account, file=sys.stderr)


def _run_file(path: str) -> None:
    """As `__main__`, which it stays for what runs at exit; runpy would give it another argv[0] or another file."""
    loader = SourceFileLoader("__main__", path)
    code = loader.source_to_code(loader.get_data(path), path)
    main = ModuleType("__main__")
    vars(main).update(__file__=path, __loader__=loader, __builtins__=builtins)
    sys.modules["__main__"] = main
    exec(code, vars(main))
