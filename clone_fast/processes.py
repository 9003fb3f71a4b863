"""The processes of one run under torchrun, or the one that there is: their number, and how they share work.

They talk over torch.distributed: a gloo group, and the store it was made with. gloo runs on the host, over TCP, so NCCL
is not needed. A process that dies closes its connections, and whoever waits for it knows at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from clone_fast.errors import CloneFastError, GroupError

JOIN = timedelta(minutes=10)
"""Processes that are not all there after this long, or do not know their work, are an error."""

WAIT = timedelta(days=1)
"""How long those that are done wait for one that is not, and lives: longer than a photo takes anywhere."""

_Value = TypeVar("_Value")


class Processes:
    """This process among those of its run.

    Attributes:
        rank: of 0 to size - 1. The first one, 0, decides and tells.
        size: how many there are.
        store: of torch.distributed, shared by all.
        broken: why the store is out of reach, or None.
    """

    def __init__(self, rank: int, size: int, store: dist.Store) -> None:
        self.rank, self.size = rank, size
        self.store = dist.PrefixStore("clone_fast", store)
        self.broken: str | None = None

    def device(self, name: str | None) -> str | None:
        """The device of this process: where several share the GPUs of a host, "cuda" and "auto" mean one each.

        It becomes the current one, which events and streams without a device of their own belong to.
        """
        if self.size > 1 and name in (None, "auto", "cuda") and torch.cuda.is_available():
            # modulo: a launcher may show each process a GPU of its own, and nothing else
            index = int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count()
            name = f"cuda:{index}"
        if name is not None and name.startswith("cuda:"):
            torch.cuda.set_device(name)
        return name

    def agree(self, decide: Callable[[], _Value]) -> _Value | None:
        """What the first process decides, for all; None for the others if it raised a `CloneFastError`, as it does.

        Raises:
            GroupError: the first process is gone.
        """
        answer: list[_Value | None] = [None]
        failure = None
        if self.rank == 0:
            try:
                answer = [decide()]
            except CloneFastError as error:
                failure = error
        if self.size > 1:
            try:
                dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
            except RuntimeError as error:
                raise GroupError(f"a process ended before there was work for it ({_first_line(error)})") from error
        if failure is not None:
            raise failure
        return answer[0]

    def numbers(self, count: int) -> Iterator[int]:
        """Those below `count` that no other process gets, one when it is asked for. Ends early if the store is gone."""
        while (number := self.add("taken", 1) - 1) < count and self.broken is None:
            yield number

    def add(self, name: str, amount: int) -> int:
        """Add to a number that all processes see, 0 at first; returns the sum. If the store is gone, see `broken`."""
        return self._ask(lambda: self.store.add(name, amount), amount)

    def append(self, name: str, text: str) -> None:
        """Append to a text that all processes see. If the store is gone, see `broken`."""
        # in every torch that we run on, but not in its stubs
        self._ask(lambda: self.store.append(name, text), None)  # type: ignore[attr-defined]

    def text(self, name: str) -> str:
        """All that was appended under this name so far, or nothing."""
        return self._ask(lambda: self.store.get(name).decode() if self.store.check([name]) else "", "")

    def _ask(self, question: Callable[[], _Value], otherwise: _Value) -> _Value:
        """An answer of the store, which is asked no more once it is gone: each question would be a page of warnings."""
        if self.broken is None:
            try:
                return question()
            except RuntimeError as error:  # what torch.distributed raises are RuntimeErrors
                self.broken = _first_line(error)
        return otherwise

    def finish(self) -> list[int]:
        """To be called when the work is done; the first process waits for the others.

        Returns:
            In the first process: those that ended before they came here.

        Raises:
            GroupError: the store, or the first process, is gone.
        """
        ended = []
        if self.broken is None and self.rank:
            try:
                _wait(dist.isend(torch.ones(1), dst=0))  # until the first process takes it
            except RuntimeError as error:
                self.broken = _first_line(error)
        if self.broken is not None:
            raise GroupError(f"the other processes are out of reach ({self.broken}); start again for what is left")
        for other in range(1, self.size) if self.rank == 0 else ():
            try:
                _wait(dist.irecv(torch.empty(1), src=other))
            except RuntimeError:  # its connection was closed
                ended.append(other)
        return ended


@contextmanager
def processes() -> Iterator[Processes]:
    """Those that a launcher such as torchrun started together, or this one alone. Their group ends with the block.

    Raises:
        GroupError: they did not come together, or the launcher's variables are not all there.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes(0, 1, dist.HashStore())
        return
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=JOIN)))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=JOIN)
    except (ValueError, RuntimeError) as error:
        raise GroupError(f"the processes of this run did not come together: {_first_line(error)}") from error
    try:
        yield Processes(rank, size, store)
    finally:
        dist.destroy_process_group()


def _wait(work: dist.Work | None) -> None:
    if work is not None:  # None: for a process outside of the group
        work.wait(WAIT)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
