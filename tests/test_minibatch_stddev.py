"""minibatch_stddev against numpy, its gradients, registration, messages; and the Triton kernels against float64.

On a CPU the kernels run interpreted, on small shapes, and are compiled ahead of time.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import naive
import pytest
import torch
from ahead_of_time import compiled_launches, meta
from grids import DTYPES, as_layout, assert_close_as_dtype, assert_op_check, assert_same, compiled
from interpreted import WHERE, interpreted_leaf, leaf_on, needs_interpreter
from spec_leaf import steps
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.errors import BackendError
from clone_fast.ops import dispatch, minibatch_stddev
from clone_fast.ops.dispatch import Leaf
from clone_fast.reference import minibatch_stddev as spec

OPS = torch.ops.clone_fast
LEAF = "triton"  # any name but "reference"
LAYOUTS = ["contiguous", "channels_last", "strided"]


@dataclass(frozen=True)
class Case:
    """So many groups of samples [C, H, W], and features."""

    group: int
    groups: int
    channels: int
    size: tuple[int, int] = (4, 4)
    features: int = 1

    @property
    def args(self) -> tuple[int, int]:
        return self.group, self.features

    def made(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
        return torch.randn(self.group * self.groups, self.channels, *self.size, device=device).to(dtype)

    def slope(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return torch.randn(n, c + self.features, h, w, device=x.device).to(x.dtype)


CASES = [
    Case(5, 2, 6),
    Case(4, 1, 8),
    Case(1, 3, 4),
    Case(2, 3, 6, (3, 5), 2),
    Case(3, 1, 9, (1, 1), 3),
    Case(7, 2, 1, (2, 3)),
    Case(2, 1, 4, (1, 6), 4),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=["reference", "registered", "leaf"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By PyTorch's autograd of the reference; by the op on it; and on a leaf in plain PyTorch."""
    backend = {"registered": "reference", "leaf": LEAF}.get(request.param)
    if backend is not None:
        monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(steps("minibatch_stddev")))
        module = sys.modules["clone_fast.ops.minibatch_stddev"]
        monkeypatch.setattr(module, "resolve", lambda *args: LEAF)
        if request.param == "registered":
            op = module._op
            monkeypatch.setattr(module, "_op", lambda *args: op(*args[:-1], backend))
    return str(request.param)


# ---- the meaning -------------------------------------------------------------------------------------------------


