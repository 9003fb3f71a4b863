"""The two convolutions of a discriminator's block: as one op, which is what the two are.

Without a GPU on the leaves of tests/spec_leaf.py, in float64. tests/test_fir_act.py has the step of its way back.
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
from clone_fast.ops import conv2d_down, dispatch, modulated_conv2d, setup_filter
from clone_fast.ops.dispatch import Leaf
from clone_fast.ops.registration import layout_of

OPS = torch.ops.clone_fast
LEAF = "triton"  # any name but "reference"
NAMES = ("x", "weight", "down_weight", "bias", "down_bias")
MODULE = sys.modules["clone_fast.ops.conv2d_down"]


def tensors(n: int = 2, channels: int = 3, k: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {
        "x": [n, channels, 6, 8],
        "weight": [channels, channels, k, k],
        "down_weight": [4, channels, k, k],
        "bias": [channels],
        "down_bias": [4],
    }
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def apart(x: Tensor, weight: Tensor, down_weight: Tensor, f: Tensor, backend: str = "reference", **last: Any) -> Tensor:
    """By two ops, which have tests of their own."""
    first = {name: value for name, value in last.items() if not name.startswith("down_")}
    second = {name.removeprefix("down_"): value for name, value in last.items() if name.startswith("down_")}
    options: dict[str, Any] = {"demodulate": False, "backend": backend}
    y = modulated_conv2d(x, weight, None, **first, **options)
    return modulated_conv2d(y, down_weight, None, down=2, resample_filter=f, **second, **options)


def function(args: dict[str, Any], names: Sequence[str], run: Any, f: Tensor, **options: Any) -> Any:
    """Of the tensors of these names."""
    rest = {name: value for name, value in args.items() if name not in names}

    def of_values(*values: Tensor) -> Tensor:
        given = {**rest, **dict(zip(names, values, strict=True))}
        images = [given.pop(name) for name in ("x", "weight", "down_weight")]
        result: Tensor = run(*images, f, **given, **options)
        return result

    return of_values


def smooth(dtype: torch.dtype = torch.float64) -> Tensor:
    return setup_filter([1, 3, 3, 1]).to(dtype)


@pytest.fixture(params=["in one pass", "small", "refused", "composed"])
def done(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The public function takes a leaf, though there is no GPU; which steps it ran, the kind of leaf first."""
    ran: list[str] = [request.param]

    def noted(name: str, step: Any) -> Any:
        return lambda *args: ran.append(name.removeprefix("launch_")) or step(*args)

    def functions(op: str) -> SimpleNamespace:
        found = spec_leaf.steps(op, whole=request.param != "composed")
        for name, step in list(vars(found).items()):
            if name.startswith("launch"):
                setattr(found, name, noted(name, step))
        if request.param == "refused" and op == "modulated_conv2d":
            found.supports_fir_act = found.supports_kept = lambda *args: "not this one"
        return found

    def resolved(op: str, requested: str, *args: Any) -> str:
        return LEAF if requested == "auto" else requested

    leaves = {op: Leaf(functions(op)) for op in ("modulated_conv2d", "bias_act", "upfirdn2d")}
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: leaves[op])
    for module in "modulated_conv2d", "bias_act", "upfirdn2d", "conv2d_down":
        monkeypatch.setattr(sys.modules[f"clone_fast.ops.{module}"], "resolve", resolved)
    monkeypatch.setattr(MODULE, "IN_ONE_PASS", 49 if request.param == "small" else 48)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return ran


FOLDED = {"act": "lrelu", "gain": 0.4, "clamp": 0.9, "down_act": "lrelu", "down_gain": 0.3, "down_clamp": 0.8}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_result(layout: str, done: list[str]) -> None:
    args = tensors()
    args["x"] = as_layout(args["x"], layout)
    z = function(args, [], conv2d_down, smooth(), **FOLDED)()
    torch.testing.assert_close(z, function(args, [], apart, smooth(), **FOLDED)())
    assert z.is_contiguous(memory_format=layout_of(args["x"]))


ACTIVATIONS = {
    "folded": FOLDED,
    "one clamp": {"act": "relu", "clamp": 1.0, "down_act": "lrelu"},
    "second linear": {"act": "lrelu"},
    "linear": {},
    "not fused": {"act": "tanh", "down_act": "lrelu"},
}
FROZEN = [[], ["bias"], ["weight", "down_weight"], ["x", "weight", "bias"], ["down_weight", "down_bias"], ["x"]]


