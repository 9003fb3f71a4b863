"""Captured iterations: after a few eager calls, a CUDA graph launches in one go what Python launched kernel by kernel.

At batch 1 the host takes several times as long to launch a generator's kernels as the GPU takes to run them. A graph
replays the same kernels on the same memory, so what it runs must read nothing on the host, take no argument from it
and keep what changes between calls (learning rates, random inputs, counters) in tensors that stay where they are. The
same function runs eagerly on a CPU, where a capture is impossible, and with CLONE_FAST_CAPTURE=0.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from inspect import ismethod
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from clone_fast.errors import BackendError
from clone_fast.ops import compile_ahead, marks
from clone_fast.ops.streams import ended, rejoin

# Of each variant before its capture: kernels are compiled and loaded. Not more, since an eager call while there are
# graphs needs memory beside theirs; and none where this process has recorded the like before.
EAGER_CALLS = 1
ROWS = 1024  # of a table, at most: longer runs draw the next rows when these are used up

_under_way: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)
_rehearsed: set[Hashable] = set()
_recorded: set[Hashable] = set()


@dataclass
class Rehearsal:
    """One that is under way.

    Attributes:
        marks: of itself and of those within it that have ended; None for what has none.
        whole: whether nothing was left out so far.
    """

    marks: list[str | None]
    whole: bool = True


def rehearsing() -> bool:
    """Whether this call of an iteration is to change nothing that lasts: see `Captured`."""
    return _under_way.get() is not None


@contextmanager
def _begun(rehearsal: Rehearsal) -> Iterator[None]:
    token = _under_way.set(rehearsal)
    try:
        yield
    finally:
        _under_way.reset(token)


@contextmanager
def within_memory() -> Iterator[None]:
    """A part of a rehearsal that ends early where the memory is full: what it has launched is compiled all the same."""
    try:
        yield
    except torch.OutOfMemoryError:
        rehearsal = _under_way.get()
        if rehearsal is not None:
            rehearsal.whole = False


def alike(settings: Any) -> Any:
    """What stands for all settings whose iterations launch the same kernels: how many there are does not matter."""
    return replace(settings, steps=min(settings.steps, 1), check_every=1)


def rehearse(device: torch.device, kind: Hashable, run: Callable[[], None]) -> None:
    """Before the first of a kind: have the kernels that `run` launches on this device compiled side by side.

    `run` is called, and what it computes is of no worth: the step of a `Descent`, `Table.advance` and what else asks
    `rehearsing` do nothing. A rehearsal within another one is a part of it. Where a process has compiled all of a kind,
    `run` is not called: see `clone_fast.ops.marks`.
    """
    if (device, kind) in _rehearsed:
        return
    mark, outer = marks.name(device, kind), _under_way.get()
    if outer is not None:
        run()
        if outer.whole:
            outer.marks.append(mark)
    elif not marks.found(mark):
        rehearsal = Rehearsal([mark])
        with _begun(rehearsal):
            compiled = compile_ahead(run, device)
        if compiled and rehearsal.whole:
            marks.leave(rehearsal.marks)
    _rehearsed.add((device, kind))


class CudaGraphs:
    """What a CUDA device offers: a stream for them, and graphs that share one pool of memory.

    They may share it because no two of them run at once, and none leaves a result there that is read after another one
    has run: results go to tensors that existed before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        current = torch.cuda.current_stream(device)
        # The default stream cannot be captured. Any other one is captured itself: what libraries keep for a stream,
        # say cuBLAS its workspace, then serves graphs that never run at once.
        # Where work of both could run, the GPU takes that of this stream before what goes beside it.
        own = current == torch.cuda.default_stream(device)
        self.stream = torch.cuda.Stream(device, priority=-1) if own else current
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self, run: Callable[[], None]) -> None:
        """Run on the graphs' stream, after all that was launched before and before all that comes."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A graph of what `run` launches, as a function that replays it; nothing is executed.

        Raises:
            Exception: what `run` raises, or CUDA for an operation that cannot be captured.
        """
        current = torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[current.device_index]
        numbers = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        collected = gc.isenabled()
        gc.disable()  # a graph that is found to be garbage now, and destroyed, would spoil this capture
        try:
            # thread_local: what other threads of the program ask of CUDA meanwhile does not spoil the capture
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                try:
                    run()
                except BaseException:
                    rejoin(self.device)
                    raise
        except BaseException:
            # A capture that CUDA breaks off leaves its own stream behind, a generator that draws in it for ever, and an
            # allocator that waits for its end to give back what several streams have used.
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(numbers)
            with suppress(RuntimeError):  # says that it is over, where CUDA did not break it off
                torch._C._cuda_endAllocateToPool(current.device_index, self.pool)
                torch._C._cuda_releasePool(current.device_index, self.pool)
            raise
        finally:
            if collected:
                gc.enable()
            ended()
        return graph.replay


def graphs_of(device: torch.device) -> CudaGraphs | None:
    """The graphs of a device; None where there are none, or where CLONE_FAST_CAPTURE=0 forbids them."""
    if device.type != "cuda" or os.environ.get("CLONE_FAST_CAPTURE") == "0":
        return None
    return CudaGraphs(device)


