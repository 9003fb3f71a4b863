"""The opcodes of a pickle, each a few lines on a `safe_pickle.Machine`; what can run code is refused.

Names, codes and argument layouts are those of CPython's `pickletools`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clone_fast.checkpoints.safe_pickle import Machine

Op = Callable[["Machine"], None]
OPCODES: dict[int, Op] = {}


def _op(code: bytes) -> Callable[[Op], Op]:
    def register(step: Op) -> Op:
        OPCODES[code[0]] = step
        return step

    return register


def _constant(code: bytes, value: Any) -> None:
    OPCODES[code[0]] = lambda m: m.push(value)


def _fresh(code: bytes, make: Callable[[], Any]) -> None:
    OPCODES[code[0]] = lambda m: m.push(make())


def _number(code: bytes, layout: str) -> None:
    OPCODES[code[0]] = lambda m: m.push(m.number(layout))


def _text(code: bytes, layout: str, encoding: str, errors: str) -> None:
    OPCODES[code[0]] = lambda m: m.push(str(m.read(m.number(layout)), encoding, errors))


def _binary(code: bytes, layout: str) -> None:
    OPCODES[code[0]] = lambda m: m.push(m.read(m.number(layout)))


def _get(code: bytes, layout: str) -> None:
    OPCODES[code[0]] = lambda m: m.recall(m.number(layout))


def _put(code: bytes, layout: str) -> None:
    OPCODES[code[0]] = lambda m: m.memo.__setitem__(m.number(layout), m.top())


def _long(code: bytes, layout: str) -> None:
    OPCODES[code[0]] = lambda m: m.push(int.from_bytes(m.read(m.number(layout)), "little", signed=True))


def _tuple(code: bytes, count: int) -> None:
    OPCODES[code[0]] = lambda m: m.push(tuple([m.pop() for _ in range(count)][::-1]))


def _collect(code: bytes, make: Callable[[list[Any]], Any]) -> None:
    OPCODES[code[0]] = lambda m: m.push(make(m.pop_to_mark()))


def _forbid(code: bytes, what: str) -> None:
    def step(machine: Machine) -> None:
        raise machine.refused(what)

    OPCODES[code[0]] = step


for _code, _value in ((b"N", None), (b"\x88", True), (b"\x89", False), (b")", ())):
    _constant(_code, _value)
for _code, _make in ((b"]", list), (b"}", dict), (b"\x8f", set)):
    _fresh(_code, _make)
for _code, _layout in ((b"J", "<i"), (b"K", "<B"), (b"M", "<H"), (b"G", ">d")):
    _number(_code, _layout)
for _code, _layout in ((b"X", "<I"), (b"\x8c", "<B"), (b"\x8d", "<Q")):
    _text(_code, _layout, "utf-8", "surrogatepass")
for _code, _layout in ((b"T", "<i"), (b"U", "<B")):  # Python 2 str
    _text(_code, _layout, "latin-1", "strict")
for _code, _layout in ((b"B", "<I"), (b"C", "<B"), (b"\x8e", "<Q"), (b"\x96", "<Q")):
    _binary(_code, _layout)
for _code, _layout in ((b"h", "<B"), (b"j", "<I")):
    _get(_code, _layout)
for _code, _layout in ((b"q", "<B"), (b"r", "<I")):
    _put(_code, _layout)
for _code, _layout in ((b"\x8a", "<B"), (b"\x8b", "<i")):
    _long(_code, _layout)
for _code, _count in ((b"\x85", 1), (b"\x86", 2), (b"\x87", 3)):
    _tuple(_code, _count)
_collect(b"t", tuple)
_collect(b"l", list)
for _code, _what in (
    (b"o", "makes an object by the opcode OBJ"),
    (b"P", "has a persistent id in text form"),
    (b"\x82", "uses an extension code"),
    (b"\x83", "uses an extension code"),
    (b"\x84", "uses an extension code"),
    (b"\x97", "wants an out-of-band buffer"),
    (b"\x98", "wants an out-of-band buffer"),
):
    _forbid(_code, _what)


@_op(b"\x80")
def _protocol(m: Machine) -> None:
    version = m.number("<B")
    if version > 5:
        raise m.damaged(f"pickle protocol {version}")


@_op(b"\x95")
def _frame(m: Machine) -> None:
    m.number("<Q")  # a hint for readers of streams; the whole file is at hand


@_op(b".")
def _stop(m: Machine) -> None:
    m.done = True


@_op(b"(")
def _mark(m: Machine) -> None:
    m.open_mark()


@_op(b"0")
def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_to_mark()


@_op(b"1")
def _pop_mark(m: Machine) -> None:
    m.pop_to_mark()


@_op(b"2")
def _dup(m: Machine) -> None:
    m.push(m.top())


@_op(b"I")
def _int(m: Machine) -> None:
    line = m.read_line()
    m.push(line == b"01" if line in (b"00", b"01") else int(line))


@_op(b"L")
def _long_text(m: Machine) -> None:
    m.push(int(m.read_line().rstrip(b"L")))


@_op(b"F")
def _float(m: Machine) -> None:
    m.push(float(m.read_line()))


@_op(b"S")
def _string(m: Machine) -> None:
    line = m.read_line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise m.damaged("a string without quotes")
    m.push(line[1:-1].decode("unicode_escape"))


@_op(b"V")
def _unicode(m: Machine) -> None:
    m.push(m.read_line().decode("raw_unicode_escape"))


@_op(b"g")
def _get_text(m: Machine) -> None:
    m.recall(int(m.read_line()))


@_op(b"p")
def _put_text(m: Machine) -> None:
    m.memo[int(m.read_line())] = m.top()


@_op(b"\x94")
def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.top()


@_op(b"d")
def _dict(m: Machine) -> None:
    items = m.pop_to_mark()
    made: dict[Any, Any] = {}
    m.fill(made, items)
    m.push(made)


@_op(b"\x91")
def _frozenset(m: Machine) -> None:
    m.push(frozenset(m.as_set(m.pop_to_mark())))


@_op(b"s")
def _setitem(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.fill(m.top(), [key, value])


@_op(b"u")
def _setitems(m: Machine) -> None:
    items = m.pop_to_mark()
    m.fill(m.top(), items)


@_op(b"a")
def _append(m: Machine) -> None:
    item = m.pop()
    m.extend(m.top(), [item])


@_op(b"e")
@_op(b"\x90")
def _appends(m: Machine) -> None:
    items = m.pop_to_mark()
    m.extend(m.top(), items)


@_op(b"c")
def _global(m: Machine) -> None:
    module, name = m.read_name(), m.read_name()
    m.push(m.find(module, name))


@_op(b"\x93")
def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    m.push(m.find(module, name))


@_op(b"i")
def _inst(m: Machine) -> None:
    module, name = m.read_name(), m.read_name()
    m.find(module, name)
    raise m.refused(f"makes a {module}.{name} by the opcode INST")


@_op(b"R")
def _reduce(m: Machine) -> None:
    args, function = m.pop(), m.pop()
    m.push(m.make("call", function, args))


@_op(b"\x81")
def _newobj(m: Machine) -> None:
    args, cls = m.pop(), m.pop()
    m.push(m.make("new", cls, args))


@_op(b"\x92")
def _newobj_ex(m: Machine) -> None:
    kwargs, args, cls = m.pop(), m.pop(), m.pop()
    if not isinstance(kwargs, dict) or kwargs:
        raise m.refused("makes an object with keyword arguments")
    m.push(m.make("new", cls, args))


@_op(b"b")
def _build(m: Machine) -> None:
    state, target = m.pop(), m.top()
    m.build(target, state)


@_op(b"Q")
def _persistent(m: Machine) -> None:
    pid = m.pop()
    if m.persistent_load is None:
        raise m.refused("has a persistent id")
    m.push(m.persistent_load(pid))
