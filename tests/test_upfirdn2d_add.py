"""upfirdn2d with another image added: the sum of RGB images, and of the gradients where a residual block begins."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from fast import FLOATS, placed
from grids import assert_op_check, assert_same, compiled
from spec_leaf import steps
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.ops import dispatch, downsample2d, downsampled_branch, upsample2d, upsample2d_add
from clone_fast.ops.dispatch import Leaf
from clone_fast.ops.registration import layout_of

BLUR = torch.tensor(naive.BLUR, dtype=torch.float32)
REGISTERED = torch.ops.clone_fast.upfirdn2d_add.default
UP, NO = [2, 2], [1, 1]


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(params=["whole", "without the step"])
def leaf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Leaves in plain PyTorch, without a GPU; what their sums returned."""
    done: list[Tensor] = []

    def functions(op: str) -> SimpleNamespace:
        found = steps(op)
        add = vars(found).pop("launch_add", None)
        if request.param == "whole" and add is not None:
            found.launch_add = lambda *args: done.append(add(*args)) or done[-1]
        return found

    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(functions(op)))
    for module in "upfirdn2d", "upfirdn2d_add":
        monkeypatch.setattr(sys.modules[f"clone_fast.ops.{module}"], "resolve", lambda *args: "triton")
    return done


# ---- the sum of RGB images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("taps", [naive.BLUR, [1.0, 3, 3, 1], [2.0], [[1.0, 2, 3], [0, 1, 4]]], ids=str)
def test_the_sum(size: tuple[int, int], taps: Any) -> None:
    x, other, f = double(2, 3, *size), double(2, 3, *(2 * n for n in size)), torch.tensor(taps)
    fh, fw = f.shape[0], f.shape[-1]
    padding = [(fw + 1) // 2, (fw - 2) // 2, (fh + 1) // 2, (fh - 2) // 2]
    want = naive.upfirdn2d(naive.array(x), naive.array(f), up=UP, padding=padding, gain=4.0)
    assert_same(upsample2d_add(x, f, other), want + naive.array(other))


def test_the_result_has_the_dtype_of_the_image(leaf: list[Tensor]) -> None:
    x, other = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(1, 3, 8, 8).bfloat16().requires_grad_()
    y = upsample2d_add(x, BLUR, other)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, upsample2d(x, BLUR) + other)
    dx, dother = torch.autograd.grad(y.square().sum(), [x, other])
    assert (dx.dtype, dother.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("last", [0, 1])
def test_the_result_has_the_layout_of_the_image(last: int) -> None:
    inputs = [torch.randn(2, 3, 4, 6), torch.randn(2, 3, 8, 12).bfloat16()]
    want = upsample2d_add(inputs[0], BLUR, inputs[1])
    inputs[last] = inputs[last].contiguous(memory_format=torch.channels_last)
    y = upsample2d_add(inputs[0], BLUR, inputs[1])
    assert y.is_contiguous(memory_format=layout_of(inputs[0]))
    assert torch.equal(y, want)


@pytest.mark.parametrize("last", [0, 1])
def test_on_leaves_the_result_has_the_layout_of_the_image(last: int, leaf: list[Tensor]) -> None:
    test_the_result_has_the_layout_of_the_image(last)


def test_gradients_of_the_sum(leaf: list[Tensor]) -> None:
    inputs = double(1, 2, 3, 4).requires_grad_(), double(1, 2, 6, 8).requires_grad_()
    assert gradcheck(lambda x, other: upsample2d_add(x, BLUR, other), inputs)
    assert gradgradcheck(lambda x, other: upsample2d_add(x, BLUR, other), inputs)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_of_the_sum(wanted: int, leaf: list[Tensor]) -> None:
    inputs = [double(1, 2, 3, 4), double(1, 2, 6, 8)]
    inputs[wanted].requires_grad_()
    y = upsample2d_add(inputs[0], BLUR, inputs[1])
    dy = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, inputs[wanted], dy)
    (want,) = torch.autograd.grad(upsample2d(inputs[0], BLUR) + inputs[1], inputs[wanted], dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_check(dtype: torch.dtype) -> None:
    x, other = torch.randn(1, 3, 4, 5, requires_grad=True), torch.randn(1, 3, 8, 10).to(dtype).requires_grad_()
    x_last, other_last = (
        image.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for image in (x, other)
    )
    for image, added in (x, other), (x_last, other), (x, other_last):
        assert_op_check(REGISTERED, (image, added, BLUR, UP, NO, [2, 1, 2, 1], False, 4.0, "reference"))


def test_both_compile_without_a_graph_break() -> None:
    x, other = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8).requires_grad_()
    compiled(lambda x: upsample2d_add(x, BLUR, other), x, [other])

    def both(x: Tensor) -> Tensor:
        same, half = downsampled_branch(x, BLUR)
        return same.square().sum() + half.sum()

    compiled(both, x)


