"""Weights times a factor, and the layers whose gain goes there: no activation follows them."""

from __future__ import annotations

import sys

import pytest
import torch
from fast import FLOATS
from grids import assert_op_check
from spec_leaf import steps
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.nn.layers import Conv2dLayer
from clone_fast.ops import dispatch
from clone_fast.ops.dispatch import Leaf
from clone_fast.ops.finished_weights import scaled_weight

REGISTERED = torch.ops.clone_fast.scaled_weight.default
DTYPES = [torch.float64, *FLOATS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rounded_once_in_both_directions(device: str, kept: torch.dtype, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 32, 1, 1, device=device).to(kept).requires_grad_()
    got, wide = scaled_weight(weight, 0.3, dtype), torch.promote_types(dtype, kept)
    assert got.dtype == dtype
    assert torch.equal(got, (weight.to(wide) * 0.3).to(dtype))
    dw = torch.randn_like(got)
    (grad,) = torch.autograd.grad(got, weight, dw)
    assert torch.equal(grad, (dw.to(wide) * 0.3).to(kept))


def test_derivatives() -> None:
    weight = torch.randn(3, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda weight: scaled_weight(weight, 0.3, torch.float64), weight)
    assert gradgradcheck(lambda weight: scaled_weight(weight, 0.3, torch.float64).square(), weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_op_check(dtype: torch.dtype) -> None:
    for weight in torch.randn(3, 2, 1, 1), torch.randn(2, 3, 1, 1).transpose(0, 1):
        assert_op_check(REGISTERED, (weight.requires_grad_(), 0.3, dtype, "reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_a_layer_that_only_multiplies(dtype: torch.dtype, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither direction takes the pass of an activation, on the reference, or the leaves, which agree."""
    layer = Conv2dLayer(8, 6, 1, bias=False)
    x = torch.randn(2, 8, 3, 4).to(dtype).requires_grad_()
    inputs = [x, layer.weight]
    plain = layer(x, gain)
    dy = torch.randn_like(plain)
    want = plain, *torch.autograd.grad(plain, inputs, dy)
    weight = layer.weight.detach().double()[:, :, 0, 0] * (gain / 8**0.5)
    exact = torch.einsum("oi,nihw->nohw", weight, x.detach().double())
    assert (plain.double() - exact).abs().max() <= 2 * max(torch.finfo(dtype).eps, 1e-7) * exact.abs().max()

    leaf = steps("modulated_conv2d", whole=False)
    del leaf.launch_act_backward
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(leaf))
    monkeypatch.setattr(sys.modules["clone_fast.ops.modulated_conv2d"], "resolve", lambda *args: "triton")
    monkeypatch.setattr(sys.modules["clone_fast.nn.layers"], "is_fast", lambda device: True)
    y = layer(x, gain)
    for got, one in zip((y, *torch.autograd.grad(y, inputs, dy)), want, strict=True):
        assert got.dtype == one.dtype
        assert_near(got, one, dtype)


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    eps = max(torch.finfo(dtype).eps, torch.finfo(want.dtype).eps)
    assert (got - want).abs().max() <= 4 * max(eps, 1e-7) * want.abs().max()
