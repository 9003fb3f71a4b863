"""The CUDA leaf of modulated_conv2d with up=2 and down=2: small shapes at the edges of tiles, fit for a sanitizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grids import as_layout
from spec_leaf import finish as spec_finish
from torch import Tensor

from clone_fast.ops.registration import layout_of
from clone_fast.reference.bias_act import bias_act
from clone_fast.reference.modulated_conv2d import downsampling_padding, resampled_conv2d
from clone_fast.reference.upfirdn2d import upfirdn2d

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

HALF = [torch.bfloat16, torch.float16]
# up and [N, I, O, H, W]: one pixel; one strip; one pixel more than a strip; several strips, segments and blocks of
# channels; every depth of the input's ring
SHAPES = [
    (2, 1, 16, 16, 1, 1),
    (2, 2, 64, 32, 8, 30),
    (2, 1, 64, 64, 9, 31),
    (2, 3, 32, 48, 21, 64),
    (2, 1, 48, 16, 70, 3),
    (2, 2, 32, 32, 13, 35),
    (2, 1, 48, 80, 12, 61),
    (2, 2, 64, 64, 33, 47),
    (1, 1, 32, 16, 2, 2),
    (1, 1, 64, 64, 16, 62),
    (1, 2, 64, 80, 18, 64),
    (1, 3, 32, 48, 42, 130),
    (1, 1, 64, 128, 140, 6),
]


@pytest.fixture
def leaf() -> Any:
    module = pytest.importorskip("clone_fast.cuda._resampled_conv", reason="needs clone_fast._C")
    if torch.cuda.get_device_capability() != module.COMPUTE_CAPABILITY:
        pytest.skip("needs compute capability 9.0")
    return module


def fresh(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def smooth(dtype: torch.dtype = torch.float32) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cuda") / 8
    return taps.outer(taps).to(dtype)


def convolve(x: Tensor, weight: Tensor, f: Tensor, up: int = 2) -> Tensor:
    """The reference, with a weight for all or one for each sample; up=1 is down=2."""
    weights = weight.unbind() if weight.ndim == 5 else [weight] * len(x)
    pairs = zip(x.split(1), weights, strict=True)
    return torch.cat([resampled_conv2d(one, w, up=up, down=3 - up, f=f) for one, w in pairs])


def assert_close(got: Tensor, want: Tensor, plain: Tensor, peak: Tensor | None = None) -> None:
    """The rule of errors: at most twice that of the plain computation in the same dtype, plus one rounding of `peak`.

    The peak is the largest result, unless a clamp hides it: sums are rounded before.
    """
    assert got.shape == want.shape
    error, peak = (got.double() - want).abs().max(), want.abs().max() if peak is None else peak
    allowed = 2 * (plain.double() - want).abs().max() + torch.finfo(got.dtype).eps * peak
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_fused(leaf: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    up, n, i, o, h, w = shape
    height, width = h * up * up // 2, w * up * up // 2
    x = as_layout(fresh(n, i, h, w, dtype=dtype), "channels_last")
    weight = fresh(n, 3, 3, o, i, dtype=dtype, scale=(9 * i) ** -0.5).permute(0, 3, 4, 1, 2)
    noise, strength, bias, f = fresh(n, 1, height, width, dtype=dtype), fresh(), fresh(o), smooth()
    arguments = (x, weight, noise, strength, bias, f, up, 3 - up, "lrelu", 2**0.5, 2.0)
    assert leaf.supports(*arguments) is None
    got = leaf.launch(*arguments)

    def spec(kind: torch.dtype) -> Tensor:
        y = convolve(x.to(kind), weight.to(kind), f, up) + noise.to(kind) * strength.to(kind)
        return bias_act(y, bias.to(kind), act="lrelu", gain=2**0.5, clamp=2.0)

    assert got.dtype == dtype
    assert_close(got, spec(torch.float64), spec(dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] == 1], ids=str)
def test_what_the_convolution_reads_is_kept(leaf: Any, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Every pixel of it, by whichever block, and nothing else changes."""
    up, n, i, o, h, w = shape
    x = as_layout(fresh(n, i, h, w, dtype=dtype), layout)
    weight, f = fresh(o, i, 3, 3, dtype=dtype, scale=(9 * i) ** -0.5), smooth() * fresh(4, 4).abs()
    arguments = (x, weight, None, None, fresh(o), f, up, 3 - up, "lrelu", 2**0.5, 2.0)
    assert (leaf.supports_kept(*arguments) is None) == (i == 32)
    y, filtered = leaf.launch_kept(*arguments)
    assert torch.equal(y, leaf.launch(*arguments))
    padding = downsampling_padding(f, 3)
    assert filtered.is_contiguous(memory_format=layout_of(x))
    plain = upfirdn2d(x, f, padding=padding)
    assert_close(filtered, upfirdn2d(x.double(), f.double(), padding=padding), plain)
    assert leaf.supports_kept(*arguments[:6], 2, 1, *arguments[8:]) is not None


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["any", "outer product", "one-dimensional", "zero"])
@pytest.mark.parametrize("up", [2, 1])
def test_filters(leaf: Any, up: int, kind: str, dtype: torch.dtype) -> None:
    """Taps of any value, which half precision can't hold, and neither symmetric nor separable."""
    f = {
        "any": fresh(4, 4, scale=0.3),
        "outer product": fresh(4).outer(fresh(4)) * 0.3,
        "one-dimensional": fresh(4, scale=0.5),
        "zero": fresh(4, 4, scale=0.0),
    }[kind]
    x = as_layout(fresh(1, 64, 16, 34, dtype=dtype), "channels_last")
    weight = fresh(32, 64, 3, 3, dtype=dtype, scale=0.04)
    got = leaf.launch(x, weight, None, None, None, f, up, 3 - up, "linear", 1.0, None)
    assert_close(got, convolve(x.double(), weight.double(), f, up), convolve(x, weight, f, up))


