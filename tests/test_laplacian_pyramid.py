"""laplacian_pyramid and its loss against scipy.ndimage, gradients, registration and messages."""

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

from clone_fast.ops import laplacian_pyramid, laplacian_pyramid_loss
from clone_fast.reference.laplacian_pyramid import expand, reduce

REGISTERED = torch.ops.clone_fast.laplacian_pyramid.default
SIZES = [(16, 16), (17, 24), (5, 9), (1, 1), (1, 6), (2, 3)]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def registered(
    x: Tensor, y: Tensor, *, levels: int = 6, weights: list[float] | None = None, mse: float = 0.0
) -> Tensor:
    return REGISTERED(x, y, levels, [1.0] * levels if weights is None else weights, None, mse, False, "reference")[0]


def expected_loss(
    x: Tensor,
    y: Tensor,
    levels: int,
    weights: list[float] | None = None,
    charbonnier: float = 0.0,
    mse: float = 0.0,
) -> float:
    """The bands of both images, each on its own. Charbonnier's distance with eps = 0 is the absolute value."""
    bands = zip(
        naive.laplacian_pyramid(naive.array(x), levels),
        naive.laplacian_pyramid(naive.array(y), levels),
        [1.0] * levels if weights is None else weights,
        strict=True,
    )
    total = sum(weight * naive.charbonnier(one - other, charbonnier).mean() for one, other, weight in bands)
    return float(total + mse * np.square(naive.array(x) - naive.array(y)).mean())


# ---- the pyramid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 4, 6])
def test_bands_against_scipy(size: tuple[int, int], levels: int) -> None:
    x = double(2, 3, *size)
    bands = laplacian_pyramid(x, levels=levels)
    assert len(bands) == levels
    for band, want in zip(bands, naive.laplacian_pyramid(naive.array(x), levels), strict=True):
        assert_same(band, want)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_bands_add_up_to_the_image(size: tuple[int, int]) -> None:
    x = double(1, 2, *size)
    *bands, image = laplacian_pyramid(x, levels=4)
    for band in reversed(bands):
        image = band + expand(image, *band.shape[2:])
    torch.testing.assert_close(image, x, rtol=0, atol=1e-13)


def test_a_constant_has_no_detail() -> None:
    *bands, residual = laplacian_pyramid(torch.full([1, 1, 13, 10], 0.7, dtype=torch.float64), levels=4)
    for band in bands:
        assert band.abs().max() < 1e-14
    torch.testing.assert_close(residual, torch.full_like(residual, 0.7))


def test_reduce_and_expand_at_an_impulse() -> None:
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 4, 4] = 256
    taps = torch.tensor([1.0, 6, 1]).double()
    assert torch.equal(reduce(x)[0, 0, 1:4, 1:4], taps.outer(taps))
    small = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    small[0, 0, 2, 2] = 64
    taps = torch.tensor([1.0, 4, 6, 4, 1]).double()
    assert torch.equal(expand(small, 9, 9)[0, 0, 2:7, 2:7], taps.outer(taps))


def test_linear() -> None:
    x, y = double(1, 2, 12, 11), double(1, 2, 12, 11)
    for one, other, both in zip(*(laplacian_pyramid(v) for v in (x, y, 2 * x - y)), strict=True):
        torch.testing.assert_close(2 * one - other, both)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_bands_keep_the_dtype(dtype: torch.dtype, layout: str) -> None:
    x = as_layout(torch.randn(2, 3, 12, 10).to(dtype), layout)
    plain = naive_in_dtype(x, 3)
    for band, want, same in zip(
        laplacian_pyramid(x, levels=3), naive.laplacian_pyramid(naive.array(x), 3), plain, strict=True
    ):
        assert band.dtype == dtype
        assert_close_as_dtype(band, want, same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 3, 20, 24).to(dtype), torch.randn(2, 3, 20, 24).to(dtype)
    for low, high in zip(laplacian_pyramid(x), laplacian_pyramid(x.float()), strict=True):
        assert torch.equal(low, high.to(dtype))
    for mse in (0.0, 2.0):
        assert torch.equal(
            laplacian_pyramid_loss(x, y, mse=mse), laplacian_pyramid_loss(x.float(), y.float(), mse=mse)
        )


