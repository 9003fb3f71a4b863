"""The CUDA leaf's first pass of a discriminator: the 1x1 convolution of the image, and its result at half the size.

On a CPU csrc/_upfirdn2d_branch.cu runs emulated, which covers the order of its barriers and reads, too.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import emulated as emulation
import pytest
import spec_leaf
import torch
from grids import as_layout, assert_close_as_dtype
from naive import array
from test_act_fir import EPILOGUES, FLOATS, smooth
from torch import Tensor

from clone_fast.reference.upfirdn2d import upfirdn2d

pytestmark = pytest.mark.usefixtures("nan_empty")

AROUND = [1, 1, 1, 1]
# N, I, O, H, W: one piece, several of them in a block, several splits of the channels, bands, strips
SHAPES = [
    (1, 3, 8, 2, 2),
    (3, 3, 8, 6, 10),
    (2, 1, 24, 4, 16),
    (1, 4, 136, 10, 6),
    (2, 2, 16, 70, 30),
    (1, 3, 64, 36, 70),
    (1, 3, 32, 98, 140),
]


compiled, device, leaf = emulation.fixtures("upfirdn2d", "upfirdn2d_branch", "_branch")


def made(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, epilogue: tuple[Any, ...], bias: torch.dtype | None
) -> list[Any]:
    """x, weight, bias of this dtype, act, gain and clamp."""
    n, i, o, h, w = shape
    x, weight = torch.randn(n, i, h, w, device=device), torch.randn(o, i, 1, 1, device=device)
    shift = None if bias is None else torch.randn(o, device=device).to(bias)
    return [as_layout(x.to(dtype), "channels_last"), weight.to(dtype), shift, *epilogue]


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *activation: Any) -> Tensor:
    whole: Tensor = spec_leaf.steps("modulated_conv2d").launch(x, weight, None, None, bias, None, 1, 1, *activation)
    return whole


def check(leaf: Any, args: list[Any], f: Tensor, padding: list[int] = AROUND) -> tuple[Tensor, Tensor]:
    x, weight, bias, act, gain, clamp = args
    assert leaf.supports_branch(*args, f, padding) is None
    y, shrunk = leaf.launch_branch(*args, f, padding)
    limit = None if clamp is None else float(torch.tensor(clamp, dtype=x.dtype))  # what a result in this dtype holds
    exact = (x.double(), weight.double(), None if bias is None else bias.double(), act, gain, limit)
    for got, want, plain in (
        (y, convolved(*exact), convolved(*args)),
        # of what has been stored
        (shrunk, *(upfirdn2d(one, f.to(one.dtype), down=2, padding=padding) for one in (y.double(), y))),
    ):
        assert got.dtype == x.dtype
        assert got.stride() == torch.empty_like(want, memory_format=leaf.layout_of(x)).stride()
        assert got.shape == want.shape
        assert_close_as_dtype(got.cpu(), array(want.cpu()), plain.cpu())
    return y, shrunk


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(leaf: Any, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for i, epilogue in enumerate(EPILOGUES):
        check(leaf, made(shape, dtype, device, epilogue, [dtype, torch.float32, None][i % 3]), smooth(device))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_every_time(leaf: Any, device: str, dtype: torch.dtype) -> None:
    args = made((2, 3, 16, 20, 34), dtype, device, EPILOGUES[0], dtype)
    for one, other in zip(*(check(leaf, args, smooth(device)) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
def test_filters_and_paddings(leaf: Any, device: str, dtype: torch.dtype) -> None:
    """Asymmetric, dense and separable; with the last column and row in no window beyond the image, and one further."""
    filters = [torch.rand(4, device=device), torch.rand(4, 4, device=device), torch.zeros(4, 4, device=device)]
    for f, padding in itertools.product(filters, [AROUND, [1, 2, 1, 1]]):
        for shape in (1, 3, 16, 18, 22), (1, 4, 64, 34, 38):
            check(leaf, made(shape, dtype, device, EPILOGUES[0], dtype), f, padding)


def test_the_border_sees_zeros_and_not_the_bias(leaf: Any, device: str) -> None:
    args = made((1, 3, 8, 4, 6), torch.float32, device, ("linear", 1.0, None), torch.float32)
    args[0].zero_(), args[2].fill_(1.0)
    y, shrunk = check(leaf, args, torch.ones(4, 4, device=device))
    assert y.eq(1).all()
    assert shrunk[0, 0].tolist() == [[9, 12, 9], [9, 12, 9]]


def test_weights_and_images_as_they_lie(leaf: Any, device: str) -> None:
    """Weights transposed, an image between two multiples of 16 bytes."""
    x, weight, *rest = made((2, 3, 8, 6, 10), torch.float16, device, EPILOGUES[0], None)
    want = check(leaf, [x, weight, *rest], smooth(device))
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    off = x.new_zeros(x.numel() + 1)[1:].view(2, 6, 10, 3).permute(0, 3, 1, 2)
    for one in check(leaf, [off.copy_(x), turned, *rest], smooth(device)), leaf.launch_branch(
        x.contiguous(), weight, *rest, smooth(device), AROUND
    ):
        for got, other in zip(one, want, strict=True):
            assert torch.equal(got, other)


def test_nan_stays_where_it_is_seen(leaf: Any, device: str) -> None:
    args = made((2, 3, 16, 10, 12), torch.bfloat16, device, EPILOGUES[0], torch.bfloat16)
    args[0][1, 2, 4, 5] = float("nan")
    y, shrunk = leaf.launch_branch(*args, smooth(device), AROUND)
    assert y[1, :, 4, 5].isnan().all()
    assert y.isnan().sum() == 16
    assert shrunk[1, :, 1:3, 2:4].isnan().all()
    assert shrunk.isnan().sum() == 4 * 16


def test_reasons(leaf: Any, device: str) -> None:
    args = made((1, 3, 16, 4, 6), torch.float16, device, EPILOGUES[0], torch.float16)
    x, weight, bias, *activation = args

    def reason(args: list[Any], f: Tensor | None = None, padding: list[int] = AROUND) -> str:
        return str(leaf.supports_branch(*args, smooth(device) if f is None else f, padding))

    assert reason(args) == "None"
    assert "swish" in reason([*args[:3], "swish", 1.0, None])
    assert "gain above zero" in reason([*args[:3], "lrelu", -1.0, None])
    assert "channels_last" in reason([x.contiguous(), *args[1:]])
    assert "[O, I, 1, 1], got [16, 3, 3, 3]" in reason([x, weight.expand(-1, -1, 3, 3), *args[2:]])
    assert "[O, I, 1, 1], got [1, 16, 3, 1, 1]" in reason([x, weight[None], *args[2:]])
    assert "up to 4 channels, got 6" in reason(
        [as_layout(torch.cat([x, x], 1), "channels_last"), weight.repeat(1, 2, 1, 1), *args[2:]]
    )
    assert "multiple of 8, got 12" in reason([x, weight[:12], bias[:12], *activation])
    assert "[4, 4]" in reason(args, f=torch.ones(3, 3, device=device))
    for padding in [2, 0, 1, 1], [1, 3, 1, 1], [1, 1, 1, 0]:
        assert f"4x6 with {padding}" in reason(args, padding=padding)
    for odd in x[..., :5], x[:, :, :3]:
        assert "even size" in reason([as_layout(odd, "channels_last"), *args[1:]])
    assert "one dtype" in reason([x, weight.float(), *args[2:]])
    assert "one dtype" in reason([x, weight, bias.bfloat16(), *activation])
    assert reason([x, weight, bias.float(), *activation]) == "None"
    assert "float64" in reason([x.double(), weight.double(), None, *activation])


def test_what_the_launcher_refuses(compiled: ModuleType) -> None:
    def launch(options: dict[str, Any], **change: Any) -> None:
        sizes = {"shape": (1, 8, 4, 4), "size": (2, 2), "channels_last": True, "filter": (4, 4), "separable": False}
        sizes |= {"up": (1, 1), "down": (2, 2), "pad": (1, 1), "flip": False, "gain": 1.0}
        call = {"dtype": 2, "inputs": 3, "weight_strides": (3, 1), "bias_float": False, "gain": 1.0, "slope": 0.2}
        call |= dict.fromkeys(("x", "f", "y", "shrunk", "weight", "bias", "stream"), 0) | {"clamp": 1.0}
        compiled.upfirdn2d_branch(op=compiled.Upfirdn2d(**sizes | change), **call | options)

    wrong = [{"pad": (0, 1)}, {"pad": (1, 2)}, {"size": (3, 2)}, {"size": (2, 1)}, {"up": (2, 2)}, {"filter": (3, 4)}]
    for change in wrong:
        with pytest.raises(RuntimeError, match="upfirdn2d: a branch wants a 4x4 filter to half the size"):
            launch({}, **change)
    for change in {"channels_last": False}, {"shape": (1, 4, 4, 4)}:
        with pytest.raises(RuntimeError, match="upfirdn2d: a branch wants channels in vectors of 16 bytes"):
            launch({}, **change)
    for name in "y", "shrunk":
        with pytest.raises(RuntimeError, match="upfirdn2d: a branch wants channels in vectors of 16 bytes"):
            launch({name: 8})
    for option in {"gain": 0.0}, {"slope": 1.5}:
        with pytest.raises(RuntimeError, match="upfirdn2d: a branch wants a positive gain and a slope of at most 1"):
            launch(option)
    for inputs in 0, 5:
        with pytest.raises(RuntimeError, match=f"upfirdn2d: a branch wants 1 to 4 channels of x, got {inputs}"):
            launch({"inputs": inputs})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(2, 3, 32, 1024, 1024), (5, 3, 64, 254, 258), (3, 4, 128, 128, 130), (1, 1, 512, 66, 62)], ids=str
)
def test_large_images(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same every time, too."""
    leaf: Any = pytest.importorskip("clone_fast.cuda._branch", reason="needs clone_fast._C")
    args = made(shape, dtype, "cuda", EPILOGUES[0], dtype)
    found = check(leaf, args, smooth("cuda"))
    for one, other in zip(found, check(leaf, args, smooth("cuda")), strict=True):
        assert torch.equal(one, other)