@every_case
def test_against_numpy(case: Case, path: str) -> None:
    x = case.made()
    assert_same(minibatch_stddev(x, *case.args), naive.minibatch_stddev(naive.array(x), *case.args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str, path: str) -> None:
    case = Case(3, 2, 6, (4, 3), 2)
    x = as_layout(case.made(dtype), layout)
    y = minibatch_stddev(x, *case.args)
    assert y.dtype == dtype
    assert torch.equal(y[:, :6], x)
    if path != "reference":
        last = layout == "channels_last"
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    grouped = x.reshape(3, 2, 2, 3, 4, 3)
    feature = (grouped.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=[2, 3, 4]).repeat(3, 1)
    plain = torch.cat([x, feature[:, :, None, None].expand(-1, -1, 4, 3)], 1)
    assert_close_as_dtype(y, naive.minibatch_stddev(naive.array(x), *case.args), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, path: str) -> None:
    x = CASES[0].made(dtype)
    assert torch.equal(minibatch_stddev(x, 5, 1), minibatch_stddev(x.float(), 5, 1).to(dtype))


@pytest.mark.parametrize("group", [None, 4, 9])
def test_a_group_is_the_batch_at_most(group: int | None) -> None:
    x = CASES[1].made()
    assert torch.equal(minibatch_stddev(x, group), minibatch_stddev(x, 4, 1))


# ---- gradients ---------------------------------------------------------------------------------------------------


@every_case
def test_gradients(case: Case, path: str) -> None:
    x = Case(case.group, case.groups, case.channels, (2, 1), case.features).made().requires_grad_()
    if case.group == 1:  # flat, but too sharply bent where the variance is zero to be tried by differences
        slope = case.slope(x)
        (dx,) = torch.autograd.grad(minibatch_stddev(x, *case.args), x, slope)
        assert torch.equal(dx, slope[:, : case.channels])
        return
    assert gradcheck(lambda x: minibatch_stddev(x, *case.args), x)
    assert gradgradcheck(lambda x: minibatch_stddev(x, *case.args), x)


@every_case
def test_the_formula_of_the_gradient(case: Case) -> None:
    x = case.made().requires_grad_()
    slope = case.slope(x)
    (want,) = torch.autograd.grad(spec.minibatch_stddev(x, *case.args), x, slope)
    torch.testing.assert_close(spec.minibatch_stddev_backward(slope, x, *case.args), want)


def test_third_derivative(path: str) -> None:
    x = Case(3, 1, 2, (1, 2)).made().requires_grad_()

    def slopes(x: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(minibatch_stddev(x, 3, 1).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x, create_graph=True)[0]

    assert gradcheck(slopes, x)


# ---- registration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.float32), ("channels_last", torch.bfloat16), ("strided", torch.float64)],
)
@pytest.mark.parametrize("backend", ["reference", LEAF])
def test_opcheck(layout: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(steps("minibatch_stddev")))
    case = Case(2, 2, 6, (3, 2), 2)
    x = as_layout(case.made(dtype), layout)
    assert_op_check(OPS.minibatch_stddev.default, (x.detach().requires_grad_(), *case.args, backend))
    slope = as_layout(case.slope(x), layout)
    args = (slope.requires_grad_(), x.detach().requires_grad_(), *case.args, backend)
    assert_op_check(OPS.minibatch_stddev_backward.default, args)


@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize("group", [2, None])
def test_compiles_without_a_graph_break(group: int | None, dynamic_batch: bool, path: str) -> None:
    compiled(lambda x: minibatch_stddev(x, group, 2), torch.randn(4, 6, 4, 4), dynamic_batch=dynamic_batch)


def test_autocast_changes_nothing(path: str) -> None:
    x = torch.randn(4, 6, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = minibatch_stddev(x, 2, 2)
    assert torch.equal(inside, minibatch_stddev(x, 2, 2))


# ---- messages ----------------------------------------------------------------------------------------------------

X = torch.zeros(4, 6, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (TypeError, "x must be a floating-point tensor [N, C, H, W], got NoneType", (None, 4, 1)),
        (TypeError, "x must be a floating-point tensor [N, C, H, W], got uint8 [4, 6, 4, 4]", (X.byte(), 4, 1)),
        (ValueError, "x must be [N, C, H, W] and not empty, got float32 [6, 4, 4]", (X[0], 4, 1)),
        (ValueError, "x must be [N, C, H, W] and not empty, got float32 [0, 6, 4, 4]", (X[:0], 4, 1)),
        (ValueError, "group_size must be None or an integer >= 1, got 0", (X, 0, 1)),
        (ValueError, "num_channels must divide x's 6 channels, got 4", (X, 4, 4)),
        (ValueError, "num_channels must divide x's 6 channels, got 0", (X, 4, 0)),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(error) as raised:
        minibatch_stddev(*args)
    assert raised.type is error
    assert str(raised.value) == f"minibatch_stddev: {message}"


def test_a_batch_that_is_no_multiple() -> None:
    with pytest.raises(ValueError, match=r"^the batch must be a multiple of the discriminator's group size 3, got 4$"):
        minibatch_stddev(X, 3, 1)


# ---- backends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_on_cuda_it_is_the_other_leaf_s(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """clone_fast/cuda has no kernel of it, and yet a network may be asked for there."""
    leaves = {"cuda": importlib.import_module("clone_fast.cuda.minibatch_stddev"), "triton": steps("minibatch_stddev")}
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: Leaf(leaves[name]))
    with FakeTensorMode():
        x = torch.empty(4, 6, 4, 4, device="cuda")
        chosen = dispatch.resolve("minibatch_stddev", backend, x, 2, 1)
        with pytest.raises(BackendError):
            dispatch.resolve("minibatch_stddev", "cuda", x.double(), 2, 1)
    module = sys.modules["clone_fast.ops.minibatch_stddev"]
    y = torch.randn(4, 6, 4, 4, requires_grad=True)
    found = minibatch_stddev(y, 2, 1)
    monkeypatch.setattr(module, "resolve", lambda *args: chosen)
    got = minibatch_stddev(y, 2, 1)
    assert torch.equal(got, found)
    (want,) = torch.autograd.grad(found.square().sum(), y)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), y)[0], want)


