"""The Triton leaf's convolutions: bare, and fused with resampling, noise, bias and activation, against float64.

On a CPU the kernels run interpreted on small shapes, and all variants are compiled ahead of time; on a GPU they run on
the shapes of StyleGAN2 too, which is where the kernel with divided warps and the block sizes of its table come in.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import compiled_launches, meta
from grids import as_layout
from interpreted import INTERPRETS, WHERE, interpreted_leaf, leaf_on, needs_interpreter
from spec_leaf import conv_finish as spec_conv_finish
from spec_leaf import finish as spec_finish
from torch import Tensor

from clone_fast.reference.bias_act import bias_act
from clone_fast.reference.modulated_conv2d import resampled_conv2d

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter multiplies bfloat16 as if its bits were an integer's.
RUNS = [pytest.param(*where.values, dtype, marks=where.marks, id=f"{where.values[0]}-{dtype}") for where in WHERE
        for dtype in DTYPES if (where.values[0], dtype) != ("cpu", torch.bfloat16)]  # fmt: skip
CONVOLUTIONS = [(1, 1, False), (1, 1, True), (2, 0, False), (2, 0, True), (2, 1, False), (2, 1, True)]

pytestmark = pytest.mark.usefixtures("nan_empty")

leaf = functools.partial(leaf_on, "modulated_conv2d")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def random(device: str, dtype: torch.dtype, *shape: int, layout: str = "contiguous") -> Tensor:
    """Normal numbers; strided: every other row and all but one column of something larger, transposed."""
    if layout == "strided":
        n, c, h, w = shape
        return torch.randn(n, c, 2 * w, h + 1).to(device, dtype)[:, :, ::2, 1:].transpose(2, 3)
    return as_layout(torch.randn(shape), layout).to(device, dtype)


def conv(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    """The definition, in the tensors' dtype."""
    if weight.ndim == 5:
        pairs = zip(x.split(1), weight, strict=True)
        return torch.cat([conv(image, own, stride, padding, transposed) for image, own in pairs])
    if transposed:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=stride, padding=padding)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def fused(x: Tensor, weight: Tensor, noise: Any, strength: Any, bias: Any, f: Any, options: dict[str, Any]) -> Tensor:
    """The definition of `launch`."""
    weights = weight if weight.ndim == 5 else weight.expand(x.shape[0], *weight.shape)
    resampling = {"up": options["up"], "down": options["down"], "f": f}
    images = [resampled_conv2d(image, own, **resampling) for image, own in zip(x.split(1), weights, strict=True)]
    y = torch.cat(images)
    if noise is not None:
        y = y + (noise if strength is None else noise * strength)
    return bias_act(y, bias, act=options["act"], gain=options["gain"], clamp=options["clamp"])


