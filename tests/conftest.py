"""What every test gets: fixed seeds, few threads, visible GPU skips; fixtures `device` and `nan_empty`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import interpreted  # noqa: F401  # first: it decides how Triton runs, which Triton asks once
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from clone_fast import capture

# The same examples on every run, none stored, and no deadline: a shared machine may pause anywhere.
settings.register_profile("clone_fast", derandomize=True, database=None, deadline=None)
settings.load_profile("clone_fast")

# Fixed, because the order of a float sum depends on it; one, because the networks of the tests are so small that
# threads only wait for one another.
torch.set_num_threads(1)

# TF32 off: float32 means float32 on every device. A test of TF32 turns it on for itself, and off again.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's choice of backend does not reach a test; on a GPU a silent fall-back is an error."""
    monkeypatch.delenv("CLONE_FAST_BACKEND", raising=False)
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CLONE_FAST_STRICT", "1")
    else:
        monkeypatch.delenv("CLONE_FAST_STRICT", raising=False)


@pytest.fixture(autouse=True)
def _nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured, and when, does not depend on the tests before."""
    monkeypatch.setattr(capture, "_recorded", set())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the op must run on."""
    return torch.device(request.param)


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written reads as NaN: what a kernel forgets to write shows in its result.

    Covers what Python allocates (`torch.empty` and its relatives); integers stay as they come.
    """

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            if out.is_floating_point() or out.is_complex():
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return allocate_nan

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