def test_on_leaves_both_compile_without_a_graph_break(leaf: list[Tensor]) -> None:
    test_both_compile_without_a_graph_break()


@pytest.mark.parametrize(
    ("error", "message", "other"),
    [
        (ValueError, r"_add: other must be \[1, 3, 8, 8\], got float32 \[1, 3, 4, 4\]", torch.ones(1, 3, 4, 4)),
        (
            ValueError,
            r"other must be of a dtype that float32 \[1, 3, 4, 4\] has room for, got float64",
            double(1, 3, 8, 8),
        ),
        (TypeError, "other must be a floating-point tensor", torch.ones(1, 3, 8, 8, dtype=torch.int32)),
        (ValueError, "other must be on cpu", torch.ones(1, 3, 8, 8, device="meta")),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, other: Tensor) -> None:
    with pytest.raises(error, match=message):
        upsample2d_add(torch.ones(1, 3, 4, 4), BLUR, other)


# ---- where a residual block begins --------------------------------------------------------------------------------


def test_the_branch_is_the_image_and_its_half(leaf: list[Tensor]) -> None:
    for x in double(2, 3, 6, 8), double(2, 3, 6, 8).requires_grad_():
        same, half = downsampled_branch(x, BLUR)
        assert torch.equal(same, x)
        want = naive.upfirdn2d(naive.array(x), naive.BLUR, down=UP, padding=[1, 1, 1, 1])
        assert_same(half, want)


def test_gradients_of_the_branch(leaf: list[Tensor]) -> None:
    x = double(1, 2, 6, 4).requires_grad_()
    assert gradcheck(lambda x: downsampled_branch(x, BLUR), x)
    assert gradgradcheck(lambda x: downsampled_branch(x, BLUR), x)
    assert gradcheck(lambda x: [part.square() for part in downsampled_branch(x, BLUR)], x)
    assert gradgradcheck(lambda x: [part.square() for part in downsampled_branch(x, BLUR)], x)


@pytest.mark.parametrize("used", [[0], [1], [0, 1]], ids=str)
def test_gradients_of_what_is_used_of_the_branch(used: list[int], leaf: list[Tensor]) -> None:
    x = double(1, 2, 6, 4).requires_grad_()
    slopes = [double(1, 2, 6, 4), double(1, 2, 3, 2)]
    parts = downsampled_branch(x, BLUR)
    (got,) = torch.autograd.grad([parts[i] for i in used], x, [slopes[i] for i in used])
    plain = x, downsample2d(x, BLUR)
    (want,) = torch.autograd.grad([plain[i] for i in used], x, [slopes[i] for i in used])
    torch.testing.assert_close(got, want)


def test_both_gradients_come_in_one_pass(leaf: list[Tensor], request: pytest.FixtureRequest) -> None:
    x = double(1, 2, 6, 4).requires_grad_()
    same, half = downsampled_branch(x, BLUR)
    (same.sum() + half.sum()).backward()
    assert len(leaf) == ("without" not in request.node.name)


# ---- on a GPU -----------------------------------------------------------------------------------------------------

# up 2 of the generator, and the adjoint of its discriminator's down 2: (padding, flip_filter, gain)
USES = [([2, 1, 2, 1], False, 4.0), ([2, 1, 2, 1], True, 1.0), ([3, 0, 1, 2], False, 1.5), ([0, 3, 2, 1], True, 1.0)]
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (2, 8, 4, 4), (1, 40, 9, 3), (3, 512, 4, 4), (1, 32, 64, 70), (2, 3, 128, 128)]
PAIRS = [*zip(FLOATS, FLOATS, strict=True), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


def check_on_cuda(x: Tensor, other: Tensor, f: Tensor, padding: list[int], flip: bool, gain: float) -> None:
    """Against float64: a rounding of the result, and roundings in float32 of the terms."""
    options = (UP, NO, padding, flip, gain)
    got = REGISTERED(x, other, f, *options, "cuda")
    want = REGISTERED(x.double(), other.double(), f, *options, "reference")
    terms = REGISTERED(x.double().abs(), other.double().abs(), f.abs(), *options, "reference")
    eps = torch.finfo(got.dtype).eps
    wrong = (got.double() - want).abs() - 0.51 * eps * want.abs() - 8 * torch.finfo(torch.float32).eps * terms
    assert got.dtype == x.dtype
    assert got.is_contiguous(memory_format=layout_of(x))
    assert wrong.max() <= torch.finfo(got.dtype).tiny, wrong.max()


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided", "offset"])
def test_on_cuda(shape: tuple[int, ...], layout: str) -> None:
    n, c, h, w = shape
    filters = [BLUR, torch.randn(4, 4), torch.tensor([1.0, 2, -3, 4])]
    for dtype, added in PAIRS:
        for (padding, flip, gain), f in zip(USES, [*filters, BLUR], strict=True):
            x = placed(torch.randn(n, c, h, w).to("cuda", dtype), layout)
            other = placed(torch.randn(n, c, 2 * h, 2 * w).to("cuda", added), layout)
            check_on_cuda(x, other, f.cuda(), padding, flip, gain)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 6, 5), (1, 3, 12, 8), (5, 3, 100, 36)], ids=str)
