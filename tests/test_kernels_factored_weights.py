"""The Triton leaf's part in a convolution whose weight is frozen: factors, their gradients by sums, the styles'."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import sys
from typing import Any

import pytest
import spec_leaf
import torch
from ahead_of_time import compiled_launches, meta
from fast import Call, complaints, cosine
from grids import as_layout
from interpreted import WHERE, leaf_on, needs_interpreter
from torch import Tensor

from clone_fast.ops import dispatch, factored_weights, modulated_conv2d, setup_filter
from clone_fast.ops.dispatch import Leaf
from clone_fast.reference import modulated_conv2d as spec

SMALLEST = spec.SMALLEST_STYLE
STEPS = ("act_backward", "factored", "factored_backward", "factor_gradients")
needs_gpu = pytest.mark.gpu

leaf = functools.partial(leaf_on, "modulated_conv2d")


def close_sum(got: Tensor, want: Tensor, terms: Tensor, dims: list[int]) -> None:
    """A sum in float32 of these terms in float64, which may cancel: roundings of their sizes."""
    roundings = (4 + math.log2(math.prod(terms.shape[dim] for dim in dims))) * torch.finfo(torch.float32).eps
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert ((got.double() - want).abs() <= roundings * terms.abs().sum(dims)).all()


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("case", [(8, 24, 3, 2), (16, 32, 1, 1), (5, 7, 5, 3), (130, 4, 1, 2)], ids=str)
def test_factored(case: tuple[int, ...], demodulate: bool, device: str, nan_empty: None) -> None:
    o, i, k, n = case
    module = leaf(device)
    for dtype, layout in itertools.product([torch.float32, torch.bfloat16], ["contiguous", "channels_last"]):
        weight = as_layout(torch.randn(o, i, k, k), layout).to(device)
        styles = (torch.randn(n, 2 * i) + 1).to(device)[:, ::2]
        made, s, d, energy = module.launch_factored(weight, styles, demodulate, 1e-8, dtype, SMALLEST)
        assert torch.equal(made, module.launch_modulate(weight, styles, demodulate, 1e-8, dtype))
        assert made.permute(0, 3, 4, 1, 2).is_contiguous()
        assert torch.equal(s, styles)
        _, _, *want = spec.factored_weights(
            weight.double(), styles.double(), demodulate=demodulate, eps=1e-8, dtype=torch.float64
        )
        for got, exact in zip((d, energy), want, strict=True):
            assert (got is None) == (not demodulate)
            if exact is not None:
                torch.testing.assert_close(got, exact.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", WHERE)
def test_styles_next_to_zero_are_put_at_a_distance(device: str, nan_empty: None) -> None:
    weight = torch.randn(4, 5, 3, 3, device=device)
    styles = torch.tensor([[1.0, 0.0, -0.0, 1e-30, -1e-30]], device=device)
    want = torch.tensor([[1.0, SMALLEST, SMALLEST, SMALLEST, -SMALLEST]], device=device)
    for dtype in torch.float32, torch.bfloat16:
        made, s, d, _ = leaf(device).launch_factored(weight, styles, True, 1e-8, dtype, SMALLEST)
        assert torch.equal(s, want)
        product = weight.double() * want.double()[:, None, :, None, None] * d.double()[:, :, None, None, None]
        torch.testing.assert_close(made.double(), product, rtol=2 * torch.finfo(dtype).eps, atol=0)


SHAPES = [(2, 5, 4, 7), (1, 32, 8, 8), (3, 40, 3, 3), (1, 1, 1, 1), (2, 70, 1, 2), (2, 20, 33, 35)]
EPILOGUES = [("lrelu", 2**0.5, 1.5), ("relu", 2.0, None), ("linear", 0.5, 0.7), ("linear", 1.0, None)]
NOISES: list[Any] = [None, "shared", "one", "each"]


def check_dots(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, epilogue: tuple[Any, ...], noise: str | None, device: str
) -> None:
    n, channels, height, width = shape
    act, gain, clamp = epilogue
    y, dy = (as_layout(torch.randn(shape).to(dtype), layout).to(device) for _ in range(2))
    if clamp is not None:
        clamp = float(torch.tensor(clamp, dtype=dtype))  # as results hold it
        y = y.clamp(-clamp, clamp)
    y = y.relu() if act == "relu" else y
    sizes = {"shared": [height, width], "one": [1, 1, height, width], "each": [n, 1, height, width]}
    maps = None if noise is None else torch.randn(sizes[noise]).to(device, dtype)
    strength = None if noise in (None, "one") else torch.tensor(0.3, device=device, dtype=dtype)
    bias = None if noise == "each" else torch.randn(channels).to(device, dtype)
    args, wants = (dy, y, maps, strength, act, gain, clamp), (noise is not None, strength is not None, True)
    module = leaf(device)
    g, *parts, dots = module.launch_act_backward(*args, *wants, bias, True)
    alone, *other_parts, _ = module.launch_act_backward(*args, *wants)
    assert torch.equal(g, alone)
    doubles = [value.double() if isinstance(value, Tensor) else value for value in args]
    positive = [value.abs() if isinstance(value, Tensor) and i != 1 else value for i, value in enumerate(doubles)]
    sums, others = (module.launch_act_sums(*some, maps, strength, dtype) for some in (parts, other_parts))
    sizes = spec_leaf.act_backward(*positive, *wants)[1:4]
    sizes = spec_leaf.act_sums(*sizes, positive[2], positive[3], torch.float64)
    for got, same, size in zip(sums, others, sizes, strict=True):
        assert (got is None) == (same is None)
        if got is not None:  # by other blocks, so in another order
            roundings = 2 * (4 + math.log2(y.numel())) * torch.finfo(torch.float32).eps * size
            assert ((got - same).double().abs() <= roundings + torch.finfo(got.dtype).eps * same.double().abs()).all()
    assert dots.shape[::2] == (n, channels)
    *_, want = spec_leaf.act_backward(*doubles, *wants, None if bias is None else bias.double(), True)
    g = spec_leaf.act_backward(*doubles, False, False, False)[0]
    terms = dy.double().abs() * y.double().abs() + g.abs() * (1 + maps.double().abs() if maps is not None else 1)
    if bias is not None:
        terms = terms + (g * bias.double()[:, None, None]).abs()
    close_sum(dots.double().sum(1).float(), want[:, 0], terms, [2, 3])


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dots_of_the_gradient(shape: tuple[int, ...], layout: str, device: str, nan_empty: None) -> None:
    for dtype in torch.float32, torch.bfloat16:
        for epilogue in EPILOGUES:
            check_dots(shape, dtype, layout, epilogue, None, device)
        for noise in NOISES:
            check_dots(shape, dtype, layout, EPILOGUES[0], noise, device)


def check_factor_gradients(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> None:
    n, channels, *_ = shape
    x, dx = (as_layout(torch.randn(shape).to(dtype), layout).to(device) for _ in range(2))
    s, module = (torch.randn(n, channels) + 1).to(device), leaf(device)
    terms = x.double() * dx.double() / s.double()[:, :, None, None]
    for parts, outputs in (1, 8), (3, 21), (700, 5):
        dots, d = torch.randn(n, parts, outputs, device=device), torch.rand(n, outputs, device=device) + 0.1
        ds, dd = module.launch_factor_gradients(x, dx, s, dots, d)
        close_sum(ds, terms.sum([2, 3]), terms, [2, 3])
        parts_of_d = dots.double() / d.double()[:, None]
        close_sum(dd, parts_of_d.sum(1), parts_of_d, [1])
    alone, nothing = module.launch_factor_gradients(x, dx, s, None, None)
    assert torch.equal(alone, ds)
    assert nothing is None


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factor_gradients(shape: tuple[int, ...], layout: str, device: str, nan_empty: None) -> None:
    for dtype in torch.float32, torch.bfloat16:
        check_factor_gradients(shape, dtype, layout, device)


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 32, 256, 255), (3, 512, 16, 16), (1, 64, 512, 512), (2, 1100, 2, 3)], ids=str)
def test_sums_over_large_images(shape: tuple[int, ...], layout: str, nan_empty: None) -> None:
    for dtype in torch.float32, torch.bfloat16:
        check_factor_gradients(shape, dtype, layout, "cuda")
        for noise in NOISES:
            check_dots(shape, dtype, layout, EPILOGUES[0], noise, "cuda")


@pytest.mark.parametrize("device", WHERE)
def test_factored_backward(device: str, nan_empty: None) -> None:
    for n, o, i in (1, 16, 8), (3, 5, 21), (2, 600, 9):
        ds, dd, s, d, energy = (
            torch.rand(shape, device=device) for shape in ([n, i], [n, o], [n, i], [n, o], [o, i])
        )  # fmt: skip
        for dtype in torch.float32, torch.float16:
            got = leaf(device).launch_factored_backward(ds, dd, s, d, energy, dtype)
            assert got.dtype == dtype
            want = spec_leaf.factored_backward(*(t.double() for t in (ds, dd, s, d, energy)), torch.float64)
            size = want.abs().max().item() + 1
            torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps * size)


@needs_interpreter
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("demodulate", [True, False])
def test_the_styles_gradient_in_steps(
    up: int, k: int, demodulate: bool, monkeypatch: pytest.MonkeyPatch, nan_empty: None
) -> None:
    """These kernels beside the convolutions of tests/spec_leaf.py, in float32, against the reference in float64."""

    def mixed(op: str, name: str) -> Leaf:
        module = spec_leaf.steps(op)
        if op == "modulated_conv2d":
            for step in STEPS:
                setattr(module, f"launch_{step}", getattr(leaf("cpu"), f"launch_{step}"))
        return Leaf(module)

    monkeypatch.setattr(dispatch, "leaf", mixed)
    monkeypatch.setattr(factored_weights, "FEWEST", 2)
    monkeypatch.setattr(factored_weights, "SMALLEST", 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(sys.modules["clone_fast.ops.modulated_conv2d"], "resolve", lambda op, name, *args: name)
    size = (6 * up, 10 * up)
    shapes = {"x": [2, 8, 6, 10], "weight": [4, 8, k, k], "styles": [2, 8], "noise": size, "bias": [4]}
    exact = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    exact["styles"][0, 3] = 0
    options = {"up": up, "resample_filter": setup_filter([1, 3, 3, 1]), "act": "lrelu", "clamp": 1.0}
    found = []
    for backend, dtype in ("reference", torch.float64), ("triton", torch.float32):
        args = {name: value.to(dtype).requires_grad_(name != "weight") for name, value in exact.items()}
        y = modulated_conv2d(**args, **options, demodulate=demodulate, backend=backend)
        wanted = [value for value in args.values() if value.requires_grad]
        found.append([y, *torch.autograd.grad(y, wanted, y.detach().cos())])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def calls(dtype: torch.dtype, up: int, k: int, tf32: bool = False) -> list[Call]:
    found = []
    for n, size, demodulate, layout in itertools.product(
        [1, 4], [12, 40], [True, False], ["channels_last", "contiguous"]
    ):
        shapes = {"x": [n, 32, size, size], "weight": [48, 32, k, k], "styles": [n, 32]}
        shapes |= {"noise": [size * up, size * up], "noise_strength": [], "bias": [48]}
        tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        tensors["styles"] = 1 + 0.5 * tensors["styles"]
        tensors["styles"][-1, :3] = 0
        tensors["weight"] /= math.sqrt(32 * k * k)
        f = setup_filter([1, 3, 3, 1])
        # large beside the rounding of what it cuts: the error allowed is one of the largest value, which is the clamp
        options = {"up": up, "resample_filter": f, "act": "lrelu", "clamp": 4.0, "demodulate": demodulate}
        found.append(Call("modulated_conv2d", tensors, options, dtype, layout, ("weight",), tf32))
    return found


@needs_gpu
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_with_a_frozen_weight(precision: str, up: int, k: int, backend: str) -> None:
    """fp16 goes by the weight gradient, as ever; so does float32, see below."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    found = [
        f"{call}: {text}" for call in calls(dtype, up, k, precision == "tf32") for text in complaints(call, backend)
    ]
    assert not found, "\n".join(found)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("up", [1, 2])
