"""upfirdn2d against scipy, its gradients of any order, its registration and its messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grids import DTYPES, as_layout, assert_close_as_dtype, assert_op_check, assert_same, compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

REGISTERED = torch.ops.clone_fast.upfirdn2d.default
BLUR = torch.tensor(naive.BLUR)

# every way in which StyleGAN2 uses it, then the odd ones: (filter, up, down, padding, flip_filter, gain)
CASES: dict[str, tuple[Any, Any, Any, Any, bool, float]] = {
    "blur after the up-convolution": (BLUR, 1, 1, [1, 1, 1, 1], False, 4.0),
    "skip up": (BLUR, 2, 1, [2, 1, 2, 1], False, 4.0),
    "blur before the strided convolution": (BLUR, 1, 1, 2, False, 1.0),
    "skip down": (BLUR, 1, 2, [1, 1, 1, 1], False, 1.0),
    "lopsided filter": (torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), 1, 1, 2, False, 1.0),
    "lopsided filter flipped": (torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), 1, 1, 2, True, 1.0),
    "separable": (torch.tensor([1.0, 2, -3, 4, 5]), 1, 1, [2, 2], False, 1.5),
    "separable flipped": (torch.tensor([1.0, 2, -3, 4, 5]), 2, 3, [2, 1, 3, 4], True, -1.5),
    "axes differ": (
        torch.randn(2, 3, generator=torch.Generator().manual_seed(2)),
        [3, 1],
        [1, 2],
        [1, 2, 3, 0],
        False,
        1.0,
    ),
    "both factors": (torch.randn(4, 4, generator=torch.Generator().manual_seed(3)), 3, 2, [1, 2, 3, 4], False, 2.0),
    "crop": (torch.randn(2, 2, generator=torch.Generator().manual_seed(4)), 1, 1, [-1, -2, -2, 0], False, 1.0),
    "crop and pad": (torch.randn(3, 3, generator=torch.Generator().manual_seed(5)), 2, 2, [-3, 2, 4, -1], False, 1.0),
    "crop more than the image": (torch.ones(1, 1), 1, 1, [-6, 8, 8, -7], False, 1.0),
    "one tap": (torch.tensor([[2.0]]), 2, 1, 0, False, 1.0),
    "decimate only": (torch.ones(1), 1, [3, 2], 0, False, 1.0),
    "gain zero": (BLUR, 1, 1, 1, False, 0.0),
}


def pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def pads(value: Any) -> list[int]:
    values = pair(value)
    return values if len(values) == 4 else [values[0], values[0], values[1], values[1]]


def registered(x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip: bool, gain: float) -> Tensor:
    return REGISTERED(x, f, pair(up), pair(down), pads(padding), flip, gain, "reference")


def public(x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip: bool, gain: float) -> Tensor:
    return upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip, gain=gain, backend="reference")


def expected(x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip: bool, gain: float) -> naive.Array:
    return naive.upfirdn2d(
        naive.array(x), naive.array(f), up=pair(up), down=pair(down), padding=pads(padding), flip_filter=flip, gain=gain
    )


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(6, 7), (8, 8), (5, 9)], ids=str)
@pytest.mark.parametrize("function", [public, registered])
def test_against_scipy(case: str, size: tuple[int, int], function: Callable[..., Tensor]) -> None:
    f, *rest = CASES[case]
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_same(function(x, f.double(), *rest), expected(x, f.double(), *rest))


@given(data=st.data())
@settings(max_examples=150)
def test_any_arguments(data: st.DataObject) -> None:
    small, pad = st.integers(1, 4), st.integers(-3, 4)
    up, down = [data.draw(small), data.draw(small)], [data.draw(small), data.draw(small)]
    padding = [data.draw(pad) for _ in range(4)]
    taps = [data.draw(st.integers(1, 6)) for _ in range(data.draw(st.integers(1, 2)))]
    height, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    flip, gain = data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 4.0, -0.5]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(2, 2, height, width, generator=generator, dtype=torch.float64)
    f = torch.randn(*taps, generator=generator, dtype=torch.float64)
    args = (up, down, padding, flip, gain)
    fh, fw = f.shape[0], f.shape[-1]
    covered = (height * up[1] + sum(padding[2:]) >= fh) and (width * up[0] + sum(padding[:2]) >= fw)
    if not covered:
        with pytest.raises(ValueError, match="nothing is left"):
            public(x, f, *args)
        return
    assert_same(public(x, f, *args), expected(x, f, *args))


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_one_axis_is_scipys_upfirdn(up: int, down: int) -> None:
    x, taps = np.random.randn(11), np.random.randn(5)
    want = signal.upfirdn(taps, x, up, down)
    f = torch.tensor(taps)[None]
    y = upfirdn2d(torch.tensor(x)[None, None, None], f, up=[up, 1], down=[down, 1], padding=[4, 4, 0, 0])
    assert_same(y[0, 0, 0, : len(want)], want[: y.shape[-1]])


def test_one_pixel() -> None:
    x = torch.tensor([[[[2.0]]]], dtype=torch.float64)
    y = upfirdn2d(x, BLUR, up=2, padding=[2, 1, 2, 1], gain=4)
    assert_same(y, 8 * naive.BLUR[None, None, 1:3, 1:3])


def test_an_impulse_draws_the_filter_and_flip_reverses_it() -> None:
    f = torch.arange(1.0, 7).reshape(2, 3)
    x = torch.zeros(1, 1, 3, 5)
    x[0, 0, 1, 2] = 1
    assert torch.equal(upfirdn2d(x, f, padding=[0, 0, 0, 0])[0, 0], f)
    assert torch.equal(upfirdn2d(x, f, flip_filter=True)[0, 0], f.flip([0, 1]))


def test_padding_of_two_numbers_is_x_and_y() -> None:
    assert list(upfirdn2d(torch.zeros(1, 1, 3, 3), torch.ones(1, 1), padding=[2, 1]).shape) == [1, 1, 5, 7]


def test_separable_is_the_outer_product() -> None:
    x, taps = torch.randn(1, 2, 9, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    args = {"up": 2, "down": [1, 2], "padding": [3, 2, 1, 0], "gain": 3.0}
    torch.testing.assert_close(upfirdn2d(x, taps, **args), upfirdn2d(x, taps.outer(taps), **args))


@pytest.mark.parametrize("size", [(8, 8), (5, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 8])
def test_the_three_that_keep_the_image_in_place(size: tuple[int, int], taps: int) -> None:
    """A symmetric filter must leave the centre of gravity where it is, in the coordinates of the whole image."""
    f = setup_filter([1.0] * taps)
    height, width = size
    x = torch.zeros(1, 1, height + 16, width + 16)
    x[:, :, 8:-8, 8:-8] = torch.rand(height, width)

    def centre(image: Tensor, axis: int) -> float:
        weight = image[0, 0].sum(dim=1 - axis)
        place = (torch.arange(len(weight)) + 0.5) / len(weight)
        return float((place * weight).sum() / weight.sum())

    for y, factor in (
        (filter2d(x, f), 1.0),
        (upsample2d(x, f, up=2), 2.0),
        (downsample2d(x, f, down=2), 0.5),
    ):
        assert list(y.shape[2:]) == [int((height + 16) * factor), int((width + 16) * factor)]
        if factor != 0.5:  # an odd size loses half a pixel when it is halved, and few taps alias
            for axis in (0, 1):
                shift = 0.5 * ((taps + factor) % 2) / y.shape[2 + axis]  # half a pixel where there is no middle tap
                assert abs(centre(y, axis) - centre(x, axis)) == pytest.approx(shift, abs=1e-5)


def test_upsampling_keeps_brightness_and_downsampling_too() -> None:
    x, f = torch.ones(1, 1, 8, 8), setup_filter([1, 3, 3, 1])
    assert torch.allclose(upsample2d(x, f)[:, :, 2:-2, 2:-2], torch.ones(12, 12))
    assert torch.allclose(downsample2d(x, f)[:, :, 1:-1, 1:-1], torch.ones(2, 2))
    assert torch.allclose(filter2d(x, f)[:, :, 2:-2, 2:-2], torch.ones(4, 4))


def test_the_three_pass_on_what_they_are_given() -> None:
    x, f = torch.randn(1, 2, 6, 6), torch.randn(3, 4)
    kwargs: dict[str, Any] = {"flip_filter": True}
    want = upfirdn2d(x, f, padding=[2 + 1, 1 + 1, 1 + 2, 1 + 2], gain=2, **kwargs)
    assert torch.equal(filter2d(x, f, padding=[1, 2], gain=2, **kwargs), want)
    want = upfirdn2d(x, f, up=[2, 1], padding=[2, 1, 1, 1], gain=2 * 3, **kwargs)
    assert torch.equal(upsample2d(x, f, up=[2, 1], gain=3, **kwargs), want)
    want = upfirdn2d(x, f, down=[2, 1], padding=[1, 1, 1, 1], gain=3, **kwargs)
    assert torch.equal(downsample2d(x, f, down=[2, 1], gain=3, **kwargs), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("case", list(CASES)[:10])
@pytest.mark.parametrize("function", [public, registered])
def test_dtypes(dtype: torch.dtype, layout: str, case: str, function: Callable[..., Tensor]) -> None:
    f, up, down, padding, flip, gain = CASES[case]
    f = f.float()
    x = as_layout(torch.randn(2, 3, 6, 8).to(dtype), layout)
    want = expected(x, f, up, down, padding, flip, gain)
    (ux, uy), (dx, dy) = pair(up), pair(down)
    kernel = (f.outer(f) if f.ndim == 1 else f) * gain
    plain = torch.zeros(2, 3, 6 * uy, 8 * ux, dtype=dtype)
    plain[:, :, ::uy, ::ux] = x
    kernel = (kernel if flip else kernel.flip([0, 1])).to(dtype).expand(3, 1, -1, -1)
    plain = F.conv2d(F.pad(plain, pads(padding)), kernel, stride=(dy, dx), groups=3)
    y = function(x, f, up, down, padding, flip, gain)
    assert y.dtype == dtype
    assert_close_as_dtype(y, want, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["skip up", "skip down", "separable flipped"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, case: str) -> None:
    f, *rest = CASES[case]
    x = torch.randn(2, 3, 8, 8).to(dtype)
    assert torch.equal(public(x, f.float(), *rest), public(x.float(), f.float(), *rest).to(dtype))


# ---- setup_filter ------------------------------------------------------------------------------------------------


def test_setup_filter() -> None:
    torch.testing.assert_close(setup_filter([1, 3, 3, 1]), BLUR.float())
    assert setup_filter([1, 3, 3, 1]).dtype == torch.float32
    assert setup_filter(None).tolist() == [[1]]
    assert setup_filter(3.0).tolist() == [[1]]
    assert setup_filter(np.array([1.0, 1.0])).tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert setup_filter([1.0] * 8).tolist() == [0.125] * 8
    assert list(setup_filter([1.0] * 7).shape) == [7, 7]
    assert setup_filter([1, 2], separable=True, normalize=False).tolist() == [1, 2]
    assert setup_filter([1, 2], separable=False, normalize=False).tolist() == [[1, 2], [2, 4]]
    assert setup_filter([[1, 2], [3, 4]], normalize=False, flip_filter=True).tolist() == [[4, 3], [2, 1]]
    assert setup_filter([1.0] * 8, gain=4).sum().item() == pytest.approx(2)  # twice on an image: 4
    assert setup_filter([1, 3, 3, 1], gain=4).sum().item() == pytest.approx(4)
    assert setup_filter([1.0, 1.0], device="meta").device.type == "meta"


@pytest.mark.parametrize("bad", [[], [[[1.0]]], torch.zeros(2, 0)])
def test_setup_filter_refuses(bad: Any) -> None:
    with pytest.raises(
        ValueError, match=r"setup_filter: f must be a number, \[taps\] or \[fh, fw\], not empty, got \["
    ):
        setup_filter(bad)


def test_setup_filter_refuses_a_root_of_a_negative_gain() -> None:
    with pytest.raises(ValueError, match=r"setup_filter: gain must be >= 0 for a separable filter, got -1"):
        setup_filter([1, 2], separable=True, gain=-1)


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [public, registered])
def test_gradcheck(case: str, function: Callable[..., Tensor]) -> None:
    f, *rest = CASES[case]
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: function(x, f.double(), *rest), x)
    assert gradgradcheck(lambda x: function(x, f.double(), *rest), x)


@pytest.mark.parametrize("case", CASES)
def test_backward_is_the_adjoint(case: str) -> None:
    f, *rest = CASES[case]
    f = f.double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    for function in (public, registered):
        y = function(x, f, *rest)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close((y * dy).sum(), (x * dx).sum())


@pytest.mark.parametrize("function", [public, registered])
def test_third_derivative(function: Callable[..., Tensor]) -> None:
    f, *rest = CASES["skip up"]
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(function(x, f, *rest).pow(3).sum(), x, create_graph=True)[0]

    assert gradgradcheck(slope, x)


# ---- registration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("case", ["skip up", "skip down", "separable flipped", "crop and pad"])
def test_opcheck(layout: str, case: str) -> None:
    f, up, down, padding, flip, gain = CASES[case]
    x = as_layout(torch.randn(2, 3, 6, 8), layout).requires_grad_()
    assert_op_check(REGISTERED, (x, f.float(), pair(up), pair(down), pads(padding), flip, gain, "reference"))


@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize("function", [public, registered])
def test_compiles_without_a_graph_break(function: Callable[..., Tensor], dynamic_batch: bool) -> None:
    f, *rest = CASES["axes differ"]
    compiled(lambda x: function(x, f, *rest), torch.randn(2, 3, 6, 8), dynamic_batch=dynamic_batch)


@pytest.mark.parametrize("function", [public, registered])
def test_autocast_changes_nothing(function: Callable[..., Tensor]) -> None:
    f, *rest = CASES["skip up"]
    x = torch.randn(1, 2, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(x, f.float(), *rest)
    assert torch.equal(inside, function(x, f.float(), *rest))


def test_autocast_changes_nothing_in_a_backward() -> None:
    f, *rest = CASES["skip up"]
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    y = registered(x, f.float(), *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(inside, torch.autograd.grad(y, x, torch.ones_like(y))[0])


def test_meta_tensors_have_the_right_shape() -> None:
    x, f = torch.empty(2, 3, 6, 5, device="meta"), torch.ones(4, 4, device="meta")
    assert list(upfirdn2d(x, f, up=2, padding=[2, 1, 2, 1]).shape) == [2, 3, 12, 10]
    assert list(registered(x, f, 2, 1, [2, 1, 2, 1], False, 1.0).shape) == [2, 3, 12, 10]


# ---- messages ----------------------------------------------------------------------------------------------------

X, ONE = torch.zeros(1, 2, 4, 4), torch.ones(1, 1)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "x must be a floating-point tensor [N, C, H, W], got ndarray", (np.zeros([1, 1, 2, 2]), ONE), {}),
        (TypeError, "x must be a floating-point tensor [N, C, H, W], got int64 [1, 2, 4, 4]", (X.long(), ONE), {}),
        (ValueError, "x must be [N, C, H, W] and not empty, got float32 [2, 4, 4]", (X[0], ONE), {}),
        (ValueError, "x must be [N, C, H, W] and not empty, got float32 [0, 2, 4, 4]", (X[:0], ONE), {}),
        (
            ValueError,
            "x must have fewer than 2^31 elements, got float32 [2, 4, 16384, 16384]",
            (torch.empty(1).expand(2, 4, 2**14, 2**14), ONE),
            {},
        ),
        (
            ValueError,
            "the result must have fewer than 2^31 elements, got [1, 4, 32768, 32768]",
            (torch.empty(1).expand(1, 4, 2**14, 2**14), ONE),
            {"up": 2},
        ),
        (TypeError, "f must be a tensor float32 [fh, fw] or [taps], got NoneType", (X, None), {}),
        (TypeError, "f must be a tensor float32 [fh, fw] or [taps], got list", (X, [1.0]), {}),
        (
            ValueError,
            "f must be float32 [fh, fw] or [taps], got float16 [4, 4, 1]",
            (X, torch.ones(4, 4, 1).half()),
            {},
        ),
        (ValueError, "f must be float32 [fh, fw] or [taps], got float16 [1, 1]", (X.half(), ONE.half()), {}),
        (ValueError, "f must be float32 [fh, fw] or [taps], got float64 [1, 1]", (X, ONE.double()), {}),
        (ValueError, "f must be float32 [fh, fw] or [taps], got float32 []", (X, torch.tensor(1.0)), {}),
        (ValueError, "f must be float32 [fh, fw] or [taps], got float32 [0]", (X, torch.ones(0)), {}),
        (ValueError, "f must be on cpu as x is, got meta", (X, ONE.to("meta")), {}),
        (
            ValueError,
            "f must not require a gradient, as the op has none to it, got requires_grad=True",
            (X, torch.ones(1, 1, requires_grad=True)),
            {},
        ),
        (ValueError, "up must be an integer >= 1 or [x, y] of such, got 0", (X, ONE), {"up": 0}),
        (ValueError, "up must be an integer >= 1 or [x, y] of such, got 2.0", (X, ONE), {"up": 2.0}),
        (ValueError, "up must be an integer >= 1 or [x, y] of such, got [1, 2, 3]", (X, ONE), {"up": [1, 2, 3]}),
        (ValueError, "down must be an integer >= 1 or [x, y] of such, got [1, -1]", (X, ONE), {"down": [1, -1]}),
        (ValueError, "down must be an integer >= 1 or [x, y] of such, got '2'", (X, ONE), {"down": "2"}),
        (
            ValueError,
            "padding must be an int, [x, y] or [x0, x1, y0, y1], got [1, 2, 3]",
            (X, ONE),
            {"padding": [1, 2, 3]},
        ),
        (ValueError, "padding must be an int, [x, y] or [x0, x1, y0, y1], got None", (X, ONE), {"padding": None}),
        (
            ValueError,
            "nothing is left of x float32 [1, 2, 4, 4] with f float32 [5, 5], up=1, down=1, padding=0",
            (X, torch.ones(5, 5)),
            {},
        ),
        (
            ValueError,
            "nothing is left of x float32 [1, 2, 4, 4] with f float32 [1, 1], up=1, down=1, padding=[0, 0, -2, -2]",
            (X, ONE),
            {"padding": [0, 0, -2, -2]},
        ),
        (TypeError, "gain must be a number, got str", (X, ONE), {"gain": "4"}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        upfirdn2d(*args, **kwargs)
    assert raised.type is error
    assert str(raised.value) == f"upfirdn2d: {message}"


@pytest.mark.parametrize("function", [filter2d, upsample2d, downsample2d])
def test_the_three_refuse_as_upfirdn2d_does(function: Callable[..., Tensor]) -> None:
    with pytest.raises(
        TypeError, match=r"^upfirdn2d: f must be a tensor float32 \[fh, fw\] or \[taps\], got NoneType$"
    ):
        function(X, None)
    with pytest.raises(
        ValueError, match=r"^upfirdn2d: x must be \[N, C, H, W\] and not empty, got float32 \[2, 4, 4\]$"
    ):
        function(X[0], ONE)
    with pytest.raises(TypeError, match=r"^upfirdn2d: gain must be a number, got str$"):
        function(X, ONE, gain="4")
