"""Nothing in a file is ever executed: every way a pickle can ask for code is refused, and told.

Each payload would create the file `canary` in the working directory. Where plain `pickle` can load the
payload, the test first shows that it is live.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    Persistent,
    load_unsafely,
    nvidia_dict,
    nvidia_modules,
    persistent,
    same_tensors,
    small_network,
    write_pickle,
    write_torch,
)

from clone_fast.checkpoints import load_generator, load_network
from clone_fast.checkpoints.torch_file import read_pickle
from clone_fast.errors import CheckpointError

COMMAND = "touch canary"
EXECUTED = "; nothing was executed"


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that a payload would create; it must not be there in the end."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something in a file was executed"


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def refusal(content: bytes) -> str:
    """The message with which loading refuses this pickle."""
    Path("network.pkl").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        load_network("network.pkl")
    return str(raised.value)


def read(content: bytes) -> Any:
    return read_pickle(memoryview(content), "network.pkl")


# --- calls by name ------------------------------------------------------------------------------------------

OS = os.system.__module__  # posix or nt


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (Call(os.system, COMMAND), f"{OS}.system"),
        (Call(eval, "open('canary', 'w')"), "builtins.eval"),
        (Call(exec, "open('canary', 'w')"), "builtins.exec"),
        (Call(open, "canary", "w"), f"{open.__module__}.open"),
        (Call(torch.load, "payload.pt", None, None), "torch.serialization.load"),
        (Call(getattr, OrderedDict, "fromkeys"), "builtins.getattr"),
        (Call(__import__, "canary"), "builtins.__import__"),
        (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        (Call(np.load, "payload.npy", None, True), "numpy.load"),
        (Call(torch.jit.load, "payload.pt"), "torch.jit._serialization.load"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_call_is_refused_by_name(payload: Call, name: str, protocol: int) -> None:
    module, _, function = name.rpartition(".")
    if protocol < 3 and module == "builtins":
        name = f"__builtin__.{function}"
    told = refusal(pickle.dumps({"G_ema": payload}, protocol=protocol))
    assert told == (
        f"network.pkl: refused: the pickle asks for {name}, which is not part of a StyleGAN2 checkpoint{EXECUTED}"
    )


def test_the_payload_is_live_elsewhere(canary: Path) -> None:
    """What the other tests refuse does run under plain pickle, and torch refuses or runs it, never we."""
    pickle.loads(pickle.dumps(Call(os.system, COMMAND)))
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize("style", ["pickle", "zip", "legacy"])
def test_source_text_in_a_persistent_object_is_not_run(canary: Path, style: str) -> None:
    written = small_network()
    content = nvidia_dict(written, module_src="open('canary', 'w')")
    path = Path("network.pkl")
    if style == "pickle":
        write_pickle(content, path)
        load_unsafely(path)
    else:
        write_torch(content, path, zipped=style == "zip")
        with nvidia_modules():
            torch.load(path, weights_only=False)
    assert canary.exists()
    canary.unlink()
    assert same_tensors(load_network(path).generator, written.generator)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_call_inside_a_torch_file(zipped: bool) -> None:
    content = {"g_ema": {"input.input": torch.ones(2)}, "args": Call(os.system, COMMAND)}
    write_torch(content, Path("x.pt"), zipped=zipped)
    assert f"refused: the pickle asks for {OS}.system" in refusal(Path("x.pt").read_bytes())


def storage_bytes(payload: Any, zipped: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(payload, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_call_inside_a_nested_storage(zipped: bool) -> None:
    nested = Call(torch.storage._load_from_bytes, storage_bytes(Call(os.system, COMMAND), zipped))
    assert f"asks for {OS}.system" in refusal(pickle.dumps(nested))
    twice = Call(torch.storage._load_from_bytes, storage_bytes(nested, zipped))
    assert "has a storage within a storage" in refusal(pickle.dumps(twice))


def test_a_call_in_the_headers_of_a_legacy_file() -> None:
    head = storage_bytes(torch.ones(1))[:15]
    assert f"asks for {OS}.system" in refusal(head + pickle.dumps(Call(os.system, COMMAND), protocol=2))


# --- names
# ----------------------------------------------------------------------------------------------------


def stack_global(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os.path", "os.system"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("collections.OrderedDict", "__init__"),
        ("torch", "serialization.os.system"),
        ("torch", "FloatStorage.__reduce__"),
        ("torch.serialization", "os"),
        ("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"),
        ("torch_utils", "persistence._reconstruct_persistent_obj"),
        ("numpy", "dtype.__class__"),
        ("", "torch.Size"),
        ("builtins", "type"),
        ("builtins", "object"),
        ("copyreg", "_reconstructor"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("types", "CodeType"),
        ("clone_fast.checkpoints.vetted", "InertDict"),
        ("runpy", "run_path"),
        ("torch._utils", "_rebuild_tensor_v3"),
    ],
)
def test_a_name_counts_as_a_whole(module: str, name: str) -> None:
    told = refusal(b"\x80\x04" + stack_global(module, name) + b".")
    assert f"asks for {module}.{name}," in told or "is no name" in told


def test_a_name_cannot_write_to_the_terminal() -> None:
    told = refusal(b"\x80\x04" + stack_global("os", "\x1b]0;x\x07\nsystem") + b".")
    assert told.isascii()
    assert told.isprintable()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"(cos\nsystem\nS'touch canary'\no.", "asks for os.system"),
        (b"(S'touch canary'\nios\nsystem\n.", "asks for os.system"),
        (b"(icollections\nOrderedDict\n.", "by the opcode INST"),
        (b"(ccollections\nOrderedDict\no.", "by the opcode OBJ"),
        (b"\x80\x02\x82\x01.", "uses an extension code"),
        (b"\x80\x02\x83\x01\x00.", "uses an extension code"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "uses an extension code"),
        (b"\x80\x05\x97.", "wants an out-of-band buffer"),
        (b"(P12\n.", "has a persistent id in text form"),
        (b"\x80\x02K\x01Q.", "has a persistent id"),
        (b"\x80\x02U\x02os)R.", "calls something of type str"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "wants to call numpy.ndarray"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "wants to call torch.FloatStorage"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
            "wants to new torch._utils._rebuild_tensor_v2",
        ),
        (b"\x80\x02cargparse\nNamespace\n)}U\x01aK\x01s\x92.", "makes an object with keyword arguments"),
    ],
)
def test_opcodes_that_make_objects(code: bytes, message: str) -> None:
    assert message in refusal(code)


@pytest.mark.parametrize(
    "target",
    [
        b"ctorch._utils\n_rebuild_parameter\n",  # a function: its __code__ or __globals__
        b"ccollections\nOrderedDict\n",  # a class of the table
        b"]",
        b"N",
    ],
)
def test_state_is_set_on_nothing_of_ours(target: bytes) -> None:
    assert "sets the state of something of type" in refusal(b"\x80\x02" + target + b"}U\x04callN" + b"sb.")


def test_state_becomes_no_attribute() -> None:
    """A state may be named like anything; it stays data."""
    state = {"set_state": "x", "__class__": "y", "__dict__": {"class_name": "z"}, "state": 1}
    namespace = b"\x80\x02cargparse\nNamespace\n)\x81" + pickle.dumps(state, protocol=2)[2:-1] + b"b."
    made = read(namespace)
    assert made.state == state
    assert made.class_name == "argparse.Namespace"
    ordered = b"\x80\x02ccollections\nOrderedDict\n)R" + pickle.dumps(state, protocol=2)[2:-1] + b"b."
    assert read(ordered) == {}
    assert type(read(ordered)).__name__ == "InertDict"
    assert "damaged" in refusal(namespace.replace(b"}", b"]", 1)[:28] + b"]b.")


# --- what is allowed
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_data(protocol: int) -> None:
    value = {
        "text": "a\n\u00e9'\\",
        "long": [1 << 80, -1, 255, 65536, True, False, None, 0.5],
        "nested": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, []],
        "set": {"a", "b"},
    }
    assert read(pickle.dumps(value, protocol=protocol)) == value
    assert bytes(read(pickle.dumps(b"\0\xff", protocol=protocol))) == b"\0\xff"


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_vetted_objects(protocol: int) -> None:
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    value = {
        "scalar": np.float64(2**0.5),
        "integer": np.int64(-3),
        "truth": np.bool_(True),
        "array": array,
        "columns": np.asfortranarray(array),
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.float32,
        "path": Path("a/b"),
        "ordered": OrderedDict(a=1, b=2),
        "frozen": frozenset("ab"),
    }
    made = read(pickle.dumps(value, protocol=protocol))
    assert (made["scalar"], made["integer"], made["truth"]) == (2**0.5, -3, True)
    for name in ("array", "columns"):
        assert torch.equal(made[name].load(), torch.from_numpy(array).float())
    assert (made["size"], made["device"], made["path"]) == ((2, 3), "cuda:1", "a/b")
    assert made["ordered"] == {"a": 1, "b": 2}
    assert made["frozen"] == {"a", "b"}


@pytest.mark.parametrize(
    "value",
    [
        np.ones(2, dtype=">f4"),
        np.array([object()]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.array(["text"]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.ones(2, dtype=np.complex64),
    ],
)
def test_only_plain_numbers_of_numpy(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"a numpy dtype|asks for"):
        read(pickle.dumps(value, protocol=4))


@contextmanager
def audited() -> Iterator[list[str]]:
    """The audit events within that mean that code was found, compiled or started."""
    seen: list[str] = []
    watched = (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "subprocess.Popen",
        "pickle.find_class",
        "exec",
        "compile",
        "import",
    )
    active = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if active and event in watched:
            seen.append(f"{event} {args[:1]!r}")

    sys.addaudithook(hook)  # for the life of the process; `active` ends its work
    try:
        yield seen
    finally:
        active = False


@pytest.mark.parametrize("style", ["pickle", "zip", "legacy"])
def test_loading_imports_and_compiles_nothing(style: str) -> None:
    path = Path("network.pkl")
    content = nvidia_dict(small_network(), module_src="open('canary', 'w')")
    if style == "pickle":
        write_pickle(content, path)
    else:
        write_torch(content, path, zipped=style == "zip")
    load_network(path)  # what torch itself imports on first use
    with audited() as seen:
        load_network(path)
    assert seen == []


def test_a_module_of_any_name_is_only_data() -> None:
    """A class name chosen to collide with ours or Python's changes nothing."""
    for name in ("Generator", "__class__", "os.system", "InertDict"):
        with pytest.raises(CheckpointError, match="not a StyleGAN2 generator"):
            load_generator(write_torch(Persistent(name, ""), Path("x.pt")))
    assert load_generator(write_torch(persistent(small_network().generator), Path("x.pt")))
