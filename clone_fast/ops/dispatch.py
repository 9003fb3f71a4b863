"""Which backend runs an op: asked for per call, by `with backend(...)`, by CLONE_FAST_BACKEND, in that order.

A backend that was asked for by name runs or raises with the reason. "auto" takes the fastest that accepts the call;
where none does it falls back to the reference and warns once for each reason; CLONE_FAST_STRICT=1 makes that an error.

A leaf is a module found by name, `clone_fast.kernels.<op>` for triton and `clone_fast.cuda.<op>` for cuda, the latter
with the extension `clone_fast._C` below it. It offers `supports(*args) -> str | None` (the reason why not) and
`launch(*args)` with the arguments of the op's schema without the backend. What a gradient needs goes by the names
`supports_<step>` and `launch_<step>`, the former optional; a step that a leaf lacks is done by the next that has it.
A leaf may offer `composes(*args) -> str | None` too: None where the op, though the leaf refuses it, shall run on its
backend, composed of steps.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clone_fast._compiler import constant_result
from clone_fast.errors import BackendError

OPS = ("bias_act", "upfirdn2d", "modulated_conv2d", "laplacian_pyramid", "styles", "minibatch_stddev")
BACKENDS = ("auto", "reference", "triton", "cuda")
CANNOT = "cannot run this call: "
PREFERENCE = ("cuda", "triton")  # what "auto" tries before the reference

_scoped: ContextVar[str | None] = ContextVar("clone_fast_backend", default=None)
_notes: ContextVar[list[str | None] | None] = ContextVar("clone_fast_notes", default=None)  # while `explain` asks
_warned: set[str] = set()
_leaves: dict[tuple[str, str], Leaf | str] = {}


@dataclass(frozen=True)
class Leaf:
    """One op on one backend: what it can do, and its launch functions."""

    functions: Any  # the module

    def why_not(self, step: str, args: tuple[Any, ...]) -> str | None:
        """The reason why this leaf cannot launch a step ("" is the op itself) with these arguments."""
        if not self.has(step):
            return f"it has no {step or 'launch'}"
        supports = getattr(self.functions, f"supports_{step}" if step else "supports", None)
        reason: str | None = supports(*args) if supports is not None else None
        return reason

    def composes(self, args: tuple[Any, ...]) -> bool:
        """Whether the op, where this leaf refuses to launch it, is best composed of steps, some of them its own."""
        composes = getattr(self.functions, "composes", None)
        return composes is not None and composes(*args) is None

    def describe(self, args: tuple[Any, ...]) -> str | None:
        """What the leaf says of how it would run the op, where it has more than one way."""
        describe = getattr(self.functions, "describe", None)
        found: str | None = describe(*args) if describe is not None else None
        return found

    def has(self, step: str) -> bool:
        """Whether the step exists at all."""
        return hasattr(self.functions, f"launch_{step}" if step else "launch")

    def launch(self, step: str, *args: Any) -> Any:
        """Run a step ("" is the op itself)."""
        return getattr(self.functions, f"launch_{step}" if step else "launch")(*args)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on the backend of this name, where the call names none.

    Args:
        name: "auto", "reference", "triton" or "cuda".

    Raises:
        ValueError: the name is none of these.
    """
    token = _scoped.set(_checked(name))
    try:
        yield
    finally:
        _scoped.reset(token)


def _find(op: str, name: str) -> Leaf | str:
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if importlib.util.find_spec("clone_fast.kernels") is None:
            return "clone_fast.kernels is not installed"
        if importlib.util.find_spec(f"clone_fast.kernels.{op}") is None:
            return f"this version has no Triton kernel of {op}"
        return Leaf(importlib.import_module(f"clone_fast.kernels.{op}"))
    if name == "cuda":
        if importlib.util.find_spec("clone_fast._C") is None:
            return "this installation was built without the CUDA extension clone_fast._C"
        if importlib.util.find_spec(f"clone_fast.cuda.{op}") is None:
            return f"this version has no CUDA kernel of {op}"
        return Leaf(importlib.import_module(f"clone_fast.cuda.{op}"))
    raise ValueError(f"no leaves on backend {name!r}")