def naive_in_dtype(x: Tensor, levels: int) -> list[Tensor]:
    """The pyramid with every step rounded to x's dtype."""
    c = x.shape[1]
    taps = torch.tensor(naive.BINOMIAL)
    kernel = taps.outer(taps).to(x.dtype).expand(c, 1, 5, 5)
    bands = []
    for _ in range(levels - 1):
        low = F.conv2d(F.pad(x, [2] * 4, mode="replicate"), kernel, stride=2, groups=c)
        z = torch.zeros(x.shape[0], c, 2 * low.shape[2] + 4, 2 * low.shape[3] + 4, dtype=x.dtype)
        z[:, :, ::2, ::2] = F.pad(low, [1] * 4, mode="replicate")
        bands.append(x - F.conv2d(z, 4 * kernel, groups=c)[:, :, : x.shape[2], : x.shape[3]])
        x = low
    return [*bands, x]


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [laplacian_pyramid_loss, registered])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("levels", "weights"), [(1, None), (3, None), (6, None), (3, [1, 0, 2.5]), (2, [0, 0])])
def test_loss(function: Callable[..., Tensor], size: tuple[int, int], levels: int, weights: list[float] | None) -> None:
    x, y = double(2, 3, *size), double(2, 3, *size)
    loss = function(x, y, levels=levels, weights=weights)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected_loss(x, y, levels, weights), rel=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("levels", "weights"), [(1, None), (3, [1, 0, 2.5]), (6, None)])
@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_charbonnier(size: tuple[int, int], levels: int, weights: list[float] | None, eps: float) -> None:
    x, y = double(2, 3, *size), double(2, 3, *size)
    loss = laplacian_pyramid_loss(x, y, levels=levels, weights=weights, charbonnier=eps)
    assert loss.item() == pytest.approx(expected_loss(x, y, levels, weights, eps), rel=1e-12)


@pytest.mark.parametrize("function", [laplacian_pyramid_loss, registered])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("levels", "weights"), [(1, None), (4, [1, 0, 2.5, 1]), (2, [0, 0])])
@pytest.mark.parametrize("mse", [1, 0.3, 400.0])
def test_mean_square_error(
    function: Callable[..., Tensor], size: tuple[int, int], levels: int, weights: list[float] | None, mse: float
) -> None:
    x, y = double(2, 3, *size), double(2, 3, *size)
    loss = function(x, y, levels=levels, weights=weights, mse=mse)
    assert loss.item() == pytest.approx(expected_loss(x, y, levels, weights, mse=mse), rel=1e-12)


def test_mean_square_error_beside_charbonnier() -> None:
    x, y = double(2, 3, 9, 14), double(2, 3, 9, 14)
    loss = laplacian_pyramid_loss(x, y, levels=3, charbonnier=0.2, mse=1.5)
    assert loss.item() == pytest.approx(expected_loss(x, y, 3, None, 0.2, 1.5), rel=1e-12)


def test_gradcheck_of_charbonnier() -> None:
    x, y = double(1, 2, 5, 4).requires_grad_(), double(1, 2, 5, 4).requires_grad_()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return laplacian_pyramid_loss(x, y, levels=3, weights=[1, 2, 3], charbonnier=0.1)

    assert gradcheck(loss, (x, y))
    assert gradgradcheck(loss, (x, y))


def test_charbonnier_of_equal_images() -> None:
    """eps at every level, and flat there."""
    x = double(1, 3, 8, 8).requires_grad_()
    loss = laplacian_pyramid_loss(x, x.detach().clone(), levels=3, weights=[1, 2, 4], charbonnier=0.25)
    assert loss.item() == 7 * 0.25
    loss.backward()
    assert (x.grad == 0).all()


