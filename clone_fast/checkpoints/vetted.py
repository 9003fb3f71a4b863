"""The names that a StyleGAN2 checkpoint needs, and what each becomes: plain data that we build ourselves.

No function that a file names is called and nothing is imported on its behalf. A ValueError raised here
reaches the user as a `CheckpointError` of the machine. To support a file that asks for one more harmless
name, add it to `TABLE` with a function that treats its arguments as hostile, and a test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clone_fast.checkpoints.safe_pickle import Buildable, Global, Machine, shown
from clone_fast.checkpoints.tensors import HeldTensor, StoredTensor, stored_tensor

Args = tuple[Any, ...]


class InertDict(dict[Any, Any], Buildable):
    """An OrderedDict, defaultdict or EasyDict. Its attributes (`_metadata` of a state_dict) are dropped."""

    def set_state(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("a dict with a state that is no dict")


@dataclass
class PlainObject(Buildable):
    """An argparse.Namespace: its attributes as a dict, never set as attributes."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)

    def set_state(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"a {self.class_name} with a state that is no dict")
        self.state = state


@dataclass
class PersistentObject:
    """A module of `torch_utils.persistence`: class name and state. Its source text is dropped, never run."""

    class_name: str
    state: dict[str, Any]


@dataclass
class NumpyType(Buildable):
    """A numpy dtype, of plain numbers only."""

    code: str

    def set_state(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, itemsize, alignment, flags)
        plain = isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", "|", "=")
        if not plain or state[2:5] != (None, None, None):
            raise ValueError("a numpy dtype other than plain little-endian numbers")

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<" + self.code)


@dataclass
class NumpyArray(Buildable):
    """A numpy array; satisfies `tensors.LazyTensor` once it has its state."""

    shape: tuple[int, ...] = ()
    values: np.ndarray[Any, Any] | None = None

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("a numpy array with an unknown state")
        _, shape, dtype, fortran, data = state
        self.fill(shape, dtype, "F" if fortran is True else "C", data)

    def fill(self, shape: Any, dtype: Any, order: str, data: Any) -> np.ndarray[Any, Any]:
        counts = (
            isinstance(shape, tuple) and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
        )
        if not counts or not isinstance(dtype, NumpyType):
            raise ValueError("a numpy array with a damaged shape or dtype")
        raw = _raw(data)
        if len(raw) != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError("a numpy array whose data does not fit its shape")
        self.shape = shape
        self.values = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
        return self.values

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def load(self) -> Tensor:
        if self.values is None:
            raise ValueError("a numpy array without data")
        return torch.from_numpy(np.array(self.values, dtype=np.float32, order="C"))


TENSORS = (StoredTensor, NumpyArray, HeldTensor)
"""All that a reader takes for a tensor."""


def _raw(data: Any) -> memoryview:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return memoryview(data)
    if isinstance(data, str):  # bytes of Python 2
        return memoryview(data.encode("latin-1"))
    raise ValueError(f"bytes wanted, got {shown(type(data).__name__)}")


def _arguments(machine: Machine, args: Args, least: int, most: int, what: str) -> Args:
    if not least <= len(args) <= most:
        raise machine.damaged(f"{what} with {len(args)} arguments")
    return args + (None,) * (most - len(args))


def _dict(machine: Machine, args: Args) -> InertDict:
    """OrderedDict(), OrderedDict([[key, value], ...]) as protocol 2 writes it, defaultdict(factory)."""
    made = InertDict()
    first = _arguments(machine, args, 0, 1, "a dict")[0]
    if isinstance(first, (list, tuple)):
        machine.charge(len(first))
        for pair in first:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise machine.damaged("a dict of something that is no pair")
            machine.fill(made, list(pair))
    return made


def _set(machine: Machine, args: Args) -> set[Any]:
    items = _arguments(machine, args, 0, 1, "a set")[0]
    machine.charge(len(items) if isinstance(items, (list, tuple)) else 0)
    return machine.as_set([] if items is None else items)


def _encode(machine: Machine, args: Args) -> memoryview:
    """`_codecs.encode(text, "latin1")`, which is how protocol 2 writes bytes."""
    text, codec = _arguments(machine, args, 1, 2, "encode")
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise machine.refused("encodes text other than as latin-1")
    machine.charge(len(text))
    return memoryview(text.encode("latin-1"))


def _bytes(machine: Machine, args: Args) -> memoryview:
    return _encode(machine, args) if args else memoryview(b"")


def _path(machine: Machine, args: Args) -> str:
    if not all(isinstance(part, str) for part in args):
        raise machine.damaged("a path of something that is no text")
    machine.charge(sum(map(len, args)))
    return "/".join(args)


def _persistent(machine: Machine, args: Args) -> PersistentObject:
    meta = _arguments(machine, args, 1, 1, "a persistent object")[0]
    fields = meta if isinstance(meta, dict) else {}
    name, state = fields.get("class_name"), fields.get("state")
    if fields.get("type") != "class" or not isinstance(name, str) or not isinstance(state, dict):
        raise machine.damaged("a persistent object without a class name and a state")
    return PersistentObject(name, state)


def _tensor(machine: Machine, args: Args) -> StoredTensor:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    storage, offset, shape, stride = _arguments(machine, args, 4, 7, "a tensor")[:4]
    return stored_tensor(storage, offset, shape, stride, machine.source)