@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last")], ids=str)
def test_layouts_that_differ(shape: tuple[int, ...], layouts: tuple[str, str]) -> None:
    n, c, h, w = shape
    one, two = layouts
    for dtype, added in PAIRS:
        for (padding, flip, gain), f in zip(USES, [BLUR, torch.randn(4, 4), BLUR, torch.randn(4)], strict=True):
            x = torch.randn(n, c, h, w).to("cuda", dtype)
            other = placed(torch.randn(n, c, 2 * h, 2 * w).to("cuda", added), two)
            for layout in [one] if one == "channels_last" else [one, "strided", "offset"]:
                check_on_cuda(placed(x, layout), other, f.cuda(), padding, flip, gain)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_layout_of_what_is_added_changes_nothing(dtype: torch.dtype) -> None:
    x, other = torch.randn(2, 3, 64, 64, device="cuda"), torch.randn(2, 3, 128, 128, device="cuda").to(dtype)
    images, others = ([placed(image, "contiguous"), placed(image, "channels_last")] for image in (x, other))
    want, *rest = (upsample2d_add(image, BLUR.cuda(), one, backend="cuda") for image in images for one in others)
    for got in rest:
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize(("channels", "size"), [(32, 512), (64, 256), (512, 8), (512, 2)], ids=str)
def test_branches_of_a_discriminator_on_cuda(channels: int, size: int) -> None:
    """The gradient of both, against float64 and beside the sum of two passes."""
    f = BLUR.cuda()
    x, half = (torch.randn(2, channels, n, n, device="cuda").bfloat16() for n in (2 * size, size))
    x, half = placed(x, "channels_last"), placed(half, "channels_last")
    slopes = torch.randn_like(x), half

    def gradient(x: Tensor, slopes: tuple[Tensor, ...], backend: str) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(downsampled_branch(x, f, backend=backend), x, slopes)[0]

    want = gradient(x.double(), tuple(slope.double() for slope in slopes), "reference")
    errors = [(gradient(x, slopes, name).double() - want).abs().max() for name in ("auto", "reference")]
    assert errors[0] <= errors[1]  # rounded once
    assert errors[0] > 0


@pytest.mark.gpu
def test_replayed_with_changed_inputs() -> None:
    f = BLUR.cuda()
    x, other = torch.randn(2, 3, 32, 32, device="cuda"), torch.randn(2, 3, 64, 64, device="cuda").bfloat16()
    upsample2d_add(x, f, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = upsample2d_add(x, f, other)
    for _ in range(2):
        x.normal_()
        other.normal_()
        graph.replay()
        assert torch.equal(y, upsample2d_add(x, f, other))