@pytest.mark.parametrize("kind", list(ACTIVATIONS))
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_gradients(frozen: list[str], kind: str, done: list[str]) -> None:
    args, options = tensors(), ACTIVATIONS[kind]
    names = [name for name in NAMES if name not in frozen]
    values = [args[name].requires_grad_() for name in names]
    run, two = (function(args, names, one, smooth(), **options) for one in (conv2d_down, apart))
    z, want = run(*values), two(*values)
    torch.testing.assert_close(z, want)
    dz = torch.randn_like(z)
    way, before = done[0], len(done)
    found = torch.autograd.grad(z, values, dz)
    steps = done[before:]
    for got, one in zip(found, torch.autograd.grad(want, values, dz), strict=True):
        torch.testing.assert_close(got, one)
    one_pass = way == "in one pass" and kind != "not fused" and {"x", "weight", "bias"} & set(names)
    assert ("fir_act" in steps) == bool(one_pass)
    if way == "small" and kind == "folded" and "x" in names:
        assert "launch" in steps  # transposed convolution and filter, as one op
    assert gradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_second_gradients(frozen: list[str], done: list[str]) -> None:
    """What R1 wants, by the ops apart."""
    args = tensors(n=1)
    names = [name for name in NAMES if name not in frozen]
    run = function(args, names, conv2d_down, smooth(), **FOLDED)
    assert gradgradcheck(run, [args[name].requires_grad_() for name in names], fast_mode=True)


def test_third_gradients(done: list[str]) -> None:
    args = tensors(n=1, k=1)
    run = function(args, ["x", "down_weight"], conv2d_down, smooth())

    def slopes(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(x, weight).pow(3).sum(), (x, weight), create_graph=True)

    assert gradgradcheck(slopes, [args[name].requires_grad_() for name in ("x", "down_weight")], fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
def test_kernels_without_a_bias_and_of_one_pixel(bias: bool, done: list[str]) -> None:
    args: dict[str, Any] = tensors(k=1) if bias else {**tensors(), "bias": None, "down_bias": None}
    names = ["x", "weight", "down_weight"]
    values = [args[name].requires_grad_() for name in names]
    run, two = (function(args, names, one, smooth(), **FOLDED) for one in (conv2d_down, apart))
    dz = torch.randn_like(two(*values))
    for got, want in zip(*(torch.autograd.grad(one(*values), values, dz) for one in (run, two)), strict=True):
        torch.testing.assert_close(got, want)


def test_channels_that_change_are_two_ops(done: list[str]) -> None:
    args = tensors()
    args["weight"], args["bias"] = torch.randn(5, 3, 3, 3).double(), torch.randn(5).double()
    args["down_weight"] = torch.randn(4, 5, 3, 3).double()
    torch.testing.assert_close(
        function(args, [], conv2d_down, smooth(), **FOLDED)(), function(args, [], apart, smooth(), **FOLDED)()
    )


@pytest.mark.parametrize("frozen", [[], ["down_weight"], ["x", "weight", "bias"]], ids=str)
def test_what_is_filtered_for_its_weight_is_not_filtered_again(frozen: list[str], done: list[str]) -> None:
    """And kept for nothing else."""
    args, kept = tensors(), []
    names = [name for name in NAMES if name not in frozen]
    values = [args[name].requires_grad_() for name in names]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(list(x.shape)) or x, lambda x: x):
        z = function(args, names, conv2d_down, smooth(), **FOLDED)(*values)
    wanted = "down_weight" not in frozen
    assert ([2, 3, 7, 9] in kept) == wanted
    assert ("kept" in done) == (wanted and done[0] in ("in one pass", "small"))
    before = len(done)
    torch.autograd.grad(z.sum(), values)
    filters = done[before:].count("launch")
    back = "x" in names  # one filter, which the weight's gradient does not need
    assert filters == back - (back and done[0] == "in one pass")