class Captured:
    """A function of few variants that is called again and again, as a CUDA graph for each variant where possible.

    Every call does what the function does: the first of a variant runs it eagerly on a side stream, the next records
    it, which executes nothing, and from then on the graph is replayed. Where recording fails, all calls are eager from
    then on, with one warning; CLONE_FAST_STRICT=1 makes that an error.

    Before the first of a variant there is a rehearsal, see `rehearse`.

    Args:
        function: takes a variant's values, and works on tensors that stay where they are. It must set the gradients it
            needs to None itself, so that they lie in the graphs' memory. What it makes once and keeps must be there
            before its first call.
        device: where it runs.
        kind: what tells functions apart that launch different kernels; one rehearsal serves all of a kind.
        at_once: whether a variant of a kind that was recorded before may be recorded without an eager call. Not where
            it calls code of others, of which the kind knows nothing.
    """

    def __init__(
        self, function: Callable[..., None], device: torch.device, kind: Hashable, *, at_once: bool = False
    ) -> None:
        # A method is not held: its object holds this one, and what holds itself gives its memory back who knows when.
        self.function = WeakMethod(function) if ismethod(function) else lambda: function
        self.device, self.kind, self.at_once = device, kind, at_once
        self.graphs = graphs_of(device)
        self.calls: Counter[tuple[Hashable, ...]] = Counter()
        self.replays: dict[tuple[Hashable, ...], Callable[[], None]] = {}

    def __call__(self, *variant: Hashable) -> None:
        run = partial(self._run, *variant)
        if not self.calls[variant]:
            self.rehearse(*variant)
        ready = self.calls[variant] >= EAGER_CALLS or (self.at_once and self._known(variant) in _recorded)
        if self.graphs is not None and variant not in self.replays and ready:
            self._record(variant, run)
        self.calls[variant] += 1
        if variant in self.replays:
            self.replays[variant]()
        else:
            self._eagerly(run)

    def rehearse(self, *variant: Hashable) -> None:
        """What comes before the first call of a variant, for those who know it earlier."""
        run = partial(self._run, *variant)
        rehearse(self.device, (self.kind, variant), partial(self._eagerly, run))

    def _run(self, *variant: Hashable) -> None:
        function = self.function()
        if function is None:
            raise ReferenceError("what this is an iteration of is gone")
        function(*variant)

    def _known(self, variant: tuple[Hashable, ...]) -> Hashable:
        return self.device, self.kind, variant

    def release(self) -> None:
        """Let go of the graphs and of their memory; later calls are eager."""
        self.replays.clear()
        self.graphs = None

    def _eagerly(self, run: Callable[[], None]) -> None:
        if self.graphs is not None:
            self.graphs.aside(run)
        else:
            run()

    def _record(self, variant: tuple[Hashable, ...], run: Callable[[], None]) -> None:
        if self.graphs is None:
            return
        try:
            self.replays[variant] = self.graphs.record(run)
            _recorded.add(self._known(variant))
        except torch.OutOfMemoryError:  # an eager iteration needs no less
            self.release()
            raise
        except Exception as error:  # whatever it is: an eager call either works or raises the same with a clear trace
            self.release()
            reason = (str(error).splitlines() or [""])[0]
            message = f"capture: fell back to eager iterations ({type(error).__name__}: {reason})"
            if os.environ.get("CLONE_FAST_STRICT") == "1":
                raise BackendError(f"{message}; CLONE_FAST_STRICT=1 forbids that") from error
            warnings.warn(message, RuntimeWarning, stacklevel=4)


class Board:
    """Scalars that an iteration leaves behind, in memory that stays; each keeps its value until it is written again."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.values = torch.full([len(names)], torch.nan, device=device)
        self.slots = dict(zip(names, self.values.unbind(), strict=True))

    def write(self, values: dict[str, Tensor]) -> None:
        """Copy these values into their places, on the device."""
        places = [self.slots[name] for name in values]
        torch._foreach_copy_(places, [value.detach().float() for value in values.values()])

    def clear(self) -> None:
        """As if nothing had been written."""
        self.values.fill_(torch.nan)

    def read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The places of these names, which the next iteration writes again."""
        return {name: self.slots[name] for name in names}


class Table:
    """Rows of tensors on the device, and the number of the row in use, which lives there too.

    rows: tensors [n, ...] by name, n the same for all.
    """

    def __init__(self, rows: dict[str, Tensor], device: torch.device) -> None:
        self.rows: dict[str, Tensor] = {}
        self.index = torch.zeros([1], dtype=torch.int64, device=device)
        self.refill(rows)

    def refill(self, rows: dict[str, Tensor]) -> None:
        """Other rows in the same memory, to be read from the first one on; those of a new name make it."""
        for name, value in rows.items():
            if name in self.rows:
                self.rows[name].copy_(value)
            else:
                self.rows[name] = value.to(self.index.device)
        self.index.zero_()

    def __getitem__(self, name: str) -> Tensor:
        """A copy of the row in use, without the first axis."""
        return self.rows[name].index_select(0, self.index)[0]

    def advance(self) -> None:
        """Go to the next row, on the device."""
        if not rehearsing():
            self.index.add_(1)
