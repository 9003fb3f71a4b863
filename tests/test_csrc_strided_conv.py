"""The CUDA leaf's convolution of stride 2 and its adjoint: small shapes at the edges of its tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grids import as_layout
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

HALF = [torch.bfloat16, torch.float16]
# [N, I, O, H, W]: the least; one tile and one more; odd sizes; parts of 64 channels; several blocks of channels
SHAPES = [
    (1, 32, 64, 3, 3),
    (2, 64, 64, 8, 9),
    (1, 128, 96, 17, 33),
    (3, 24, 32, 33, 16),
    (2, 72, 128, 40, 23),
    (1, 64, 160, 75, 130),
]
TILES = {True: range(3), False: range(3, 8)}  # by whether transposed


@pytest.fixture
def leaf() -> Any:
    module = pytest.importorskip("clone_fast.cuda._strided_conv", reason="needs clone_fast._C")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    return module


def fresh(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def convolve(x: Tensor, weight: Tensor, padding: int, transposed: bool) -> Tensor:
    """PyTorch's, with a weight for all or one for each sample."""
    weights = weight.unbind() if weight.ndim == 5 else [weight] * len(x)
    pairs = zip(x.split(1), weights, strict=True)
    if transposed:
        return torch.cat([conv_transpose2d(one, w.transpose(0, 1), stride=2, padding=padding) for one, w in pairs])
    return torch.cat([conv2d(one, w, stride=2, padding=padding) for one, w in pairs])


def assert_close(got: Tensor, x: Tensor, weight: Tensor, padding: int, transposed: bool) -> None:
    """The rule of errors: at most twice that of the plain computation in the same dtype, plus one rounding."""
    want = convolve(x.double(), weight.double(), padding, transposed)
    plain = convolve(x, weight, padding, transposed)
    assert got.shape == want.shape
    error, peak = (got.double() - want).abs().max(), want.abs().max()
    allowed = 2 * (plain.double() - want).abs().max() + torch.finfo(got.dtype).eps * peak
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_convolves(
    leaf: Any, shape: tuple[int, ...], transposed: bool, dtype: torch.dtype, per_sample: bool, padding: int
) -> None:
    n, i, o, h, w = shape
    x = as_layout(fresh(n, i, h, w, dtype=dtype), "channels_last")
    weight = fresh(*([n] if per_sample else []), 3, 3, o, i, dtype=dtype, scale=(9 * i) ** -0.5)
    weight = weight.movedim((-2, -1), (-4, -3))
    assert leaf.supports_strided(x, weight, transposed) is None
    got = leaf.launch_strided(x, weight, padding, transposed)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close(got, x, weight, padding, transposed)


@pytest.mark.parametrize(("transposed", "tile"), [(kind, tile) for kind, tiles in TILES.items() for tile in tiles])
def test_tiles(leaf: Any, transposed: bool, tile: int) -> None:
    """Every tile, whichever is the best."""
    x = as_layout(fresh(2, 32, 37, 26, dtype=torch.bfloat16), "channels_last")
    weight = fresh(96, 32, 3, 3, dtype=torch.bfloat16, scale=0.06)
    assert_close(leaf.launch_strided(x, weight, 0, transposed, tile), x, weight, 0, transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_any_memory(leaf: Any, transposed: bool) -> None:
    """Contiguous images, every other column of one, weights with their channels swapped."""
    x, weight = fresh(2, 32, 19, 42, dtype=torch.float16), fresh(32, 64, 3, 3, dtype=torch.float16, scale=0.06)
    for image in (x, x[..., 1::2]):
        got = leaf.launch_strided(image, weight.transpose(0, 1), 0, transposed)
        assert got.is_contiguous()
        assert_close(got, image, weight.transpose(0, 1), 0, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_weight_of_dgrad_is_read_as_it_lies(leaf: Any, per_sample: bool, transposed: bool) -> None:
    x, dtype = fresh(2, 64, 9, 8, dtype=torch.bfloat16), torch.bfloat16
    weight = fresh(*([2] if per_sample else []), 64, 96, 3, 3, dtype=dtype).transpose(-3, -4)
    dy = fresh(2, 64, 9, 8, dtype=dtype)
    copied = leaf.launch_dgrad_weight(x, weight, transposed)
    assert torch.equal(copied, weight)
    assert leaf._packed(copied, dtype).data_ptr() == copied.data_ptr()
    assert torch.equal(leaf.launch_strided(dy, copied, 0, transposed), leaf.launch_strided(dy, weight, 0, transposed))


def test_nan_stays_where_it_belongs(leaf: Any) -> None:
    x = as_layout(fresh(1, 32, 16, 16, dtype=torch.bfloat16), "channels_last")
    x[0, 3, 5, 6] = float("nan")
    weight = fresh(32, 32, 3, 3, dtype=torch.bfloat16)
    for transposed in (False, True):
        got = leaf.launch_strided(x, weight, 0, transposed)
        assert torch.equal(got.isnan(), convolve(x, weight, 0, transposed).isnan())


def test_reasons(leaf: Any) -> None:
    x, weight = fresh(1, 32, 8, 8, dtype=torch.float16), fresh(32, 32, 3, 3, dtype=torch.float16)
    assert leaf.supports_strided(x, weight, True) is None
    assert leaf.supports_dgrad_weight(x, weight, True) is None
    assert "3x3" in leaf.supports_strided(x, weight[..., :1, :1], True)
    assert "float32" in leaf.supports_strided(x.float(), weight.float(), True)
    assert "float64" in leaf.supports_strided(x.double(), weight.double(), True)
    assert "multiples of 8" in leaf.supports_strided(x, weight[:24], True)
    assert "two pixels" in leaf.supports_strided(x[..., :1, :], weight, False)
    assert "512 input channels" in leaf.supports_strided(x.repeat(1, 16, 1, 1), weight.repeat(1, 16, 1, 1), True)