def test_loss_is_lap1_per_element() -> None:
    """Bojanowski et al.: sum_j 2^(2j) |L_j(x) - L_j(y)|_1, with sizes that halve exactly."""
    x, y = double(2, 3, 32, 64), double(2, 3, 32, 64)
    bands = naive.laplacian_pyramid(naive.array(x - y), 5)
    lap1 = sum(4**j * np.abs(band).sum() for j, band in enumerate(bands))
    assert laplacian_pyramid_loss(x, y, levels=5).item() == pytest.approx(lap1 / x.numel(), rel=1e-12)


def test_loss_of_equal_images_is_zero_and_so_is_its_gradient() -> None:
    x = double(1, 3, 8, 8).requires_grad_()
    loss = laplacian_pyramid_loss(x, x.detach().clone())
    assert loss.item() == 0
    loss.backward()
    assert (x.grad == 0).all()


def test_loss_of_a_shift_in_brightness() -> None:
    """Only the residual sees a constant."""
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert laplacian_pyramid_loss(x, x + 0.25).item() == pytest.approx(0.25)
    assert laplacian_pyramid_loss(x, x + 0.25, levels=3, weights=[1, 1, 0]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("function", [laplacian_pyramid_loss, registered])
@pytest.mark.parametrize("mse", [0.0, 2.0])
def test_loss_dtypes(dtype: torch.dtype, layout: str, function: Callable[..., Tensor], mse: float) -> None:
    x, y = (as_layout(torch.randn(2, 3, 20, 24).to(dtype), layout) for _ in range(2))
    loss = function(x, y, mse=mse)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain = torch.stack([band.abs().mean() for band in naive_in_dtype(x - y, 6)]).sum()
    plain = plain + mse * (x - y).square().mean()
    assert_close_as_dtype(loss, np.array(expected_loss(x, y, 6, mse=mse)), plain)


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [laplacian_pyramid_loss, registered])
@pytest.mark.parametrize("mse", [0.0, 0.7])
def test_gradcheck(function: Callable[..., Tensor], mse: float) -> None:
    x, y = double(1, 2, 5, 4).requires_grad_(), double(1, 2, 5, 4).requires_grad_()
    assert gradcheck(lambda x, y: function(x, y, levels=3, weights=[1, 2, 3], mse=mse), (x, y))
    assert gradgradcheck(lambda x, y: function(x * x, y, levels=3, weights=[1, 2, 3], mse=mse), (x, y))


def test_gradcheck_of_the_bands() -> None:
    x = double(1, 1, 5, 6).requires_grad_()
    assert gradcheck(lambda x: tuple(laplacian_pyramid(x, levels=3)), x)
    assert gradgradcheck(lambda x: tuple(band.pow(2) for band in laplacian_pyramid(x, levels=3)), x)


