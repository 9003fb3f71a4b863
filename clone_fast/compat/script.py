"""Run a script or a module as Python would, with other codebases on our ops."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

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
        safe_path = getattr(sys.flags, "safe_path", False)  # python -P: no folder of the script's either
        if not safe_path and (module or os.path.isfile(target)):
            sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(target))
        try:
            if module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
        finally:
            if report:
                print(account, file=sys.stderr)
