"""The activation's gradient where an image is drawn of the result, in Triton and in CUDA: one pass, and sums."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from types import ModuleType, SimpleNamespace
from typing import Any

import emulated
import pytest
import spec_leaf
import torch
from ahead_of_time import compiled_launches, meta
from grids import as_layout
from interpreted import INTERPRETS, WHERE, leaf_on
from torch import Tensor

from clone_fast.ops.registration import layout_of

needs_gpu = pytest.mark.gpu
EPILOGUES = [("lrelu", 2**0.5, 0.9), ("lrelu", 0.7, None), ("relu", 2.0, None), ("linear", 1.0, None)]
SHAPES = [(2, 5, 3, 4, 7), (1, 32, 3, 8, 9), (3, 40, 1, 3, 3), (1, 4, 3, 1, 1), (2, 70, 4, 5, 2), (2, 512, 3, 4, 4)]
FLAGS = [(True, True, True, True, True), (False, True, True, True, False), (False, False, False, False, True)]

leaf = functools.partial(leaf_on, "modulated_conv2d")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return emulated.extension("act_backward", tmp_path_factory.mktemp("emulated"), "act_backward")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def in_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The leaf in CUDA C++, or its source on a CPU; what it leaves of sums, another adds. And the device."""
    adding = leaf("cuda") if request.param == "cuda" else spec_leaf.steps("modulated_conv2d")
    others = {name: getattr(adding, name) for name in ("launch_act_sums", "launch_pointwise_sums")}
    if request.param == "cuda":
        pytest.importorskip("clone_fast._C")
        module: Any = importlib.import_module("clone_fast.cuda._act_backward")
    else:
        module = emulated.leaf("_act_backward", request.getfixturevalue("compiled"), monkeypatch)
    names = [name for name in dir(module) if name.startswith(("launch_", "supports_"))]
    return SimpleNamespace(**{name: getattr(module, name) for name in names}, **others, device=request.param)


