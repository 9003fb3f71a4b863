"""What torch.compile is told of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """Mark a function whose result a compiled graph keeps as a constant, and which a compiler does not look into.

    It is what `torch.compiler.assume_constant_result` does but for an import of torch._dynamo, which takes longer than
    that of torch and all of this package; every process that compiles kernels would pay for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
