"""Whether another codebase's function means what ours means: both are called on the same small inputs.

A signature alone does not tell: copies of these codebases differ in a constant, an epsilon or a flipped kernel. The
trial runs on the CPU in float64, where nothing else can make a difference, and compares results and first gradients.
It draws no number from the user's random generators and does not wake CUDA up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Case", "Untried", "drawn", "tried"]

SEED = 20220211


class Untried(Exception):
    """The original cannot run here at all; the message is its error."""


@dataclass(frozen=True)
class Case:
    """One call of both.

    Attributes:
        name: what is special about it.
        args, kwargs: of the call.
        differentiate: tensors among what the call depends on, to which gradients are compared.
        tolerance: the largest difference, relative to the largest value.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    differentiate: Sequence[Tensor] = ()
    tolerance: float = 1e-6


def drawn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    """Normal numbers, the same in every trial, a different tensor for every shape."""
    generator = torch.Generator().manual_seed(SEED + sum(31**i * n for i, n in enumerate(shape)))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_(grad)


class _StayOnTheCpu(TorchFunctionMode):
    """`.cuda()`, which some copies call on everything that they get, does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _quiet_room() -> Iterator[None]:
    """As at the start of a process, whatever the user set; and afterwards as the user set it."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        _StayOnTheCpu(),
    ):
        yield


def tried(original: Callable[..., Any], ours: Callable[..., Any], cases: Callable[[], Iterable[Case]]) -> str | None:
    """The first difference in words, or None where all cases agree.

    Raises:
        Untried: the original raises in the first case already.
    """
    with _quiet_room():
        try:
            todo = list(cases())
        except Exception as error:  # foreign code: its class cannot even be made
            raise Untried(_told(error)) from error
        for index, case in enumerate(todo):
            try:
                theirs = _outcome(original, case)
            except Exception as error:  # foreign code, whatever it raises
                if index == 0:
                    raise Untried(_told(error)) from error
                return f"with {case.name} it raises {_told(error)}"
            if isinstance(theirs, str):
                return f"with {case.name} it returns {theirs}"
            difference = _difference(theirs, _outcome(ours, case), case.tolerance)
            if difference:
                return f"with {case.name} {difference}"
    return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _outcome(function: Callable[..., Any], case: Case) -> list[Tensor] | str:
    """The result and its gradients; or what it returned, where that is no tensor."""
    y = function(*case.args, **case.kwargs)
    if not isinstance(y, Tensor):
        return f"a {type(y).__name__}"
    direction = drawn(*y.shape, dtype=y.dtype, grad=False)
    # of a scalar: PyTorch imports sympy where it is given gradients
    grads = torch.autograd.grad((y * direction).sum(), list(case.differentiate)) if case.differentiate else ()
    return [y.detach(), *grads]


def _difference(theirs: list[Tensor], ours: list[Tensor] | str, tolerance: float) -> str | None:
    if isinstance(ours, str):
        return f"ours returns {ours}"
    for i, (expected, got) in enumerate(zip(theirs, ours, strict=True)):
        what = "results" if i == 0 else "gradients"
        if expected.shape != got.shape or expected.dtype != got.dtype:
            return f"{what} are {expected.dtype} {list(expected.shape)}, not {got.dtype} {list(got.shape)}"
        error = (expected - got).abs().max().item() / max(expected.abs().max().item(), 1e-12)
        if not error <= tolerance:
            return f"{what} differ by {error:.2g} of the largest"
    return None
