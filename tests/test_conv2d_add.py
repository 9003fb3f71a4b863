"""A convolution with another image added: where a residual block ends."""

from __future__ import annotations

import functools
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest
import torch
from ahead_of_time import compiled_launches, meta
from fast import FLOATS, placed
from grids import as_layout, assert_op_check, assert_same, compiled
from interpreted import WHERE, leaf_on
from spec_leaf import conv_add as spec_conv_add
from spec_leaf import steps
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.nn.layers import Conv2dLayer
from clone_fast.ops import conv2d_add, dispatch, modulated_conv2d
from clone_fast.ops.dispatch import Leaf
from clone_fast.ops.finished_weights import scaled_weight
from clone_fast.ops.registration import layout_of

REGISTERED = torch.ops.clone_fast.conv2d_add.default
plain_conv = functools.partial(modulated_conv2d, styles=None, demodulate=False)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(params=["whole", "without the step"])
def leaf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leaves in plain PyTorch, without a GPU, where all images have many channels; the convolutions' steps that ran."""
    done: list[str] = []

    def functions(op: str) -> SimpleNamespace:
        found = steps(op)
        if op == "modulated_conv2d":
            del found.launch_pointwise_backward
            if request.param != "whole":
                del found.launch_conv_add
            for name, step in vars(found).items():
                setattr(found, name, noted(name, step))
        return found

    def noted(name: str, step: Any) -> Any:
        return lambda *args: done.append(name) or step(*args)

    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(functions(op)))
    for module in "modulated_conv2d", "conv2d_add", "upfirdn2d", "upfirdn2d_add", "bias_act":
        monkeypatch.setattr(sys.modules[f"clone_fast.ops.{module}"], "resolve", lambda *args: "triton")
    monkeypatch.setattr(sys.modules["clone_fast.nn.layers"], "is_fast", lambda device: True)
    return done


# ---- the sum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_the_sum(size: tuple[int, int], k: int) -> None:
    x, weight, other = double(2, 3, *size), double(4, 3, k, k), double(2, 4, *size)
    want = np.stack([naive.conv2d(sample, naive.array(weight)) for sample in naive.array(x)])
    assert_same(conv2d_add(x, weight, other), want + naive.array(other))


@pytest.mark.parametrize("k", [1, 3])
def test_the_sum_on_leaves(k: int, leaf: list[str], request: pytest.FixtureRequest) -> None:
    x, weight, other = double(2, 3, 4, 5), double(4, 3, k, k), double(2, 4, 4, 5)
    torch.testing.assert_close(conv2d_add(x, weight, other), plain_conv(x, weight) + other)
    assert leaf[0] == ("launch" if "without" in request.node.name else "launch_conv_add")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_the_result_has_the_layout_of_the_image(layout: str, leaf: list[str]) -> None:
    x = as_layout(double(2, 3, 4, 5), layout)
    for other in (as_layout(double(2, 4, 4, 5), one) for one in ("contiguous", "channels_last", "strided")):
        for backend in "triton", "reference":
            y = REGISTERED(x, double(4, 3, 1, 1), other, backend)
            assert y.is_contiguous(memory_format=layout_of(x))


def test_the_result_has_the_dtype_of_the_image(leaf: list[str]) -> None:
    x, weight = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 1, 1).double().requires_grad_()
    other = torch.randn(1, 5, 4, 4).bfloat16().requires_grad_()
    y = conv2d_add(x, weight, other)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain_conv(x, weight) + other)
    grads = torch.autograd.grad(y.square().sum(), [x, weight, other])
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("k", [1, 3])
def test_gradients(k: int, leaf: list[str]) -> None:
    inputs = [double(2, 2, 3, 4), double(6, 2, k, k), double(2, 6, 3, 4)]
    assert gradcheck(conv2d_add, [value.requires_grad_() for value in inputs])
    assert gradgradcheck(conv2d_add, inputs)
    assert gradgradcheck(lambda *args: conv2d_add(*args).square(), inputs)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
