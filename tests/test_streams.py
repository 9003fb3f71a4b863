"""Work that goes side by side in a capture, and how it ends in an error."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from clone_fast.capture import Captured
from clone_fast.ops.streams import beside


def test_without_a_capture_one_comes_after_the_other() -> None:
    order: list[str] = []
    both = [partial(lambda name: order.append(name) or name, name) for name in ("run", "meanwhile")]
    assert beside(torch.device("cpu"), "lane", *both) == ("run", "meanwhile")
    assert order == ["run", "meanwhile"]


class Full(torch.autograd.Function):
    """Nothing, but that its gradient finds the memory full while it is captured."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return find_it_full(grads[0])


def find_it_full(x: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise torch.OutOfMemoryError("full")
    return x * 2


@pytest.mark.gpu
@pytest.mark.parametrize("first", [find_it_full, Full.apply], ids=["forward", "backward"])
@pytest.mark.parametrize("in_lane", [True, False])
def test_a_full_memory_is_told_from_beside_other_work(first: Callable[[Tensor], Tensor], in_lane: bool) -> None:
    """What is under way beside does not hide the error, nor keep the memory; the next capture succeeds."""
    device = torch.device("cuda", torch.cuda.current_device())
    x, total = torch.ones(1 << 20, device=device, requires_grad=True), torch.zeros([], device=device)

    def iteration(function: Callable[[Tensor], Tensor]) -> None:
        x.grad = None
        both = (partial(function, x), lambda: x * 3)
        one, two = beside(device, "other", *(both if in_lane else both[::-1]))
        (one + two).sum().backward()
        total.copy_(cast(Tensor, x.grad)[0])

    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)

    spoiled, sound = (Captured(partial(iteration, f), device, "a test") for f in (first, torch.sin))
    spoiled()
    before = reserved()
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        spoiled()
    assert reserved() <= before
    assert torch.randn(2, device=device).isfinite().all()
    for _ in range(3):
        total.fill_(torch.nan)
        sound()
        assert total.item() == pytest.approx(3 + math.cos(1), rel=1e-6)
    assert len(sound.replays) == 1
