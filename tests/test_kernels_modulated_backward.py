"""The Triton leaf's way back through a modulated convolution: act_backward, wgrad, modulate and its gradient."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import naive
import pytest
import torch
from ahead_of_time import compiled_launches, meta
from grids import as_layout, assert_close_as_dtype
from interpreted import WHERE, leaf_on, needs_interpreter
from torch import Tensor
from torch.nn.grad import conv2d_weight

from clone_fast.reference.bias_act import bias_act

needs_gpu = pytest.mark.gpu


@contextmanager
def tf32(allowed: bool) -> Any:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def dtypes(device: str) -> list[torch.dtype]:
    """The interpreter multiplies bfloat16 as if its bits were an integer's."""
    return [torch.float16, torch.float32] + ([torch.bfloat16] if device == "cuda" else [])


def close(got: Tensor, want: Tensor, plain: Tensor | None = None) -> None:
    """By the rule of errors; without a plain result only the rounding of the dtype is allowed, for every summand."""
    if plain is None:
        plain = want.to(got.dtype)
    assert got.shape == want.shape
    assert_close_as_dtype(got.cpu(), naive.array(want.cpu()), plain.cpu())


def close_sum(got: Tensor, want: Tensor, terms: int) -> None:
    """A sum of positive terms: one rounding for each level of a tree in float32, and that of the result."""
    roundings = (2 + math.log2(terms)) * torch.finfo(torch.float32).eps + torch.finfo(got.dtype).eps / 2
    torch.testing.assert_close(got.double(), want, rtol=roundings, atol=0)


# wgrad: (N, Ca, Cb, H, W of b, k, stride, padding)
WGRADS = [
    (2, 8, 16, 5, 7, 3, 1, 1),  # odd sizes
    (1, 40, 24, 9, 3, 3, 1, 1),  # channels that fill no block
    (2, 64, 32, 4, 4, 3, 1, 1),  # as wide as a tile
    (1, 16, 16, 5, 16, 3, 1, 1),
    (1, 16, 16, 1, 1, 3, 1, 1),  # one pixel
    (2, 16, 8, 4, 5, 3, 2, 0),  # the up layer: a is [2H+1, 2W+1]
    (1, 8, 8, 3, 3, 3, 2, 1),
    *[(1, 8, cb, 2, 5, 3, stride, 2 - stride) for cb in (72, 136, 264) for stride in (1, 2)],  # rows of the table
    *[(1, 8, 264, 2, 17, 3, stride, 2 - stride) for stride in (1, 2)],
    (1, 73, 24, 3, 4, 3, 1, 1),  # copied for descriptors
    (1, 24, 67, 3, 3, 3, 2, 1),
    (2, 5, 3, 6, 6, 3, 1, 1),  # what no descriptor can describe
    (1, 5, 3, 3, 3, 3, 2, 1),
    (2, 16, 3, 6, 6, 1, 1, 0),  # ToRGB
    (2, 3, 16, 6, 6, 1, 1, 0),  # fromRGB
    (1, 8, 8, 6, 6, 5, 1, 2),
    (1, 8, 16, 3, 3, 1, 2, 0),
]