def _parameter(machine: Machine, args: Args) -> StoredTensor:
    """_rebuild_parameter(data, requires_grad, hooks) and ..._with_state(..., state): the data."""
    data = _arguments(machine, args, 1, 4, "a parameter")[0]
    if not isinstance(data, StoredTensor):
        raise machine.damaged("a parameter that is no tensor")
    return data


def _storage(machine: Machine, args: Args) -> Any:
    """torch.storage._load_from_bytes(bytes): a torch file inside the pickle."""
    data = _raw(_arguments(machine, args, 1, 1, "a storage")[0])
    if machine.nested is None:
        raise machine.refused("has a storage within a storage")
    return machine.nested(machine, data)


def _size(machine: Machine, args: Args) -> tuple[int, ...]:
    sizes = _arguments(machine, args, 1, 1, "a size")[0]
    if not isinstance(sizes, (tuple, list)) or not all(type(size) is int for size in sizes):
        raise machine.damaged("a torch.Size of something that is no integer")
    machine.charge(len(sizes))
    return tuple(sizes)


def _device(machine: Machine, args: Args) -> str:
    kind, index = _arguments(machine, args, 1, 2, "a device")
    return shown(kind if index is None else f"{kind}:{index}")


def _numpy_type(machine: Machine, args: Args) -> NumpyType:
    code = _arguments(machine, args, 1, 3, "a numpy dtype")[0]
    if not isinstance(code, str) or code not in _NUMPY_CODES:
        raise machine.refused(f"has a numpy dtype {shown(code)}")
    return NumpyType(code)


def _numpy_scalar(machine: Machine, args: Args) -> int | float | bool:
    dtype, data = _arguments(machine, args, 2, 2, "a numpy scalar")
    value: int | float | bool = NumpyArray().fill((1,), dtype, "C", data)[0].item()
    return value


def _numpy_array(machine: Machine, args: Args) -> NumpyArray:
    """numpy.core.multiarray._reconstruct(ndarray, (0,), b"b"); the state follows."""
    kind = _arguments(machine, args, 3, 3, "a numpy array")[0]
    if not isinstance(kind, Global) or kind.name != "numpy.ndarray":
        raise machine.damaged("a numpy array of an unknown kind")
    return NumpyArray()


def _numpy_buffer(machine: Machine, args: Args) -> NumpyArray:
    """numpy._core.numeric._frombuffer(data, dtype, shape, order), which is how protocol 5 writes arrays."""
    data, dtype, shape, order = _arguments(machine, args, 4, 4, "a numpy array")
    array = NumpyArray()
    array.fill(shape, dtype, order, data)
    return array


_TENSORFLOW = (
    "a TensorFlow network of StyleGAN or StyleGAN2; convert it with legacy.py of stylegan2-ada-pytorch or "
    "stylegan3 (python legacy.py --source=this.pkl --dest=new.pkl) and give the new file"
)
_NUMPY_CODES = frozenset({"f2", "f4", "f8", "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def _entries() -> list[Global]:
    found = [
        Global("torch_utils.persistence._reconstruct_persistent_obj", call=_persistent),
        Global("torch._utils._rebuild_tensor_v2", call=_tensor),
        Global("torch._utils._rebuild_parameter", call=_parameter),
        Global("torch._utils._rebuild_parameter_with_state", call=_parameter),
        Global("torch.storage._load_from_bytes", call=_storage),
        Global("torch.storage.UntypedStorage", value=torch.uint8),
        Global("torch.Size", call=_size),
        Global("torch.device", call=_device),
        Global("dnnlib.tflib.network.Network", refusal=_TENSORFLOW),
        Global("tfutil.Network", refusal=_TENSORFLOW),
        Global("_codecs.encode", call=_encode),
        Global("numpy.ndarray"),
        Global("numpy.dtype", call=_numpy_type),
        Global("argparse.Namespace", new=lambda m, args: PlainObject("argparse.Namespace")),
    ]
    found += [Global(f"torch.{name}", value=dtype) for name, dtype in _STORAGES.items()]
    found += [Global(f"torch.{name}") for name in _DTYPES]
    for name in (
        "dnnlib.util.EasyDict",
        "dnnlib.EasyDict",
        "collections.OrderedDict",
        "collections.defaultdict",
    ):
        found.append(Global(name, call=_dict, new=_dict))
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        found += [Global(f"{module}.{name}", call=_path) for module in ("pathlib", "pathlib._local")]
    for module in ("builtins", "__builtin__"):
        found += [Global(f"{module}.{name}", call=_set) for name in ("set", "frozenset")]
        found += [Global(f"{module}.{name}", call=_bytes) for name in ("bytes", "bytearray")]
        found += [Global(f"{module}.{name}") for name in ("dict", "list", "int", "float", "bool", "str")]
    for package in ("numpy.core", "numpy._core"):
        found += [
            Global(f"{package}.multiarray.scalar", call=_numpy_scalar),
            Global(f"{package}.multiarray._reconstruct", call=_numpy_array),
            Global(f"{package}.numeric._frombuffer", call=_numpy_buffer),
        ]
    return found


# A name counts only where the file splits it into module and name as we do: ("torch", "Size"), not ("",
# "torch.Size").
TABLE: dict[tuple[str, str], Global] = {
    (g.name.rpartition(".")[0], g.name.rpartition(".")[2]): g for g in _entries()
}
