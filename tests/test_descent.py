"""Adam with its rates on the device, and a scaled loss."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from played_streams import play_streams
from recorded import repeated
from torch import Tensor

from clone_fast import descent
from clone_fast.descent import ENOUGH, Descent

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


def counted(work: Descent, patch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each step of Adam moves, from now on."""
    found: list[int] = []
    step = work.optimizer.step

    def count(among: list[Tensor] | None = None) -> None:
        found.append(sum(p.grad is not None for p in (work.tensors if among is None else among)))
        step(among)

    patch.setattr(work.optimizer, "step", count)
    return found


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_steps_taken_as_gradients_come_have_the_same_bits(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small weights together, of one that several layers use once, and with a scaled loss all at the end."""
    sides = [8, 6, 6, 9, 8, 8, 3]
    start = [torch.randn(o, i) / i**0.5 for i, o in pairwise(sides)] + [torch.zeros([]), torch.randn(4)]
    x, found, moved = torch.randn(5, 8), [], []
    for played in (False, True):
        leaves = [weight.clone().requires_grad_() for weight in start]
        work = Descent([(leaves[:3], 0.04), (leaves[3:], 0.02)], betas=(0.9, 0.99), loss_scale=scale)
        with monkeypatch.context() as patch:
            if played:
                play_streams(patch)
                patch.setattr(descent, "ENOUGH", 60)
            moved.append(counted(work, patch))
            for _ in range(3):
                work.step(chain(x, [*leaves[:2], leaves[1], *leaves[2:6]], leaves[6]), ONE)
        assert [float(steps) for *_, steps in work.optimizer.state.values()] == [3.0] * 7 + [0.0]
        state = [value for of_one in work.optimizer.state.values() for value in of_one]
        found.append([*(leaf.detach() for leaf in leaves), *state])
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)
    assert moved[0] == [7] * 3
    assert moved[1] == ([7] * 3 if scale > 1 else [3, 1, 2, 1] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("sides", [[1024, 1024, 1024, 8], [512] * 6 + [8]], ids=["large", "together"])
def test_captured_steps_of_large_weights_are_those_of_an_eager_loop(sides: list[int]) -> None:
    """Taken beside the backward of the layers before, each once, and not before its weight has been read."""
    device = torch.device("cuda", torch.cuda.current_device())
    start = [torch.randn(o, i, device=device) / i**0.5 for i, o in pairwise(sides)]
    start.append(torch.zeros([], device=device))
    assert sum(weight.numel() for weight in start[1:]) >= ENOUGH  # and the first one may be left
    x, rate = torch.randn(512, sides[0], device=device), torch.full([], 0.5, device=device)
    found: list[list[Tensor]] = []
    for captured in (False, True):
        leaves = [weight.clone().requires_grad_() for weight in start]
        work = Descent([(leaves[:2], 0.04), (leaves[2:], 0.02)], betas=(0.9, 0.99))  # steps as large as the weights
        idle = torch.zeros(1024, 1024, device=device, requires_grad=True)  # large, and takes no part
        work.tensors.append(idle)

        def run(work: Descent = work, leaves: list[Tensor] = leaves) -> None:
            work.step(chain(x, leaves[:-1], leaves[-1]), rate)

        repeated(run, 4, replayed=captured)
        found.append([leaf.detach() for leaf in leaves])
        assert idle.grad is None
    for got, want, before in zip(found[1], found[0], start, strict=True):
        # where a gradient is next to nothing its rounding decides which way Adam goes
        assert float((got - want).norm()) <= 1e-2 * float((want - before).norm())