def test_the_same_gradient_as_by_the_weights(up: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By sums over images, which is another way; but in exact float32 the same one, whose error others test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    call = calls(torch.bfloat16 if precision == "bf16" else torch.float32, up, 3)[0]
    grads = []
    for fewest in 16, 1000:
        monkeypatch.setattr(factored_weights, "FEWEST", fewest)
        inputs = call.inputs()
        y = call.function(**inputs)
        grads.append(torch.autograd.grad(y, inputs["styles"], y.detach())[0])
    if precision == "fp32":
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)  # cuDNN's sums, in any order
    else:
        assert not torch.equal(*grads)
        assert cosine(*grads) > 1 - {"tf32": 1e-5, "bf16": 1e-3}[precision]


@needs_gpu
def test_captured_it_is_deterministic() -> None:
    """A graph replays on new inputs what a plain call computes, bit for bit; the layers' gradients go side by side."""
    first, second = calls(torch.bfloat16, 2, 3)[0], calls(torch.bfloat16, 1, 3)[0]
    args = [call.inputs() for call in (first, second)]
    x, weight = args[0]["x"], torch.randn(48, 48, 3, 3, device="cuda", dtype=torch.bfloat16)
    styles = torch.randn(1, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    f = setup_filter([1, 3, 3, 1]).cuda()

    def step() -> list[Tensor]:
        y = modulated_conv2d(x, args[0]["weight"], args[0]["styles"], up=2, resample_filter=f, act="lrelu")
        y = modulated_conv2d(y, weight, styles, act="lrelu", clamp=1.0)
        return list(torch.autograd.grad(y.square().sum(), [x, args[0]["styles"], styles]))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            styles.normal_()
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


# ahead of time
def every_launch() -> None:
    """A layer of every kind of tile: few pixels, many; channels innermost, and pixels."""
    module = importlib.import_module("clone_fast.kernels.modulated_conv2d")
    for dtype, last in itertools.product([torch.bfloat16, torch.float32], [True, False]):
        for channels, size in (32, 1024), (64, 512), (128, 256), (512, 64), (512, 32), (512, 4):
            x = meta(1, channels, size, size, dtype=dtype, channels_last=last)
            noise, strength, bias = (meta(*shape, dtype=dtype) for shape in ([size, size], [], [channels]))
            for wants in (False, False, False), (True, False, False):
                args = (x, x, noise, strength, "lrelu", 2**0.5, None, *wants, bias, True)
                dots = module.launch_act_backward(*args)[-1]
            module.launch_factor_gradients(x, x, meta(1, channels), dots, meta(1, channels))
    for o, i, k in (512, 512, 3), (32, 64, 3), (32, 64, 1):
        for demodulate in True, False:
            _, s, d, energy = module.launch_factored(
                meta(o, i, k, k), meta(1, i), demodulate, 1e-8, torch.bfloat16, SMALLEST
            )
            if demodulate:
                module.launch_factored_backward(s, d, s, d, energy, torch.float32)


def test_compiles_for_sm_90() -> None:
    kernels = compiled_launches(__file__, "every_launch")
    names = {"_act_backward_kernel", "_factor_kernel", "_add_factor", "_factored_backward_kernel", "_modulate_kernel"}
    assert {kernel.name for kernel in kernels} >= names
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
