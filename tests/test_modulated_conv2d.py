"""modulated_conv2d against per-sample convolutions in numpy, its gradients, its registration and its messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grids import DTYPES, as_layout, assert_close_as_dtype, assert_op_check, assert_same, compiled
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.ops import modulated_conv2d, setup_filter, upfirdn2d
from clone_fast.ops.bias_act import ACTIVATIONS
from clone_fast.reference.convolution import _Convolution, _TransposedConvolution

REGISTERED = torch.ops.clone_fast.modulated_conv2d.default
WEIGHTS = torch.ops.clone_fast.modulated_weights.default
FILTER = setup_filter([1, 3, 3, 1])
RESAMPLING = [(1, 1), (2, 1), (1, 2)]
TENSORS = ["x", "weight", "styles", "noise", "noise_strength", "bias"]


def inputs(
    *, n: int = 2, i: int = 3, o: int = 4, k: int = 3, size: tuple[int, int] = (4, 6), up: int = 1, down: int = 1
) -> dict[str, Any]:
    """Every argument that is a tensor, in float64."""
    height, width = size[0] * up // down, size[1] * up // down
    shapes = {
        "x": [n, i, *size],
        "weight": [o, i, k, k],
        "styles": [n, i],
        "noise": [n, 1, height, width],
        "noise_strength": [],
        "bias": [o],
    }
    made: dict[str, Any] = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return made | {"up": up, "down": down, "resample_filter": FILTER if up * down > 1 else None}


def registered(
    x: Tensor,
    weight: Tensor,
    styles: Tensor | None = None,
    *,
    up: int = 1,
    down: int = 1,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
) -> Tensor:
    gain = ACTIVATIONS[act].gain if gain is None else gain
    if styles is not None:
        weight = WEIGHTS(weight, styles, demodulate, eps, x.dtype, "reference")
    tensors = (x, weight, noise, noise_strength, bias, resample_filter)
    return REGISTERED(*tensors, up, down, act, gain, clamp, "reference")


def expected(
    x: Tensor, weight: Tensor, styles: Tensor | None, *, resample_filter: Tensor | None = None, **kwargs: Any
) -> naive.Array:
    kwargs = {name: naive.array(v) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
    return naive.modulated_conv2d(
        naive.array(x), naive.array(weight), naive.array(styles), f=naive.array(resample_filter), **kwargs
    )


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [modulated_conv2d, registered])
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("demodulate", [True, False])
def test_against_numpy(function: Callable[..., Tensor], up: int, down: int, k: int, demodulate: bool) -> None:
    args = inputs(k=k, up=up, down=down) | {"demodulate": demodulate, "act": "lrelu", "clamp": 1.5}
    assert_same(function(**args), expected(**args))


@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("k", [1, 3])
def test_plain_convolution(up: int, down: int, k: int) -> None:
    args = inputs(k=k, up=up, down=down) | {"styles": None, "demodulate": False}
    assert_same(modulated_conv2d(**args), expected(**args))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (7, 7)], ids=str)
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_odd_sizes(size: tuple[int, int], up: int, k: int) -> None:
    args = inputs(size=size, up=up, k=k)
    assert_same(modulated_conv2d(**args), expected(**args))


@pytest.mark.parametrize(("up", "down"), RESAMPLING[1:])
@pytest.mark.parametrize("taps", [[1], [1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 2, 3, 2, 5, 1]])
@pytest.mark.parametrize("separable", [True, False])
def test_other_filters(up: int, down: int, taps: list[float], separable: bool) -> None:
    f = setup_filter(taps, separable=separable)
    args = inputs(up=up, down=down) | {"resample_filter": f}
    assert_same(modulated_conv2d(**args), expected(**args))


@pytest.mark.parametrize("shape", [[2, 1, 4, 6], [1, 1, 4, 6], [4, 6]], ids=str)
@pytest.mark.parametrize("strength", [True, False])
def test_forms_of_noise(shape: list[int], strength: bool) -> None:
    args = inputs() | {"noise": torch.randn(shape, dtype=torch.float64)}
    if not strength:
        args.pop("noise_strength")
    assert_same(modulated_conv2d(**args), expected(**args))


def test_strength_without_noise_does_nothing() -> None:
    args = inputs() | {"noise": None}
    assert torch.equal(modulated_conv2d(**args), modulated_conv2d(**args | {"noise_strength": None}))


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("gain", [None, 0.3])
def test_activations(act: str, gain: float | None) -> None:
    args = inputs() | {"act": act, "gain": gain}
    assert_same(modulated_conv2d(**args), expected(**args))


def test_noise_comes_before_the_bias_and_clamp_after_the_gain() -> None:
    x, weight = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    y = modulated_conv2d(
        x,
        weight,
        torch.tensor([[3.0]]),
        demodulate=False,
        noise=torch.tensor([[-5.0]]),
        noise_strength=torch.tensor(2.0),
        bias=torch.tensor([-1.0]),
        act="lrelu",
        gain=10,
    )
    assert y.item() == pytest.approx(0.2 * (3 - 10 - 1) * 10)
    y = modulated_conv2d(x, weight, None, demodulate=False, gain=10, clamp=7)
    assert y.item() == 7


def test_demodulation_brings_the_weights_to_unit_norm() -> None:
    """Independent unit-variance pixels keep their variance, whatever the styles are."""
    x = torch.randn(1, 8, 64, 64)
    weight, styles = torch.randn(4, 8, 3, 3), 50 * torch.randn(1, 8)
    y = modulated_conv2d(x, weight, styles)[:, :, 1:-1, 1:-1]
    np.testing.assert_allclose(naive.array(y).var(axis=(0, 2, 3)), 1, rtol=0.15)


def test_eps_stands_beside_the_unscaled_weights() -> None:
    args = {"x": torch.ones(1, 16, 4, 4), "weight": torch.ones(1, 16, 3, 3), "styles": torch.full([1, 16], 1e-5)}
    center = modulated_conv2d(**args)[0, 0, 1, 1].item()
    assert center == pytest.approx(144 * 1e-5 / (144 * 1e-10 + 1e-8) ** 0.5)
    assert modulated_conv2d(**args, eps=0.0)[0, 0, 1, 1].item() == pytest.approx(12)


def test_every_sample_has_its_own_weights() -> None:
    args = inputs(n=3, up=2)
    together = modulated_conv2d(**args)
    for n in range(3):
        own = {name: args[name][n : n + 1] for name in ("x", "styles", "noise")}
        torch.testing.assert_close(together[n : n + 1], modulated_conv2d(**args | own))


# ---- dtypes ------------------------------------------------------------------------------------------------------


def grouped(
    x: Tensor, weight: Tensor, styles: Tensor, *, up: int, down: int, resample_filter: Tensor | None, **rest: Tensor
) -> Tensor:
    """The op in x's dtype all through, by weights modulated for each sample and a grouped convolution."""
    n, o, i, k = x.shape[0], *weight.shape[:3]
    w = weight.to(x.dtype)[None] * styles.to(x.dtype)[:, None, :, None, None]
    w = w * (w.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    x = x.reshape(1, n * i, *x.shape[2:])
    f = resample_filter
    if up == 2:
        y = F.conv_transpose2d(x, w.transpose(1, 2).reshape(n * i, o, k, k), stride=2, groups=n)
        y = upfirdn2d(y, f, padding=1, gain=4)
    elif down == 2:
        x = upfirdn2d(x, f, padding=2)
        y = F.conv2d(x, w.reshape(n * o, i, k, k), stride=2, groups=n)
    else:
        y = F.conv2d(x, w.reshape(n * o, i, k, k), padding=k // 2, groups=n)
    y = y.reshape(n, o, *y.shape[2:]) + rest["noise"].to(x.dtype) * rest["noise_strength"].to(x.dtype)
    return F.leaky_relu(y + rest["bias"].to(x.dtype)[:, None, None], 0.2) * 2**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", ["in x's dtype", "float32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("function", [modulated_conv2d, registered])
def test_dtypes(
    dtype: torch.dtype, parameters: str, layout: str, up: int, down: int, function: Callable[..., Tensor]
) -> None:
    args = inputs(i=16, o=8, size=(6, 8), up=up, down=down)
    for name in TENSORS:
        args[name] = args[name].to(dtype if parameters == "in x's dtype" or name == "x" else torch.float32)
    args["x"] = as_layout(args["x"], layout)
    y = function(**args, act="lrelu")
    assert y.dtype == dtype
    assert_close_as_dtype(y, expected(**args, act="lrelu"), grouped(**args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_styles_do_not_overflow(dtype: torch.dtype) -> None:
    """Without the normalisation float16 would be infinite here: 300 * 300 * 16 * 9."""
    args = inputs(i=16, o=8)
    args["styles"], args["weight"] = args["styles"].abs() * 300, args["weight"] + 300
    args |= {name: args[name].to(dtype) for name in TENSORS}
    y = modulated_conv2d(**args)
    assert y.isfinite().all()
    want = expected(**args)
    assert np.abs(naive.array(y) - want).max() < 4 * torch.finfo(dtype).eps * np.abs(want).max()


def test_float16_normalises_so_that_eps_does_not_matter_and_bfloat16_does_not() -> None:
    """The factors of the normalisation cancel but for eps, which then stands beside the normalised weights."""
    args = {"x": torch.ones(1, 16, 4, 4), "weight": torch.ones(1, 16, 3, 3), "styles": torch.full([1, 16], 1e-5)}
    half = modulated_conv2d(**args | {"x": args["x"].half()})[0, 0, 1, 1].item()
    assert half == pytest.approx(12, rel=1e-3)  # sqrt(144): all taps at 1 / 12
    brain = modulated_conv2d(**args | {"x": args["x"].bfloat16()})[0, 0, 1, 1].item()
    assert brain == pytest.approx(144 * 1e-5 / (144 * 1e-10 + 1e-8) ** 0.5, rel=2e-2)


def test_float16_sums_over_many_channels_without_overflow() -> None:
    """4608 products of 200 and a weight of 1 are 922 thousand; the largest float16 is 65504."""
    x, weight, styles = torch.full([1, 512, 3, 3], 200.0), torch.ones(1, 512, 3, 3), torch.ones(1, 512)
    y = modulated_conv2d(x.half(), weight, styles)
    assert y[0, 0, 1, 1].item() == pytest.approx(200 * 4608**0.5, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_modulated_is_zero_and_not_nan(dtype: torch.dtype) -> None:
    args = {"x": torch.ones(2, 3, 4, 4), "weight": torch.randn(2, 3, 3, 3), "styles": torch.zeros(2, 3)}
    args["styles"][1] = 1
    args["weight"][1] = 0
    y = modulated_conv2d(**{name: value.to(dtype) for name, value in args.items()})
    assert y.isfinite().all()
    assert (y[0] == 0).all()
    assert (y[:, 1] == 0).all()
    assert (y[1, 0] != 0).any()


# ---- gradients ---------------------------------------------------------------------------------------------------


def differentiable(function: Callable[..., Tensor], args: dict[str, Any]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    names = [name for name in TENSORS if args.get(name) is not None]
    leaves = [args[name].requires_grad_() for name in names]
    return lambda *tensors: function(**args | dict(zip(names, tensors, strict=True))), leaves


@pytest.mark.parametrize("function", [modulated_conv2d, registered])
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("kwargs", [{"act": "swish"}, {"demodulate": False, "act": "lrelu", "k": 1}], ids=str)
def test_gradcheck(function: Callable[..., Tensor], up: int, down: int, kwargs: dict[str, Any]) -> None:
    kwargs = dict(kwargs)
    args = inputs(i=2, o=2, size=(2, 2), up=up, down=down, k=kwargs.pop("k", 3))
    run, leaves = differentiable(function, args | kwargs)
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


@pytest.mark.parametrize("function", [modulated_conv2d, registered])
def test_gradcheck_of_the_plain_convolution(function: Callable[..., Tensor]) -> None:
    args = inputs(i=2, o=2, size=(2, 2), down=2) | {"styles": None, "noise": None, "noise_strength": None}
    run, leaves = differentiable(function, args | {"demodulate": False, "act": "tanh"})
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


@pytest.mark.parametrize(("up", "down"), RESAMPLING)
def test_both_ways_have_the_same_gradients(up: int, down: int) -> None:
    args = inputs(up=up, down=down) | {"act": "lrelu", "clamp": 2.0}
    found = []
    for function in (modulated_conv2d, registered):
        run, leaves = differentiable(function, args)
        found.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", TENSORS)
def test_each_gradient_alone(wanted: str) -> None:
    args = inputs(up=2)
    grads = []
    for function in (modulated_conv2d, registered):
        tensor = args[wanted].clone().requires_grad_()
        y = function(**args | {wanted: tensor})
        grads.append(torch.autograd.grad(y.square().sum(), tensor)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert grads[0].abs().max() > 0


def test_styles_computed_from_x_are_counted_once() -> None:
    """Path length regularisation and R1 differentiate a gradient in which one input depends on another."""
    x, weight = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def slope(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = function(x, weight, 1 + x.mean(dim=(2, 3)), bias=x.sum(dim=(0, 2, 3)), act="swish")
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

    leaf = x.requires_grad_()
    one, other = slope(modulated_conv2d, leaf), slope(registered, leaf)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    second = [torch.autograd.grad(s.square().sum(), leaf)[0] for s in (one, other)]
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-10)
    assert gradgradcheck(lambda x: slope(registered, x), leaf)


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 1, 4), (1, 0, 3), (2, 0, 5), (2, 0, 6), (2, 1, 5)])
def test_convolutions_whose_second_derivative_is_fast(stride: int, padding: int, size: int) -> None:
    """Used on CUDA only, so checked here by hand: they are the convolutions, with all their derivatives."""
    x = torch.randn(1, 2, size, size, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return _Convolution.apply(x, w, stride, padding)

    def transposed(x: Tensor, w: Tensor) -> Tensor:
        return _TransposedConvolution.apply(x, w.transpose(0, 1), stride)

    torch.testing.assert_close(forward(x, w), F.conv2d(x, w, stride=stride, padding=padding))
    torch.testing.assert_close(transposed(x, w), F.conv_transpose2d(x, w.transpose(0, 1), stride=stride))
    for function in (forward, transposed):
        assert gradcheck(function, (x, w))
        assert gradgradcheck(function, (x, w))


# ---- registration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("per_sample", [True, False])
def test_opcheck(layout: str, up: int, down: int, per_sample: bool) -> None:
    args = inputs(up=up, down=down)
    if per_sample:
        args["weight"] = args["weight"] * args["styles"][:, None, :, None, None]
    tensors = [args[name].float() for name in TENSORS if name != "styles"]
    tensors[0] = as_layout(tensors[0], layout)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert_op_check(REGISTERED, (*tensors, args["resample_filter"], up, down, "lrelu", 1.4, 1.0, "reference"))


def test_opcheck_of_the_plain_convolution() -> None:
    x, weight = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(4, 3, 1, 1)
    assert_op_check(REGISTERED, (x, weight, None, None, None, None, 1, 1, "linear", 1.0, None, "reference"))


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("shape", [[4, 3, 3, 3], [2, 4, 3, 3, 3]], ids=str)
def test_opcheck_of_the_weights(shape: list[int], demodulate: bool) -> None:
    weight, styles = torch.randn(shape, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    assert_op_check(WEIGHTS, (weight, styles, demodulate, 1e-8, torch.bfloat16, "reference"))


@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("function", [modulated_conv2d, registered])
def test_compiles_without_a_graph_break(
    function: Callable[..., Tensor], up: int, down: int, dynamic_batch: bool
) -> None:
    args = inputs(n=1, up=up, down=down) | {"noise": None, "act": "lrelu"}
    for name in TENSORS:
        args[name] = None if args[name] is None else args[name].float().requires_grad_()
    x, styles = args.pop("x").detach().expand(2, -1, -1, -1), args.pop("styles")

    def run(x: Tensor) -> Tensor:
        return function(x, styles=styles.expand(x.shape[0], -1), **args)

    compiled(run, x, [args["weight"], styles, args["bias"]], dynamic_batch=dynamic_batch)


@pytest.mark.parametrize("function", [modulated_conv2d, registered])
def test_autocast_changes_nothing(function: Callable[..., Tensor]) -> None:
    args = inputs(up=2) | {"act": "lrelu"}
    args |= {name: args[name].float().requires_grad_() for name in TENSORS}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = function(**args)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled and function is registered):
            results.append([y, *torch.autograd.grad(y.square().sum(), [args[name] for name in TENSORS])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---- messages ----------------------------------------------------------------------------------------------------

X, W, S = torch.zeros(2, 3, 4, 6), torch.zeros(5, 3, 3, 3), torch.zeros(2, 3)
PLAIN: dict[str, Any] = {"styles": None, "demodulate": False}


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x must be a floating-point tensor [N, C, H, W], got int64 [2, 3, 4, 6]", {"x": X.long()}),
        (ValueError, "x must be [N, C, H, W] and not empty, got float32 [2, 3, 0, 6]", {"x": X[:, :, :0]}),
        (ValueError, "x must be [N, C, H, W] and not empty, got float32 [3, 4, 6]", {"x": X[0]}),
        (
            ValueError,
            "x must have fewer than 2^31 elements, got float32 [2, 3, 32768, 32768]",
            {"x": torch.empty(1).expand(2, 3, 2**15, 2**15)},
        ),
        (
            ValueError,
            "the result must have fewer than 2^31 elements, got [2, 5, 16384, 16384]",
            {"x": torch.empty(1).expand(2, 3, 2**14, 2**14)},
        ),
        (
            TypeError,
            "weight must be a floating-point tensor [O, 3, k, k] or [2, O, 3, k, k], got NoneType",
            {"weight": None},
        ),
        (
            TypeError,
            "weight must be a floating-point tensor [O, 3, k, k] or [2, O, 3, k, k], got int64 [5, 3, 3, 3]",
            {"weight": W.long()},
        ),
        (
            ValueError,
            "weight must be [O, 3, k, k] or [2, O, 3, k, k], got float32 [5, 4, 3, 3]",
            {"weight": torch.zeros(5, 4, 3, 3)},
        ),
        (
            ValueError,
            "weight must be [O, 3, k, k] with odd k, got float32 [5, 3, 3, 1]",
            {"weight": torch.zeros(5, 3, 3, 1)},
        ),
        (
            ValueError,
            "weight must be [O, 3, k, k] with odd k, got float32 [5, 3, 2, 2]",
            {"weight": torch.zeros(5, 3, 2, 2)},
        ),
        (
            ValueError,
            "weight must be [O, 3, k, k] or [2, O, 3, k, k], got float32 [5, 3]",
            {"weight": torch.zeros(5, 3)},
        ),
        (ValueError, "weight must be [O, 3, k, k] with odd k, got float32 [0, 3, 3, 3]", {"weight": W[:0]}),
        (ValueError, "weight must be on cpu as x is, got meta", {"weight": W.to("meta")}),
        (TypeError, "styles must be a floating-point tensor [2, 3], got list", {"styles": [[1.0] * 3] * 2}),
        (ValueError, "styles must be [2, 3], got float32 [1, 3]", {"styles": S[:1]}),
        (ValueError, "styles must be on cpu as x is, got meta", {"styles": S.to("meta")}),
        (ValueError, "demodulate=True needs styles [2, 3], got None", {"styles": None}),
        (ValueError, "up and down must be 1 or 2 and not both 2, got up=2, down=2", {"up": 2, "down": 2}),
        (ValueError, "up and down must be 1 or 2 and not both 2, got up=3, down=1", {"up": 3}),
        (ValueError, "up and down must be 1 or 2 and not both 2, got up=1, down='2'", {"down": "2"}),
        (
            ValueError,
            "x must have an even height and width for down=2, got float32 [2, 3, 3, 6]",
            {"down": 2, "x": X[:, :, :3], "resample_filter": FILTER},
        ),
        (TypeError, "resample_filter must be a tensor float32 [fh, fw] or [taps], got NoneType", {"up": 2}),
        (TypeError, "resample_filter must be a tensor float32 [fh, fw] or [taps], got NoneType", {"down": 2}),
        (
            ValueError,
            "resample_filter must be float32 [fh, fw] or [taps], got float16 [4, 4]",
            {"up": 2, "resample_filter": FILTER.half()},
        ),
        (
            ValueError,
            "resample_filter must not require a gradient, as the op has none to it, got requires_grad=True",
            {"up": 2, "resample_filter": FILTER.clone().requires_grad_()},
        ),
        (
            ValueError,
            "noise must be [4, 6] or [1, 1, 4, 6] or [2, 1, 4, 6], got float32 [6, 4]",
            {"noise": torch.zeros(6, 4)},
        ),
        (
            ValueError,
            "noise must be [4, 6] or [1, 1, 4, 6] or [2, 1, 4, 6], got float32 [2, 5, 4, 6]",
            {"noise": torch.zeros(2, 5, 4, 6)},
        ),
        (
            ValueError,
            "noise must be [8, 12] or [1, 1, 8, 12] or [2, 1, 8, 12], got float32 [4, 6]",
            {"noise": torch.zeros(4, 6), "up": 2, "resample_filter": FILTER},
        ),
        (
            TypeError,
            "noise must be a floating-point tensor [4, 6] or [1, 1, 4, 6] or [2, 1, 4, 6], got str",
            {"noise": "const"},
        ),
        (TypeError, "noise_strength must be a floating-point tensor [], got float", {"noise_strength": 1.0}),
        (ValueError, "noise_strength must be [], got float32 [1]", {"noise_strength": torch.zeros(1)}),
        (ValueError, "bias must be [5], got float32 [3]", {"bias": torch.zeros(3)}),
        (ValueError, "bias must be on cpu as x is, got meta", {"bias": torch.zeros(5, device="meta")}),
        (
            ValueError,
            "act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish, got 'LeakyReLU'",
            {"act": "LeakyReLU"},
        ),
        (ValueError, "clamp must be None or a number >= 0, got -256", {"clamp": -256}),
        (TypeError, "gain must be a number, got list", {"gain": [1.0]}),
        (TypeError, "eps must be a number, got str", {"eps": "1e-8"}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    args: dict[str, Any] = {"x": X, "weight": W, "styles": S} | changed
    with pytest.raises(error) as raised:
        modulated_conv2d(**args)
    assert raised.type is error
    assert str(raised.value) == f"modulated_conv2d: {message}"
