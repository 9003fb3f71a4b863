"""Where a discriminator begins: the convolution and its result at half the resolution as one op, which is what the two
are.

Without a GPU on the leaves of tests/spec_leaf.py, in float64. tests/test_branch_backward.py has the step of its
way back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import spec_leaf
import torch
from fast import cosine
from grids import as_layout, assert_op_check, compiled
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.nn import Architecture, Discriminator
from clone_fast.ops import conv2d_branch, dispatch, downsample2d, modulated_conv2d, setup_filter
from clone_fast.ops.dispatch import Leaf
from clone_fast.ops.registration import layout_of

OPS = torch.ops.clone_fast
LEAF = "triton"  # any name but "reference"
NAMES = ("x", "weight", "bias")
FOLDED = {"act": "lrelu", "gain": 0.4, "clamp": 0.9}
ACTIVATIONS = {"folded": FOLDED, "lrelu": {"act": "lrelu"}, "linear": {}, "not fused": {"act": "tanh"}}
FROZEN = [[], ["bias"], ["weight"], ["weight", "bias"], ["x"], ["x", "weight"]]


def tensors(
    n: int = 2, channels: int = 3, k: int = 1, size: Sequence[int] = (6, 8), dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    shapes = {"x": [n, channels, *size], "weight": [8, channels, k, k], "bias": [8]}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def apart(x: Tensor, weight: Tensor, f: Tensor, backend: str = "reference", **last: Any) -> tuple[Tensor, Tensor]:
    """By two ops, which have tests of their own."""
    y = modulated_conv2d(x, weight, None, demodulate=False, backend=backend, **last)
    return y, downsample2d(y, f, backend=backend)


def function(args: dict[str, Any], names: Sequence[str], run: Any, f: Tensor, **options: Any) -> Any:
    """Of the tensors of these names."""
    rest = {name: value for name, value in args.items() if name not in names}

    def of_values(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = {**rest, **dict(zip(names, values, strict=True))}
        images = [given.pop(name) for name in ("x", "weight")]
        results: tuple[Tensor, Tensor] = run(*images, f, **given, **options)
        return results

    return of_values


def smooth(dtype: torch.dtype = torch.float64) -> Tensor:
    return setup_filter([1, 3, 3, 1]).to(dtype)


def branch(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """The step that makes both results."""
    *activation, f, padding = args
    y = spec_leaf.steps("modulated_conv2d").launch(x, weight, None, None, bias, None, 1, 1, *activation)
    return y, spec_leaf.steps("upfirdn2d").launch(y, f, [1, 1], [2, 2], padding, False, 1.0)


@pytest.fixture(params=["in one pass", "forward too", "refused", "composed"])
def done(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The public function takes a leaf, though there is no GPU; which steps it ran, the kind of leaf first."""
    ran: list[str] = [request.param]

    def noted(name: str, step: Any) -> Any:
        return lambda *args: ran.append(name.removeprefix("launch_")) or step(*args)

    def functions(op: str) -> SimpleNamespace:
        found = spec_leaf.steps(op, whole=request.param != "composed")
        if request.param == "forward too" and op == "modulated_conv2d":
            found.launch_branch = branch
        for name, step in list(vars(found).items()):
            if name.startswith("launch"):
                setattr(found, name, noted(name, step))
        if request.param == "refused" and op == "modulated_conv2d":
            found.supports_branch_backward = lambda *args: "not this one"
        return found

    def resolved(op: str, requested: str, *args: Any) -> str:
        return LEAF if requested == "auto" else requested

    leaves = {op: Leaf(functions(op)) for op in ("modulated_conv2d", "bias_act", "upfirdn2d")}
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: leaves[op])
    for module in "modulated_conv2d", "bias_act", "upfirdn2d", "upfirdn2d_add", "conv2d_down", "conv2d_branch":
        monkeypatch.setattr(sys.modules[f"clone_fast.ops.{module}"], "resolve", resolved)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return ran


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results(layout: str, size: tuple[int, int], done: list[str]) -> None:
    args = tensors(size=size)
    args["x"] = as_layout(args["x"], layout)
    way, before = done[0], len(done)
    found = function(args, [], conv2d_branch, smooth(), **FOLDED)()
    assert (done[before:] == ["branch"]) == (way == "forward too")
    for got, want in zip(found, function(args, [], apart, smooth(), **FOLDED)(), strict=True):
        torch.testing.assert_close(got, want)
        assert got.is_contiguous(memory_format=layout_of(args["x"]))


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_gradients(frozen: list[str], kind: str, used: tuple[int, ...], done: list[str]) -> None:
    """Of both results, and of one that alone came to anything."""
    args, options = tensors(size=(6, 7)), ACTIVATIONS[kind]
    names = [name for name in NAMES if name not in frozen]
    values = [args[name].requires_grad_() for name in names]

    def results_of(op: Any, *values: Tensor) -> list[Tensor]:
        both = function(args, names, op, smooth(), **options)(*values)
        return [both[i] for i in used]

    results, want = (results_of(op, *values) for op in (conv2d_branch, apart))
    grads = [torch.randn_like(one) for one in results]
    way, before = done[0], len(done)
    found = torch.autograd.grad(results, values, grads)
    steps = done[before:]
    for got, one in zip(found, torch.autograd.grad(want, values, grads), strict=True):
        torch.testing.assert_close(got, one)
    one_pass = way in ("in one pass", "forward too") and kind != "not fused" and len(used) == 2
    assert ("branch_backward" in steps) == one_pass
    assert not (one_pass and {"add", "launch", "act_backward", "pointwise_backward"} & set(steps))
    assert gradcheck(lambda *values: results_of(conv2d_branch, *values), values, fast_mode=True)


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_second_gradients(frozen: list[str], done: list[str]) -> None:
    """What R1 wants, by the ops apart."""
    args = tensors(n=1)
    names = [name for name in NAMES if name not in frozen]
    run = function(args, names, conv2d_branch, smooth(), **FOLDED)
    assert gradgradcheck(run, [args[name].requires_grad_() for name in names], fast_mode=True)