def check(
    functions: Any, shape: tuple[int, ...], dtype: torch.dtype, layouts: str, epilogue: tuple[Any, ...], own: bool,
    device: str, with_dy: bool = True, flags: tuple[bool, ...] = FLAGS[0], image: bool = True,
) -> None:  # fmt: skip
    """Against float64: a rounding of the result, and roundings in float32 of the terms, which may cancel.

    image: whether one is drawn; else the step is that of a convolution alone.
    """
    n, channels, few, height, width = shape
    act, gain, clamp = epilogue
    of_y, of_image = layouts.split()

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    y = random(n, channels, height, width)
    y = y.relu() if act == "relu" else y
    if clamp is not None:
        clamp = float(torch.tensor(clamp, dtype=dtype))  # as results hold it
        y = y.clamp(-clamp, clamp)
    dy = as_layout(random(*y.shape), of_y) if with_dy else None
    dimage, drawn = as_layout(random(n, few, height, width), of_image), random(n, few, height, width)
    weight = random(*([n] if own else []), few, channels, 1, 1)
    image_clamp = clamp and 0.7
    limit = image_clamp and float(torch.tensor(image_clamp, dtype=dtype))
    drawn = as_layout(drawn if limit is None else drawn.clamp(-limit, limit), of_y)
    noise, strength = random(height, width), torch.tensor(0.3).to(device, dtype)
    bias, y = random(channels), as_layout(y, of_y)
    want_noise, want_strength, want_bias, want_dots, want_weight = flags
    wants = (want_noise, want_strength, want_bias)
    args = (dy, dimage, y, weight, drawn, image_clamp, noise, strength, act, gain, clamp, *wants)
    rest = (bias, want_dots, want_weight, want_bias)
    if image:
        assert functions.supports_drawn_act_backward(*args, *rest) is None
    else:
        assert functions.supports_act_backward(dy, y, *args[6:], *rest[:2]) is None

    def summed(functions: Any, *args: Any) -> list[Tensor | None]:
        if image:
            g, *parts, dots, of_weight, of_bias = functions.launch_drawn_act_backward(*args, *rest[1:])
        else:
            g, *parts, dots = functions.launch_act_backward(args[0], args[2], *args[6:], want_dots)
            of_weight = of_bias = None
        sums = functions.launch_act_sums(*parts, args[6], args[7], y.dtype if functions is not spec else torch.float64)
        to_weight = None if of_weight is None else functions.launch_pointwise_sums(of_weight, args[3])
        exact = torch.float64 if functions is spec else y.dtype
        to_bias = None if of_bias is None else functions.launch_act_sums(None, None, of_bias, None, None, exact)[2]
        return [g, *sums, None if dots is None else dots.sum(1), to_weight, to_bias]

    spec = spec_leaf.steps("modulated_conv2d")
    found = summed(functions, *args, bias)
    doubles = [value.double() if isinstance(value, Tensor) else value for value in (*args, bias)]
    doubles[5] = limit
    want = summed(spec, *doubles)
    sizes = [value.abs() if isinstance(value, Tensor) and i != 2 else value for i, value in enumerate(doubles)]
    terms = summed(spec, *sizes)
    seen_image = sizes[1] if limit is None else torch.where(sizes[4] < limit, sizes[1], 0)
    # of dy y - g (noise * strength + bias), and of the image's weights, whatever the signs of y
    g, seen = terms[0], doubles[2].abs()
    if terms[4] is not None:
        shift = sizes[6] * sizes[7] + sizes[-1][:, None, None]
        full = 0 if dy is None else sizes[0]
        if image:
            wide = sizes[3].flatten(2 if own else 1).expand(n, few, channels)
            full = full + torch.einsum("nfc,nfhw->nchw", wide, seen_image)
        terms[4] = (full * seen + g * shift).sum([2, 3])
    if terms[5] is not None:
        each = torch.einsum("nfhw,nchw->nfc", seen_image, seen)
        terms[5] = (each if own else each.sum(0)).view(weight.shape)
    pixels = n * height * width
    counts = (few + 1, channels * n, channels * pixels, pixels, pixels, pixels, pixels)
    for got, value, size, count in zip(found, want, terms, counts, strict=True):
        assert (got is None) == (value is None)
        if got is None or value is None or size is None:
            continue
        about = torch.finfo(got.dtype)
        rounding = 1 if INTERPRETS and got.dtype == torch.bfloat16 else 0.51  # the interpreter cuts there
        allowed = (8 + math.log2(few * count)) * torch.finfo(torch.float32).eps * size
        allowed = allowed + rounding * about.eps * value.abs() + about.tiny * about.eps
        wrong = (got.double() - value.reshape(got.shape)).abs() - allowed.reshape(got.shape)
        assert wrong.max() <= 0, wrong.max()
    assert found[0] is not None
    assert found[0].is_contiguous(memory_format=layout_of(y))


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(shape: tuple[int, ...], own: bool, device: str, nan_empty: None) -> None:
    for dtype, epilogue in itertools.product([torch.float32, torch.bfloat16], EPILOGUES):
        check(leaf(device), shape, dtype, "channels_last channels_last", epilogue, own, device)
    for with_dy, flags in itertools.product([True, False], FLAGS):
        args = ("channels_last channels_last", EPILOGUES[0], own, device, with_dy, flags)
        check(leaf(device), shape, torch.float16, *args)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("layouts", ["contiguous contiguous", "channels_last contiguous", "contiguous channels_last",
                                     "strided strided"])  # fmt: skip
def test_step_in_other_layouts(layouts: str, device: str, nan_empty: None) -> None:
    for shape, own in itertools.product([SHAPES[0], SHAPES[1], SHAPES[4]], [False, True]):
        check(leaf(device), shape, torch.float32, layouts, EPILOGUES[0], own, device)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 32, 3, 256, 255), (3, 512, 3, 16, 16), (1, 64, 3, 512, 512), (2, 1100, 3, 2, 3)])
def test_step_of_large_images(shape: tuple[int, ...], dtype: torch.dtype, nan_empty: None) -> None:
    for with_dy, flags in itertools.product([True, False], FLAGS[:2]):
        check(leaf("cuda"), shape, dtype, "channels_last contiguous", EPILOGUES[1], True, "cuda", with_dy, flags)


IN_CUDA = [(2, 8, 3, 4, 7), (1, 32, 3, 8, 9), (3, 40, 3, 3, 3), (1, 64, 3, 1, 2), (2, 512, 3, 4, 4), (1, 1024, 3, 3, 2)]


@pytest.mark.parametrize("image", [True, False], ids=["drawn", "alone"])
@pytest.mark.parametrize("shape", IN_CUDA, ids=str)
def test_step_in_cuda(shape: tuple[int, ...], image: bool, in_cuda: Any, nan_empty: None) -> None:
    flags = [(False, *others) for others in itertools.product([True, False], repeat=4)]
    for dtype in torch.float32, torch.float16, torch.bfloat16:
        for of_image, own in (("channels_last", True), ("contiguous", False)):
            layouts = f"channels_last {of_image}"
            check(in_cuda, shape, dtype, layouts, EPILOGUES[0], own, in_cuda.device, True, flags[0], image)
    for epilogue in EPILOGUES[1:] if image else EPILOGUES[1:3]:
        args = ("channels_last strided", epilogue, True, in_cuda.device, True, flags[0], image)
        check(in_cuda, shape, torch.bfloat16, *args)
    for some, with_dy in itertools.product(flags[1::6], [True, False] if image else [True]):
        args = ("channels_last channels_last", EPILOGUES[0], True, in_cuda.device, with_dy, some, image)
        check(in_cuda, shape, torch.bfloat16, *args)


