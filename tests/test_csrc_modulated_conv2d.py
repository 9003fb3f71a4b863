"""The CUDA leaf of modulated_conv2d on its own: small shapes at the edges of its tiles, fit for a sanitizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grids import as_layout
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d
from torch.nn.grad import conv2d_weight

from clone_fast.reference.bias_act import bias_act

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

HALF = [torch.bfloat16, torch.float16]
# [N, I, O, H, W]: one pixel, one tile, one more than a tile each way, several strips and steps
SHAPES = [
    (1, 32, 32, 1, 1),
    (2, 64, 64, 8, 64),
    (1, 32, 64, 9, 65),
    (3, 64, 32, 17, 33),
    (2, 16, 48, 70, 130),
    (1, 64, 64, 41, 200),
    (1, 8, 40, 24, 5),
    (2, 32, 32, 13, 270),
    (3, 64, 40, 10, 260),
    (2, 40, 56, 3, 1),
]


@pytest.fixture
def leaf() -> Any:
    return pytest.importorskip("clone_fast.cuda.modulated_conv2d", reason="needs clone_fast._C")


def fresh(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def each_sample(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """F.conv2d, or its adjoint, with a weight for all or one for each; of the size of x."""
    weights = weight.unbind() if weight.ndim == 5 else [weight] * len(x)
    pairs = zip(x.split(1), weights, strict=True)
    if transposed:
        return torch.cat([conv_transpose2d(one, w.transpose(0, 1), padding=1) for one, w in pairs])
    return torch.cat([conv2d(one, w, padding=w.shape[-1] // 2) for one, w in pairs])


def assert_close(got: Tensor, want: Tensor, plain: Tensor) -> None:
    """The rule of errors: at most twice that of the plain computation in the same dtype, plus one rounding."""
    assert got.shape == want.shape
    error, peak = (got.double() - want).abs().max(), want.abs().max()
    allowed = 2 * (plain.double() - want).abs().max() + torch.finfo(got.dtype).eps * peak
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("blocks", [0, 3])  # 3: each walks on over steps, strips and samples
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_fused(leaf: Any, shape: tuple[int, ...], dtype: torch.dtype, portable: bool, blocks: int) -> None:
    n, i, o, h, w = shape
    x = as_layout(fresh(n, i, h, w, dtype=dtype), "channels_last")
    weight = fresh(n, 3, 3, o, i, dtype=dtype, scale=(9 * i) ** -0.5).permute(0, 3, 4, 1, 2)
    noise, strength, bias = fresh(n, 1, h, w, dtype=dtype), fresh(), fresh(o)
    got = leaf._conv3x3(x, weight, False, noise, strength, bias, 0.2, 2**0.5, 2.0, portable, blocks)

    def spec(kind: torch.dtype) -> Tensor:
        y = each_sample(x.to(kind), weight.to(kind)) + noise.to(kind) * strength.to(kind)
        return bias_act(y, bias.to(kind), act="lrelu", gain=2**0.5, clamp=2.0)

    assert got.dtype == dtype
    assert got.stride() == torch.empty_like(got, memory_format=torch.channels_last).stride() or h * w == 1
    assert_close(got, spec(torch.float64), spec(dtype))


@pytest.mark.parametrize("options", range(8))
def test_options(leaf: Any, options: int) -> None:
    """Every choice of act, noise and weight appears, in either layout."""
    act = ("linear", "relu", "lrelu")[options % 3]
    n, i, o, h, w = 2, 32, 32, 11, 37
    x = fresh(n, i, h, w, dtype=torch.float16)
    if options // 3 == 1:
        x = as_layout(x, "channels_last")
    elif options // 3 == 2:
        x = fresh(n, i, h, 2 * w, dtype=torch.float16)[..., 1::2]
    per_sample, flat = options % 2 == 1, options in (2, 5)
    weight = fresh(*([n] if per_sample else []), o, i, 3, 3, dtype=torch.float16, scale=0.06)
    noise = None if options == 0 else fresh(h, w) if flat else fresh(1, 1, h, w, dtype=torch.float16)
    strength = None if options < 3 else fresh().to(torch.float16)
    bias = None if options % 4 == 0 else fresh(o, dtype=torch.float16)
    clamp = None if options < 4 else 0.5
    arguments = (x, weight, noise, strength, bias, None, 1, 1, act, 0.7, clamp)
    assert leaf.supports(*arguments) is None
    got = leaf.launch(*arguments)

    def spec(kind: torch.dtype) -> Tensor:
        y = each_sample(x.to(kind), weight.to(kind))
        if noise is not None:
            y = y + noise.to(kind) * (1.0 if strength is None else strength.to(kind))
        return bias_act(y, None if bias is None else bias.to(kind), act=act, gain=0.7, clamp=clamp)

    assert got.is_contiguous(memory_format=torch.channels_last if options // 3 == 1 else torch.contiguous_format)
    assert_close(got, spec(torch.float64), spec(torch.float16))


@pytest.mark.parametrize("order", ["oi", "io", "odd", "plain"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_bare_convolution_and_its_adjoint(leaf: Any, transposed: bool, per_sample: bool, order: str) -> None:
    """Weights with I innermost, with O innermost, neither on 16 bytes, and as PyTorch makes them."""
    n, i, o = 2, 48, 64
    samples = n if per_sample else 1
    if order == "plain":
        weight = fresh(samples, o, i, 3, 3, dtype=torch.bfloat16, scale=0.05)
    else:
        last = {"oi": (o, i), "odd": (o, i + 1), "io": (i, o)}[order]
        weight = fresh(samples, 3, 3, *last, dtype=torch.bfloat16, scale=0.05).movedim((1, 2), (3, 4))
        weight = weight.transpose(1, 2) if order == "io" else weight[:, :, -i:]
    weight = weight if per_sample else weight[0]
    x = as_layout(fresh(n, i, 19, 70, dtype=torch.bfloat16), "channels_last")
    assert leaf.supports_conv(x, weight, 1, 1, transposed) is None
    got = leaf.launch_conv(x, weight, 1, 1, transposed)
    want, plain = (each_sample(x.to(kind), weight.to(kind), transposed) for kind in (torch.float64, torch.bfloat16))
    assert_close(got, want, plain)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 32, 32, 9, 9)])
def test_weight_gradient(
    leaf: Any, shape: tuple[int, ...], dtype: torch.dtype, per_sample: bool, blocks: int, portable: bool
) -> None:
    n, i, o, h, w = shape
    a, b = (as_layout(fresh(n, c, h, w, dtype=dtype), "channels_last") for c in (i, o))
    assert leaf.supports_wgrad(a, b, 3, 1, 1, per_sample) is None
    if blocks or portable:
        got = leaf._wgrad3x3(a, b, per_sample, blocks or 2, portable)
    else:
        got = leaf.launch_wgrad(a, b, 3, 1, 1, per_sample)

    def spec(kind: torch.dtype) -> Tensor:
        pairs = zip(a.to(kind).split(1), b.to(kind).split(1), strict=True)
        each = [conv2d_weight(x, (o, i, 3, 3), g, padding=1) for x, g in pairs]
        return torch.stack(each) if per_sample else torch.stack(each).sum(0)

    assert got.dtype == torch.float32
    want = spec(torch.float64)
    assert torch.nn.functional.cosine_similarity(got.double().flatten(), want.flatten(), dim=0) > 0.99999
    assert_close(got, want, spec(dtype))


def assert_drawn(
    rgb: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, clamp: float | None = None
) -> None:
    """The 1x1 convolution of y as it was rounded, in y's layout."""

    def spec(kind: torch.dtype) -> Tensor:
        return bias_act(each_sample(y.to(kind), weight.to(kind)), None if bias is None else bias.to(kind), clamp=clamp)

    assert rgb.dtype == y.dtype
    for layout in (torch.contiguous_format, torch.channels_last):
        assert rgb.is_contiguous(memory_format=layout) or not y.is_contiguous(memory_format=layout)
    assert_close(rgb, spec(torch.float64), spec(y.dtype))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_on_its_way(
    leaf: Any, shape: tuple[int, ...], dtype: torch.dtype, portable: bool, blocks: int, per_sample: bool
) -> None:
    """y is what it is without, to the bit; the image is that of y."""
    n, i, o, h, w = shape
    samples = [n] if per_sample else []
    x = as_layout(fresh(n, i, h, w, dtype=dtype), "channels_last")
    weight = fresh(*samples, 3, 3, o, i, dtype=dtype, scale=(9 * i) ** -0.5).movedim((-2, -1), (-4, -3))
    noise, strength, bias = fresh(n, 1, h, w, dtype=dtype), fresh(), fresh(o)
    rgb_weight, rgb_bias = fresh(*samples, 3, o, 1, 1, dtype=dtype, scale=o**-0.5), fresh(3, dtype=dtype)
    arguments = (x, weight, noise, strength, bias, "lrelu", 2**0.5, 2.0, rgb_weight, rgb_bias, 1.0)
    assert leaf.supports_drawn(*arguments) is None
    y, rgb = leaf.launch_drawn(*arguments, portable, blocks)
    assert torch.equal(y, leaf._conv3x3(x, weight, False, noise, strength, bias, 0.2, 2**0.5, 2.0, portable, blocks))
    assert_drawn(rgb, y, rgb_weight, rgb_bias, 1.0)


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("options", range(8))
def test_options_of_a_drawing(leaf: Any, options: int, channels: int) -> None:
    """1 to 4 outputs, weights of any strides for all or for each, with and without what may be missing."""
    n, o, h, w, outputs = 3, channels - 8 * (options % 2), 19, 135, options % 4 + 1
    x = fresh(n, channels, h, w, dtype=torch.float16)
    x = as_layout(x, "channels_last") if options % 3 else x
    weight = fresh(*([n] if options % 2 else []), o, channels, 3, 3, dtype=torch.float16, scale=0.05)
    noise = None if options < 2 else fresh(h, w) if options < 4 else fresh(n, 1, h, w, dtype=torch.float16)
    rgb_weight = fresh(n, o, 2 * outputs, 1, 1, dtype=torch.float16, scale=0.2).transpose(1, 2)[:, 1::2]
    if options in (1, 4, 6):
        rgb_weight = rgb_weight[2]
    elif options == 5:
        rgb_weight = rgb_weight[:1].expand(n, -1, -1, -1, -1)
    rgb_bias = None if options < 3 else fresh(outputs) if options < 6 else fresh(2 * outputs, dtype=torch.float16)[::2]
    clamp, rgb_clamp = (None if options in chosen else 0.7 for chosen in ((0, 3, 5), (2, 3, 7)))
    act = ("linear", "relu", "lrelu")[options % 3]
    epilogue = (noise, None if options % 2 else fresh(), None if options == 3 else fresh(o))
    y, rgb = leaf.launch_drawn(x, weight, *epilogue, act, 1.3, clamp, rgb_weight, rgb_bias, rgb_clamp)
    plain = leaf.launch(x, weight, *epilogue, None, 1, 1, act, 1.3, clamp)
    assert torch.equal(y, plain)
    assert y.stride() == plain.stride()
    assert rgb.shape == (n, outputs, h, w)
    assert_drawn(rgb, y, rgb_weight, rgb_bias, rgb_clamp)


