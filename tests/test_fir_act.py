"""The CUDA leaf's last pass back through a downsampling convolution: the filter and the activation before it in one.

On a CPU csrc/_upfirdn2d_slope.cu runs emulated, which covers the order of its copies, barriers and reads, too.
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
from test_act_fir import EPILOGUES, FLOATS, SHAPES, close_sum, smooth
from torch import Tensor

pytestmark = pytest.mark.usefixtures("nan_empty")

AROUND = [1, 1, 1, 1]  # the adjoint of what stands before a convolution of stride 2 with a 3x3 kernel


compiled, device, leaf = emulation.fixtures("upfirdn2d", "upfirdn2d_slope", "_fir_act")


def made(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, epilogue: tuple[Any, ...], padding: list[int] = AROUND
) -> list[Any]:
    """z, y, act, gain and clamp, for y of this shape."""
    (n, c, h, w), (x0, x1, y0, y1) = shape, padding
    act, gain, clamp = epilogue
    y = torch.randn(shape, device=device)
    y[torch.rand_like(y) < 0.1] = 0  # which counts as below zero
    if act == "relu":
        y = y.relu()
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    z = torch.randn(n, c, h + 3 - y0 - y1, w + 3 - x0 - x1, device=device)
    return [*(as_layout(image.to(dtype), "channels_last") for image in (z, y)), act, gain, clamp]


def check(
    leaf: Any, args: list[Any], f: Tensor, padding: list[int] = AROUND, flip: bool = True, want_bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    z, y, act, gain, clamp = args
    n, c, h, w = y.shape
    fir = (f, padding, flip, 2.0)
    assert leaf.supports_fir_act(*args, want_bias, *fir) is None
    g, sums = leaf.launch_fir_act(*args, want_bias, *fir)
    limit = None if clamp is None else float(torch.tensor(clamp, dtype=y.dtype))  # what a result in this dtype holds
    want, _ = spec_leaf.fir_act(z.double(), y.double(), act, gain, limit, False, f.double(), *fir[1:])
    plain, _ = spec_leaf.fir_act(*args, False, *fir)
    assert g.dtype == y.dtype
    assert g.is_contiguous(memory_format=torch.channels_last)
    assert_close_as_dtype(g.cpu(), array(want.cpu()), plain.cpu())
    assert (sums is not None) == want_bias
    if sums is not None:
        assert sums.shape[1:] == (c,)
        sizes, _ = spec_leaf.fir_act(z.double().abs(), y.double(), act, gain, limit, False, f.double().abs(), *fir[1:])
        terms = 16 * n * h * w  # with those of the filter, which are not rounded either
        close_sum(sums.double().sum(0).float(), want.sum([0, 2, 3]), sizes.abs().sum([0, 2, 3]), terms)
    return g, sums


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(leaf: Any, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for epilogue in EPILOGUES:
        check(leaf, made(shape, dtype, device, epilogue), smooth(device))


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_only_where_they_are_wanted(leaf: Any, device: str, dtype: torch.dtype) -> None:
    args = made((2, 16, 19, 23), dtype, device, EPILOGUES[0])
    (g, sums), (again, none) = (check(leaf, args, smooth(device), want_bias=want) for want in (True, False))
    assert torch.equal(again, g)
    assert none is None
    assert torch.equal(check(leaf, args, smooth(device))[1], sums)  # the same every time


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
def test_filters_and_paddings(leaf: Any, device: str, dtype: torch.dtype) -> None:
    """Asymmetric, dense and separable; to more pixels and to fewer."""
    filters = [torch.rand(4, device=device), torch.rand(4, 4, device=device), torch.zeros(4, 4, device=device)]
    for f, padding in itertools.product(filters, [AROUND, [0, 3, 1, 2], [3, 4, 3, 3], [0, 0, -1, 0]]):
        for flip in True, False:
            check(leaf, made((1, 16, 18, 21), dtype, device, EPILOGUES[0], padding), f, padding, flip)


def test_a_gradient_of_another_layout_or_off_16_bytes(leaf: Any, device: str) -> None:
    z, *rest = made((2, 8, 6, 9), torch.float16, device, EPILOGUES[0])
    want = check(leaf, [z, *rest], smooth(device))
    off = z.new_zeros(z.numel() + 1)[1:].view(2, 7, 10, 8).permute(0, 3, 1, 2)
    for one in (z.contiguous(), off.copy_(z)):
        for got, other in zip(check(leaf, [one, *rest], smooth(device)), want, strict=True):
            assert torch.equal(got, other)


def test_nan_stays_in_the_image_and_the_channel(leaf: Any, device: str) -> None:
    z, y, *activation = made((2, 16, 9, 12), torch.bfloat16, device, EPILOGUES[0])
    y.fill_(0.5)
    z[1, 3, 4, 5] = float("nan")
    g, sums = leaf.launch_fir_act(z, y, *activation, True, smooth(device), AROUND, True, 1.0)
    assert g[1, 3, 2:6, 3:7].isnan().all()
    assert g.isnan().sum() == 16
    assert sums.isnan().any(0).nonzero().tolist() == [[3]]


def test_reasons(leaf: Any, device: str) -> None:
    args = made((1, 16, 4, 4), torch.float16, device, EPILOGUES[0])
    f = smooth(device)

    def reason(args: list[Any], f: Tensor = f, padding: list[int] = AROUND) -> str:
        return str(leaf.supports_fir_act(*args, True, f, padding, True, 1.0))

    assert reason(args) == "None"
    assert "swish" in reason([*args[:2], "swish", 1.0, None])
    assert "gain above zero" in reason([*args[:2], "lrelu", -1.0, None])
    assert "channels_last" in reason([args[0], args[1].contiguous(), *args[2:]])
    assert "multiple of 8" in reason([as_layout(one[:, :12], "channels_last") for one in args[:2]] + args[2:])
    assert "[4, 4]" in reason(args, f=f[:3, :3])
    assert "the size of y [4, 4], not [5, 4]" in reason(args, padding=[1, 1, 1, 2])
    assert "one dtype" in reason([args[0].float(), *args[1:]])
    assert "float64" in reason([one.double() if isinstance(one, Tensor) else one for one in args])


def test_what_the_launcher_refuses(compiled: ModuleType) -> None:
    def sums(**change: Any) -> Any:
        sizes = {"shape": (1, 8, 5, 5), "size": (4, 4), "channels_last": True, "filter": (4, 4), "separable": False}
        sizes |= {"up": (1, 1), "down": (1, 1), "pad": (1, 1), "flip": True, "gain": 1.0}
        return compiled.upfirdn2d_slope_sums(compiled.Upfirdn2d(**sizes | change), 2)

    assert sums() == 1
    for change in {"up": (2, 2)}, {"filter": (3, 4)}:
        with pytest.raises(RuntimeError, match="upfirdn2d: an activation's slopes want a 4x4 filter without"):
            sums(**change)
    for change in {"channels_last": False}, {"shape": (1, 4, 5, 5)}:
        with pytest.raises(RuntimeError, match="upfirdn2d: an activation's slopes want channels in vectors of 16"):
            sums(**change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 32, 1024, 1024), (5, 64, 255, 257), (3, 256, 128, 128), (2, 512, 33, 31), (1, 1104, 17, 64)], ids=str
)
def test_large_images(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same every time, too."""
    leaf: Any = pytest.importorskip("clone_fast.cuda._fir_act", reason="needs clone_fast._C")
    args = made(shape, dtype, "cuda", EPILOGUES[0])
    found = check(leaf, args, smooth("cuda"))
    for one, other in zip(found, check(leaf, args, smooth("cuda")), strict=True):
        assert torch.equal(one, other)