def test_some_gradients(wanted: list[int], leaf: list[str]) -> None:
    inputs = [double(2, 5, 3, 4), double(6, 5, 1, 1), double(2, 6, 3, 4)]
    some = [inputs[i].requires_grad_() for i in wanted]
    y = conv2d_add(*inputs)
    dy = as_layout(torch.randn_like(y), "channels_last")
    want = torch.autograd.grad(plain_conv(inputs[0], inputs[1]) + inputs[2], some, dy)
    for got, one in zip(torch.autograd.grad(y, some, dy), want, strict=True):
        torch.testing.assert_close(got, one)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_is_read_as_it_is_and_by_both(layout: str, leaf: list[str]) -> None:
    """No pass of an activation, and what the other branch gets is what came, with nothing written into it."""
    x, weight, other = as_layout(double(2, 8, 3, 4), layout), double(6, 8, 1, 1), double(2, 6, 3, 4)
    inputs = [value.requires_grad_() for value in (x, weight, other)]
    y = conv2d_add(*inputs)
    dy = torch.randn_like(y)
    kept = dy.clone()
    leaf.clear()
    dx, dw, dother = torch.autograd.grad(y, inputs, dy)
    assert set(leaf) == {"launch_conv", "launch_wgrad"}
    assert dother.data_ptr() == dy.data_ptr()
    assert torch.equal(dy, kept)
    assert not {dx.data_ptr(), dw.data_ptr()} & {dy.data_ptr(), x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_check(dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)
    other = torch.randn(1, 2, 4, 5).to(dtype).requires_grad_()
    x_last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for image in x, x_last:
        assert_op_check(REGISTERED, (image, weight, other, "reference"))


def test_op_check_on_leaves(leaf: list[str]) -> None:
    x, weight, other = (torch.randn(*shape, 4, 5) for shape in ((2, 8), (6, 8), (2, 6)))
    inputs = [value.requires_grad_() for value in (x, weight[..., :1, :1], other)]
    assert_op_check(REGISTERED, (*inputs, "triton"))


def test_it_compiles_without_a_graph_break(leaf: list[str]) -> None:
    x, weight, other = torch.randn(1, 3, 4, 4), torch.randn(5, 3, 1, 1).requires_grad_(), torch.randn(1, 5, 4, 4)
    compiled(lambda x: conv2d_add(x, scaled_weight(weight, 0.3, x.dtype), other), x, [weight])


@pytest.mark.parametrize(
    ("error", "message", "weight", "other"),
    [
        (ValueError, r"weight must be \[O, 3, k, k\], got float32 \[5, 4, 1, 1\]", (5, 4, 1, 1), (1, 5, 4, 4)),
        (ValueError, r"weight must be \[O, 3, k, k\] with odd k, got float32 \[5, 3, 2, 2\]", (5, 3, 2, 2), None),
        (ValueError, r"weight must be \[O, 3, k, k\] with odd k, got float32 \[5, 3, 1, 3\]", (5, 3, 1, 3), None),
        (ValueError, r"weight must be .*, got float32 \[1, 5, 3, 1, 1\]", (1, 5, 3, 1, 1), None),
        (ValueError, r"other must be \[1, 5, 4, 4\], got float32 \[1, 5, 2, 2\]", (5, 3, 1, 1), (1, 5, 2, 2)),
    ],
)
def test_bad_shapes(error: type[Exception], message: str, weight: Any, other: Any) -> None:
    with pytest.raises(error, match=f"^conv2d_add: {message}"):
        conv2d_add(torch.ones(1, 3, 4, 4), torch.ones(weight), torch.ones(other or (1, 5, 4, 4)))


@pytest.mark.parametrize(
    ("error", "message", "other"),
    [
        (ValueError, r"a dtype that float32 \[1, 3, 4, 4\] has room for, got float64", double(1, 5, 4, 4)),
        (TypeError, "other must be a floating-point tensor", torch.ones(1, 5, 4, 4, dtype=torch.int32)),
        (ValueError, "other must be on cpu", torch.ones(1, 5, 4, 4, device="meta")),
    ],
)
def test_bad_others(error: type[Exception], message: str, other: Tensor) -> None:
    with pytest.raises(error, match=message):
        conv2d_add(torch.ones(1, 3, 4, 4), torch.ones(5, 3, 1, 1), other)


# ---- where a block ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_adds(dtype: torch.dtype, leaf: list[str]) -> None:
    """Without an activation, on the way back neither; and it is what the layer was, to the weights' rounding."""
    layer = Conv2dLayer(8, 6, 1, bias=False)
    x, other = (torch.randn(2, channels, 3, 4).to(dtype).requires_grad_() for channels in (8, 6))
    weight = (layer.weight.detach() * (0.3 / 8**0.5)).to(dtype)
    y = layer(x, 0.3, other=other)
    exact = spec_conv_add(x.detach().double(), weight.double(), other.detach().double())
    assert (y.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    leaf.clear()
    y.backward(torch.ones_like(y))
    assert set(leaf) == {"launch_conv", "launch_wgrad"}


@pytest.mark.parametrize(("k", "down", "options"), [(3, 1, {}), (1, 2, {}), (1, 1, {"conv_clamp": 0.5, "bias": True})])
def test_other_layers_add_too(k: int, down: int, options: dict[str, Any]) -> None:
    layer = Conv2dLayer(3, 4, k, down=down, **{"bias": False, **options}).double()
    x, other = double(2, 3, 6, 6), double(2, 4, 6 // down, 6 // down)
    torch.testing.assert_close(layer(x, 0.7, other=other), layer(x, 0.7) + other)


# ---- the step in Triton -------------------------------------------------------------------------------------------

# The interpreter multiplies bfloat16 as if its bits were an integer's.
RUNS = [pytest.param(*where.values, dtype, marks=where.marks, id=f"{where.values[0]}-{dtype}") for where in WHERE
        for dtype in FLOATS if (where.values[0], dtype) != ("cpu", torch.bfloat16)]  # fmt: skip
# (n, inputs, outputs, height, width): tiles that are whole and are not, sums that are split, descriptors that are not
SMALL = [(2, 16, 8, 4, 6), (1, 3, 5, 5, 3), (2, 9, 24, 7, 3), (1, 256, 24, 2, 2), (1, 16, 16, 1, 1), (1, 1, 1, 1, 9)]
OF_D = [(512, 32, 64), (256, 64, 128), (128, 128, 256), (64, 256, 512), (32, 512, 512), (16, 512, 512), (8, 512, 512),
        (4, 512, 512)]  # fmt: skip


def assert_rounded_once(got: Tensor, x: Tensor, weight: Tensor, other: Tensor, tf32: bool = False) -> None:
    """Against float64: a rounding of the result, and roundings in float32 of the terms, of factors where as TF32."""
    wide = x.double(), weight.double(), other.double()
    want, terms = spec_conv_add(*wide), spec_conv_add(*(value.abs() for value in wide))
    assert got.dtype == x.dtype
    assert got.is_contiguous(memory_format=layout_of(x))
    per_term = (8 + x.shape[1] / 8) * torch.finfo(torch.float32).eps + (2**-10 if tf32 else 0)
    wrong = (got.double() - want).abs() - 0.51 * torch.finfo(got.dtype).eps * want.abs() - per_term * terms
    assert wrong.max() <= torch.finfo(got.dtype).tiny, wrong.max()


def check_step(x: Tensor, weight: Tensor, other: Tensor, tf32: bool = False) -> None:
    module = leaf_on("modulated_conv2d", x.device.type)
    assert module.supports_conv_add(x, weight, other) is None
    assert_rounded_once(module.launch_conv_add(x, weight, other), x, weight, other, tf32)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize(("device", "dtype"), RUNS)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided", "offset"])
def test_step(device: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for n, i, o, height, width in SMALL:
        x = placed(torch.randn(n, i, height, width).to(device, dtype), layout)
        other = placed(torch.randn(n, o, height, width).to(device, dtype), layout)
        check_step(x, torch.randn(o, i, 1, 1).to(device, dtype), other)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("device", WHERE)
def test_step_of_layouts_and_dtypes_that_differ(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for one, two in ("channels_last", "contiguous"), ("contiguous", "channels_last"), ("strided", "offset"):
        for dtype in torch.float32, torch.float16:
            x = placed(torch.randn(2, 16, 6, 5, device=device), one)
            other = placed(torch.randn(2, 8, 6, 5).to(device, dtype), two)
            wide = torch.randn(16, 9, 1, 1, device=device)[:, 1:].transpose(0, 1)
            check_step(x, wide, other)


@pytest.mark.parametrize("device", WHERE)
def test_reasons(device: str) -> None:
    supports = leaf_on("modulated_conv2d", device).supports_conv_add
    x, weight = torch.randn(1, 4, 4, 4, device=device), torch.randn(4, 4, 3, 3, device=device)
    assert "only a 1x1 kernel" in supports(x, weight, x)
    assert "reference only" in supports(x.double(), weight[..., :1, :1], x)
    assert "dtype" in supports(x, weight[..., :1, :1].half(), x)


def every_launch() -> None:
    """Of a discriminator of 1024x1024, in bfloat16 and as TF32."""
    module = importlib.import_module("clone_fast.kernels.modulated_conv2d")
    for n in 10, 2:
        for dtype in torch.bfloat16, torch.float32:
            for size, i, o in OF_D:
                x, other = (meta(n, c, size, size, dtype=dtype, channels_last=True) for c in (i, o))
                module.launch_conv_add(x, meta(o, i, 1, 1, dtype=dtype), other)


@pytest.mark.slow
def test_compiles_for_sm_90() -> None:
    kernels = compiled_launches(__file__, "every_launch")
    adding = {kernel.name for kernel in kernels if "'ADD': True" in kernel.arguments}
    assert {"_conv_hopper_kernel", "_fir_kernel"} <= adding
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= 227 * 1024, kernel


# ---- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [*FLOATS, "tf32"], ids=str)
@pytest.mark.parametrize(("size", "i", "o"), OF_D, ids=str)
def test_blocks_of_a_discriminator(size: int, i: int, o: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", dtype == "tf32")
    dtype, tf32 = (torch.float32, True) if dtype == "tf32" else (dtype, False)
    for n in (10, 2, 1) if size <= 128 else (2,):
        for layout in "channels_last", "strided":
            x = torch.randn(n, i, size, size, device="cuda").to(dtype, memory_format=torch.channels_last)
            other = placed(torch.randn(n, o, size, size, device="cuda").to(dtype), layout)
            check_step(x, torch.randn(o, i, 1, 1, device="cuda").to(dtype) / i**0.5, other, tf32)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("size", "i", "o"), OF_D[1:], ids=str)
def test_gradients_on_a_gpu(size: int, i: int, o: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule of errors; and where the step rounds once, the reference rounds twice."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, other, dy = (torch.randn(2, c, size, size, device="cuda").to(dtype) for c in (i, o, o))
    weight = torch.randn(o, i, 1, 1, device="cuda") / i**0.5

    def run(wide: torch.dtype, backend: str) -> list[Tensor]:
        images = [placed(value.to(wide), "channels_last").requires_grad_() for value in (x, other)]
        leaf = weight.to(wide if wide == torch.float64 else torch.float32).requires_grad_()
        y = conv2d_add(images[0], leaf, images[1], backend=backend)
        slope = placed(dy.to(wide), "channels_last")
        return [y, *torch.autograd.grad(y, [*images, leaf], slope)]

    exact, plain, fast = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "auto")
    assert torch.equal(fast[2], placed(dy, "channels_last"))
    for got, same, want in zip(fast, plain, exact, strict=True):
        error, allowed = ((one.double() - want).norm() for one in (got, same))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * want.norm()


@pytest.mark.gpu
def test_second_derivative_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a penalty on the gradient takes it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, other, weight = (torch.randn(2, c, 16, 16, device="cuda") for c in (32, 64, 32))
    weight = torch.randn(64, 32, 1, 1, device="cuda") / 6

    def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        inputs = [value.to(dtype).requires_grad_() for value in (x, weight, other)]
        y = conv2d_add(inputs[0], scaled_weight(inputs[1], 0.7, dtype), inputs[2], backend=backend)
        slopes = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(slope.square().mean() for slope in slopes), inputs)

    results = run(torch.float64, "reference"), run(torch.float32, "reference"), run(torch.float32, "auto")
    for want, plain, got in zip(*results, strict=True):
        error, allowed = ((one.double() - want).norm() for one in (got, plain))
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [4, 64])
def test_replayed_with_changed_inputs(size: int) -> None:
    """Both directions; the weight's gradient goes beside, and reads the gradient that the other branch gets."""
    x, other, dy = (
        torch.randn(2, c, size, size, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last)
        for c in (64, 128, 128)
    )
    weight = torch.nn.Parameter(torch.randn(128, 64, 1, 1, device="cuda"))
    inputs = [x.requires_grad_(), weight, other.requires_grad_()]

    def run() -> list[Tensor]:
        y = conv2d_add(x, scaled_weight(weight, 0.1, x.dtype), other)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        with torch.no_grad():
            for value in (*inputs, dy):
                value.normal_()
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)
