"""The styles' gradient where the weight is frozen: no weight gradient, and the same numbers.

Without a GPU on the leaves of tests/spec_leaf.py, in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import assert_op_check, compiled
from launches import counted
from spec_leaf import steps
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.nn import Architecture, Generator
from clone_fast.ops import convolution_gradients, dispatch, explain, factored_weights, modulated_conv2d, setup_filter
from clone_fast.ops.dispatch import Leaf

OPS = torch.ops.clone_fast
RESAMPLING = [(1, 1), (2, 1), (1, 2)]
LEAF = "triton"  # any name but "reference"
STEPS = ("factored", "factored_backward", "factor_gradients")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The public function takes a leaf, though there is no GPU; which steps it ran."""
    ran: list[str] = []

    def noted(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(name.removeprefix("launch_"))
            return launch(*args)

        return run

    def leaf(op: str, name: str) -> Leaf:
        module = steps(op)
        for step, launch in list(vars(module).items()):
            setattr(module, step, noted(step, launch))
        return Leaf(module)

    monkeypatch.setattr(dispatch, "leaf", leaf)
    for op in dispatch.OPS:
        monkeypatch.setattr(sys.modules[f"clone_fast.ops.{op}"], "resolve", lambda *args: LEAF)
    monkeypatch.setattr(convolution_gradients, "IN_ONE_PASS", 0)
    monkeypatch.setattr(factored_weights, "FEWEST", 2)
    monkeypatch.setattr(factored_weights, "SMALLEST", 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return ran


def tensors(up: int, down: int, k: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All want a gradient but the weight."""
    height, width = 4 * up // down, 6 * up // down
    shapes = {
        "x": [2, 3, 4, 6],
        "weight": [2, 3, k, k],
        "styles": [2, 3],
        "noise": [2, 1, height, width],
        "noise_strength": [],
        "bias": [2],
    }
    made = {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    made["weight"].requires_grad_(False)
    return made


def changed(args: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """New leaves that want what those before wanted."""
    return {name: change(value.detach()).requires_grad_(value.requires_grad) for name, value in args.items()}


def split(args: dict[str, Tensor]) -> tuple[list[str], tuple[Tensor, ...]]:
    names = [name for name, value in args.items() if value.requires_grad]
    return names, tuple(args[name] for name in names)


def function(args: dict[str, Tensor], **options: Any) -> Callable[..., Tensor]:
    names, _ = split(args)
    rest = {name: value for name, value in args.items() if name not in names}
    return lambda *values: modulated_conv2d(**dict(zip(names, values, strict=True)), **rest, **options)


@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(
    ("act", "gain", "clamp"),
    [("lrelu", None, 1.0), ("relu", 0.7, None), ("linear", 1.0, None), ("tanh", None, 0.5), ("lrelu", -0.7, 1.0)],
)
def test_gradients(
    up: int, down: int, k: int, demodulate: bool, act: str, gain: float | None, clamp: float | None, used: list[str]
) -> None:
    args = tensors(up, down, k)
    options: dict[str, Any] = {"up": up, "down": down, "act": act, "gain": gain, "clamp": clamp}
    options |= {"resample_filter": setup_filter([1, 2, 4, 1, 3]).double(), "demodulate": demodulate}
    run, reference = function(args, **options), function(args, **options, backend="reference")
    values = split(args)[1]
    y = run(*values)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, reference(*values))
    found, want = torch.autograd.grad(y, values, dy), torch.autograd.grad(reference(*values), values, dy)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
    assert gradcheck(run, values, fast_mode=True)
    assert {"factored", "factor_gradients"} <= set(used)
    assert ("factored_backward" in used) == demodulate
    assert not {"wgrad", "modulate", "modulate_backward"} & set(used)


@pytest.mark.parametrize("names", [["x", "styles"], ["x", "styles", "noise"], ["x", "styles", "bias"]], ids="-".join)
def test_what_else_wants_a_gradient(names: list[str], used: list[str]) -> None:
    args = {name: value.requires_grad_(name in names) for name, value in tensors(1, 1, 3).items()}
    assert gradcheck(function(args, act="lrelu"), split(args)[1])
    assert "factored" in used


@pytest.mark.parametrize("shape", [None, [4, 6], [1, 1, 4, 6]], ids=str)
def test_forms_of_noise(shape: list[int] | None, used: list[str]) -> None:
    args = tensors(1, 1, 3)
    del args["noise_strength"]
    if shape is None:
        del args["noise"]
    else:
        args["noise"] = torch.randn(shape, dtype=torch.float64).requires_grad_()
    assert gradcheck(function(args, act="lrelu"), split(args)[1])
    assert "factored" in used


@pytest.mark.parametrize("demodulate", [True, False])
def test_styles_of_zero(demodulate: bool, used: list[str]) -> None:
    args = tensors(1, 1, 3)
    with torch.no_grad():
        args["styles"][0, 1] = 0
        args["styles"][1, :2] = torch.tensor([-0.0, -1e-30])
    run, values = function(args, demodulate=demodulate), split(args)[1]
    reference = function(args, demodulate=demodulate, backend="reference")
    dy = torch.randn_like(run(*values))
    torch.testing.assert_close(run(*values), reference(*values))
    found, want = (torch.autograd.grad(one(*values), values, dy) for one in (run, reference))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
    assert "factored" in used


def test_a_sample_of_zeros_is_still_finite(used: list[str]) -> None:
    args = changed(tensors(1, 1, 3), Tensor.float)
    with torch.no_grad():
        args["styles"].zero_()
    run, values = function(args), split(args)[1]
    y = run(*values)
    torch.testing.assert_close(y, function(args, backend="reference")(*values))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), values))


@pytest.mark.parametrize(("up", "down"), RESAMPLING)
@pytest.mark.parametrize("demodulate", [True, False])
def test_twice(up: int, down: int, demodulate: bool, used: list[str]) -> None:
    """By the weights, as ever."""
    args = tensors(up, down, 3)
    args |= changed({name: args[name] for name in ("x", "styles", "noise")}, lambda value: value[:1])
    options = {"up": up, "down": down, "resample_filter": setup_filter([1, 3, 3, 1]).double()}
    assert gradgradcheck(function(args, **options, demodulate=demodulate), split(args)[1])
    assert "factored" in used
    assert "wgrad" in used


def other_paths() -> dict[str, Callable[[dict[str, Tensor]], Any]]:
    own = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64)
    return {
        "a weight that wants a gradient": lambda args: args["weight"].requires_grad_(),
        "an image that wants none": lambda args: args["x"].requires_grad_(False),
        "styles that want none": lambda args: args["styles"].requires_grad_(False),
        "weights of every sample's own": lambda args: args.update(weight=own),
        "few output channels": lambda args: args.update(weight=args["weight"][:1], bias=args["bias"][:1]),
        "float16": lambda args: args.update(changed(args, Tensor.half)),
        "float32 with every bit": lambda args: args.update(changed(args, Tensor.float)),
    }


@pytest.mark.parametrize("case", other_paths())
def test_what_takes_another_path(case: str, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    args = tensors(1, 1, 3)
    other_paths()[case](args)
    y = function(args, act="lrelu")(*split(args)[1])
    torch.autograd.grad(y.sum(), split(args)[1])
    assert "modulate" in used
    assert not set(STEPS) & set(used)


def test_without_a_gradient_nothing_is_kept(used: list[str]) -> None:
    args = tensors(1, 1, 3)
    with torch.no_grad():
        function(args)(*split(args)[1])
    assert not set(STEPS) & set(used)


def test_explain_tells(used: list[str]) -> None:
    args = tensors(1, 1, 3)
    told = explain("modulated_conv2d", **args)
    assert "the styles' gradient by sums over images" in told.splitlines()[0]
    args["weight"].requires_grad_()
    assert "sums over images" not in explain("modulated_conv2d", **args)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("up", "down"), RESAMPLING)
def test_ops(up: int, down: int, demodulate: bool, used: list[str]) -> None:
    args = tensors(up, down, 3, torch.float32)
    x = args["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    options = (demodulate, 1e-8, torch.float32, LEAF)
    assert_op_check(OPS.factored_weights.default, (args["weight"], args["styles"], *options))
    made, s, d, energy = (value.detach() for value in OPS.factored_weights(args["weight"], args["styles"], *options))
    if demodulate:
        rest = (torch.randn_like(s), torch.randn_like(d), s, d, energy, torch.float32, LEAF)
        assert_op_check(OPS.factored_weights_backward.default, rest)
    small = [args[name] for name in ("noise", "noise_strength", "bias")]
    geometry = (setup_filter([1, 3, 3, 1]), up, down, "lrelu", 1.4, 1.0)
    s.requires_grad_()
    factors = (s, d.requires_grad_() if demodulate else None)
    assert_op_check(OPS.factored_conv2d.default, (x, made, *small, *geometry, *factors, LEAF))
    y = OPS.factored_conv2d(x, made, *small, *geometry, *factors, LEAF).detach()
    plain = [None if value is None else value.detach() for value in (x, made, *small, *factors)]
    for want_sums in ([True] * 3, [False, False, True]):
        assert_op_check(
            OPS.factored_conv2d_backward.default, (y, y, *plain[:5], *geometry, *plain[5:], want_sums, LEAF)
        )


@pytest.mark.parametrize(("up", "down"), RESAMPLING)
def test_compiles_without_a_graph_break(up: int, down: int, used: list[str]) -> None:
    args = tensors(up, down, 3, torch.float32)
    run = function(args, up=up, down=down, resample_filter=setup_filter([1, 3, 3, 1]), act="lrelu")
    _, (_, *rest) = split(args)
    compiled(lambda x: run(x, *rest), args["x"], [args["styles"], args["bias"]])
    assert "factor_gradients" in used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_generator_at_fixed_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config F: the weights of the first layer, whose image wants no gradient, and of the images go by their own."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with torch.device("meta"):
        generator = Generator(Architecture()).requires_grad_(False)
        ws = torch.empty(1, 18, 512, requires_grad=True)
    with counted() as launches:
        image = generator.synthesis(ws, dtype=dtype)
        image.backward(torch.empty_like(image))
    for op in ("factored_weights", "factored_conv2d"):
        assert launches.found[f"clone_fast::{op}"] == launches.found[f"clone_fast::{op}_backward"] == 16
    for op in ("modulated_weights", "modulated_conv2d"):
        assert launches.found[f"clone_fast::{op}"] == launches.found[f"clone_fast::{op}_backward"] == 10
