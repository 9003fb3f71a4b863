"""Take one value of a pickled dict out of its pickle, as a pickle of its own, without unpickling.

The opcodes that build a value stand together, but some are short for "what is under that number in the memo":
strings, names and classes that an earlier part of the pickle made. Those are brought along, at the place of their first
use. What each opcode takes from the stack and leaves there is what the standard library's `pickletools` says.
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass, field
from typing import Any

_SAME = frozenset({"BUILD", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "ADDITEMS"})  # change what they leave
_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
_REFUSED = frozenset({"DUP", "POP", "POP_MARK", "PERSID", "BINPERSID", "INST", "OBJ"})  # no writer of networks has them


@dataclass(eq=False)
class _Object:
    """What the opcodes [start, end) build."""

    start: int
    end: int
    text: str | None = None
    is_mark: bool = False
    is_reference: bool = False
    memo: int | None = None
    values: dict[str, _Object] = field(default_factory=dict)  # of a dict, under keys that are text


@dataclass(frozen=True)
class _Opcode:
    name: str
    arg: Any
    start: int
    end: int
    memo: int | None = None  # that it puts or gets


class _Slicer:
    """The opcodes of a pickle, and which of them build what."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = memoryview(data)
        self.opcodes: list[_Opcode] = []
        self.memo: dict[int, _Object] = {}
        self.begins: dict[int, list[_Object]] = {}
        self.root = self._follow(data)
        for made in self.memo.values():
            self.begins.setdefault(made.start, []).append(made)

    def _follow(self, data: bytes | bytearray) -> _Object:
        stack: list[_Object] = []
        found: list[tuple[pickletools.OpcodeInfo, Any, int | None]] = list(pickletools.genops(data))
        ends = [position or 0 for _, _, position in found[1:]] + [len(data)]
        for i, ((code, arg, position), end) in enumerate(zip(found, ends, strict=True)):
            if code.name in _REFUSED:
                raise ValueError(f"it uses {code.name}")
            number: int | None = None
            if code.name in _PUT:
                number = len(self.memo) if code.name == "MEMOIZE" else int(arg)
                self.memo[number] = stack[-1]
                stack[-1].memo, stack[-1].end = number, i + 1
            elif code.name in _GET:
                number = int(arg)
                stack.append(_Object(i, i + 1, self.memo[number].text, is_reference=True))
            elif code.name == "STOP":
                self.opcodes.append(_Opcode(code.name, None, position or 0, (position or 0) + 1))
                break
            elif code.name not in ("PROTO", "FRAME"):
                self._step(stack, code, arg, i)
            self.opcodes.append(_Opcode(code.name, arg if code.name == "PROTO" else None, position or 0, end, number))
        if len(stack) != 1:
            raise ValueError("it does not end in one value")
        return stack[0]

    def _step(self, stack: list[_Object], code: pickletools.OpcodeInfo, arg: Any, i: int) -> None:
        before, taken = list(code.stack_before), []
        if pickletools.markobject in before:
            while not stack[-1].is_mark:
                taken.append(stack.pop())
            taken.append(stack.pop())
            before = before[: before.index(pickletools.markobject)]
        taken += [stack.pop() for _ in before]
        taken.reverse()
        if code.name in _SAME:
            target, items = taken[0], [item for item in taken[1:] if not item.is_mark]
            if target.is_reference:
                raise ValueError("it changes a value after it was used elsewhere")
            if code.name in ("SETITEM", "SETITEMS"):
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if key.text is not None:
                        target.values[key.text] = value
            target.end = i + 1
            stack.append(target)
            return
        start = min([item.start for item in taken] + [i])
        for _ in code.stack_after:
            made = _Object(start, i + 1, is_mark=code.name == "MARK")
            made.text = arg if isinstance(arg, str) and "UNICODE" in code.name else None
            stack.append(made)

    def emit(self, wanted: _Object, known: set[int], within: list[_Object]) -> list[bytes | memoryview]:
        """The opcodes that build an object; `known` are the numbers of the memo that are set by then."""
        if wanted in within:
            raise ValueError("it is a part of what it uses")
        parts: list[bytes | memoryview] = []
        i = wanted.start
        while i < wanted.end:
            again = [made for made in self.begins.get(i, []) if made.memo in known and made.end <= wanted.end]
            if again:  # brought along before
                made = max(again, key=lambda found: found.end)
                parts.append(b"j" + struct.pack("<I", made.memo))
                i = made.end
                continue
            opcode = self.opcodes[i]
            if opcode.name in _GET and opcode.memo is not None and opcode.memo not in known:
                parts += self.emit(self.memo[opcode.memo], known, [*within, wanted])
            elif opcode.name in _PUT and opcode.memo is not None:
                known.add(opcode.memo)
                parts.append(b"r" + struct.pack("<I", opcode.memo))  # MEMOIZE would count anew
            elif opcode.name != "FRAME":
                parts.append(self.data[opcode.start : opcode.end])
            i += 1
        return parts


def value_of(data: bytes | bytearray, key: str) -> list[bytes | memoryview]:
    """A pickle of the value that a pickled dict has under a key, in pieces that share the memory of `data`.

    Args:
        data: a pickle, of which the safe reader has found that it is whole and harmless.

    Raises:
        ValueError: there is no such value, or the pickle does what no writer of networks does.
    """
    try:
        slicer = _Slicer(data)
    except (IndexError, KeyError) as error:
        raise ValueError("its opcodes do not fit together") from error
    wanted = slicer.root.values.get(key)
    if wanted is None or wanted.is_reference:
        raise ValueError(f"it has no {key} of its own")
    first = slicer.opcodes[0]
    protocol = bytes(slicer.data[first.start : first.end]) if first.name == "PROTO" else b""
    return [protocol, *slicer.emit(wanted, set(), []), b"."]
