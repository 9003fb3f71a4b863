"""A convolution and the image that is drawn of its result: as one op, which is what the two are.

Without a GPU on the leaves of tests/spec_leaf.py, in float64. tests/test_kernels_drawn.py has the step of its way back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import spec_leaf
import torch
from grids import as_layout, assert_op_check, assert_same, compiled
from interpreted import INTERPRETS, leaf_on
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from clone_fast.ops import dispatch, factored_weights, modulated_conv2d, modulated_conv2d_torgb
from clone_fast.ops.dispatch import Leaf
from clone_fast.ops.registration import layout_of

OPS = torch.ops.clone_fast
LEAF = "triton"  # any name but "reference"
NAMES = ("x", "weight", "styles", "rgb_weight", "rgb_styles", "noise", "noise_strength", "bias", "rgb_bias")
needs_gpu = pytest.mark.gpu


def tensors(n: int = 2, channels: int = 5, k: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {
        "x": [n, 4, 3, 5],
        "weight": [channels, 4, k, k],
        "styles": [n, 4],
        "rgb_weight": [3, channels, 1, 1],
        "rgb_styles": [n, channels],
        "noise": [3, 5],
        "noise_strength": [],
        "bias": [channels],
        "rgb_bias": [3],
    }
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def apart(**args: Any) -> tuple[Tensor, Tensor]:
    """By two ops on the reference, which have tests of their own."""
    of_image = {name.removeprefix("rgb_"): args.pop(name, None) for name in list(args) if name.startswith("rgb_")}
    y = modulated_conv2d(**args, backend="reference")
    return y, modulated_conv2d(y, **of_image, demodulate=False, backend="reference")


def function(args: dict[str, Tensor], names: Sequence[str], run: Callable[..., Any], **options: Any) -> Any:
    """Of the tensors of these names."""
    rest = {name: value for name, value in args.items() if name not in names}
    return lambda *values: run(**dict(zip(names, values, strict=True)), **rest, **options)


@pytest.fixture(params=["drawn by the step", "drawn apart"])
def done(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The public function takes a leaf, though there is no GPU; which steps it ran."""
    ran: list[str] = []

    def noted(name: str, step: Any) -> Any:
        return lambda *args: ran.append(name.removeprefix("launch_")) or step(*args)

    def functions(op: str) -> SimpleNamespace:
        found = spec_leaf.steps(op)
        if request.param == "drawn apart" and op == "modulated_conv2d":
            del found.launch_drawn
        for name, step in list(vars(found).items()):
            setattr(found, name, noted(name, step))
        return found

    def resolved(op: str, requested: str, *args: Any) -> str:
        return LEAF if requested == "auto" else requested

    leaves = {op: Leaf(functions(op)) for op in ("modulated_conv2d", "bias_act")}
    monkeypatch.setattr(dispatch, "leaf", lambda op, name: leaves[op])
    for module in "modulated_conv2d", "modulated_conv2d_torgb", "bias_act":
        monkeypatch.setattr(sys.modules[f"clone_fast.ops.{module}"], "resolve", resolved)
    monkeypatch.setattr(factored_weights, "FEWEST", 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return ran


# ---- the op -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_both_results(layout: str) -> None:
    args = tensors()
    args["x"] = as_layout(args["x"], layout)
    y, rgb = modulated_conv2d_torgb(**args, act="lrelu", clamp=0.9, rgb_clamp=0.5)
    weight = args["rgb_weight"][:, :, 0, 0] * args["rgb_styles"][:, None]
    image = torch.einsum("nfc,nchw->nfhw", weight, y) + args["rgb_bias"][:, None, None]
    assert_same(rgb, image.clamp(-0.5, 0.5).numpy())
    assert torch.equal(y, apart(**args, act="lrelu", clamp=0.9, rgb_clamp=0.5)[0])
    for one in y, rgb:
        assert one.is_contiguous(memory_format=layout_of(args["x"]))


@pytest.mark.parametrize(("act", "gain", "clamp"), [("lrelu", None, 1.0), ("linear", 1.0, None), ("tanh", None, 0.5)])
@pytest.mark.parametrize("rgb_clamp", [None, 0.7])
@pytest.mark.parametrize("frozen", [[], ["weight"], ["weight", "rgb_weight", "bias", "noise", "rgb_bias"], ["styles"]])
def test_gradients(
    frozen: list[str], act: str, gain: float | None, clamp: float | None, rgb_clamp: float | None, done: list[str]
) -> None:
    args = tensors()
    names = [name for name in NAMES if name not in frozen]
    values = [args[name].requires_grad_() for name in names]
    options: dict[str, Any] = {"act": act, "gain": gain, "clamp": clamp, "rgb_clamp": rgb_clamp}
    run, two = function(args, names, modulated_conv2d_torgb, **options), function(args, names, apart, **options)
    found, want = run(*values), two(*values)
    torch.testing.assert_close(found, want)
    grads = [torch.randn_like(one) for one in want]
    done.clear()
    for got, one in zip(
        torch.autograd.grad(found, values, grads), torch.autograd.grad(want, values, grads), strict=True
    ):
        torch.testing.assert_close(got, one)
    fused = act != "tanh"
    assert ("drawn_act_backward" in done) == fused
    assert ("pointwise_backward" in done) != fused
    assert ("wgrad" in done) == ("weight" not in frozen)
    assert gradcheck(run, values, fast_mode=True)
    if fused and rgb_clamp is None:
        assert gradgradcheck(run, values, fast_mode=True)


def test_a_frozen_weight_costs_no_zeros(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a sample come from styles that want a gradient; theirs goes by the factors alone."""
    args = tensors()
    values = [args[name].requires_grad_() for name in ("x", "styles", "rgb_styles")]
    made: list[Tensor | None] = []
    module = sys.modules["clone_fast.ops.modulated_conv2d_torgb"]
    like = module.like
    monkeypatch.setattr(module, "like", lambda grad, value: made.append(grad) or like(grad, value))
    y, rgb = modulated_conv2d_torgb(**args, act="lrelu")
    torch.autograd.grad((y.square().sum() + rgb.square().sum()), values)
    assert "factor_gradients" in done
    assert len(made) == 4  # x, s, d and the image's weights
    assert all(one is not None for one in made)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("names", [["x"], ["x", "rgb_weight"], ["bias", "rgb_bias"], ["weight", "rgb_styles"]], ids=str)
def test_one_result_alone(names: list[str], used: int, done: list[str]) -> None:
    args = tensors()
    values = [args[name].requires_grad_() for name in names]
    run, two = (function(args, names, one, act="lrelu") for one in (modulated_conv2d_torgb, apart))
    y, other = run(*values)[used], two(*values)[used]
    dy = torch.randn_like(y)
    wants = torch.autograd.grad(other, values, dy, allow_unused=True)
    for got, want, value in zip(torch.autograd.grad(y, values, dy, allow_unused=True), wants, values, strict=True):
        none = torch.zeros_like(value)  # some say it by None
        torch.testing.assert_close(none if got is None else got, none if want is None else want)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_as_many_channels_are_drawn_apart(channels: int, done: list[str]) -> None:
    """As the real leaf refuses, though this one would not."""
    real = leaf_on("modulated_conv2d", "cpu") if INTERPRETS else leaf_on("modulated_conv2d", "cuda")
    args = tensors(channels=channels)
    image, y = torch.randn(2, 3, 4, 4), torch.randn(2, channels, 4, 4)
    reason = real.supports_drawn_act_backward(
        None, image, y, args["rgb_weight"].float(), None, None, None, None, "lrelu", 1.0, None, True, True, True
    )
    assert "3 of" in reason


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_op_checks(layout: str, done: list[str]) -> None:
    args = tensors(dtype=torch.float32)
    x = as_layout(args["x"], layout).requires_grad_()
    weight = torch.randn(2, 5, 4, 3, 3).requires_grad_()
    rest = [args[name].requires_grad_() for name in ("noise", "noise_strength", "bias")]
    image = (torch.randn(2, 3, 5, 1, 1).requires_grad_(), args["rgb_bias"].requires_grad_(), 0.5)
    s, d = torch.rand(2, 4).add(0.5).requires_grad_(), torch.rand(2, 5).add(0.5).requires_grad_()
    activation = ("lrelu", 1.4, 0.9)
    for call in (
        (x, weight, *rest, *activation, None, None, *image),
        (x, weight.detach(), *rest, *activation, s, d, *image),
    ):
        assert_op_check(OPS.modulated_conv2d_torgb.default, (*call, LEAF))
    y, rgb = (as_layout(torch.randn(2, channels, 3, 5), layout) for channels in (5, 3))
    plain = [value.detach() if isinstance(value, Tensor) else value for value in call]
    for dy, drgb in (torch.randn_like(y), torch.randn_like(rgb)), (None, torch.randn_like(rgb)):
        wanted = [True, False, *[True] * 7]
        assert_op_check(OPS.modulated_conv2d_torgb_backward.default, (y, rgb, dy, drgb, *plain, wanted, LEAF))


def test_it_compiles_without_a_graph_break(done: list[str]) -> None:
    args = tensors(dtype=torch.float32)
    parameters = [args[name].requires_grad_() for name in NAMES[1:]]

    def run(x: Tensor) -> Tensor:
        y, rgb = modulated_conv2d_torgb(**{**args, "x": x}, act="lrelu")
        return torch.cat([y, rgb], dim=1)

    compiled(run, args["x"], parameters)


@pytest.mark.parametrize(
    ("error", "message", "name", "value"),
    [
        (ValueError, r"rgb_weight must be \[F, 5, 1, 1\], got float64 \[3, 4, 1, 1\]", "rgb_weight", (3, 4, 1, 1)),
        (ValueError, r"rgb_weight must be \[F, 5, 1, 1\], got float64 \[3, 5, 3, 3\]", "rgb_weight", (3, 5, 3, 3)),
        (ValueError, r"rgb_styles must be \[2, 5\], got float64 \[1, 5\]", "rgb_styles", (1, 5)),
        (ValueError, r"rgb_bias must be \[3\], got float64 \[5\]", "rgb_bias", (5,)),
        (ValueError, r"styles must be \[2, 4\], got float64 \[2, 5\]", "styles", (2, 5)),
    ],
)
def test_bad_shapes(error: type[Exception], message: str, name: str, value: tuple[int, ...]) -> None:
    with pytest.raises(error, match=message):
        modulated_conv2d_torgb(**{**tensors(), name: torch.ones(value, dtype=torch.float64)})


@pytest.mark.parametrize("option", ["rgb_clamp", "clamp"])
def test_a_clamp_is_a_number_from_0_on(option: str) -> None:
    with pytest.raises(ValueError, match="clamp must be None or a number >= 0, got -1"):
        modulated_conv2d_torgb(**tensors(), **{option: -1})


@needs_gpu
def test_two_runs_are_one() -> None:
    args = {name: value.cuda().bfloat16().requires_grad_() for name, value in tensors(channels=64).items()}
    args["x"] = torch.randn(2, 4, 128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    args["noise"] = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    runs = []
    for _ in range(2):
        y, rgb = modulated_conv2d_torgb(**args, act="lrelu")
        torch.manual_seed(0)
        runs.append([y, rgb, *torch.autograd.grad([y, rgb], list(args.values()), [torch.randn_like(y), rgb.detach()])])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
