"""The weight as the gradient of a resampling convolution reads it, copied ahead of that in a capture.

On the leaves of tests/spec_leaf.py, on streams that are played. tests/test_csrc_strided_conv.py has the real copy.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import spec_leaf
import torch
from played_streams import Machine, play_streams
from torch import Tensor

from clone_fast.ops import dispatch, factored_weights, modulated_conv2d, setup_filter
from clone_fast.ops.dispatch import Leaf
from clone_fast.ops.resampling_gradients import dgrad_weight

LEAF = "triton"  # any name but "reference"
Ran = list[tuple[str, tuple[Any, ...]]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Which steps, composed where the image is resampled, and with what."""
    found: Ran = []

    def noted(name: str, step: Any) -> Any:
        return lambda *args: found.append((name.removeprefix("launch_"), args)) or step(*args)

    functions: SimpleNamespace = spec_leaf.steps("modulated_conv2d", whole=False)
    for name in [name for name in vars(functions) if name.startswith("launch")]:
        setattr(functions, name, noted(name, getattr(functions, name)))
    leaves = {"modulated_conv2d": Leaf(functions), "upfirdn2d": Leaf(spec_leaf.steps("upfirdn2d"))}
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: leaves[op] if name == LEAF else "another")
    monkeypatch.setattr(sys.modules["clone_fast.ops.modulated_conv2d"], "resolve", lambda *args: LEAF)
    monkeypatch.setattr(factored_weights, "FEWEST", 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return found


def inputs(per_sample: bool) -> dict[str, Any]:
    shapes = {"x": [2, 4, 6, 4], "weight": [2, 5, 4, 3, 3] if per_sample else [5, 4, 3, 3], "styles": [2, 4]}
    values: dict[str, Any] = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return {**values, "resample_filter": setup_filter([1, 3, 3, 1]).double()}


def gradients(args: dict[str, Any], names: list[str], **options: Any) -> tuple[Tensor, ...]:
    values = [args[name].requires_grad_() for name in names]
    return torch.autograd.grad(modulated_conv2d(**args, **options).sin().sum(), values)


def order(weight: Tensor) -> bool:
    """Whether it lies as [.., k, k, O, I]."""
    return weight.movedim((-4, -3), (-2, -1)).is_contiguous()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{"up": 2}, {"down": 2}], ids=str)
def test_it_is_copied_on_the_lane_of_the_weight(
    options: dict[str, int], frozen: bool, per_sample: bool, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, names = inputs(per_sample), ["x", "styles"] if frozen else ["x", "styles", "weight"]
    want = gradients(args, names, **options)
    assert "dgrad_weight" not in dict(ran)
    assert not order([given[1] for name, given in ran if name == "conv"][-1])  # transposed as it is
    ran.clear()
    machine, where = play_streams(monkeypatch), []
    functions: Any = dispatch.leaf("modulated_conv2d", LEAF)
    copy = functions.functions.launch_dgrad_weight

    def noted(*given: Any) -> Tensor:
        where.append(machine.now.name)
        return copy(*given)

    monkeypatch.setattr(functions.functions, "launch_dgrad_weight", noted)
    for got, exact in zip(gradients(args, names, **options), want, strict=True):
        torch.testing.assert_close(got, exact)
    steps = [name for name, _ in ran]
    assert [i for i, name in enumerate(steps) if name == "dgrad_weight"] == [1]  # right behind the weight
    assert where[0].startswith("weights ")
    last = max(i for i, name in enumerate(steps) if name == "conv")
    assert order(ran[last][1][1])


@pytest.mark.parametrize("options", [{"up": 2}, {"down": 2}], ids=str)
def test_it_is_copied_for_small_images(options: dict[str, int], ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger of what the convolution reads and makes is its result where that is twice the size."""
    args = inputs(False)
    larger = args["x"].nbytes * (5 if "up" in options else 1)
    args["x"].requires_grad_()
    play_streams(monkeypatch)
    for limit in (larger, larger - 1):
        monkeypatch.setattr(sys.modules["clone_fast.ops.resampling_gradients"], "SMALL", limit)
        ran.clear()
        modulated_conv2d(**args, **options)
        assert ("dgrad_weight" in dict(ran)) == (limit == larger)


@pytest.mark.parametrize("what", ["no gradient", "x wants none", "the same size"])
def test_it_is_not_copied_for_nothing(what: str, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Machine = play_streams(monkeypatch)
    args = inputs(False)
    args["styles"].requires_grad_(what != "no gradient")
    args["x"].requires_grad_(what == "the same size")
    with torch.set_grad_enabled(what != "no gradient"):
        modulated_conv2d(**args, **({} if what == "the same size" else {"up": 2}))
    assert machine.lanes
    assert "dgrad_weight" not in dict(ran)


def test_a_weight_that_has_no_copy_is_a_view() -> None:
    weight = torch.randn(5, 4, 3, 3)
    assert dgrad_weight(weight).data_ptr() == weight.data_ptr()
    assert torch.equal(dgrad_weight(weight), weight.transpose(0, 1))
