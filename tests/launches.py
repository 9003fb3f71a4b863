"""How many kernels a computation launches, counted without a GPU: on tensors without memory, as if leaves were there.

A call of one of our ops is one, whatever its leaf makes of it; so is every operator of PyTorch that is no view.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

OPS = ("bias_act", "upfirdn2d", "modulated_conv2d", "laplacian_pyramid", "styles", "minibatch_stddev")
FREE = (
    "aten::empty",
    "aten::new_empty",
    "aten::_unsafe_view",
    "aten::lift_fresh",
    "aten::detach",
    "aten::sym_",
    "aten::promote_types",
)


class Launches(TorchDispatchMode):
    """Counts by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not func.is_view and not name.startswith(FREE):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Launches]:
    """Count inside the `with` block; every op takes the path that it takes on a GPU with leaves for all."""
    with pytest.MonkeyPatch.context() as patch:
        for op in (*OPS, "upfirdn2d_add", "conv2d_add"):
            patch.setattr(importlib.import_module(f"clone_fast.ops.{op}"), "resolve", lambda *args: "triton")
        patch.setattr(importlib.import_module("clone_fast.nn.layers"), "is_fast", lambda device: True)
        with Launches() as launches:
            yield launches