@constant_result
def _load(op: str, name: str) -> None:
    """Fill the table; a compiler does not look into imports."""
    if (op, name) not in _leaves:
        _leaves[op, name] = _find(op, name)


def leaf(op: str, name: str) -> Leaf | str:
    """The leaf of this op on this backend, or the reason why there is none."""
    _load(op, name)
    return _leaves[op, name]


@constant_result
def _configured() -> str:
    """What `with backend(...)` or the environment ask for; a compiled graph keeps what stood when it was traced."""
    return _scoped.get() or _checked(os.environ.get("CLONE_FAST_BACKEND") or "auto")


@constant_result
def _candidates(op: str) -> tuple[str, ...]:
    """The backends of this installation that "auto" tries for an op, best first."""
    return tuple(name for name in PREFERENCE if not isinstance(leaf(op, name), str))


def _why_not(op: str, name: str, x: Tensor, args: tuple[Any, ...]) -> str | None:
    found = leaf(op, name)
    if isinstance(found, str):
        return found
    if not x.is_cuda:
        return f"{name} runs on CUDA tensors, x is on {x.device}"
    reason = found.why_not("", (x, *args))
    # other leaves' steps are part of it
    return None if reason and len(_candidates(op)) > 1 and found.composes((x, *args)) else reason


def resolve(op: str, requested: str, x: Tensor, *args: Any) -> str:
    """The backend that shall run this call: "reference", "triton" or "cuda".

    Raises:
        BackendError: a backend was asked for by name and cannot, or CLONE_FAST_STRICT=1 and "auto" would fall back.
        ValueError: the name is none of BACKENDS.
    """
    name = _checked(requested)
    if name == "auto":
        name = _configured()
    if name == "reference":
        return name
    if name != "auto":
        reason = _why_not(op, name, x, args)
        if reason:
            raise BackendError(f"{op}: backend {name!r} {CANNOT}{reason}")
        _note(op, name, (x, *args))
        return name
    if not x.is_cuda:
        return "reference"
    reasons = []
    for candidate in _candidates(op):
        reason = _why_not(op, candidate, x, args)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    if reasons:
        _report_fallback(f"{op}: fell back to the reference ({'; '.join(reasons)})")
    return "reference"


def _note(op: str, name: str, args: tuple[Any, ...]) -> None:
    """For `explain`: how this call will run."""
    found = None if torch.compiler.is_compiling() else leaf(op, name)
    if isinstance(found, Leaf):
        note(found.describe(args))


def note(text: str | None) -> None:
    """Something that `explain` shall tell of the call that it makes."""
    notes = None if torch.compiler.is_compiling() else _notes.get()
    if notes is not None:
        notes.append(text)


@constant_result
def step_backend(op: str, step: str) -> str:
    """The first backend whose leaf has a step that runs whatever the arguments are; "reference" where none has."""
    for name in PREFERENCE:
        found = leaf(op, name)
        if not isinstance(found, str) and found.has(step):
            return name
    return "reference"


def is_fast(device: torch.device) -> bool:
    """Whether convolutions on this device run on a leaf, unless one refuses: those want channels_last."""
    return device.type == "cuda" and _configured() != "reference" and bool(_candidates("modulated_conv2d"))


def _step_leaf(op: str, step: str, backend: str, args: tuple[Any, ...]) -> Leaf | str:
    """The leaf of this backend or, where that lacks the step, the best other that has it; or why there is none."""
    reasons = []
    for name in (backend, *(other for other in PREFERENCE if other != backend)):
        found = leaf(op, name)
        reason = found if isinstance(found, str) else found.why_not(step, args)
        if not isinstance(found, str) and reason is None:
            notes = _notes.get()
            if notes is not None and name != backend:
                notes.append(f"{step} on {name}".lstrip())
            return found
        reasons.append(f"{name}: {reason}")
    return "; ".join(reasons)


def launch_step(op: str, step: str, backend: str, *args: Any) -> Any:
    """Run a step of an op on the leaf of this backend or, where that lacks it, on the best other leaf that has it.

    Raises:
        BackendError: no leaf of this installation can.
    """
    found = _step_leaf(op, step, backend, args)
    if isinstance(found, str):
        raise BackendError(f"{op}: no backend runs its step {step!r} ({found})")
    return found.launch(step, *args)


