"""Triton kernels on a CPU: the leaves of kernels/, run by Triton's interpreter.

Triton decides when it is imported whether it compiles or interprets, its own library included. So conftest.py imports
this module before anything imports triton: where no GPU is visible it sets TRITON_INTERPRET=1 for the whole test
process. With a GPU the process compiles, and the interpreted tests are skipped, visibly, unless the caller has set
TRITON_INTERPRET=1.

Ahead-of-time compilation needs the other state, and therefore a process of its own: see ahead_of_time.py.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/interpreted.py could ask it to interpret")
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(
    not INTERPRETS, reason="Triton compiles in this process; TRITON_INTERPRET=1 lets it interpret"
)

WHERE = [  # what a test of a leaf runs on: `leaf_on`
    pytest.param("cpu", marks=needs_interpreter),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETS, reason="this process interprets Triton")]
    ),
]


@functools.cache
def why_not() -> str | None:
    """Triton 3.6 cannot interpret a loop over a bound of the kernel with NumPy 2.4, which refuses int(array of one)."""
    import numpy as np
    import triton

    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}"
    return None


def interpreted_leaf(op: str) -> Any:
    """`clone_fast.kernels.<op>`, which takes CPU tensors here."""
    if not INTERPRETS:
        raise RuntimeError("mark the test with needs_interpreter")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    leaf: ModuleType = importlib.import_module(f"clone_fast.kernels.{op}")
    return leaf


def leaf_on(op: str, device: str) -> ModuleType:
    """`clone_fast.kernels.<op>`, interpreted on a CPU."""
    return interpreted_leaf(op) if device == "cpu" else importlib.import_module(f"clone_fast.kernels.{op}")