# ---- the kernels -------------------------------------------------------------------------------------------------


def differentiated(x: Tensor, slope: Tensor, dtype: torch.dtype, *args: int) -> tuple[Tensor, Tensor]:
    """The result and its gradient to x, every step in this dtype, by PyTorch's autograd."""
    x = x.detach().to(dtype).requires_grad_()
    n, c, h, w = x.shape
    group, features = args
    parts = x.reshape(group, n // group, features, c // features, h, w)
    deviation = (parts.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=[2, 3, 4]).repeat(group, 1)
    y = torch.cat([x, deviation[:, :, None, None].expand(-1, -1, h, w)], 1)
    return y.detach(), torch.autograd.grad(y, x, slope.to(dtype))[0]


def check(leaf: ModuleType, x: Tensor, slope: Tensor, *args: int) -> None:
    assert leaf.supports(x, *args) is None
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    y, dx = leaf.launch(x, *args), leaf.launch_backward(slope, x, *args)
    want_y, want_dx = differentiated(x, slope, torch.float64, *args)
    plain_y, plain_dx = differentiated(x, slope, x.dtype, *args)
    if not plain_dx.isfinite().all():  # float16 has no 1e-8: where nothing deviates the slope of its root is infinite
        plain_y, plain_dx = (one.to(x.dtype) for one in differentiated(x, slope, torch.float32, *args))
    channels = x.shape[1]
    assert torch.equal(y[:, :channels], x)
    for got, want, plain in (
        (y[:, channels:], want_y[:, channels:], plain_y[:, channels:]),
        (dx, want_dx, plain_dx),
    ):
        assert got.dtype == x.dtype
        assert_close_as_dtype(got.cpu(), naive.array(want.cpu()), plain.cpu())
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)
    if x.dtype == torch.bfloat16:  # the part through the feature alone: in the sum a rounding of the rest may hide it
        alone = torch.cat([torch.zeros_like(slope[:, :channels]), slope[:, channels:]], 1)
        through = leaf.launch_backward(alone, x, *args)
        _, want = differentiated(x, alone, torch.float64, *args)
        if want.any():
            assert torch.cosine_similarity(through.double().flatten(), want.flatten(), 0) > 0.9999


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("where", WHERE)
@every_case
def test_kernels(case: Case, where: str) -> None:
    x = case.made(torch.float32, where)
    check(leaf_on("minibatch_stddev", where), x, case.slope(x), *case.args)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope_layout", LAYOUTS)