def test_third_gradients(done: list[str]) -> None:
    args = tensors(n=1)
    run = function(args, ["x", "weight"], conv2d_branch, smooth())

    def slopes(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, shrunk = run(x, weight)
        return torch.autograd.grad(y.pow(3).sum() + shrunk.pow(3).sum(), (x, weight), create_graph=True)

    assert gradgradcheck(slopes, [args[name].requires_grad_() for name in ("x", "weight")], fast_mode=True)


@pytest.mark.parametrize("k", [1, 3])
def test_without_a_bias_and_of_larger_kernels(k: int, done: list[str]) -> None:
    args: dict[str, Any] = {**tensors(k=k), "bias": None}
    names = ["x", "weight"]
    values = [args[name].requires_grad_() for name in names]
    run, two = (function(args, names, one, smooth(), **FOLDED) for one in (conv2d_branch, apart))
    grads = [torch.randn_like(one) for one in two(*values)]
    for got, want in zip(*(torch.autograd.grad(one(*values), values, grads) for one in (run, two)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_op_checks(layout: str, done: list[str]) -> None:
    args = {name: value.requires_grad_() for name, value in tensors(dtype=torch.float32).items()}
    x = as_layout(args["x"].detach(), layout).requires_grad_()
    call = (x, args["weight"], args["bias"], "lrelu", 0.4, 0.9, smooth(torch.float32), [1, 1, 1, 1], LEAF)
    assert_op_check(OPS.conv2d_branch.default, (*call, LEAF))
    plain = [value.detach() if isinstance(value, Tensor) else value for value in call]
    y, shrunk = (one.detach() for one in OPS.conv2d_branch(*plain, LEAF))
    for wanted in [True] * 3, [False, True, True], [True, False, False]:
        grads = (torch.randn_like(y), torch.randn_like(shrunk))
        assert_op_check(OPS.conv2d_branch_backward.default, (*grads, y, *plain, wanted, LEAF))


def test_it_compiles_without_a_graph_break(done: list[str]) -> None:
    args = tensors(dtype=torch.float32)
    parameters = [args[name].requires_grad_() for name in NAMES[1:]]
    run = function(args, ["x"], conv2d_branch, smooth(torch.float32), act="lrelu")
    compiled(lambda x: torch.cat([one.flatten(1) for one in run(x)], dim=1), args["x"], parameters)


@pytest.mark.parametrize(
    ("message", "name", "shape"),
    [
        (r"weight must be \[O, 3, k, k\]", "weight", (8, 5, 1, 1)),
        (r"bias must be \[8\], got float64 \[5\]", "bias", (5,)),
        ("nothing is left of x", "x", (2, 3, 1, 8)),
    ],
)
def test_bad_shapes(message: str, name: str, shape: tuple[int, ...], done: list[str]) -> None:
    args = {**tensors(), name: torch.ones(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        function(args, [], conv2d_branch, smooth())()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_discriminator_s_gradients(dtype: torch.dtype, recompute: bool, done: list[str]) -> None:
    """With its weights' factors in the gains of the activations, or not, as those of float64."""
    arch = Architecture(img_resolution=8, channel_base=64, channel_max=16)
    d = Discriminator(arch)
    img = torch.randn(4, 3, 8, 8)
    grads = []
    for one in dtype, torch.float64:
        module = d.double() if one == torch.float64 else d
        given = img.to(one).requires_grad_()
        logits = module(given, dtype=one, recompute=recompute)
        grads.append(torch.autograd.grad(logits.sum(), [given, module.b8.fromrgb.weight, module.b8.fromrgb.bias]))
    assert ("branch_backward" in done) == (done[0] in ("in one pass", "forward too"))
    for got, want in zip(*grads, strict=True):
        assert cosine(got, want) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 32, 1024), (2, 64, 512), (3, 8, 64)], ids=str)
def test_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """As two ops, up to roundings; twice the same bits; captured, too."""
    n, channels, size = shape
    args = {
        "x": as_layout(torch.randn(n, 3, size, size, device="cuda"), "channels_last"),
        "weight": torch.randn(channels, 3, 1, 1, device="cuda"),
        "bias": torch.randn(channels, device="cuda"),
    }
    args = {name: value.to(dtype).requires_grad_() for name, value in args.items()}
    values, f = list(args.values()), setup_filter([1, 3, 3, 1]).cuda()
    options = {"act": "lrelu", "clamp": 2.0}
    run = function(args, NAMES, conv2d_branch, f, **options)
    two = function(args, NAMES, lambda *a, **b: apart(*a, "auto", **b), f, **options)
    given = [torch.randn_like(one) for one in two(*values)]
    grads = [torch.autograd.grad(one(*values), values, given) for one in (run, run, two)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(run(*values), values, given)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(run(*values), two(*values), strict=True):
        assert cosine(got, want) > 0.99999
    for first, again, replayed, want in zip(grads[0], grads[1], captured, grads[2], strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, replayed)
        assert cosine(first, want) > 0.9999
