"""Adam with its rates on the device, and a scaled loss."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clone_fast.capture import CudaGraphs
from clone_fast.descent import LARGE, Descent

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


def chain(x: Tensor, weights: list[Tensor], shift: Tensor) -> Tensor:
    """Layers whose gradients to x read the very weights that the step writes."""
    for weight in weights:
        x = F.leaky_relu(F.linear(x, weight), 0.2)
    return (x + shift).square().mean()


@pytest.mark.gpu
def test_captured_steps_of_large_weights_are_those_of_an_eager_loop() -> None:
    """Taken beside the backward of the layers before, each once, and not before its weight has been read."""
    device = torch.device("cuda", torch.cuda.current_device())
    sides = [1024, 1024, 1024, 8]  # and one that is not large
    start = [torch.randn(o, i, device=device) / i**0.5 for i, o in pairwise(sides)]
    start.append(torch.zeros([], device=device))
    assert sum(weight.numel() >= LARGE for weight in start) == 2
    x, rate = torch.randn(512, 1024, device=device), torch.full([], 0.5, device=device)
    found: list[list[Tensor]] = []
    for captured in (False, True):
        leaves = [weight.clone().requires_grad_() for weight in start]
        work = Descent([(leaves[:2], 0.04), (leaves[2:], 0.02)], betas=(0.9, 0.99))  # steps as large as the weights
        idle = torch.zeros(1024, 1024, device=device, requires_grad=True)  # large, and takes no part
        work.early.append(idle)

        def run(work: Descent = work, leaves: list[Tensor] = leaves) -> None:
            work.step(chain(x, leaves[:-1], leaves[-1]), rate)

        if captured:
            graphs = CudaGraphs(device)
            graphs.aside(run)
            run = graphs.record(run)
        for _ in range(3 if captured else 4):
            run()
        found.append([leaf.detach() for leaf in leaves])
        assert idle.grad is None
    for got, want, before in zip(found[1], found[0], start, strict=True):
        # where a gradient is next to nothing its rounding decides which way Adam goes
        assert float((got - want).norm()) <= 1e-2 * float((want - before).norm())
