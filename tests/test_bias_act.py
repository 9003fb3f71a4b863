"""bias_act against the formulas in numpy, its gradients of both orders, its registration and its messages."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from grids import DTYPES, as_layout, assert_close_as_dtype, assert_op_check, assert_same, compiled
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.ops.bias_act import ACTIVATIONS, bias_act

REGISTERED = torch.ops.clone_fast.bias_act.default
NAMES = ["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]
SMOOTH = ["linear", "tanh", "sigmoid", "softplus", "swish"]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def registered(x: Tensor, b: Tensor | None, *, act: str = "lrelu", clamp: float | None = None) -> Tensor:
    spec = ACTIVATIONS[act]
    return REGISTERED(x, b, 1, act, spec.alpha, spec.gain, clamp, "reference")


# ---- values ------------------------------------------------------------------------------------------------------


def test_the_nine_activations() -> None:
    assert list(ACTIVATIONS) == NAMES
    assert {name: (spec.alpha, spec.gain) for name, spec in ACTIVATIONS.items()} == {
        name: (alpha, pytest.approx(gain)) for name, (_, alpha, gain) in naive.ACTIVATIONS.items()
    }


@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize(
    "kwargs", [{}, {"gain": -0.7}, {"clamp": 0.4}, {"alpha": 0.3, "gain": 2, "clamp": 0.9}], ids=str
)
def test_formula(act: str, kwargs: dict[str, Any]) -> None:
    x, b = 2 * double(3, 4, 5), double(4)
    assert_same(bias_act(x, b, act=act, **kwargs), naive.bias_act(naive.array(x), naive.array(b), act=act, **kwargs))


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ([5], 0),
        ([3, 4], 1),
        ([3, 4], 0),
        ([2, 3, 4], -1),
        ([2, 3, 4, 5], 1),
        ([2, 3, 4, 5], 3),
        ([2, 3, 2, 3, 2], 2),
        ([2, 3, 2, 3, 2], -5),
    ],
    ids=str,
)
def test_shape_and_dim(shape: list[int], dim: int) -> None:
    x, b = double(*shape), double(shape[dim])
    assert_same(
        bias_act(x, b, dim=dim, act="lrelu"), naive.bias_act(naive.array(x), naive.array(b), dim=dim, act="lrelu")
    )


def test_without_bias_dim_plays_no_part() -> None:
    x = double(5)
    assert_same(bias_act(x, act="relu"), naive.bias_act(naive.array(x), act="relu"))
    assert bias_act(x[0], act="linear", gain=3).item() == pytest.approx(3 * x[0].item())


def test_result_is_a_new_tensor_even_where_nothing_is_to_do() -> None:
    x = double(2, 3)
    for y in (bias_act(x), REGISTERED(x, None, 0, "linear", 0.0, 1.0, None, "reference")):
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("act", NAMES)
def test_dtypes(dtype: torch.dtype, layout: str, act: str) -> None:
    x, b = as_layout(4 * torch.randn(2, 5, 4, 6), layout).to(dtype), torch.randn(5).to(dtype)
    want = naive.bias_act(naive.array(x), naive.array(b), act=act, clamp=3)
    spec = ACTIVATIONS[act]
    plain = (spec.function(x + b[:, None, None], spec.alpha) * spec.gain).clamp(-3, 3)
    for y in (bias_act(x, b, act=act, clamp=3), registered(x, b, act=act, clamp=3)):
        assert y.dtype == dtype
        assert_close_as_dtype(y, want, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", NAMES)
def test_half_precision_is_rounded_once(dtype: torch.dtype, act: str) -> None:
    x, b = torch.randn(64, 5).to(dtype), torch.randn(5).to(dtype)
    assert torch.equal(bias_act(x, b, act=act), bias_act(x.float(), b.float(), act=act).to(dtype))


def test_infinity_and_nan_pass_through() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert bias_act(x, act="lrelu", gain=1).tolist()[:2] == [float("inf"), float("-inf")]
    assert bias_act(x, act="lrelu", clamp=7).tolist()[:2] == [7, -7]
    assert bias_act(x, act="lrelu", clamp=7)[2].isnan()


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("through", ["public", "registered"])
def test_gradcheck(act: str, through: str) -> None:
    x, b = double(2, 3, 4).requires_grad_(), double(3).requires_grad_()

    def function(x: Tensor, b: Tensor) -> Tensor:
        if through == "registered":
            return registered(x, b, act=act, clamp=0.8)
        return bias_act(x, b, act=act, clamp=0.8, backend="reference")

    assert gradcheck(function, (x, b))
    assert gradgradcheck(function, (x, b))


@pytest.mark.parametrize("act", SMOOTH)
def test_third_derivative_of_the_registered_op(act: str) -> None:
    x = double(6).requires_grad_()

    def slope(x: Tensor) -> Tensor:
        y = REGISTERED(x, None, 0, act, 0.0, 1.0, None, "reference")
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

    assert gradgradcheck(slope, x)


@pytest.mark.parametrize("act", NAMES)
def test_both_ways_have_the_same_gradients(act: str) -> None:
    found = []
    for function in (bias_act, registered):
        x, b = (
            torch.linspace(-3, 3, 24).double().reshape(2, 3, 4).requires_grad_(),
            torch.ones(3).double().requires_grad_(),
        )
        y = function(x, b, act=act, clamp=1.5)
        found.append(torch.autograd.grad(y.square().sum(), (x, b)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradient_is_zero_beyond_the_clamp() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    bias_act(x, act="linear", gain=2, clamp=2).sum().backward()
    assert x.grad.tolist() == [0, 2, 2, 0]


def test_bias_computed_from_x_is_counted_once() -> None:
    def both(function: Any) -> Tensor:
        x = torch.linspace(-1, 1, 12).double().reshape(1, 3, 4).requires_grad_()
        (g,) = torch.autograd.grad(function(x, x.sum(dim=(0, 2))).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    torch.testing.assert_close(
        both(lambda x, b: registered(x, b, act="swish")), both(lambda x, b: bias_act(x, b, act="swish"))
    )


# ---- registration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(layout: str, bias: bool) -> None:
    x = as_layout(torch.randn(2, 3, 4, 5), layout).requires_grad_()
    b = torch.randn(3, requires_grad=True) if bias else None
    assert_op_check(REGISTERED, (x, b, 1, "lrelu", 0.2, 1.4, 0.5, "reference"))
    assert_op_check(REGISTERED, (x, b, 1, "linear", 0.0, 1.0, None, "reference"))


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_compiles_without_a_graph_break(dynamic_batch: bool) -> None:
    b = torch.randn(3, requires_grad=True)
    compiled(
        lambda x: bias_act(x, b, act="lrelu", clamp=0.5), torch.randn(2, 3, 4, 5), [b], dynamic_batch=dynamic_batch
    )
    compiled(lambda x: registered(x, b, act="swish"), torch.randn(2, 3, 4, 5), [b], dynamic_batch=dynamic_batch)


def test_autocast_changes_nothing() -> None:
    x, b = torch.randn(2, 3, requires_grad=True), torch.randn(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [bias_act(x, b, act="swish"), registered(x, b, act="swish")]
    for y in inside:
        assert torch.equal(y, bias_act(x, b, act="swish"))


# ---- messages ----------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "bias_act: x must be a floating-point tensor, got int64 [2]", (torch.zeros(2).long(),), {}),
        (TypeError, "bias_act: x must be a floating-point tensor, got complex64 [2]", (torch.zeros(2) * 1j,), {}),
        (TypeError, "bias_act: x must be a floating-point tensor, got list", ([1.0],), {}),
        (ValueError, "bias_act: x must have 1 to 2^31 - 1 elements, got float32 [0, 3]", (torch.zeros(0, 3),), {}),
        (
            ValueError,
            "bias_act: x must have 1 to 2^31 - 1 elements, got float32 [2, 1073741824]",
            (torch.empty(1).expand(2, 2**30),),
            {},
        ),
        (ValueError, "bias_act: b must be float32 [3], got float32 [4]", (X, torch.zeros(4)), {}),
        (ValueError, "bias_act: b must be float32 [3], got float32 [3, 1]", (X, torch.zeros(3, 1)), {}),
        (ValueError, "bias_act: b must be float32 [3], got float64 [3]", (X, torch.zeros(3).double()), {}),
        (ValueError, "bias_act: b must be float32 [4], got float32 [3]", (X, torch.zeros(3)), {"dim": 2}),
        (ValueError, "bias_act: b must be on cpu as x is, got meta", (X, torch.zeros(3, device="meta")), {}),
        (TypeError, "bias_act: b must be a floating-point tensor float32 [3], got list", (X, [0.0] * 3), {}),
        (
            TypeError,
            "bias_act: b must be a floating-point tensor float32 [3], got int64 [3]",
            (X, torch.zeros(3).long()),
            {},
        ),
        (
            ValueError,
            "bias_act: dim must be an axis of x float32 [2, 3, 4], got 3",
            (X, torch.zeros(3)),
            {"dim": 3},
        ),
        (
            ValueError,
            "bias_act: dim must be an axis of x float32 [2, 3, 4], got -4",
            (X, torch.zeros(3)),
            {"dim": -4},
        ),
        (
            ValueError,
            "bias_act: act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish, got 'gelu'",
            (X,),
            {"act": "gelu"},
        ),
        (ValueError, "bias_act: clamp must be None or a number >= 0, got -1", (X,), {"clamp": -1}),
        (ValueError, "bias_act: clamp must be None or a number >= 0, got nan", (X,), {"clamp": float("nan")}),
        (ValueError, "bias_act: clamp must be None or a number >= 0, got '1'", (X,), {"clamp": "1"}),
        (TypeError, "bias_act: gain must be a number, got str", (X,), {"gain": "2"}),
        (TypeError, "bias_act: alpha must be a number, got float32 []", (X,), {"alpha": torch.tensor(0.2)}),
        (ValueError, "backend must be one of auto, reference, triton, cuda, got 'cpu'", (X,), {"backend": "cpu"}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        bias_act(*args, **kwargs)
    assert raised.type is error
    assert str(raised.value) == message
