"""Gradients of results with given gradients, by way of a scalar: those of `torch.autograd.grad`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clone_fast.ops.registration import gradients_through


def results(x: Tensor, y: Tensor) -> list[Tensor]:
    """One of them x itself, one to which the second input has no part."""
    return [x, x.sin() * y, x.square().mean(0, keepdim=True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("used", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_they_are_autograds(dtype: torch.dtype, used: list[int]) -> None:
    """Those of them in turn, too; and where no input takes part there is None."""
    found = []
    x, y, alone = (torch.randn(3, 5).to(dtype).requires_grad_() for _ in range(3))
    given = [torch.randn_like(one).requires_grad_() for one in results(x, y)]
    for ours in (True, False):
        ends, grads, inputs = [results(x, y)[i] for i in used], [given[i] for i in used], [x, y, alone]
        if ours:
            first = gradients_through(ends, inputs, grads, create_graph=True)
        else:
            first = list(torch.autograd.grad(ends, inputs, grads, create_graph=True, allow_unused=True))
        there = sum((one.double().square().sum() for one in first if one is not None), torch.zeros([]).double())
        found.append([*first, *torch.autograd.grad(there, [x, y, *grads], allow_unused=True)])
    assert [one is None for one in found[0]] == [one is None for one in found[1]]
    assert found[0][2] is None
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True) if one is not None)


def test_what_the_gradients_depend_on_has_no_part() -> None:
    x = torch.randn(4, requires_grad=True)
    slope = x.exp()
    (found,) = gradients_through(x.square(), [x], slope, create_graph=True)
    assert found is not None
    assert torch.equal(found, 2 * x * slope)
    (second,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(second, (2 * (1 + x) * x.exp()).detach())


def test_grad_mode_does_not_matter() -> None:
    x = torch.randn(4, requires_grad=True)
    y = x.square()
    with torch.no_grad():
        (found,) = gradients_through(y, [x], torch.ones(4))
    assert found is not None
    assert torch.equal(found, (2 * x).detach())
    assert not found.requires_grad