@needs_gpu
@pytest.mark.parametrize("in_cuda", ["cuda"], indirect=True)
@pytest.mark.parametrize("shape", [(2, 32, 3, 256, 255), (1, 64, 3, 512, 512), (5, 512, 3, 33, 64)], ids=str)
def test_step_in_cuda_of_large_images(shape: tuple[int, ...], in_cuda: Any, nan_empty: None) -> None:
    for dtype, image in itertools.product([torch.float32, torch.bfloat16], [True, False]):
        args = ("channels_last contiguous", EPILOGUES[1], True, "cuda", True, (False, True, True, True, True), image)
        check(in_cuda, shape, dtype, *args)


def test_infinity_passes_where_there_is_no_clamp(in_cuda: Any) -> None:
    y = torch.full([1, 8, 2, 2], math.inf, device=in_cuda.device).to(memory_format=torch.channels_last)
    dy = torch.ones_like(y)
    for clamp, want in ((None, 0.7), (3.0, 0.0)):
        g, *_ = in_cuda.launch_act_backward(dy, y, None, None, "lrelu", 0.7, clamp, False, False, True)
        assert torch.equal(g, torch.full_like(y, want))


def test_reasons_in_cuda(in_cuda: Any) -> None:
    def why(channels: int = 8, wanted: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
        y = torch.ones(1, channels, 2, 2, device=in_cuda.device)
        y = y.to(torch.bfloat16, memory_format=torch.channels_last)
        noise = torch.ones(2, 2, device=in_cuda.device, dtype=dtype)
        given = {"dy": y, "y": y, "noise": noise, "act": "lrelu"} | changes
        args = (given["dy"], given["y"], given["noise"], None, given["act"], 1.0, None)
        return in_cuda.supports_act_backward(*args, wanted, True, True)

    assert why() is None
    assert "for the noise itself" in why(wanted=True)
    assert "16 bytes" in why(channels=12)
    assert "at most 2048" in why(channels=4096)
    assert "one dtype, bfloat16" in why(dtype=torch.float32)
    assert "channels_last" in why(y=torch.ones(1, 8, 2, 2, device=in_cuda.device).bfloat16())
    assert "swish" in why(act="swish")
    assert "nothing but sums" in why(act="linear")


@pytest.mark.parametrize("device", WHERE)
def test_reasons(device: str) -> None:
    supports = leaf(device).supports_drawn_act_backward
    image, y = torch.ones(1, 3, 2, 2, device=device), torch.ones(1, 8, 2, 2, device=device)

    def why(shape: tuple[int, ...], *rest: Any, dtype: torch.dtype = torch.float32) -> Any:
        act, gain = rest or ("lrelu", 1.0)
        weight = torch.ones(shape, device=device, dtype=dtype)
        return supports(None, image, y, weight, image, 0.5, None, None, act, gain, None, True, True, True)

    assert why((3, 8, 1, 1)) is None
    assert why((1, 3, 8, 1, 1)) is None
    assert "3x3" in why((3, 8, 3, 3))
    assert "5 of 8" in why((5, 8, 1, 1))
    assert "float64" in why((3, 8, 1, 1), dtype=torch.float64)
    assert "'swish'" in why((3, 8, 1, 1), "swish", 1.0)
    assert "gain" in why((3, 8, 1, 1), "lrelu", -1.0)


def every_launch() -> None:
    module = leaf("cuda")
    for (n, channels, size), dtype in itertools.product(
        [(1, 32, 1024), (5, 64, 512), (1, 128, 256), (5, 512, 64), (1, 512, 4)], [torch.bfloat16, torch.float32]
    ):
        y = meta(n, channels, size, size, dtype=dtype, channels_last=True)
        image, weight = meta(n, 3, size, size, dtype=dtype), meta(n, 3, channels, 1, 1, dtype=dtype)
        for dy, want_dots in itertools.product([y, None], [False, True]):
            rest = ("lrelu", 2**0.5, None, False, True, True, meta(channels), want_dots, True, True)
            module.launch_drawn_act_backward(dy, image, y, weight, image, 256.0, meta(size, size), meta(), *rest)


def test_compiles_for_sm_90() -> None:
    kernels = compiled_launches(__file__, "every_launch")
    assert {kernel.name for kernel in kernels} == {"_act_backward_kernel"}
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