def test_what_is_too_large_is_not_kept(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args, kept = tensors(), []
    values = [args[name].requires_grad_() for name in NAMES]
    monkeypatch.setattr(MODULE, "KEPT", args["x"].nbytes - 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(list(x.shape)) or x, lambda x: x):
        function(args, NAMES, conv2d_down, smooth(), **FOLDED)(*values)
    assert kept
    assert [2, 3, 7, 9] not in kept


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_op_checks(layout: str, keep: bool, done: list[str]) -> None:
    args = {name: value.requires_grad_() for name, value in tensors(dtype=torch.float32).items()}
    x = as_layout(args["x"].detach(), layout).requires_grad_()
    first, second = (args["weight"], args["bias"]), (args["down_weight"], args["down_bias"])
    call = (x, *first, "lrelu", 0.4, 0.9, *second, smooth(torch.float32), "lrelu", 0.3, 0.8, keep, LEAF)
    assert_op_check(OPS.conv2d_down.default, (*call, LEAF))
    plain = [value.detach() if isinstance(value, Tensor) else value for value in call]
    y, z, filtered = (one.detach() for one in OPS.conv2d_down(*plain, LEAF))
    for dy in None, torch.randn_like(y):
        for wanted in [True] * 5, [False, False, False, True, True]:
            grads = (dy, torch.randn_like(z))
            assert_op_check(OPS.conv2d_down_backward.default, (y, z, filtered, *grads, *plain, wanted, LEAF))


def test_it_compiles_without_a_graph_break(done: list[str]) -> None:
    args = tensors(dtype=torch.float32)
    parameters = [args[name].requires_grad_() for name in NAMES[1:]]
    run = function(args, ["x"], conv2d_down, smooth(torch.float32), act="lrelu", down_act="lrelu")
    compiled(run, args["x"], parameters)


@pytest.mark.parametrize(
    ("message", "name", "shape"),
    [
        (r"weight must be \[O, 3, k, k\]", "down_weight", (4, 5, 3, 3)),
        (r"bias must be \[3\], got float64 \[5\]", "bias", (5,)),
        (r"bias must be \[4\], got float64 \[5\]", "down_bias", (5,)),
        ("even height and width", "x", (2, 3, 5, 8)),
    ],
)
def test_bad_shapes(message: str, name: str, shape: tuple[int, ...]) -> None:
    args = {**tensors(), name: torch.ones(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        function(args, [], conv2d_down, smooth())()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_discriminator_s_gradients(dtype: torch.dtype, recompute: bool, done: list[str]) -> None:
    """With its weights' factors in the gains of the activations, or not, as those of float64."""
    arch = Architecture(img_resolution=8, channel_base=64, channel_max=16)
    d = Discriminator(arch)
    img = torch.randn(4, 3, 8, 8)
    names = ["b8.conv0.weight", "b8.conv0.bias", "b8.conv1.weight", "b8.conv1.bias"]
    grads = []
    for one in dtype, torch.float64:
        module = d.double() if one == torch.float64 else d
        logits = module(img.to(one), dtype=one, recompute=recompute)
        grads.append(torch.autograd.grad(logits.sum(), [module.get_parameter(name) for name in names]))
    for got, want in zip(*grads, strict=True):
        assert cosine(got, want) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 32, 1024), (2, 64, 512), (3, 128, 64)], ids=str)
def test_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two ops, up to roundings; twice the same bits in half precision; captured, too."""
    n, channels, size = shape
    monkeypatch.setattr(MODULE, "IN_ONE_PASS", 0)
    args = {
        "x": as_layout(torch.randn(n, channels, size, size, device="cuda", dtype=dtype), "channels_last"),
        "weight": torch.randn(channels, channels, 3, 3, device="cuda") / (3 * channels**0.5),
        "down_weight": torch.randn(2 * channels, channels, 3, 3, device="cuda") / (3 * channels**0.5),
        "bias": torch.randn(channels, device="cuda").to(dtype),
        "down_bias": torch.randn(2 * channels, device="cuda").to(dtype),
    }
    args = {name: value.to(dtype).requires_grad_() for name, value in args.items()}
    values, f = list(args.values()), setup_filter([1, 3, 3, 1]).cuda()
    options = {"act": "lrelu", "clamp": 3.0, "down_act": "lrelu", "down_clamp": 3.0}
    run = function(args, NAMES, conv2d_down, f, **options)
    two = function(args, NAMES, lambda *a, **b: apart(*a, "auto", **b), f, **options)
    dz = torch.randn_like(two(*values))
    grads = [torch.autograd.grad(one(*values), values, dz) for one in (run, run, two)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(run(*values), values, dz)
    graph.replay()
    torch.cuda.synchronize()
    doubles = {name: value.detach().double() for name, value in args.items()}
    exact = function(doubles, [], apart, f.double(), **options)()
    error, of_two = ((one(*values).double() - exact).abs().max() for one in (run, two))
    assert error <= 2 * of_two + torch.finfo(dtype).eps * exact.abs().max()
    for first, again, replayed, want in zip(grads[0], grads[1], captured, grads[2], strict=True):
        if dtype != torch.float32:  # which cuDNN adds up as it comes
            assert torch.equal(first, again)
            assert torch.equal(first, replayed)
        assert cosine(first, again) > 0.999999
        assert cosine(first, replayed) > 0.999999
        assert cosine(first, want) > 0.9999
