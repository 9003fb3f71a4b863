"""A function that stands in another's place, and hands back to it whatever it is not made for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clone_fast.compat.report import Replaced

__all__ = ["Unserved", "exact_dtypes", "replacement", "wanted"]


class Unserved(Exception):
    """This call is the original's; the message says why."""


def wanted(condition: bool, otherwise: str) -> None:
    """Go on if the condition holds; else the call goes to the original, for this reason."""
    if not condition:
        raise Unserved(otherwise)


def exact_dtypes(x: Tensor) -> None:
    """Autocast would make the original compute in other dtypes than those of its arguments, which our ops keep."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    wanted(not on, "autocast decides the original's dtypes")


def replacement(original: Callable[..., Any], serve: Callable[..., Any], entry: Replaced) -> Callable[..., Any]:
    """`serve`, but `original` where serve raises Unserved, or what our ops raise for arguments that they refuse.

    So bad input meets the original's own errors. The result bears the original's name and module: it is pickled by
    reference as that, and found again where clone_fast is not.
    """

    @functools.wraps(original)
    def ours(*args: Any, **kwargs: Any) -> Any:
        if entry.active:
            try:
                result = serve(*args, **kwargs)
            except (Unserved, TypeError, ValueError) as reason:
                entry.passed[str(reason)] += 1
            else:
                entry.served += 1
                return result
        return original(*args, **kwargs)

    return ours
