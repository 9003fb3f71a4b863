"""The CUDA leaf's pass back to where a discriminator begins: a gradient and another one filtered to twice its size, the
activation and the 1x1 convolution before it in one.

On a CPU csrc/_upfirdn2d_join.cu runs emulated, which covers the order of its copies, barriers and reads,
too.
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
from test_act_fir import EPILOGUES, FLOATS, close_sum, smooth
from torch import Tensor

pytestmark = pytest.mark.usefixtures("nan_empty")

BEHIND = [2, 1, 2, 1]  # the adjoint of what stands before a filter that halves
# of y, and inputs: a thread for each pixel, two, four, eight; several pieces in a block, bands and strips
SHAPES = [
    ((1, 8, 2, 4), 1),
    ((3, 8, 6, 8), 3),
    ((2, 16, 14, 10), 4),
    ((1, 32, 38, 30), 3),
    ((2, 32, 10, 70), 2),
    ((1, 64, 22, 34), 3),
]
WANTS = [wants for wants in itertools.product([False, True], repeat=3) if any(wants)]  # dx, dw, bias


compiled, device, leaf = emulation.fixtures("upfirdn2d", "upfirdn2d_join", "_branch_backward")


def made(
    shape: tuple[int, ...],
    inputs: int,
    dtype: torch.dtype,
    device: str,
    epilogue: tuple[Any, ...],
    padding: list[int] = BEHIND,
) -> list[Any]:
    """dy, dshrunk, y, x, weight, act, gain and clamp, for y of this shape."""
    (n, c, h, w), (x0, x1, y0, y1) = shape, padding
    act, gain, clamp = epilogue
    y = torch.randn(shape, device=device)
    y[torch.rand_like(y) < 0.1] = 0  # which counts as below zero
    if act == "relu":
        y = y.relu()
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    dshrunk = torch.randn(n, c, (h + 3 - y0 - y1) // 2, (w + 3 - x0 - x1) // 2, device=device)
    images = (torch.randn_like(y), dshrunk, y, torch.randn(n, inputs, h, w, device=device))
    weight = torch.randn(c, inputs, 1, 1, device=device).to(dtype)
    return [*(as_layout(image.to(dtype), "channels_last") for image in images), weight, act, gain, clamp]


def check(
    leaf: Any,
    args: list[Any],
    f: Tensor,
    padding: list[int] = BEHIND,
    flip: bool = True,
    wants: tuple[bool, ...] = (True, True, True),
) -> tuple[Tensor | None, ...]:
    y, x, _, act, gain, clamp = args[2:]
    (n, c, h, w), inputs = y.shape, x.shape[1]
    fir = (padding, flip, 2.0)
    assert leaf.supports_branch_backward(*args, *wants, f, *fir) is None
    found = leaf.launch_branch_backward(*args, *wants, f, *fir)
    assert tuple(one is not None for one in found) == wants
    dx, of_weight, of_bias = found
    limit = None if clamp is None else float(torch.tensor(clamp, dtype=y.dtype))  # what a result in this dtype holds
    exact = [one.double() for one in args[:5]]
    every, f64 = (True, True, True), f.double()
    want = spec_leaf.branch_backward(*exact, act, gain, limit, *every, f64, *fir)
    sizes = [one if one is exact[2] else one.abs() for one in exact]
    bounds = [one.abs() for one in spec_leaf.branch_backward(*sizes, act, gain, limit, *every, f64.abs(), *fir)]
    if dx is not None:
        plain = spec_leaf.branch_backward(*args, *every, f, *fir)[0]
        assert dx.dtype == x.dtype
        assert dx.stride() == x.stride()
        assert_close_as_dtype(dx.cpu(), array(want[0].cpu()), plain.cpu())
    terms = 6 * n * h * w  # with those of the filter and dy, which are not rounded either
    if of_weight is not None:
        assert of_weight.shape[1:] == (inputs * c,)
        total, (of_all, bound) = of_weight.double().sum(0).float(), (one.sum(0) for one in (want[1], bounds[1]))
        close_sum(total, *(one.view(c, inputs).t().flatten() for one in (of_all, bound)), terms)
    if of_bias is not None:
        assert of_bias.shape[1:] == (c,)
        close_sum(of_bias.double().sum(0).float(), want[2].sum(0), bounds[2].sum(0), terms)
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "inputs"), SHAPES, ids=str)
def test_against_float64(leaf: Any, device: str, shape: tuple[int, ...], inputs: int, dtype: torch.dtype) -> None:
    check(leaf, made(shape, inputs, dtype, device, EPILOGUES[0]), smooth(device))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("epilogue", EPILOGUES[1:], ids=str)
def test_activations(leaf: Any, device: str, epilogue: tuple[Any, ...], dtype: torch.dtype) -> None:
    for inputs in range(1, 5):
        check(leaf, made((1, 32, 6, 8), inputs, dtype, device, epilogue), smooth(device))


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_wanted_and_nothing_else(leaf: Any, device: str, dtype: torch.dtype) -> None:
    args = made((2, 16, 10, 14), 3, dtype, device, EPILOGUES[0])
    whole = check(leaf, args, smooth(device))
    for wants in WANTS:  # the same every time, too
        for one, other, want in zip(check(leaf, args, smooth(device), wants=wants), whole, wants, strict=True):
            assert torch.equal(one, other) if want else one is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
def test_filters_and_paddings(leaf: Any, device: str, dtype: torch.dtype) -> None:
    """Asymmetric, dense and separable; of either phase, and to odd sizes."""
    filters = [torch.rand(4, device=device), torch.rand(4, 4, device=device), torch.zeros(4, 4, device=device)]
    cases = [((18, 22), BEHIND), ((17, 21), [1, 1, 1, 1]), ((17, 22), [3, 0, 2, 2]), ((19, 24), [2, 3, 1, 3])]
    for f, (size, padding) in itertools.product(filters, cases):
        for flip in True, False:
            check(leaf, made((1, 16, *size), 3, dtype, device, EPILOGUES[0], padding), f, padding, flip)


def test_other_layouts_and_off_16_bytes(leaf: Any, device: str) -> None:
    dy, dshrunk, y, x, weight, *rest = made((2, 8, 6, 10), 3, torch.float16, device, EPILOGUES[0])
    want = check(leaf, [dy, dshrunk, y, x, weight, *rest], smooth(device))
    off = dy.new_zeros(dy.numel() + 1)[1:].view(2, 6, 10, 8).permute(0, 3, 1, 2).copy_(dy)
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    for one in (dy.contiguous(), off):
        for got, other in zip(
            check(leaf, [one, dshrunk.contiguous(), y, x, turned, *rest], smooth(device)), want, strict=True
        ):
            assert torch.equal(got, other)


def test_nan_stays_with_the_pixels_and_the_channel(leaf: Any, device: str) -> None:
    dy, dshrunk, y, *rest = made((2, 16, 10, 14), 3, torch.bfloat16, device, EPILOGUES[0])
    y.fill_(0.5)
    dshrunk[1, 3, 2, 6] = float("nan")
    dx, of_weight, of_bias = leaf.launch_branch_backward(
        dy, dshrunk, y, *rest, True, True, True, smooth(device), BEHIND, True, 1.0
    )
    assert dx[1, :, 3:7, 11:].isnan().all()
    assert dx.isnan().sum() == 3 * 4 * 3
    assert of_weight.isnan().any(0).nonzero().flatten().tolist() == [3, 19, 35]
    assert of_bias.isnan().any(0).nonzero().tolist() == [[3]]


def test_reasons(leaf: Any, device: str) -> None:
    args = made((1, 16, 4, 4), 3, torch.float16, device, EPILOGUES[0])
    f = smooth(device)

    def reason(change: dict[int, Any], f: Tensor = f, padding: list[int] = BEHIND) -> str:
        changed = [change.get(i, value) for i, value in enumerate(args)]
        return str(leaf.supports_branch_backward(*changed, True, True, True, f, padding, True, 1.0))

    dy, _, y, x, weight, *_ = args
    assert reason({}) == "None"
    assert "swish" in reason({5: "swish"})
    assert "gain above zero" in reason({6: -1.0})
    assert "y is not channels_last" in reason({2: y.contiguous()})
    assert "x is not channels_last" in reason({3: x.contiguous()})
    assert "[4, 4]" in reason({}, f=f[:3, :3])
    assert "one 1x1 kernel for all samples, not [16, 3, 3, 3]" in reason({4: weight.expand(16, 3, 3, 3)})
    assert "one 1x1 kernel for all samples, not [1, 16, 3, 1, 1]" in reason({4: weight[None]})
    assert "from 1 to 4 channels to 8, 16, 32, 64, not from 5 to 16" in reason({4: weight[:, :1].expand(16, 5, 1, 1)})
    assert "not from 3 to 24" in reason({4: weight.new_ones(24, 3, 1, 1)})
    assert "the size of y [4, 4], not [4, 5]" in reason({}, padding=[2, 2, 2, 1])
    assert "one dtype" in reason({0: dy.float()})
    assert "float64" in reason({i: one.double() for i, one in enumerate(args[:5])})


def test_what_the_launcher_refuses(compiled: ModuleType) -> None:
    def sums(inputs: int = 3, **change: Any) -> Any:
        sizes = {"shape": (1, 8, 2, 2), "size": (4, 4), "channels_last": True, "filter": (4, 4), "separable": False}
        sizes |= {"up": (2, 2), "down": (1, 1), "pad": (2, 2), "flip": True, "gain": 1.0}
        return compiled.upfirdn2d_join_sums(compiled.Upfirdn2d(**sizes | change), 2, inputs)

    assert sums() == 1
    for change in {"up": (1, 1)}, {"filter": (3, 4)}:
        with pytest.raises(RuntimeError, match="upfirdn2d: a branch wants a 4x4 filter, up 2 and down 1"):
            sums(**change)
    for change in {"channels_last": False}, {"shape": (1, 24, 2, 2)}:
        with pytest.raises(RuntimeError, match="upfirdn2d: a branch wants 8, 16, 32 or 64 channels in channels_last"):
            sums(**change)
    with pytest.raises(RuntimeError, match="upfirdn2d: a branch wants 1 to 4 inputs, not 5"):
        sums(inputs=5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((1, 32, 1024, 1024), 3), ((5, 64, 254, 258), 4), ((3, 16, 128, 128), 1), ((2, 8, 34, 30), 2)],
    ids=str,
)
def test_large_images(shape: tuple[int, ...], inputs: int, dtype: torch.dtype) -> None:
    """The same every time, too."""
    leaf: Any = pytest.importorskip("clone_fast.cuda._branch_backward", reason="needs clone_fast._C")
    args = made(shape, inputs, dtype, "cuda", EPILOGUES[0])
    found = check(leaf, args, smooth("cuda"))
    for one, other in zip(found, check(leaf, args, smooth("cuda")), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sums_are_what_other_steps_add(dtype: torch.dtype) -> None:
    """In the order of columns in which the Triton leaf reads them."""
    leaf: Any = pytest.importorskip("clone_fast.cuda._branch_backward", reason="needs clone_fast._C")
    triton: Any = pytest.importorskip("clone_fast.kernels.modulated_conv2d")
    args = made((2, 32, 66, 130), 3, dtype, "cuda", EPILOGUES[0])
    *_, weight, _, _, _ = args
    _, of_weight, of_bias = check(leaf, args, smooth("cuda"))
    want = of_weight.double().sum(0).view(3, 32).t().view_as(weight)
    eps = torch.finfo(dtype).eps + 2**-20
    dw = triton.launch_pointwise_sums(of_weight, weight)
    *_, dbias = triton.launch_act_sums(None, None, of_bias, None, None, dtype)
    for got, one in ((dw, want), (dbias, of_bias.double().sum(0))):
        assert got.dtype == dtype
        assert ((got - one).abs() <= eps * one.abs().max()).all()