def wgrad_inputs(case: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    n, ca, cb, height, width, k, stride, padding = case
    size = [height, width] if stride == 1 else [stride * (s - 1) + k - 2 * padding for s in (height, width)]
    a, b = torch.randn([n, ca, *size], device=device), torch.randn([n, cb, height, width], device=device)
    return a.to(dtype), b.to(dtype)


def plain_wgrad(a: Tensor, b: Tensor, k: int, stride: int, padding: int) -> Tensor:
    """[N, Cb, Ca, k, k] by PyTorch, in the dtype of a."""
    shape = [b.shape[1], a.shape[1], k, k]
    pairs = zip(a.split(1), b.split(1), strict=True)
    return torch.stack([conv2d_weight(x, shape, y, stride=stride, padding=padding) for x, y in pairs])


def in_tf32(x: Tensor) -> Tensor:
    """float32 as the tensor cores read it: 10 bits of the mantissa. PyTorch may use more for some shapes."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def check_wgrad(case: tuple[int, ...], dtype: torch.dtype, layout: str, per_sample: bool, device: str) -> None:
    _, _, _, _, _, k, stride, padding = case
    a, b = (as_layout(t.cpu(), layout).to(device) for t in wgrad_inputs(case, dtype, device))
    module = leaf_on("_wgrad", device)
    assert module.supports_wgrad(a, b, k, stride, padding, per_sample) is None
    got = module.launch_wgrad(a, b, k, stride, padding, per_sample)
    assert got.dtype == torch.float32
    want = plain_wgrad(a.double(), b.double(), k, stride, padding)
    if dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        plain = plain_wgrad(in_tf32(a).double(), in_tf32(b).double(), k, stride, padding).float()
        plain = plain if per_sample else plain.sum(0)
    elif per_sample:
        plain = plain_wgrad(a, b, k, stride, padding).float()
    else:  # at once: cuDNN's algorithms, and their errors, depend on the batch
        plain = conv2d_weight(a, [b.shape[1], a.shape[1], k, k], b, stride=stride, padding=padding).float()
    close(got, want if per_sample else want.sum(0), plain)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("case", WGRADS, ids=str)
def test_wgrad(case: tuple[int, ...], device: str, nan_empty: None) -> None:
    for dtype, per_sample in itertools.product(dtypes(device), [True, False]):
        check_wgrad(case, dtype, "channels_last", per_sample, device)


@pytest.mark.parametrize("device", WHERE)
def test_nearest_tf32(device: str, nan_empty: None) -> None:
    module = leaf_on("_tf32", device)
    x = torch.randn(3, 5, 7, 9, device=device)
    x[0, 0, 0, :5] = torch.tensor([0.0, float("inf"), float("nan"), 1 + 2**-11, -1e-30])
    for image in (x, as_layout(x, "channels_last"), x[..., 1::2], x.transpose(1, 2)):
        mantissa, exponent = torch.frexp(image.double())
        want = torch.ldexp((mantissa.abs() * 2**11 + 0.5).floor() * mantissa.sign() / 2**11, exponent)
        torch.testing.assert_close(module.nearest(image).double(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", WHERE)
def test_wgrad_in_half_precision_is_rounded_once(device: str, nan_empty: None) -> None:
    module = leaf_on("_wgrad", device)
    cases = [(2, 8, 8, 5, 7, 3, 1, 1), (2, 16, 8, 4, 5, 3, 2, 0), (1, 16, 8, 9, 9, 1, 1, 0), (2, 5, 3, 6, 6, 3, 1, 1)]
    for case in cases:
        a, b = wgrad_inputs(case, torch.float16, device)
        for per_sample in True, False:
            whole = module.launch_wgrad(a, b, *case[5:], per_sample)
            got = module.launch_wgrad(a, b, *case[5:], per_sample, torch.float16)
            assert got.stride() == whole.stride()
            assert torch.equal(got, whole.half())


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_wgrad_of_other_layouts(layout: str, device: str, nan_empty: None) -> None:
    for case in (2, 8, 16, 5, 7, 3, 1, 1), (2, 16, 8, 4, 5, 3, 2, 0), (2, 16, 3, 6, 6, 1, 1, 0):
        check_wgrad(case, torch.float16, layout, True, device)


@pytest.mark.parametrize("device", WHERE)
def test_wgrad_with_tf32(device: str, nan_empty: None) -> None:
    with tf32(True):
        for case in WGRADS[:7]:
            check_wgrad(case, torch.float32, "channels_last", True, device)


@needs_gpu
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [32, 64, 128, 256, 512])
def test_wgrad_of_stylegan_layers(channels: int, stride: int, nan_empty: None) -> None:
    """Every block of the table, more than one split, and batches."""
    most = 4 * 1024 // channels
    for size, dtype, n in (most, torch.bfloat16, 1), (most // 2, torch.bfloat16, 3), (most // 2, torch.float32, 2):
        case = (n, channels // stride, channels, size, size, 3, stride, 2 - stride)
        for per_sample, allowed in (True, True), (False, False):
            with tf32(allowed):
                check_wgrad(case, dtype, "channels_last", per_sample, "cuda")


@needs_gpu
@pytest.mark.parametrize("channels", [32, 64, 512])
def test_wgrad_of_skips(channels: int, nan_empty: None) -> None:
    """1 x 1: the skips of a discriminator, and images."""
    for dtype in dtypes("cuda"):
        for ca, cb in (channels // 2, channels), (channels, 3), (3, channels):
            for allowed in False, True:
                with tf32(allowed):
                    check_wgrad((2, ca, cb, 40, 40, 1, 1, 0), dtype, "channels_last", False, "cuda")


@needs_gpu
def test_wgrad_of_random_arguments(nan_empty: None) -> None:
    generator = torch.Generator().manual_seed(0)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), [], generator=generator))]

    for _ in range(40):
        k, stride = pick((3, 1), (3, 2), (1, 1))
        channels, width = pick((8, 8), (32, 24), (3, 16)), pick(5, 33)  # each of these compiles a kernel of its own
        case = (pick(1, 2, 3, 5), *channels, pick(1, 2, 7, 16, 33), width, k, stride, k // 2 if stride == 1 else 0)
        dtype = pick(torch.float32, torch.float16, torch.bfloat16)
        with tf32(pick(False, True)):
            check_wgrad(case, dtype, pick("contiguous", "channels_last"), pick(False, True), "cuda")


@needs_interpreter
def test_wgrad_on_gpus_that_nobody_measured(monkeypatch: pytest.MonkeyPatch, nan_empty: None) -> None:
    module = leaf_on("_wgrad", "cpu")
    monkeypatch.setattr(module, "capability", lambda device: (8, 6))
    for case in WGRADS:
        check_wgrad(case, torch.float16, "channels_last", True, "cpu")


@pytest.mark.parametrize("device", WHERE)
def test_wgrad_reasons(device: str) -> None:
    module = leaf_on("_wgrad", device)
    x = torch.zeros(1, 8, 4, 4, device=device)
    assert module.supports_wgrad(x, x, 3, 1, 1, True) is None
    assert "float64" in module.supports_wgrad(x.double(), x.double(), 3, 1, 1, True)
    assert "one dtype" in module.supports_wgrad(x, x.half(), 3, 1, 1, True)
    assert "stride" in module.supports_wgrad(x, x, 3, 3, 1, True)


# act_backward
EPILOGUES = [
    ("lrelu", 2**0.5, 1.5),
    ("lrelu", 0.7, None),
    ("relu", 2.0, None),
    ("linear", 1.0, 0.7),
    ("linear", 1.0, None),
]
NOISES: dict[str, Callable[[int, int, int], list[int]]] = {
    "shared": lambda n, h, w: [h, w],
    "of one sample": lambda n, h, w: [1, 1, h, w],
    "of each sample": lambda n, h, w: [n, 1, h, w],
}
ACTS = [(2, 5, 4, 7), (1, 32, 8, 8), (3, 40, 3, 3), (1, 1, 1, 1), (2, 70, 1, 2)]


def both_passes(module: Any, *args: Any) -> tuple[Tensor | None, ...]:
    """g, dnoise, dstrength and dbias."""
    _, y, noise, strength, *_ = args
    g, *parts, _ = module.launch_act_backward(*args)
    return g, *module.launch_act_sums(*parts, noise, strength, y.dtype)


def check_act_backward(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, epilogue: tuple[Any, ...], noise: str | None, device: str
) -> None:
    act, gain, clamp = epilogue
    n, channels, height, width = shape
    clean = torch.randn(shape, device=device).to(dtype)
    bias = torch.randn([channels], device=device).to(dtype)
    # Positive, as is dy, so that no sum cancels.
    maps = None if noise is None else torch.rand(NOISES[noise](n, height, width), device=device).to(dtype)
    strength = torch.tensor(0.3, device=device)

    def forward(compute: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().to(compute).requires_grad_() for t in (clean, bias, strength)]
        x, b, s = leaves
        if maps is not None:
            leaves.append(maps.to(compute).requires_grad_())
            x = x + leaves[3] * s
        return bias_act(x, b, act=act, gain=gain, clamp=clamp), leaves

    y, leaves = forward(torch.float32)
    y64, leaves64 = forward(torch.float64)
    rounded = as_layout(y.detach().to(dtype).cpu(), layout).to(device)
    # Where rounding moves the result onto a kink, or over it, there are two right answers: no gradient comes in there.
    dy = torch.rand_like(clean) / (1 + n * height * width // 4096)  # so that no sum overflows float16
    dy[(y64 > 0) != (rounded > 0)] = 0
    if clamp is not None:
        dy[(y64.abs() < clamp) != (rounded.float().abs() < float(torch.tensor(clamp, dtype=dtype)))] = 0
    grad = as_layout(dy.cpu(), layout).to(device)
    module = leaf_on("_act_backward", device)
    wants = (True, True, True)
    args = (grad, rounded, maps, None if maps is None else strength, act, gain, clamp)
    assert module.supports_act_backward(*args, *wants) is None
    g, dnoise, dstrength, dbias = both_passes(module, *args, *wants)
    want = torch.autograd.grad(y64, leaves64, dy.double(), allow_unused=True)
    plain = torch.autograd.grad(y, leaves, dy.float(), allow_unused=True)
    assert g.dtype == dtype
    close(g, want[0], plain[0].to(dtype))
    close_sum(dbias, want[1], g.numel() // channels)
    if maps is None:
        assert dnoise is None
        assert dstrength is None
        return
    close_sum(dstrength, want[2], g.numel())
    assert dnoise.dtype == dtype
    close_sum(dnoise, want[3], channels * n)
    for wanted in (True, False, False), (False, True, False), (False, False, True), (False, False, False):
        some = both_passes(module, *args, *wanted)
        assert torch.equal(some[0], g)
        for got, whole, asked in zip(some[1:], (dnoise, dstrength, dbias), wanted, strict=True):
            assert (got is not None) == asked
            if asked:
                torch.testing.assert_close(got, whole)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", ACTS, ids=str)
def test_act_backward(shape: tuple[int, ...], layout: str, device: str, nan_empty: None) -> None:
    for dtype in torch.float32, torch.float16:
        for epilogue in EPILOGUES:
            check_act_backward(shape, dtype, layout, epilogue, None, device)
        for noise in NOISES:
            check_act_backward(shape, dtype, layout, EPILOGUES[0], noise, device)


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 32, 256, 255), (3, 512, 16, 16), (1, 64, 512, 512), (2, 1100, 2, 3)], ids=str)
def test_act_backward_of_large_tensors(shape: tuple[int, ...], layout: str, nan_empty: None) -> None:
    for dtype, noise in itertools.product([torch.float32, torch.float16, torch.bfloat16], [None, *NOISES]):
        check_act_backward(shape, dtype, layout, EPILOGUES[0], noise, "cuda")


@pytest.mark.parametrize("device", WHERE)
def test_act_backward_reasons(device: str) -> None:
    supports = leaf_on("_act_backward", device).supports_act_backward
    x = torch.zeros(1, 8, 4, 4, device=device)
    assert supports(x, x, None, None, "lrelu", 1.0, None, False, False, True) is None
    assert "'swish'" in supports(x, x, None, None, "swish", 1.0, None, False, False, True)
    assert "float64" in supports(x.double(), x.double(), None, None, "lrelu", 1.0, None, False, False, True)
    assert "gain" in supports(x, x, None, None, "lrelu", -1.0, None, False, False, True)


# modulate
MODULATES = [(8, 24, 3, 2), (16, 32, 1, 1), (5, 7, 5, 3), (1, 16, 3, 2)]  # O, I, k, N


def modulated(weight: Tensor, styles: Tensor, demodulate: bool, eps: float, normalise: bool) -> Tensor:
    """[N, O, I, k, k] as the reference modulates, in the dtype of the arguments; no gradient to the largest of them."""
    if normalise:
        largest = weight.detach().abs().amax(dim=[-3, -2, -1], keepdim=True)
        weight = weight * ((weight.shape[-3] * weight.shape[-1] ** 2) ** -0.5 / largest)
        styles = styles / styles.detach().abs().amax(dim=1, keepdim=True)
    w = weight * styles[:, None, :, None, None]
    return w * (w.square().sum(dim=[2, 3, 4], keepdim=True) + eps).rsqrt() if demodulate else w


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("case", MODULATES, ids=str)
def test_modulate_and_its_gradient(
    case: tuple[int, ...], own: bool, demodulate: bool, device: str, nan_empty: None
) -> None:
    o, i, k, n = case
    module = leaf_on("_modulate", device)
    cases = itertools.product([torch.float32, torch.float16, torch.bfloat16], ["contiguous", "channels_last"])
    for (dtype, layout), eps in itertools.product(cases, [1e-8, 1e-3]):
        weight = as_layout(torch.randn(n * o if own else o, i, k, k), layout).to(device)
        weight = weight.unflatten(0, (n, o)) if own else weight
        styles = (torch.randn(n, i) + 1).to(device)
        normalise = demodulate and dtype == torch.float16
        exact = [t.double().requires_grad_() for t in (weight, styles)]
        plain = [t.clone().requires_grad_() for t in (weight, styles)]
        want, same = (modulated(*leaves, demodulate, eps, normalise) for leaves in (exact, plain))
        got = module.modulate(weight, styles, demodulate, eps, dtype)
        assert got.permute(0, 3, 4, 1, 2).is_contiguous()
        close(got, want.detach(), same.detach().to(dtype))
        dw = torch.randn_like(want).to(dtype)
        for grad in dw, dw.float().permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2):
            found = module.modulate_backward(grad, weight, styles, demodulate, eps, dtype)
            wants = torch.autograd.grad(want, exact, dw.double(), retain_graph=True)
            plains = torch.autograd.grad(same, plain, dw.float(), retain_graph=True)
            for result, exactly, plainly in zip(found, wants, plains, strict=True):
                close(result, exactly, plainly)
                cosine = torch.nn.functional.cosine_similarity(result.flatten().double(), exactly.flatten(), dim=0)
                assert cosine > 1 - 1e-6


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_weight_without_styles_is_put_in_order(layout: str, device: str, nan_empty: None) -> None:
    module = leaf_on("_modulate", device)
    for dtype in torch.float32, torch.float16:
        weight = as_layout(torch.randn(5, 24, 3, 3), layout).to(device, dtype)
        got = module.modulate(weight, None, False, 0.0, torch.float16)
        assert got.permute(2, 3, 0, 1).is_contiguous()
        assert torch.equal(got, weight.half())
        dw = torch.randn_like(got)
        dweight, dstyles = module.modulate_backward(dw, weight, None, False, 0.0, torch.float16)
        assert dstyles is None
        assert torch.equal(dweight, dw.to(dtype))
        assert dweight.stride() == weight.stride()


@pytest.mark.parametrize("device", WHERE)
def test_modulate_in_float16_neither_overflows_nor_vanishes(device: str, nan_empty: None) -> None:
    module = leaf_on("_modulate", device)
    weight, styles = torch.randn(4, 64, 3, 3, device=device), torch.randn(2, 64, device=device)
    want = modulated(weight.double(), styles.double(), True, 1e-8, True)
    for size in 1e-4, 1e4:
        got = module.modulate(weight * size, styles * size, True, 1e-8, torch.float16)
        close(got, want, want.half())
    assert not module.modulate(weight * 0, styles, True, 1e-8, torch.float16).any()
    for grad in module.modulate_backward(got, weight * 0, styles, True, 1e-8, torch.float16):
        assert grad.isfinite().all()


@needs_gpu
def test_modulate_of_stylegan_layers(nan_empty: None) -> None:
    module = leaf_on("_modulate", "cuda")
    for o, i, k, n in (512, 512, 3, 4), (32, 64, 3, 1), (3, 512, 1, 2), (64, 1024, 3, 1):
        weight, styles = torch.randn(o, i, k, k, device="cuda"), torch.randn(n, i, device="cuda") + 1
        exact = [t.double().requires_grad_() for t in (weight, styles)]
        plain = [t.clone().requires_grad_() for t in (weight, styles)]
        want, same = (modulated(*leaves, k == 3, 1e-8, False) for leaves in (exact, plain))
        close(module.modulate(weight, styles, k == 3, 1e-8, torch.bfloat16), want.detach(), same.detach().bfloat16())
        dw = torch.randn_like(same)
        found = module.modulate_backward(dw, weight, styles, k == 3, 1e-8, torch.bfloat16)
        wants, plains = torch.autograd.grad(want, exact, dw.double()), torch.autograd.grad(same, plain, dw)
        for triple in zip(found, wants, plains, strict=True):
            close(*triple)


@needs_gpu
def test_backward_is_captured_and_deterministic() -> None:
    """A graph replays on new inputs what a plain call computes, bit for bit."""
    wgrad, act = leaf_on("_wgrad", "cuda"), leaf_on("_act_backward", "cuda")
    inputs = [torch.randn(2, 32, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    dy, y = (t.contiguous(memory_format=torch.channels_last) for t in inputs)
    noise, strength = torch.randn(64, 64, device="cuda"), torch.tensor(0.5, device="cuda")

    def step() -> list[Tensor]:
        found = both_passes(act, dy, y, noise, strength, "lrelu", 2**0.5, 1.0, True, True, True)
        return [*found, wgrad.launch_wgrad(y, found[0], 3, 1, 1, True)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        dy.normal_()
        y.normal_()
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


# ahead of time
def every_launch() -> None:
    """Each block of the tuning tables, and each shape of the other kernels' tiles."""
    wgrad, act, modulate = (
        importlib.import_module(f"clone_fast.kernels._{name}") for name in ("wgrad", "act_backward", "modulate")
    )
    torch.backends.cudnn.allow_tf32 = True

    def image(channels: int, size: int, dtype: torch.dtype) -> Tensor:
        return meta(1, channels, size, size, dtype=dtype, channels_last=True)

    for dtype in torch.bfloat16, torch.float32:
        for channels, size in (32, 1024), (64, 512), (128, 256), (512, 64), (512, 4):
            for a, b, k, stride, padding in (
                (image(channels, size, dtype), image(channels, size, dtype), 3, 1, 1),
                (image(channels // 2, 2 * size + 1, dtype), image(channels, size, dtype), 3, 2, 0),
                (image(channels // 2, size, dtype), image(channels, size, dtype), 1, 1, 0),
                (image(channels, size, dtype), image(3, size, dtype), 1, 1, 0),
            ):
                if wgrad.wgrad_route(a, b, k, stride, padding, True) != "cudnn":
                    wgrad.launch_wgrad(a, b, k, stride, padding, True)
            y = image(channels, size, dtype)
            both_passes(act, y, y, meta(size, size), meta(), "lrelu", 2**0.5, 256.0, True, True, True)
    for o, i, k in (512, 512, 3), (32, 64, 3), (3, 512, 1):
        weight, styles = meta(o, i, k, k), meta(2, i)
        w = modulate.modulate(weight, styles, k == 3, 1e-8, torch.float16)
        modulate.modulate_backward(w, weight, styles, k == 3, 1e-8, torch.float16)


def test_compiles_for_sm_90() -> None:
    kernels = compiled_launches(__file__, "every_launch")
    assert {kernel.name for kernel in kernels} >= {"_wgrad_tiles", "_wgrad_pointers", "_act_backward_kernel"}
    for kernel in kernels:
        assert kernel.spilled <= 32, kernel  # a few registers outside the loop
