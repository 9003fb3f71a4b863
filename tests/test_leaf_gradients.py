"""What clone_fast/ops makes of a leaf's steps: gradients of every order, in float64, without a GPU.

The leaves are those of tests/spec_leaf.py, so that a wrong wire between steps shows here, and a wrong kernel on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import assert_op_check, compiled
from spec_leaf import steps
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.ops import (
    convolution_gradients,
    dispatch,
    laplacian_pyramid_loss,
    modulated_conv2d,
    setup_filter,
    upfirdn2d,
)
from clone_fast.ops.bias_act import ACTIVATIONS
from clone_fast.ops.dispatch import Leaf

OPS = torch.ops.clone_fast
LEAF = "triton"  # any name but "reference"


@pytest.fixture(autouse=True)
def _spec_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(steps(op)))
    monkeypatch.setattr(convolution_gradients, "IN_ONE_PASS", 0)


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf that fuses no resampling."""
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(steps(op, whole=False)))


@pytest.fixture
def on_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions take a leaf, though there is no GPU."""
    for op in dispatch.OPS:
        monkeypatch.setattr(sys.modules[f"clone_fast.ops.{op}"], "resolve", lambda *args: LEAF)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# ---- bias_act ----------------------------------------------------------------------------------------------------


def bias_act(x: Tensor, b: Tensor | None, act: str, clamp: float | None = 0.8, dim: int = 1) -> Tensor:
    return OPS.bias_act(x, b, dim, act, ACTIVATIONS[act].alpha, ACTIVATIONS[act].gain, clamp, LEAF)


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_act(act: str, with_bias: bool) -> None:
    x, b = double(2, 3, 4).requires_grad_(), double(3).requires_grad_() if with_bias else None
    assert gradcheck(lambda x, b: bias_act(x, b, act), (x, b))
    assert gradgradcheck(lambda x, b: bias_act(x, b, act), (x, b))


def test_bias_act_third_derivative() -> None:
    x, b = double(2, 3).requires_grad_(), double(3).requires_grad_()

    def slopes(x: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(bias_act(x, b, "softplus").square().sum(), (x, b), create_graph=True)

    assert gradgradcheck(slopes, (x, b))


def test_bias_act_one_axis() -> None:
    x, b = double(5).requires_grad_(), double(5).requires_grad_()
    assert gradcheck(lambda x, b: bias_act(x, b, "lrelu", dim=0), (x, b))
    assert gradgradcheck(lambda x, b: bias_act(x, b, "tanh", dim=0), (x, b))


def test_bias_act_ops() -> None:
    x, b, dy, v = (torch.randn(shape, requires_grad=True) for shape in ([2, 3, 4], [3], [2, 3, 4], [2, 3, 4]))
    rest = (1, "swish", 0.0, 1.4, 0.5)
    assert_op_check(OPS.bias_act.default, (x, b, *rest, LEAF))
    for want_db in (True, False):
        assert_op_check(OPS.bias_act_backward.default, (dy, x, b, *rest, want_db, LEAF))
    assert_op_check(OPS.bias_act_second.default, (v.detach(), dy.detach(), x.detach(), b.detach(), *rest, LEAF))


# ---- upfirdn2d ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_leaf")
@pytest.mark.parametrize(("up", "down"), [(1, 1), ([2, 1], 1), (1, [1, 2]), ([3, 2], [2, 3])], ids=str)
@pytest.mark.parametrize("padding", [[2, 1, 0, 3], [-1, 2, 1, -1]], ids=str)
@pytest.mark.parametrize("taps", [[[1.0, 2, 3], [4, 5, 6]], [1.0, 2, 5, 3]], ids=["2d", "1d"])
def test_upfirdn2d(up: Any, down: Any, padding: list[int], taps: Any) -> None:
    x = double(1, 2, 5, 6).requires_grad_()
    f = torch.tensor(taps)

    def run(x: Tensor) -> Tensor:
        return upfirdn2d(x, f.double(), up=up, down=down, padding=padding, gain=1.3)

    assert gradcheck(run, x)
    assert gradgradcheck(run, x)


# ---- laplacian_pyramid -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_leaf")
@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (2, 2), (9, 4)], ids=str)
@pytest.mark.parametrize("charbonnier", [None, 0.3])
@pytest.mark.parametrize("mse", [0.0, 0.8])
def test_laplacian_pyramid(levels: int, size: tuple[int, int], charbonnier: float | None, mse: float) -> None:
    """Kept slopes are of float32 where they are sums, so the tolerance is."""
    x, y = double(2, 1, *size).requires_grad_(), double(2, 1, *size).requires_grad_()
    weights = [0.5, 1.0, 2.0, 0.7][:levels]

    found, want = (
        [value, *torch.autograd.grad(2 * value, (x, y))]
        for value in (
            laplacian_pyramid_loss(x, y, levels=levels, weights=weights, charbonnier=charbonnier, mse=mse),
            OPS.laplacian_pyramid(x, y, levels, weights, charbonnier, mse, False, "reference")[0],
        )
    )
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("on_leaf")
def test_laplacian_pyramid_twice() -> None:
    """Smooth, so that there is a second derivative: of the reference."""
    x, y = double(1, 1, 4, 5).requires_grad_(), double(1, 1, 4, 5).requires_grad_()
    for mse in (0.0, 0.8):
        assert gradgradcheck(
            lambda x, y, mse=mse: laplacian_pyramid_loss(x, y, levels=2, charbonnier=0.5, mse=mse), (x, y)
        )


@pytest.mark.parametrize("charbonnier", [None, 0.3])
@pytest.mark.parametrize("levels", [1, 3])
def test_laplacian_pyramid_ops(levels: int, charbonnier: float | None) -> None:
    x, y = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(2, 3, 5, 6)
    args = (x, y, levels, [1.0] * levels, charbonnier, 0.7)
    for keep in (True, False):
        assert_op_check(OPS.laplacian_pyramid.default, (*args, keep, LEAF))
    _, slope, coarse = OPS.laplacian_pyramid(*args, True, LEAF)
    dloss = torch.tensor(1.5)
    assert_op_check(
        OPS.laplacian_pyramid_backward.default,
        (dloss, slope.detach(), coarse.detach(), 0.5, x.detach(), y, 0.7, LEAF),
    )


# ---- modulated_conv2d --------------------------------------------------------------------------------------------

RESAMPLING = [(1, 1), (2, 1), (1, 2)]


def tensors(up: int, down: int, k: int, *, own_weights: bool = False, n: int = 2) -> dict[str, Tensor]:
    height, width = 4 * up // down, 6 * up // down
    shapes = {
        "x": [n, 3, 4, 6],
        "weight": [n, 2, 3, k, k] if own_weights else [2, 3, k, k],
        "styles": [n, 3],
        "noise": [n, 1, height, width],
        "noise_strength": [],
        "bias": [2],
    }
    return {name: double(*shape).requires_grad_() for name, shape in shapes.items()}


def function(names: list[str], **options: Any) -> Callable[..., Tensor]:
    return lambda *values: modulated_conv2d(**({"styles": None} | dict(zip(names, values, strict=True))), **options)


@pytest.mark.usefixtures("on_leaf")
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["shared", "own", "plain"])
def test_modulated_conv2d(up: int, down: int, k: int, kind: str) -> None:
    """Asymmetric filter, every tensor that may want a gradient."""
    args = tensors(up, down, k, own_weights=kind == "own")
    if kind == "plain":
        args.pop("styles")
    options: dict[str, Any] = {"up": up, "down": down, "act": "lrelu", "clamp": 2.0, "demodulate": kind != "plain"}
    options["resample_filter"] = setup_filter([1, 2, 4, 1, 3]).double()
    run = function(list(args), **options)
    assert gradcheck(run, tuple(args.values()))
    reference = function(list(args), **options, backend="reference")
    torch.testing.assert_close(run(*args.values()), reference(*args.values()))


@pytest.mark.usefixtures("in_steps", "on_leaf")
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("taps", [[1, 2, 4, 1, 3], [1, 3, 3, 1], None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_modulated_conv2d_in_steps(up: int, down: int, k: int, taps: list[float] | None, layout: Any) -> None:
    """Where no kernel fuses the resampling."""
    args = tensors(up, down, k)
    args["x"] = args["x"].detach().contiguous(memory_format=layout).requires_grad_()
    f = setup_filter(taps).double() if taps else setup_filter(None).double()
    run = function(list(args), up=up, down=down, resample_filter=f, act="lrelu", clamp=2.0)
    reference = function(list(args), up=up, down=down, resample_filter=f, act="lrelu", clamp=2.0, backend="reference")
    got, want = run(*args.values()), reference(*args.values())
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()
    assert gradcheck(run, tuple(args.values()), fast_mode=True)


@pytest.mark.usefixtures("on_leaf")
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
def test_modulated_conv2d_twice(up: int, down: int) -> None:
    args = tensors(up, down, 3, n=1)
    f = setup_filter([1, 3, 3, 1]).double()
    assert gradgradcheck(function(list(args), up=up, down=down, resample_filter=f), tuple(args.values()))


@pytest.mark.usefixtures("on_leaf")
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("names", [["x", "weight", "bias"], ["x", "weight"], ["x"], ["weight"]], ids="-".join)
def test_the_second_derivative_of_a_discriminator_s_layers_takes_the_leaf(
    up: int, down: int, k: int, whole: bool, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("a convolution went to the composite")

    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(steps(op, whole=whole)))
    monkeypatch.setattr(sys.modules["clone_fast.ops.finished_weights"], "composite_gradients", never)
    args = tensors(up, down, k, own_weights=k == 1)
    f = setup_filter([1, 2, 4, 1, 3]).double()
    rest = {name: args[name].detach() for name in ("x", "weight", "bias") if name not in names}
    options: dict[str, Any] = {"up": up, "down": down, "resample_filter": f, "act": "lrelu", "clamp": 2.0}
    run = function(names, **rest, **options, demodulate=False)
    assert gradgradcheck(run, tuple(args[name] for name in names))


@pytest.mark.usefixtures("on_leaf")
def test_modulated_conv2d_third_derivative() -> None:
    args = tensors(1, 1, 1, n=1)
    x, weight = args["x"], args["weight"]

    def slopes(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = modulated_conv2d(x, weight, None, demodulate=False)
        return torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)

    assert gradgradcheck(slopes, (x, weight))


@pytest.mark.usefixtures("on_leaf")
@pytest.mark.parametrize("shape", [[4, 6], [1, 1, 4, 6], [2, 1, 4, 6]], ids=str)
def test_modulated_conv2d_forms_of_noise(shape: list[int]) -> None:
    args = tensors(1, 1, 1) | {"noise": double(*shape).requires_grad_()}
    assert gradcheck(function(list(args), act="relu"), tuple(args.values()))


@pytest.mark.usefixtures("on_leaf")
@pytest.mark.parametrize(("act", "gain"), [("swish", None), ("tanh", 0.5), ("lrelu", -0.7)])
def test_modulated_conv2d_with_an_activation_that_no_epilogue_has(act: str, gain: float | None) -> None:
    args = tensors(1, 1, 1)
    run = function(list(args), act=act, gain=gain, clamp=1.5)
    assert gradcheck(run, tuple(args.values()))
    reference = function(list(args), act=act, gain=gain, clamp=1.5, backend="reference")
    torch.testing.assert_close(run(*args.values()), reference(*args.values()))


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
def test_modulated_conv2d_ops(up: int, down: int, per_sample: bool) -> None:
    made = {name: value.detach().float() for name, value in tensors(up, down, 3, own_weights=per_sample).items()}
    made.pop("styles")
    made["x"] = made["x"].contiguous(memory_format=torch.channels_last)
    x, weight, *rest = (value.requires_grad_() for value in made.values())
    args = (x, weight, *rest, setup_filter([1, 3, 3, 1]), up, down, "lrelu", 1.4, 1.0)
    assert_op_check(OPS.modulated_conv2d.default, (*args, LEAF))
    y = OPS.modulated_conv2d(*args, LEAF).detach()
    plain = [value.detach() if isinstance(value, Tensor) else value for value in args]
    for wanted in ([True] * 5, [True, False, False, False, True]):
        assert_op_check(OPS.modulated_conv2d_backward.default, (y, y, *plain, wanted, LEAF))


@pytest.mark.parametrize("shape", [[4, 3, 3, 3], [2, 4, 3, 3, 3]], ids=str)
def test_modulated_weights_ops(shape: list[int]) -> None:
    weight, styles = torch.randn(shape, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    assert_op_check(OPS.modulated_weights.default, (weight, styles, True, 1e-8, torch.float32, LEAF))
    dw = torch.randn(2, 4, 3, 3, 3)
    args = (dw, weight.detach(), styles.detach(), True, 1e-8, torch.float32, LEAF)
    assert_op_check(OPS.modulated_weights_backward.default, args)


@pytest.mark.usefixtures("on_leaf")
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
def test_modulated_conv2d_compiles_without_a_graph_break(up: int, down: int) -> None:
    args = {name: value.detach().float().requires_grad_() for name, value in tensors(up, down, 3).items()}
    f = setup_filter([1, 3, 3, 1])
    x = args.pop("x")
    run = function(["x", *args], up=up, down=down, resample_filter=f, act="lrelu")
    compiled(lambda x: run(x, *args.values()), x, [args["weight"], args["styles"], args["bias"]])


@pytest.mark.usefixtures("on_leaf")
def test_the_loss_compiles_without_a_graph_break() -> None:
    y = torch.randn(1, 3, 9, 8)
    compiled(lambda x: laplacian_pyramid_loss(x, y, levels=3, charbonnier=0.1, mse=1.0), torch.randn(1, 3, 9, 8))
