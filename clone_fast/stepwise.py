"""Loops that pause after every step, so that one thread can drive several of them side by side.

A loop is written once, as a generator function that yields a `Pause` and returns its result. Called as it is, it runs
to its end; its `steps` give the generator, for whoever goes round several.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from enum import Enum, auto
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


class Pause(Enum):
    """Where a loop stands when it lets others go on."""

    STEP = auto()
    """An iteration was launched, not waited for. KeyboardInterrupt thrown in here ends the loop with its best so far,
    without another pause."""
    READ = auto()
    """The same, and what comes next reads its values, which waits for it."""
    MEASURE = auto()
    """A part of the measuring was launched; an interruption here would lose the result."""
    FULL = auto()
    """The memory is full: `next` goes on with the last check, `close` gives the memory back for another try."""


Steps = Generator[Pause, None, T]


class Stepwise(Protocol[P, T]):
    """A function that runs to its end, and the same as `steps`."""

    steps: Callable[P, Steps[T]]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T: ...


def stepwise(function: Callable[P, Steps[T]]) -> Stepwise[P, T]:
    """The generator function as a function that returns what it returns; the generator is at `steps`."""

    @wraps(function)
    def whole(*args: P.args, **kwargs: P.kwargs) -> T:
        return drain(function(*args, **kwargs))

    whole.steps = function  # type: ignore[attr-defined]
    return cast("Stepwise[P, T]", whole)


def drain(steps: Steps[T]) -> T:
    """Run to the end. Ctrl-C that comes between two steps reaches the loop as one within a step does."""
    try:
        try:
            while True:
                next(steps)
        except KeyboardInterrupt as interrupt:
            steps.throw(interrupt)  # from within, where nobody took it, the generator is over and this raises it again
            while True:
                next(steps)
    except StopIteration as end:
        return cast("T", end.value)
