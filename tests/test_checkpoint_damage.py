"""Damaged and hostile data without any request for code: an error that says so, in bounded time and memory."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    SMALL,
    Persistent,
    nvidia_dict,
    persistent,
    small_network,
    write_pickle,
    write_torch,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clone_fast.checkpoints import load_network, save_network, save_rosinality
from clone_fast.errors import CheckpointError

FOUR = torch.storage.TypedStorage(
    wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(content: bytes) -> str:
    """The message with which loading refuses this file."""
    Path("network.pkl").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        load_network("network.pkl")
    return str(raised.value)


def tensor(*args: Any) -> Any:
    """Pickles as a tensor with these arguments of _rebuild_tensor_v2, of a storage of four floats."""

    class Made:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (FOUR, *args, False, OrderedDict())

    return Made()


def test_deep_nesting_ends_without_overflow() -> None:
    deep = 300_000  # enough to overflow the C stack in hash() of a nested tuple
    assert "nested too deeply" in refusal(b"\x80\x02" + b"(" * deep + b"t" * deep + b".")
    assert "not a StyleGAN2 network" in refusal(b"\x80\x02)" + b"\x85" * deep + b".")
    assert "a dict key of type tuple" in refusal(b"\x80\x02})" + b"\x85" * deep + b"Ns.")
    assert "a set of tuple" in refusal(b"\x80\x04\x8f()" + b"\x85" * deep + b"\x90.")
    lists = b"\x80\x02" + b"]" * deep + b"a" * (deep - 1) + b"."
    assert "holds a list" in refusal(lists)


def test_modules_in_a_circle() -> None:
    head = b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}q\x00("
    meta = b"U\x04typeU\x05classU\x0aclass_nameU\x09Generator"
    state = b"U\x05state}q\x01U\x08_modules}q\x02su" + b"\x85Rq\x03"
    circle = b"h\x02U\x01ah\x03sh\x02U\x01bh\x03s00."
    assert "modules nested without end" in refusal(head + meta + state + circle)


def test_modules_that_share_their_children() -> None:
    """14 levels with twice the same child each are 2^14 modules to visit, out of a few hundred bytes."""
    module = Persistent("Generator", "")
    for _ in range(14):
        parent = Persistent("Generator", "")
        parent.add_module("a", module)
        parent.add_module("b", module)
        module = parent
    write_pickle({"G_ema": module}, Path("shared.pkl"))
    assert "modules nested without end" in refusal(Path("shared.pkl").read_bytes())


def test_a_changed_weight_in_a_zip_is_noticed() -> None:
    """The zip container has checksums; without them the network would load, and draw something else."""
    module = persistent(small_network().generator)
    content = write_torch(module, Path("model.pt")).read_bytes()
    weight = module.get_submodule("synthesis.b8.conv0").weight.detach().numpy().tobytes()
    at = content.index(weight) + 100
    changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    assert "does not fit its checksum; copy or download it again" in refusal(changed)


def test_huge_tensor_is_refused_before_memory_is_taken() -> None:
    told = refusal(pickle.dumps({"G_ema": tensor(0, (10**6, 10**6), (0, 0))}))
    assert "refused: a tensor asks for 1000000000000 elements of a storage with 4" in told


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "message"),
    [
        (0, (5,), (1,), "asks for 5 elements of a storage with 4"),
        (2, (3,), (1,), "asks for 3 elements"),
        (0, (2, 2), (2, 2), "asks for 4 elements"),
        (-1, (1,), (1,), "are no counts"),
        (0, (-1,), (1,), "are no counts"),
        (0, (2,), (-1,), "are no counts"),
        (0, (2.0,), (1,), "are no counts"),
        (0, (True,), (1,), "are no counts"),
        (0, (1 << 64,), (1,), "are no counts"),
        (0, [2], (1,), "are no counts"),
        (0, (2, 2), (1,), "a tensor of 2 dimensions and 1 strides"),
        (0, (1,) * 9, (1,) * 9, "a tensor of 9 dimensions"),
        ("0", (1,), (1,), "are no counts"),
    ],
)
def test_tensor_outside_of_its_storage(offset: Any, shape: Any, stride: Any, message: str) -> None:
    assert message in refusal(pickle.dumps({"G_ema": tensor(offset, shape, stride)}))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.", "more bytes wanted"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.", "more bytes wanted"),
        (b"\x80\x04\x8b" + struct.pack("<i", -1) + b".", "more bytes wanted"),
        (b"\x80\x04Nr\xff\xff\xff\xff.", "holds a NoneType"),  # a memo index is no array size
        (b"\x80\x04j\x05\x00\x00\x00.", "memo 5 is not set"),
        (b"(I" + b"9" * 5000 + b"\n.", "damaged"),
        (b"c" + b"a" * 70_000 + b"\nb\n.", "damaged"),
        (b"\x80\x02t.", "a mark is missing"),
        (b"\x80\x02.", "the stack is empty"),
        (b"\x80\x02NNs.", "the stack is empty"),
        (b"\x80\x02NNNs.", "not a dict"),
        (b"\x80\x02NNa.", "neither list nor set"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "damaged"),
        (b"\x80\x02\xfe.", "0xfe is not a pickle opcode"),
        (b"\x80\x02cnumpy\ndtype\nU\x01OR.", "calls something"),
        (b"\x80\x02cnumpy\ndtype\n(U\x02O8K\x00K\x01tR.", "has a numpy dtype O8"),
        (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
            "other than as latin-1",
        ),
    ],
)
def test_damaged_streams(code: bytes, message: str) -> None:
    assert message in refusal(code)


def test_repetition_is_bounded() -> None:
    """A short file cannot ask for endless memory by encoding one long text again and again."""
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"X\x06\x00\x00\x00latin1\x86q\x01"
    again = b"c_codecs\nencode\nq\x02h\x01R" + b"h\x02h\x01R" * 1000
    assert "repeats its data without end" in refusal(b"\x80\x02(" + text + again + b"t.")


def test_storage_types_and_keys_are_checked() -> None:
    def legacy(pid: Any, keys: Any = ("0",)) -> bytes:
        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                return value[1:] if isinstance(value, tuple) and value[:1] == ("pid",) else None

        stream = io.BytesIO()
        torch.save(None, stream, _use_new_zipfile_serialization=False)
        stream.truncate(stream.seek(15))  # its magic number
        for value in (1001, {"little_endian": True}, ("pid", *pid), list(keys)):
            Pickler(stream, 2).dump(value)
        return stream.getvalue() + struct.pack("<q", 2) + b"\0" * 8

    good = ("storage", torch.FloatStorage, "0", "cpu", 2, None)
    assert "holds a Storage" in refusal(legacy(good))
    assert "a persistent id that is no storage" in refusal(legacy(("module", "os", "x", "y", 1, None)))
    assert "a persistent id that is no storage" in refusal(legacy(good[:5]))
    assert "a storage of an unknown type" in refusal(
        legacy(("storage", "torch.FloatStorage", "0", "cpu", 2, None))
    )
    assert "without a key or a size" in refusal(legacy((*good[:4], -1, None)))
    assert "bytes are missing" in refusal(legacy((*good[:4], 10**12, None)))
    assert "a storage with two sizes" in refusal(legacy((*good[:4], 1, None)))
    assert "a view of a storage" in refusal(legacy((*good[:5], ("0", 0, 1))))
    assert "list of storages does not fit" in refusal(legacy(good, keys=("1",)))
    assert "a storage is missing" in refusal(legacy(good, keys=()))


# --- random damage
# --------------------------------------------------------------------------------------------


def tiny_files() -> dict[str, bytes]:
    """One valid file of every family."""
    network = small_network(
        replace(SMALL, img_resolution=8, channel_base=64, z_dim=8, w_dim=8, mapping_layers=1)
    )
    source = "open('canary', 'w')"
    save_network(network, "network.safetensors")
    with pytest.warns(UserWarning, match="does not clamp"):
        save_rosinality(network, "network.pt", strict=False)
    write_pickle(nvidia_dict(network, source), Path("network.pkl"))
    for name, zipped in (("zip", True), ("legacy", False)):
        write_torch(persistent(network.generator, source), Path(name), zipped=zipped)
    return {path.name: path.read_bytes() for path in Path().iterdir()}


def flip(content: bytearray, position: int, value: int) -> None:
    content[position % len(content)] ^= value or 1


def cut(content: bytearray, position: int, value: int) -> None:
    del content[position % len(content) :]


def drop(content: bytearray, position: int, value: int) -> None:
    start = position % len(content)
    del content[start : start + 1 + value]


def repeat(content: bytearray, position: int, value: int) -> None:
    start = position % len(content)
    content[start:start] = content[start : start + 1 + value]


def opcode(content: bytearray, position: int, value: int) -> None:
    codes = b"(.012NRbcdeghijopqrstu)]}\x81\x85\x86\x87\x88\x93\x94QPFGIJKLMSTUVXB"
    content[position % len(content)] = codes[value % len(codes)]


def message_or_none(path: str) -> str | None:
    try:
        load_network(path)
    except CheckpointError as error:
        return str(error)
    return None


Change = tuple[Callable[[bytearray, int, int], None], int, int]
changes = st.lists(
    st.tuples(
        st.sampled_from([flip, flip, opcode, cut, drop, repeat]), st.integers(0, 1 << 20), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", ["network.pkl", "zip", "legacy", "network.pt", "network.safetensors"])
def test_random_damage(name: str) -> None:
    """A damaged file either still loads or raises CheckpointError; nothing else, and nothing is executed."""
    valid = tiny_files()[name]
    load_network(name)
    outcomes: list[str | None] = []

    @settings(max_examples=200)
    @given(changes=changes)
    def damaged(changes: list[Change]) -> None:
        content = bytearray(valid)
        for change, position, value in changes:
            if content:
                change(content, position, value)
        Path("damaged").write_bytes(content)
        outcomes.append(message_or_none("damaged"))
        told = outcomes[-1]
        assert told is None or (told.startswith("damaged: ") and told.isprintable())

    damaged()
    assert len(outcomes) >= 200
    assert not Path("canary").exists()