@pytest.mark.parametrize("up", [2, 1])
@pytest.mark.parametrize("options", range(8))
def test_options(leaf: Any, options: int, up: int) -> None:
    """Every choice of act, noise and weight appears, in either layout."""
    act = ("linear", "relu", "lrelu")[options % 3]
    n, i, o, h, w = 2, 48 if up == 2 else 32, 32, 12, 38 - 2 * (options % 2)
    x = fresh(n, i, h, w, dtype=torch.float16)
    if options // 3 == 1:
        x = as_layout(x, "channels_last")
    elif options // 3 == 2:
        x = fresh(n, i, h, 2 * w, dtype=torch.float16)[..., 1::2]
    per_sample, flat = options % 2 == 1, options in (2, 5)
    weight = fresh(*([n] if per_sample else []), o, i, 3, 3, dtype=torch.float16, scale=0.05)
    size = (h * up * up // 2, w * up * up // 2)
    noise = None if options == 0 else fresh(*size) if flat else fresh(1, 1, *size, dtype=torch.float16)
    strength = None if options < 3 else fresh().to(torch.float16)
    bias = None if options % 4 == 0 else fresh(o, dtype=torch.float16)
    clamp, f = None if options < 4 else 0.5, smooth()
    got = leaf.launch(x, weight, noise, strength, bias, f, up, 3 - up, act, 0.7, clamp)

    def spec(kind: torch.dtype) -> Tensor:
        y = convolve(x.to(kind), weight.to(kind), f, up)
        if noise is not None:
            y = y + noise.to(kind) * (1.0 if strength is None else strength.to(kind))
        return bias_act(y, None if bias is None else bias.to(kind), act=act, gain=0.7, clamp=clamp)

    assert got.is_contiguous(memory_format=torch.channels_last if options // 3 == 1 else torch.contiguous_format)
    assert_close(got, spec(torch.float64), spec(torch.float16))


def test_nan_stays_nearby_downwards(leaf: Any) -> None:
    x = as_layout(fresh(1, 64, 32, 40, dtype=torch.bfloat16), "channels_last")
    x[0, 40, 9, 12] = float("nan")
    weight = fresh(32, 64, 3, 3, dtype=torch.bfloat16)
    got = leaf.launch(x, weight, None, None, None, smooth(), 1, 2, "lrelu", 1.0, 1.0)
    assert got[0, :, 3:6, 5:8].isnan().all()  # what the pixel has a part in
    outside = torch.ones_like(got, dtype=torch.bool)
    outside[0, :, 2:7, 3:8] = False  # and what the rest of those blocks of 4 x 4 filtered pixels has
    assert got[outside].isfinite().all()


def test_nan_stays_nearby(leaf: Any) -> None:
    x = as_layout(fresh(1, 64, 16, 40, dtype=torch.bfloat16), "channels_last")
    x[0, 3, 5, 6] = float("nan")
    weight = fresh(32, 64, 3, 3, dtype=torch.bfloat16)
    got = leaf.launch(x, weight, None, None, None, smooth(), 2, 1, "lrelu", 1.0, 1.0)
    assert got[0, :, 8:14, 10:16].isnan().all()  # what the pixel has a part in
    outside = torch.ones_like(got, dtype=torch.bool)
    outside[0, :, 8:16, 8:16] = False  # and the rest of those blocks of 4 x 4 pixels
    assert got[outside].isfinite().all()


@pytest.mark.parametrize("up", [2, 1])
def test_replay_reads_again(leaf: Any, up: int) -> None:
    """A captured graph computes with what the tensors hold when it is replayed, the filter included."""
    x = as_layout(fresh(1, 64, 20, 20, dtype=torch.bfloat16), "channels_last")
    weight, f = fresh(32, 64, 3, 3, dtype=torch.bfloat16, scale=0.04), smooth()
    arguments = (x, weight, None, None, None, f, up, 3 - up, "lrelu", 1.0, None)
    leaf.launch(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = leaf.launch(*arguments)
    for tensor in (x, weight, f):
        tensor.copy_(torch.randn_like(tensor) * tensor.std())
    graph.replay()
    assert torch.equal(y, leaf.launch(*arguments))


def test_reasons(leaf: Any) -> None:
    x, weight, f = fresh(1, 32, 8, 8, dtype=torch.float16), fresh(32, 32, 3, 3, dtype=torch.float16), smooth()

    def reason(
        x: Tensor, weight: Tensor, f: Tensor | None, up: int = 2, down: int = 1, act: str = "linear", gain: float = 1.0
    ) -> str:
        return str(leaf.supports(x, weight, None, None, None, f, up, down, act, gain, None))

    assert reason(x, weight, f) == "None"
    assert "float64" in reason(x.double(), weight.double(), f)
    assert "float32" in reason(x.float(), weight.float(), f)
    assert "swish" in reason(x, weight, f, act="swish")
    assert "gain" in reason(x, weight, f, gain=-1.0)
    assert "multiples of 16" in reason(x[:, :24], weight[:, :24], f)
    assert "3x3" in reason(x, weight[..., :1, :1], f)
    assert "[4, 4]" in reason(x, weight, f[:3])
    assert "[4, 4]" in reason(x, weight, None)
    assert "up=1" in reason(x, weight, f, up=1)
    assert reason(x, weight, f, up=1, down=2) == "None"
    assert "32 or 64" in reason(x[:, :16], weight[:, :16], f, up=1, down=2)
    assert reason(x.repeat(1, 2, 1, 1), weight.repeat(5, 2, 1, 1), f) == "None"
    assert "at most 64" in reason(x.repeat(1, 3, 1, 1), weight.repeat(1, 3, 1, 1), f)


# ---- the second pass of two: filter, noise, bias, activation, clamp ------------------------------------------------


@pytest.fixture
def finish() -> Any:
    return pytest.importorskip("clone_fast.cuda._finish", reason="needs clone_fast._C")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(2, 8, 7, 9), (2, 5, 11, 4), (1, 512, 9, 9), (3, 136, 21, 30), (2, 64, 13, 70), (1, 96, 37, 40)]
)
@pytest.mark.parametrize("form", ["map", "each", "none"])
def test_finish(finish: Any, form: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    n, c, h, w = shape
    padding = [2, 1, 1, 1]
    size = (h - 1, w)
    z, bias = as_layout(fresh(*shape, dtype=dtype), layout), fresh(c, dtype=dtype) if form != "none" else None
    noise = {"map": fresh(*size, dtype=dtype), "each": fresh(n, 1, *size, dtype=dtype), "none": None}[form]
    strength = fresh(dtype=dtype) if form == "each" else None
    act, clamp = {"map": ("relu", None), "each": ("lrelu", 2.0), "none": ("linear", None)}[form]
    for f in (smooth(), fresh(4, 4, scale=0.3), fresh(4, scale=0.5), fresh(4, 4, scale=0.0)):
        arguments = (z, f, padding, 4.0, noise, strength, bias, act, 1.3, clamp)
        assert finish.supports_finish(*arguments) is None
        got = finish.launch_finish(*arguments)
        want, plain, unclamped = (
            spec_finish(*(t.to(kind) if isinstance(t, Tensor) and t is not f else t for t in values))
            for kind, values in [
                (torch.float64, arguments),
                (dtype, arguments),
                (torch.float64, (*arguments[:-1], None)),
            ]
        )
        assert got.dtype == dtype
        assert got.stride() == z.new_empty(want.shape).to(memory_format=layout_of(z)).stride()
        assert_close(got, want, plain, unclamped.abs().max() if dtype == torch.float32 else None)


@pytest.mark.parametrize("channels", [8, 32])
def test_finish_keeps_nan(finish: Any, channels: int) -> None:
    z = as_layout(fresh(1, channels, 9, 40, dtype=torch.bfloat16), "channels_last")
    z[0, 3, 4, 4] = float("nan")
    y = finish.launch_finish(z, smooth(), [1, 1, 1, 1], 4.0, None, None, None, "lrelu", 1.0, 0.5)
    assert y.isnan().sum() == 16
