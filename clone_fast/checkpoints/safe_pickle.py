"""A pickle machine that cannot call anything: files are read, never run.

A pickle is a program for a small stack machine. `pickle.load` lets that program import any name and call it,
which is how a downloaded network can run a command. This machine knows the data opcodes (protocols 0 to 5)
only. A name that the program asks for is looked up, as a whole and without importing, in a table of
`Global`s; calling one runs the function that *we* wrote for it, which builds plain data. Everything else
stops with a `CheckpointError`.

The format is the one documented in CPython's `pickletools`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clone_fast.checkpoints.pickle_opcodes import OPCODES
from clone_fast.errors import CheckpointError

_MAX_LINE = 1 << 16  # of the text opcodes of protocol 0, which no checkpoint of the last decade has
_MAX_DEPTH = 1000  # open MARKs at a time; checkpoints need about 30
_FREE_BYTES = 1 << 26  # what calls may build on top of a multiple of the stream's size
_NAME = re.compile(r"[\w.<>]{1,200}", re.ASCII)
_KEY_TYPES = frozenset(
    {str, int, float, bool, type(None)}
)  # a deep tuple as a key would overflow the C stack in hash()


@dataclass(frozen=True)
class Global:
    """What a name in a pickle stands for.

    `call` serves REDUCE, `new` serves NEWOBJ; both get the machine and the argument tuple, and must be
    written as if an attacker chose the arguments. `value` is what a mere marker means (a storage class: its
    dtype). `refusal` is what to tell where the name alone shows that the file is of another kind.
    """

    name: str
    call: Callable[[Machine, tuple[Any, ...]], Any] | None = None
    new: Callable[[Machine, tuple[Any, ...]], Any] | None = None
    value: Any = None
    refusal: str | None = None


class Buildable:
    """An object of ours that takes the state of a BUILD opcode: checked data, never attributes."""

    def set_state(self, state: Any) -> None:
        raise NotImplementedError


GlobalTable = Mapping[tuple[str, str], Global]


def shown(text: object, limit: int = 100) -> str:
    """`text` from a file, made safe to print: ASCII, one line, of limited length."""
    line = ascii(str(text))[1:-1]
    return line if len(line) <= limit else line[:limit] + "..."


class Machine:
    """Runs one pickle out of `data`, starting at `position`.

    data             the bytes, as a read-only view; byte strings of the pickle are views into it, not copies
    source           how messages name the file
    table            the names that the pickle may ask for
    persistent_load  gets a persistent id (a storage of a torch file); None: ids are refused
    nested           reads the bytes of a storage pickled on its own; None: refused
    """

    def __init__(
        self,
        data: memoryview,
        *,
        source: str,
        table: GlobalTable,
        position: int = 0,
        persistent_load: Callable[[Any], Any] | None = None,
        nested: Callable[[Machine, memoryview], Any] | None = None,
    ) -> None:
        self.data = data
        self.source = source
        self.table = table
        self.position = position
        self.persistent_load = persistent_load
        self.nested = nested
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.done = False
        self.credit = 4 * len(data) + _FREE_BYTES

    def run(self) -> Any:
        """The object that the pickle describes; `position` is left behind its STOP."""
        while not self.done:
            code = self.read(1)[0]
            step = OPCODES.get(code)
            if step is None:
                raise self.damaged(f"0x{code:02x} is not a pickle opcode")
            try:
                step(self)
            except (ValueError, OverflowError, struct.error, MemoryError) as error:
                raise self.damaged(shown(error)) from error
        return self.pop()

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: damaged, truncated or no pickle at all ({why}, byte {self.position})"
        )

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: refused: the pickle {what}, which is not part of a StyleGAN2 checkpoint; "
            "nothing was executed"
        )

    def charge(self, amount: int) -> None:
        """Count bytes that a call builds, so that a small file cannot ask for endless memory or time."""
        self.credit -= amount
        if self.credit < 0:
            raise self.refused("repeats its data without end")

    def read(self, count: int) -> memoryview:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise self.damaged(f"{count} more bytes wanted, {len(self.data) - self.position} left")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def read_line(self) -> bytes:
        window = bytes(self.data[self.position : self.position + _MAX_LINE])
        end = window.find(b"\n")
        if end < 0:
            raise self.damaged("a line without an end")
        self.position += end + 1
        return window[:end]

    def read_name(self) -> str:
        return self.read_line().decode("utf-8", "backslashreplace")

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise self.damaged("the stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise self.damaged("the stack is empty")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise self.damaged("a mark is missing")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.damaged(f"memo {index} is not set")
        self.push(self.memo[index])

    def find(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise self.damaged("a name that is no text")
        if not (_NAME.fullmatch(module) and _NAME.fullmatch(name)):
            raise self.damaged(f"{shown(module)!r}, {shown(name)!r} is no name")
        found = self.table.get((module, name))  # as a whole: a dotted name is not walked, nothing is imported
        if found is None:
            raise self.refused(f"asks for {shown(module)}.{shown(name)}")
        if found.refusal is not None:
            raise CheckpointError(f"{self.source}: {found.refusal}")
        return found

    def fill(self, target: Any, items: list[Any]) -> None:
        """SETITEM and SETITEMS."""
        if not isinstance(target, dict) or len(items) % 2:
            raise self.damaged("items for something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _KEY_TYPES:
                raise self.refused(f"has a dict key of type {shown(type(key).__name__)}")
            target[key] = value

    def extend(self, target: Any, items: list[Any]) -> None:
        """APPEND, APPENDS and ADDITEMS."""
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(self.as_set(items))
        else:
            raise self.damaged("items for something that is neither list nor set")

    def as_set(self, items: Any) -> set[Any]:
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise self.damaged("a set of something that is no list")
        for item in items:
            if type(item) not in _KEY_TYPES:
                raise self.refused(f"has a set of {shown(type(item).__name__)}")
        return set(items)

    def open_mark(self) -> None:
        if len(self.marks) >= _MAX_DEPTH:
            raise self.refused("is nested too deeply")
        self.marks.append(self.stack)
        self.stack = []

    def make(self, made_by: str, target: Any, args: Any) -> Any:
        """REDUCE (`made_by` "call") and NEWOBJ ("new"): run the function of ours that the table holds."""
        if not isinstance(target, Global) or not isinstance(args, tuple):
            raise self.refused(f"calls something of type {shown(type(target).__name__)}")
        function = target.call if made_by == "call" else target.new
        if function is None:
            raise self.refused(f"wants to {made_by} {target.name}")
        return function(self, args)

    def build(self, target: Any, state: Any) -> None:
        if not isinstance(target, Buildable):
            raise self.refused(f"sets the state of something of type {shown(type(target).__name__)}")
        target.set_state(state)