def assert_by_rule(got: Tensor, want: Tensor, plain: Tensor) -> None:
    """The rule of errors: at most twice that of plain PyTorch in this dtype, plus one rounding; written everywhere."""
    assert got.shape == want.shape
    assert got.dtype == plain.dtype
    error = (got.double() - want).abs().max()
    allowed = 2 * (plain.double() - want).abs().max() + torch.finfo(got.dtype).eps * want.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def same_layout(y: Tensor, x: Tensor) -> bool:
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def check_conv(device: str, x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> None:
    module = leaf(device)
    assert module.supports_conv(x, weight, stride, padding, transposed) is None
    got = module.launch_conv(x, weight, stride, padding, transposed)
    want = conv(x.double(), weight.double(), stride, padding, transposed)
    assert_by_rule(got, want, conv(x, weight, stride, padding, transposed))
    assert same_layout(got, x)


@pytest.mark.parametrize(("device", "dtype"), RUNS)
@pytest.mark.parametrize(("stride", "padding", "transposed"), CONVOLUTIONS)
def test_convolution(device: str, dtype: torch.dtype, stride: int, padding: int, transposed: bool) -> None:
    for k, per_sample, layout in [(3, True, "channels_last"), (3, False, "contiguous"), (1, True, "strided")]:
        for n, i, o, height, width in [(2, 16, 8, 4, 6), (1, 3, 5, 5, 3), (2, 9, 24, 7, 3)]:
            x = random(device, dtype, n, i, height, width, layout=layout)
            weight = random(device, dtype, *([n] if per_sample else []), o, i * k * k, 1, 1).reshape(
                [*([n] if per_sample else []), o, i, k, k]
            )
            check_conv(device, x, weight, stride, min(padding, k // 2), transposed)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 2)])
def test_edges_of_one_pixel(device: str, size: tuple[int, int]) -> None:
    for stride, padding, transposed in CONVOLUTIONS:
        x = random(device, torch.float16, 1, 8, *size, layout="channels_last")
        weight = random(device, torch.float16, 8, 8, 3, 3)
        if not transposed and min(size) + 2 * padding < 3:
            continue
        check_conv(device, x, weight, stride, padding, transposed)


@pytest.mark.parametrize(("device", "dtype"), RUNS)
def test_every_memory_order_of_a_weight(device: str, dtype: torch.dtype) -> None:
    """As PyTorch keeps it, channels_last, as `modulate` returns it, transposed, and a view with odd strides."""
    x = random(device, dtype, 2, 16, 4, 4, layout="channels_last")
    shared = random(device, dtype, 16, 16, 3, 3)
    modulated = random(device, dtype, 2 * 3, 3, 16, 16).reshape(2, 3, 3, 16, 16).permute(0, 3, 4, 1, 2)
    wide = random(device, dtype, 16, 17, 3, 4)[:, 1:, :, :3]
    for weight in (shared, shared.contiguous(memory_format=torch.channels_last), modulated, wide, modulated[:1]):
        for order in (weight, weight.transpose(-3, -4), weight.flip(-1, -2)):
            check_conv(device, x[: order.shape[0]] if order.ndim == 5 else x, order, 1, 1, False)


@pytest.mark.parametrize(("device", "dtype"), RUNS)
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("k", [1, 3])
def test_fused_forward(device: str, dtype: torch.dtype, up: int, down: int, k: int) -> None:
    module = leaf(device)
    filters = [torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64]
    filters += [torch.rand(3) / 2, torch.rand(2, 5) / 4] if up * down > 1 else []
    acts = [("lrelu", 1.3, 2.0), ("relu", 0.7, None), ("linear", 1.0, 1.5)]
    for case, (f, layout) in enumerate(itertools.product(filters, ["channels_last", "contiguous"])):
        n, i, o, height, width = 2, 16, 8, 4, 6
        act, gain, clamp = acts[case % 3]
        size = (height * up // down, width * up // down)
        x = random(device, dtype, n, i, height, width, layout=layout)
        weight = random(device, dtype, n, o, i * k * k, 1).reshape(n, o, i, k, k) / (i**0.5 * k)
        weight = weight[0] if case % 2 else weight
        noise = [random(device, dtype, n, 1, *size), random(device, dtype, 1, 1, *size)[0, 0], None][case % 3]
        strength = None if case % 2 else torch.tensor(0.7, dtype=dtype, device=device)
        bias = None if case % 3 == 1 else random(device, dtype, o, 1, 1, 1).reshape(o)
        f = f.to(device)
        options = {"up": up, "down": down, "act": act, "gain": gain, "clamp": clamp}
        args = (x, weight, noise, strength, bias, f, *options.values())
        assert module.supports(*args) is None
        got = module.launch(*args)
        exact = [None if t is None else t.double() for t in args[:6]]
        assert_by_rule(got, fused(*exact, options), fused(*args[:6], options))
        assert same_layout(got, x)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("halves", [0, 1, 2])
def test_copy_engine(device: str, halves: int) -> None:
    """Tiles that come through tensor descriptors, with the sum whole and split, and more tiles than fit the image."""
    if halves and device == "cpu":
        pytest.skip("Triton does not interpret the kernel with divided warps")
    leaf(device)
    convs, finish, tuning = (
        importlib.import_module(f"clone_fast.kernels.{n}") for n in ("_conv", "_fir_epilogue", "_conv_tuning")
    )
    tile = (8, 8) if halves else (1, 64)
    for (stride, padding, transposed), split in itertools.product(CONVOLUTIONS, [1, 3]):
        x = random(device, torch.float16, 2, 24, 5, 7, layout="channels_last")
        shared = random(device, torch.float16, 40, 24, 3, 3).contiguous(memory_format=torch.channels_last)
        modulated = random(device, torch.float16, 6, 3, 24, 40).reshape(2, 3, 3, 24, 40).permute(0, 4, 3, 1, 2)
        for weight in (shared, modulated):
            geometry = convs.Geometry.of(x, 3, stride, padding, transposed)
            y = torch.empty([2, 40, geometry.height, geometry.width], dtype=x.dtype, device=device)
            config = tuning.Config(*tile, 32, 16, 4, 2, split, halves)
            parts = convs.convolve(x, weight, geometry, y, config=config)
            y = y if parts is y else finish.fir(parts, y)
            want = conv(x.double(), weight.double(), stride, padding, transposed)
            assert_by_rule(y, want, conv(x, weight, stride, padding, transposed))


@pytest.mark.parametrize("device", WHERE)
def test_reasons(device: str) -> None:
    module = leaf(device)
    x, weight = random(device, torch.float32, 1, 4, 3, 3), random(device, torch.float32, 4, 4, 3, 3)
    assert "reference only" in module.supports_conv(x.double(), weight.double(), 1, 1, False)
    assert "dtype" in module.supports_conv(x.half(), weight, 1, 1, False)
    assert "strides" in module.supports_conv(x, weight, 3, 1, False)
    assert "activations" in module.supports(x, weight, None, None, None, None, 1, 1, "tanh", 1.0, None)
    assert "gain" in module.supports(x, weight, None, None, None, None, 1, 1, "relu", -1.0, None)


def test_nan_and_infinity_pass_through() -> None:
    module = leaf("cpu" if INTERPRETS else "cuda")
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], device="cpu" if INTERPRETS else "cuda")
    weight = torch.ones(1, 1, 1, 1, device=x.device)
    args = (weight, None, None, None, None, 1, 1)
    y = module.launch(x.reshape(1, 1, 1, 4), *args, "relu", 1.0, 2.0).flatten()
    assert y[0].isnan()
    assert y[1:].tolist() == [2.0, 0.0, 1.0]


SHAPES = [(4, 512), (8, 512), (16, 512), (32, 512), (64, 512), (128, 256), (256, 128), (512, 64), (1024, 32)]
SHAPES += [(4, 513), (40, 100)]  # behind a minibatch standard deviation; and what else does not end on 16 bytes


@pytest.mark.gpu
@pytest.mark.parametrize(("resolution", "channels"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_stylegan2(resolution: int, channels: int, dtype: torch.dtype) -> None:
    """Every configuration that the table or the rules choose for StyleGAN2, forward and towards the input."""
    with tf32(True):
        for n, (stride, padding, transposed) in itertools.product([1, 3], [*CONVOLUTIONS[:4]]):
            if n * resolution > 1024:
                continue
            x = torch.randn(n, channels, resolution, resolution, device="cuda", dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.randn(n, 3, 3, channels, channels, device="cuda", dtype=dtype).permute(0, 3, 4, 1, 2)
            got = leaf("cuda").launch_conv(x, weight, stride, padding, transposed)
            with tf32(False):
                want = conv(x.float(), weight.float(), stride, padding, transposed)
            plain = conv(x, weight, stride, padding, transposed)
            assert_by_rule(got, want.double(), plain)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """float32 with ten bits of mantissa, to nearest even, in float64."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32).double()


TF32_CONFIGS = [
    {"bh": 1, "bw": 64, "bn": 32, "bk": 32, "warps": 4, "stages": 3, "split": 2, "halves": 1},
    {"bh": 8, "bw": 16, "bn": 64, "bk": 32, "warps": 4, "stages": 3, "halves": 2},
    {"bh": 8, "bw": 64, "bn": 32, "bk": 32, "warps": 4, "stages": 2, "halves": 2, "halo": True},
    {"bh": 8, "bw": 64, "bn": 64, "bk": 32, "warps": 4, "stages": 2, "halves": 2, "halo": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("config", TF32_CONFIGS, ids=str)
def test_tf32_is_rounded_and_not_cut(config: dict[str, Any]) -> None:
    """All but the exact product of the rounded factors is the sum in float32."""
    convs, finish, tuning = (
        importlib.import_module(f"clone_fast.kernels.{n}") for n in ("_conv", "_fir_epilogue", "_conv_tuning")
    )
    for stride, padding, transposed in CONVOLUTIONS[: 2 if config.get("halo") else 6]:
        for n, i, o, height, width, per_sample in [(2, 48, 40, 19, 70, True), (1, 32, 96, 9, 64, False)]:
            x = random("cuda", torch.float32, n, i, height, width, layout="channels_last")
            weight = random("cuda", torch.float32, n, o, 9 * i, 1).reshape(n, o, i, 3, 3)
            weight = weight if per_sample else weight[0]
            geometry = convs.Geometry.of(x, 3, stride, padding, transposed)
            y = torch.empty([n, o, geometry.height, geometry.width], device="cuda")
            parts = convs.convolve(x, weight, geometry, y, config=tuning.Config(**config))
            y = y if parts is y else finish.fir(parts, y)
            want = conv(rounded_to_tf32(x), rounded_to_tf32(weight), stride, padding, transposed)
            assert (y.double() - want).abs().max() <= 3e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 13, 16])
def test_a_copy_for_the_copy_engine(channels: int, dtype: torch.dtype) -> None:
    memory = importlib.import_module("clone_fast.kernels._conv_memory")
    x = torch.randn(2, channels, 3, 5).to(dtype)
    for image in x, as_layout(x, "channels_last"), x[:, :, :, 1:4]:
        copied = memory.copied_on_16_bytes(image)
        assert memory.on_16_bytes(copied) or channels == 1
        assert torch.equal(copied, image)


@pytest.mark.gpu
def test_tf32_of_views() -> None:
    """What the copy engine cannot read is copied; what no kernel rounds goes to cuDNN."""
    module = leaf("cuda")
    wide = torch.randn(2, 33, 20, 24, device="cuda").contiguous(memory_format=torch.channels_last)
    shifted = torch.randn(2 * 20 * 24 * 32 + 1, device="cuda")[1:].view(2, 20, 24, 32).permute(0, 3, 1, 2)
    with tf32(True):
        for x in wide[:, :32], shifted, wide[:, :32, ::2, 1:], wide[:, :6]:
            weight = torch.randn(8, x.shape[1], 3, 3, device="cuda")
            assert module.route(x, weight) == ("triton" if x.shape[1] == 32 else "cudnn")
            want = conv(x.double(), weight.double(), 1, 1, False)
            got = module.launch_conv(x, weight, 1, 1, False)
            assert (got.double() - want).abs().max() <= 2**-10 * want.abs().max()


@pytest.mark.gpu
def test_capture_and_replay() -> None:
    module = leaf("cuda")
    x = torch.randn(2, 64, 16, 16, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16)
    f = torch.rand(4, 4, device="cuda")
    calls = [(1, 1), (2, 1), (1, 2)]

    def run() -> list[Tensor]:
        return [module.launch(x, weight, None, None, None, f, up, down, "lrelu", 1.0, None) for up, down in calls]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


def every_launch() -> None:
    """Each kind of kernel, in both precisions, at the block sizes that StyleGAN2's layers get."""
    module = importlib.import_module("clone_fast.kernels.modulated_conv2d")
    f = meta(4, 4)
    for dtype, (resolution, channels) in itertools.product(DTYPES[::2], [(8, 512), (64, 512), (256, 128), (512, 64)]):
        x = meta(1, channels, resolution, resolution, dtype=dtype, channels_last=True)
        weight = meta(1, 3, 3, channels, channels, dtype=dtype).permute(0, 3, 4, 1, 2)
        noise, bias = meta(resolution, resolution, dtype=dtype), meta(channels, dtype=dtype)
        module.launch(x, weight, noise, None, bias, None, 1, 1, "lrelu", 1.0, 256.0)
        module.launch_conv(x, weight.transpose(-3, -4), 1, 1, True)
        module.launch(x, weight, None, None, bias, f, 2, 1, "lrelu", 1.0, 256.0)
        module.launch(x, weight, None, None, bias, f, 1, 2, "lrelu", 1.0, 256.0)
    x, weight = meta(1, 3, 512, 512, channels_last=True), meta(64, 3, 1, 1)
    module.launch(x, weight, None, None, meta(64), None, 1, 1, "lrelu", 1.0, None)


@needs_interpreter
def test_table_fits_the_chip() -> None:
    interpreted_leaf("modulated_conv2d")
    tuning = importlib.import_module("clone_fast.kernels._conv_tuning")
    for (mode, rows, channels, _), config in tuning.TABLE[90].items():
        pixels = config.bh * config.bw
        stage = (config.halves * pixels + config.bn) * config.bk * 2
        assert pixels in (64, 128)
        assert config.stages * stage <= (216 if config.halves == 2 else 104) * 1024
        assert config.bn <= (256 if config.halves == 2 and pixels == 64 else 128)
        assert config.bw <= rows or mode == 2
        assert channels % config.bn == 0


@pytest.mark.slow
def test_compiles_for_sm_90() -> None:
    kernels = compiled_launches(__file__, "every_launch")
    wanted = {"_conv_kernel", "_conv_hopper_kernel", "_conv_halo_kernel", "_fir_kernel", "_pack_kernel"}
    assert wanted <= {kernel.name for kernel in kernels}
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= 227 * 1024, kernel


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("kind", ["outer product", "any", "one-dimensional", "zero", "other size"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_finish(device: str, kind: str, layout: str) -> None:
    """The second pass of an upsampling convolution, a step of its own."""
    f = {
        "outer product": torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 2, 4, 1])) / 64,
        "any": torch.randn(4, 4) / 4,
        "one-dimensional": torch.randn(4) / 2,
        "zero": torch.zeros(4, 4),
        "other size": torch.randn(3, 5) / 4,
    }[kind].to(device)
    module = leaf(device)
    for dtype, (n, c, h, w), clamp in [(torch.float16, (2, 8, 7, 9), 1.0), (torch.float32, (1, 5, 6, 4), None)]:
        z, padding = random(device, dtype, n, c, h, w, layout=layout), [2, 1, 1, 1]
        size = (h + 3 - f.shape[0], w + 4 - f.shape[-1])
        noise, strength, bias = (random(device, dtype, *shape) for shape in ([n, 1, *size], [1], [c]))
        arguments = (z, f, padding, 4.0, noise, strength[0], bias, "lrelu", 1.4, clamp)
        assert module.supports_finish(*arguments) is None
        got = module.launch_finish(*arguments)
        want, plain = (
            spec_finish(*(t.to(kind) if isinstance(t, Tensor) and t is not f else t for t in arguments))
            for kind in (torch.float64, dtype)
        )
        assert_by_rule(got, want, plain)
        assert same_layout(got, z)


@pytest.mark.parametrize("device", WHERE)
def test_convolution_with_what_follows(device: str) -> None:
    """The second pass of a downsampling convolution."""
    module, dtype = leaf(device), torch.float16
    x, weight = random(device, dtype, 2, 16, 9, 7, layout="channels_last"), random(device, dtype, 8, 16, 3, 3)
    noise, strength, bias = (random(device, dtype, *shape) for shape in ([4, 3], [1], [8]))
    arguments = (x, weight, 2, 0, noise, strength[0], bias, "relu", 1.4, 9.0)
    assert module.supports_conv_finish(*arguments) is None
    got = module.launch_conv_finish(*arguments)
    want, plain = (
        spec_conv_finish(*(t.to(kind) if isinstance(t, Tensor) else t for t in arguments))
        for kind in (torch.float64, dtype)
    )
    assert_by_rule(got, want, plain)
    assert same_layout(got, x)
