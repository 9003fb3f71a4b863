"""Adam with its rates on the device, and a scaled loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clone_fast.descent import Descent

ONE = torch.ones([])


def parameters(n: int = 1) -> list[Tensor]:
    return [torch.linspace(-1, 1, 5).add(0.1 * i).requires_grad_() for i in range(n)]


def test_its_rates_lie_on_the_device() -> None:
    """The same as PyTorch's plain one with a number for a rate."""
    mine, theirs = parameters(2), parameters(2)
    ours = Descent([([mine[0]], 0.1), ([mine[1]], 0.5)], betas=(0.0, 0.99))
    plain = torch.optim.Adam([{"params": [p], "lr": 0.0} for p in theirs], betas=(0.0, 0.99), foreach=False)
    for rate in (0.25, 1.0):
        for group, peak in zip(plain.param_groups, (0.1, 0.5), strict=True):
            group["lr"] = rate * peak
        plain.zero_grad()
        torch.stack([p**3 / 3 - 0.3 * p for p in theirs]).sum().backward()
        plain.step()
        ours.step(torch.stack([p**3 / 3 - 0.3 * p for p in mine]).sum(), torch.tensor(rate))
    torch.testing.assert_close(mine, theirs)


def test_restarted_it_is_as_new() -> None:
    (p,) = parameters()
    work, start, found = Descent([([p], 0.1)], betas=(0.9, 0.99)), p.detach().clone(), []
    for _ in range(2):
        for _ in range(3):
            work.step(p.square().sum(), ONE)
        found.append(p.detach().clone())
        with torch.no_grad():
            p.copy_(start)
        work.restart()
    assert torch.equal(*found)


def test_what_takes_no_part_is_left_alone() -> None:
    one, other = parameters(2)
    work, before = Descent([([one, other], 0.1)], betas=(0.9, 0.99)), other.detach().clone()
    work.step((one + other).square().sum(), ONE)
    moved = other.detach().clone()
    work.step(one.square().sum(), ONE)
    assert torch.equal(other, moved)
    assert not torch.equal(moved, before)
    assert other.grad is None


def test_a_scaled_loss_takes_the_same_step() -> None:
    (mine,), (theirs,) = parameters(), parameters()
    scaled = Descent([([mine], 0.1)], betas=(0.5, 0.99), loss_scale=1024.0)
    plain = Descent([([theirs], 0.1)], betas=(0.5, 0.99))
    seen: list[float] = []
    mine.register_hook(lambda grad: seen.append(float(grad[0])))
    for _ in range(3):
        for one, p in ((scaled, mine), (plain, theirs)):
            one.step((p - 0.3).square().sum(), ONE)
    torch.testing.assert_close(mine, theirs)
    assert seen[0] == pytest.approx(1024 * 2 * (-1 - 0.3))
    before = mine.detach().clone()
    scaled.step((mine * torch.inf).sum(), ONE)  # no step, and half the scale
    assert torch.equal(mine, before)
    scaled.step(mine.sum(), ONE)
    assert seen[-1] == 512
    scaled.restart()
    scaled.step(mine.sum(), ONE)
    assert seen[-1] == 1024