@pytest.mark.parametrize("channels", [24, 32, 40, 64])
def test_nan_and_infinity_are_drawn(leaf: Any, channels: int) -> None:
    """Where they are, and nowhere else: not of the channels that fill up a tile, which have but the noise."""
    x = as_layout(fresh(1, channels, 16, 16, dtype=torch.float16), "channels_last")
    x[0, 3, 5, 6] = float("nan")
    weight = fresh(channels, channels, 3, 3, dtype=torch.float16, scale=0.02)
    noise = torch.zeros(16, 16, device="cuda")
    noise[12, 3], noise[2, 9] = float("inf"), -float("inf")
    rgb_weight = fresh(3, channels, 1, 1, dtype=torch.float16).abs()
    for clamp in (None, 4.0):
        _, rgb = leaf.launch_drawn(x, weight, noise, None, None, "lrelu", 1.0, clamp, rgb_weight, None, None)
        assert rgb[..., 4:7, 5:8].isnan().all()
        assert rgb.isnan().sum() == 3 * 9
        assert rgb[..., 12, 3].isposinf().all() == (clamp is None)
        assert rgb[..., 2, 9].isneginf().all() == (clamp is None)
        assert rgb.isinf().sum() == (6 if clamp is None else 0)


def test_drawn_in_a_graph(leaf: Any) -> None:
    """Captured, and replayed with other numbers."""
    x = as_layout(fresh(2, 32, 40, 72, dtype=torch.bfloat16), "channels_last")
    weight, rgb_weight = (fresh(2, o, 32, k, k, dtype=torch.bfloat16, scale=0.1) for o, k in ((32, 3), (3, 1)))
    arguments = (x, weight, None, None, None, "lrelu", 1.0, None, rgb_weight, None, None)
    leaf.launch_drawn(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, rgb = leaf.launch_drawn(*arguments)
    for tensor in (x, weight, rgb_weight):
        tensor.copy_(tensor.flip(0))
    graph.replay()
    wanted = leaf.launch_drawn(*arguments)
    assert torch.equal(y, wanted[0])
    assert torch.equal(rgb, wanted[1])


@pytest.mark.parametrize("channels", [32, 64])
def test_nan_and_infinity_stay(leaf: Any, channels: int) -> None:
    x = as_layout(fresh(1, channels, 16, 16, dtype=torch.bfloat16), "channels_last")
    x[0, 3, 5, 6], x[0, 4, 12, 12] = float("nan"), float("inf")
    weight = fresh(channels, channels, 3, 3, dtype=torch.bfloat16).abs()
    got = leaf.launch(x, weight, None, None, None, None, 1, 1, "lrelu", 1.0, None)
    assert got[0, :, 4:7, 5:8].isnan().all()
    assert got[0, :, 11:14, 11:14].isposinf().all()
    assert got.isfinite().sum() == channels * (256 - 18)


def test_reasons(leaf: Any) -> None:
    x, weight = fresh(1, 32, 8, 8, dtype=torch.float16), fresh(32, 32, 3, 3, dtype=torch.float16)

    def reason(x: Tensor, weight: Tensor, act: str = "linear", gain: float = 1.0) -> str | None:
        return leaf.supports(x, weight, None, None, None, None, 1, 1, act, gain, None)

    assert reason(x, weight) is None
    assert "float64" in reason(x.double(), weight.double())
    assert "swish" in reason(x, weight, act="swish")
    assert "gain" in reason(x, weight, gain=-1.0)
    assert "multiples of 8" in reason(x[:, :3], weight[:, :3])
    assert "3x3" in reason(x, weight[..., :1, :1])
    assert "padding 0" in leaf.supports_conv(x, weight, 1, 0, False)
    assert "stride 2" in leaf.supports_wgrad(x, x, 3, 2, 1, False)
