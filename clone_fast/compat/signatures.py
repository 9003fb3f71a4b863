"""What a function or a class of another codebase looks like from outside, without calling it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

__all__ = ["home", "parameters"]


def _visible(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a decorator without `functools.wraps` hides, as stylegan2-ada's profiled_function does.

    Such a decorator takes (*args, **kwargs), bears the name of what it decorates, and holds it in its closure.
    """
    function = inspect.unwrap(function)
    while isinstance(function, FunctionType) and _anything_goes(function):
        cells = (cell.cell_contents for cell in function.__closure__ or () if cell != type(cell)())
        hidden = [value for value in cells if callable(value) and _name(value) == _name(function)]
        if len(hidden) != 1:
            break
        function = inspect.unwrap(hidden[0])
    return function


def _anything_goes(function: FunctionType) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    return kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "")


def home(function: Callable[..., Any]) -> str:
    """The name of the module whose source defines it."""
    return getattr(_visible(function), "__module__", None) or ""


def parameters(function: Callable[..., Any]) -> str | None:
    """Names and defaults in order, as "x, f, up=1"; without annotations; None where Python does not know them."""
    try:
        signature = inspect.signature(_visible(function))
    except (TypeError, ValueError):  # written in C, or not callable
        return None
    found = signature.parameters.values()
    return ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in found)