def test_both_ways_have_the_same_gradients() -> None:
    values = double(2, 3, 9, 12), double(2, 3, 9, 12)
    found = []
    for function in (laplacian_pyramid_loss, registered):
        x, y = (value.clone().requires_grad_() for value in values)
        found.append(torch.autograd.grad(function(x, y, levels=4, mse=1.5), (x, y)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[0][0], -found[0][1])


def test_y_computed_from_x_is_counted_once() -> None:
    x = double(1, 1, 6, 6).requires_grad_()
    found = []
    for function in (laplacian_pyramid_loss, registered):
        (slope,) = torch.autograd.grad(function(x.pow(3), x.square(), levels=3, mse=1.5), x, create_graph=True)
        found.append((slope, torch.autograd.grad(slope.square().sum(), x)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


# ---- registration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.float32), ("channels_last", torch.bfloat16), ("strided", torch.float64)],
)
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    x, y = (as_layout(torch.randn(2, 3, 9, 8).to(dtype), layout).requires_grad_() for _ in range(2))
    assert_op_check(REGISTERED, (x, y, 2, [1.0, 0.5], None, 0.5, False, "reference"))


@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize("function", [laplacian_pyramid_loss, registered])
def test_compiles_without_a_graph_break(function: Callable[..., Tensor], dynamic_batch: bool) -> None:
    y = torch.randn(1, 3, 12, 10)
    compiled(
        lambda x: function(x, y.expand(len(x), -1, -1, -1), levels=3, mse=2.0),
        torch.randn(2, 3, 12, 10),
        dynamic_batch=dynamic_batch,
    )


@pytest.mark.slow
def test_compiles_to_machine_code() -> None:
    y = torch.randn(2, 3, 12, 10)
    compiled(lambda x: laplacian_pyramid_loss(x, y, levels=2), torch.randn(2, 3, 12, 10), backend="inductor")


@pytest.mark.parametrize("function", [laplacian_pyramid_loss, registered])
def test_autocast_changes_nothing(function: Callable[..., Tensor]) -> None:
    x, y = torch.randn(2, 3, 12, 10), torch.randn(2, 3, 12, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(x, y)
        bands = laplacian_pyramid(x)
    assert torch.equal(inside, function(x, y))
    for one, other in zip(bands, laplacian_pyramid(x), strict=True):
        assert torch.equal(one, other)


# ---- messages ----------------------------------------------------------------------------------------------------

X = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "x must be a floating-point tensor [N, C, H, W], got NoneType", (None, X), {}),
        (TypeError, "x must be a floating-point tensor [N, C, H, W], got uint8 [1, 3, 4, 4]", (X.byte(), X), {}),
        (ValueError, "x must be [N, C, H, W] and not empty, got float32 [3, 4, 4]", (X[0], X[0]), {}),
        (ValueError, "x must be [N, C, H, W] and not empty, got float32 [0, 3, 4, 4]", (X[:0], X[:0]), {}),
        (
            ValueError,
            "x must have fewer than 2^31 elements, got float32 [8, 1, 16384, 16384]",
            (torch.empty(1).expand(8, 1, 2**14, 2**14),) * 2,
            {},
        ),
        (TypeError, "y must be a floating-point tensor float32 [1, 3, 4, 4], got list", (X, [0.0]), {}),
        (ValueError, "y must be float32 [1, 3, 4, 4], got float32 [1, 1, 4, 4]", (X, X[:, :1]), {}),
        (ValueError, "y must be float32 [1, 3, 4, 4], got float64 [1, 3, 4, 4]", (X, X.double()), {}),
        (ValueError, "y must be on cpu as x is, got meta", (X, X.to("meta")), {}),
        (ValueError, "levels must be an integer >= 1, got 0", (X, X), {"levels": 0}),
        (ValueError, "levels must be an integer >= 1, got 2.0", (X, X), {"levels": 2.0}),
        (ValueError, "weights must be 3 numbers >= 0, got [1, 1]", (X, X), {"levels": 3, "weights": [1, 1]}),
        (ValueError, "weights must be 2 numbers >= 0, got [1, -1]", (X, X), {"levels": 2, "weights": [1, -1]}),
        (ValueError, "weights must be 1 numbers >= 0, got ['a']", (X, X), {"levels": 1, "weights": ["a"]}),
        (ValueError, "weights must be 1 numbers >= 0, got 2", (X, X), {"levels": 1, "weights": 2}),
        (ValueError, "mse must be a number >= 0, got -0.5", (X, X), {"mse": -0.5}),
        (ValueError, "mse must be a number >= 0, got None", (X, X), {"mse": None}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        laplacian_pyramid_loss(*args, **kwargs)
    assert raised.type is error
    assert str(raised.value) == f"laplacian_pyramid: {message}"


def test_bad_arguments_of_the_pyramid() -> None:
    with pytest.raises(ValueError, match=r"^laplacian_pyramid: levels must be an integer >= 1, got -1$"):
        laplacian_pyramid(X, levels=-1)
    with pytest.raises(
        ValueError, match=r"^laplacian_pyramid: x must be \[N, C, H, W\] and not empty, got float32 \[4, 4\]$"
    ):
        laplacian_pyramid(X[0, 0])