@pytest.mark.parametrize("tile", [256, 32768])
def test_kernels_in_any_layout(
    where: str, dtype: torch.dtype, layout: str, slope_layout: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tile: whether a program goes round, too."""
    leaf = leaf_on("minibatch_stddev", where)
    monkeypatch.setattr(leaf, "TILE", tile)
    monkeypatch.setattr(leaf, "BACKWARD_TILE", tile)
    case = Case(3, 2, 22, (3, 5), 2)
    x = as_layout(case.made(dtype, where), layout)
    check(leaf, x, as_layout(case.slope(x), slope_layout), *case.args)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("where", WHERE)
def test_kernels_of_many_pixels_and_equal_samples(where: str) -> None:
    leaf = leaf_on("minibatch_stddev", where)
    case = Case(2, 1, 3, (9, 31))
    x = case.made(torch.float32, where)
    check(leaf, x, case.slope(x), *case.args)
    x[1] = x[0]
    y = leaf.launch(x, *case.args)
    torch.testing.assert_close(y[:, 3:], torch.full_like(y[:, 3:], 1e-4))
    slope = case.slope(x)
    assert torch.equal(leaf.launch_backward(slope, x, *case.args), slope[:, :3])


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("where", WHERE)
def test_kernels_of_samples_far_from_zero(where: str) -> None:
    """A variance from sums of squares would be lost."""
    x = CASES[0].made(torch.float32, where) + 1000
    check(leaf_on("minibatch_stddev", where), x, CASES[0].slope(x), *CASES[0].args)


@needs_interpreter
def test_reasons() -> None:
    leaf = interpreted_leaf("minibatch_stddev")
    assert leaf.supports(torch.zeros(1, 1, 2, 2).double(), 1, 1) == "float64 runs on the reference only"
    x = torch.zeros(1, 1, 2, 2).expand(1025, -1, -1, -1)
    assert leaf.supports(x, 1025, 1) == "groups of up to 1024 samples, got 1025"
    assert leaf.supports(x[:1024], 1024, 1) is None


def every_launch() -> None:
    leaf = importlib.import_module("clone_fast.kernels.minibatch_stddev")
    for n, group, channels, features, dtype, last in (
        (10, 5, 512, 1, torch.bfloat16, True),
        (4, 4, 512, 1, torch.float32, True),
        (1, 1, 512, 1, torch.bfloat16, True),
        (64, 64, 512, 1, torch.float32, False),
        (6, 3, 33, 3, torch.float16, False),
    ):
        x = meta(n, channels, 4, 4, dtype=dtype, channels_last=last)
        y = leaf.launch(x, group, features)
        assert leaf.launch_backward(y, x, group, features).shape == x.shape


@pytest.mark.slow
def test_compiles_for_sm_90() -> None:
    found = compiled_launches(__file__, "every_launch")
    assert {kernel.name for kernel in found} == {"_forward_kernel", "_backward_kernel"}
    for kernel in found:
        assert kernel.spilled == 0, kernel


# ---- on a GPU ----------------------------------------------------------------------------------------------------

LARGE = [
    Case(5, 2, 512),
    Case(4, 4, 512),
    Case(64, 1, 512),
    Case(1, 5, 512),
    Case(4, 1, 1000, (16, 16), 5),
    Case(3, 2, 513, (5, 7)),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu(case: Case, dtype: torch.dtype, layout: str) -> None:
    leaf = leaf_on("minibatch_stddev", "cuda")
    x = as_layout(case.made(dtype, "cuda"), layout)
    slope = as_layout(case.slope(x), layout)
    check(leaf, x, slope, *case.args)
    for run in (lambda: leaf.launch(x, *case.args), lambda: leaf.launch_backward(slope, x, *case.args)):
        assert torch.equal(run(), run())


@pytest.mark.gpu
@pytest.mark.parametrize("order", [1, 2])
def test_gpu_gradients(order: int) -> None:
    case, found = Case(5, 2, 64), []
    x, slope = case.made(), case.slope(case.made())
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = x.to("cuda", dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = minibatch_stddev(leaf, *case.args, backend=backend)
        (dx,) = torch.autograd.grad(y.square(), leaf, slope.to("cuda", dtype), create_graph=order == 2)
        found.append(dx if order == 1 else torch.autograd.grad(dx.square().sum(), leaf)[0])
    got, want = found
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.gpu
def test_gpu_float64_is_the_reference_s() -> None:
    x = CASES[0].made(device="cuda")
    with pytest.raises(BackendError, match="float64 runs on the reference only"):
        minibatch_stddev(x, 5, 1, backend="triton")
    y = minibatch_stddev(x, 5, 1, backend="reference").cpu()
    assert_same(y, naive.minibatch_stddev(naive.array(x.cpu()), 5, 1))


@pytest.mark.gpu
def test_gpu_graph_with_changed_inputs() -> None:
    case = Case(5, 2, 512)
    x = case.made(torch.bfloat16, "cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    slope = case.slope(x.detach())

    def run() -> tuple[Tensor, Tensor]:
        y = minibatch_stddev(x, *case.args, backend="triton")
        return y.detach(), torch.autograd.grad(y, x, slope)[0]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            slope.normal_()
        graph.replay()
        for one, other in zip(captured, run(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_gpu_op_check_and_compiler() -> None:
    case = Case(2, 2, 64)
    x = case.made(torch.float32, "cuda").contiguous(memory_format=torch.channels_last)
    assert_op_check(OPS.minibatch_stddev.default, (x.detach().requires_grad_(), *case.args, "triton"))
    args = (case.slope(x).requires_grad_(), x.detach().requires_grad_(), *case.args, "triton")
    assert_op_check(OPS.minibatch_stddev_backward.default, args)
    for compiler in ("aot_eager", "inductor"):
        compiled(lambda x: minibatch_stddev(x * 2, *case.args), x, backend=compiler)