def launch_best(op: str, step: str, *args: Any) -> Any:
    """`launch_step` on the best leaf that takes it, whatever the op itself runs on: for passes that memory bounds.

    Raises:
        BackendError: no leaf of this installation can.
    """
    return launch_step(op, step, PREFERENCE[0], *args)


def step_if_any(op: str, step: str, backend: str, *args: Any) -> Any:
    """`launch_step`, but None where no leaf of this installation can."""
    found = _step_leaf(op, step, backend, args)
    return None if isinstance(found, str) else found.launch(step, *args)


def own_step(op: str, step: str, backend: str, *args: Any) -> Any:
    """A step on the leaf of this backend, and no other; None where that cannot."""
    found = leaf(op, backend)
    return None if isinstance(found, str) or found.why_not(step, args) else found.launch(step, *args)


def runs_step(op: str, step: str, *args: Any) -> bool:
    """Whether some leaf of this installation runs a step with these arguments."""
    leaves = (leaf(op, name) for name in PREFERENCE)
    return any(not isinstance(found, str) and found.why_not(step, args) is None for found in leaves)


def is_whole(op: str, backend: str, *args: Any) -> bool:
    """Whether the leaf of this backend launches the op in one; otherwise it is composed of steps."""
    found = leaf(op, backend)
    return not isinstance(found, str) and found.why_not("", args) is None


def compiles(device: torch.device) -> bool:
    """Whether ops on this device may launch kernels that are compiled when they are first wanted."""
    return device.type == "cuda" and _configured() != "reference" and not isinstance(leaf(OPS[0], "triton"), str)


def compile_ahead(run: Callable[[], None], device: torch.device) -> bool:
    """Compile side by side the kernels that `run` launches on this device, by a call that computes nothing of use.

    Returns whether there is nothing left to be compiled that way; see `clone_fast.kernels._ahead`. Where nothing
    `compiles`, `run` is not called.
    """
    if not compiles(device):
        return False
    return not importlib.import_module("clone_fast.kernels._ahead").compile_ahead(run).failed


def installed() -> tuple[str, ...]:
    """What decides, besides its arguments, which leaf runs an op: the backend asked for, and what leaves there are."""
    reasons = (leaf(op, name) for op in OPS for name in PREFERENCE)
    return _configured(), *(reason if isinstance(reason, str) else "" for reason in reasons)


def _report_fallback(message: str) -> None:
    if os.environ.get("CLONE_FAST_STRICT") == "1":
        raise BackendError(f"{message}; CLONE_FAST_STRICT=1 forbids that")
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def backends() -> list[tuple[str, str, str | None]]:
    """Rows (op, backend, why not) of every op on every backend on this machine; None where it can run."""
    rows: list[tuple[str, str, str | None]] = []
    for op in OPS:
        rows.append((op, "reference", None))
        for name in reversed(PREFERENCE):
            found = leaf(op, name)
            reason = found if isinstance(found, str) else None
            if reason is None and not torch.cuda.is_available():
                reason = "no CUDA device is visible"
            rows.append((op, name, reason))
    return rows


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Say for each backend whether it accepts this call, or the reason why not, one line each.

    Args:
        op: one of OPS ("laplacian_pyramid" is the loss).
        args, kwargs: what the op is called with, as in `upfirdn2d(x, f, up=2)`. The call is made, without gradients,
            on every backend that accepts it.

    Raises:
        ValueError: op is none of these.
        TypeError, ValueError: as the op raises them.
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    function = getattr(
        importlib.import_module("clone_fast.ops"), "laplacian_pyramid_loss" if op == "laplacian_pyramid" else op
    )
    lines = []
    for name in (*PREFERENCE, "reference"):
        notes: list[str | None] = []
        token = _notes.set(notes)
        try:
            with torch.no_grad():
                function(*args, **kwargs, backend=name)
            verdict = "accepted" + "".join(f", {note}" for note in notes if note)
        except BackendError as error:
            verdict = str(error).partition(CANNOT)[2]
        finally:
            _notes.reset(token)
        lines.append(f"{op} on {name}: {verdict}")
    return "\n".join(lines)
