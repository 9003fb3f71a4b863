"""A convolution and the image that is drawn of its result: as one op, which is what the two are.

Without a GPU on the leaves of tests/spec_leaf.py, in float64; and the step in Triton behind its way back.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import spec_leaf
import torch
from ahead_of_time import compiled_launches, meta
from grids import as_layout, assert_op_check, assert_same, compiled
from interpreted import INTERPRETS, WHERE, leaf_on
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
        None, image, y, args["rgb_weight"].float(), None, None, "lrelu", 1.0, None, True, True, True
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


# ---- the step behind its way back ---------------------------------------------------------------------------------

EPILOGUES = [("lrelu", 2**0.5, 0.9), ("lrelu", 0.7, None), ("relu", 2.0, None), ("linear", 1.0, None)]
SHAPES = [(2, 5, 3, 4, 7), (1, 32, 3, 8, 9), (3, 40, 1, 3, 3), (1, 4, 3, 1, 1), (2, 70, 4, 5, 2), (2, 512, 3, 4, 4)]
FLAGS = [(True, True, True, True, True), (False, True, True, True, False), (False, False, False, False, True)]

leaf = functools.partial(leaf_on, "modulated_conv2d")


def check(
    shape: tuple[int, ...], dtype: torch.dtype, layouts: str, epilogue: tuple[Any, ...], own: bool, device: str,
    with_dy: bool = True, flags: tuple[bool, ...] = FLAGS[0],
) -> None:  # fmt: skip
    """Against float64: a rounding of the result, and roundings in float32 of the terms, which may cancel."""
    n, channels, few, height, width = shape
    act, gain, clamp = epilogue
    of_y, of_image = layouts.split()
    y = torch.randn(n, channels, height, width).to(dtype)
    y = y.relu() if act == "relu" else y
    if clamp is not None:
        clamp = float(torch.tensor(clamp, dtype=dtype))  # as results hold it
        y = y.clamp(-clamp, clamp)
    dy = as_layout(torch.randn(y.shape).to(dtype), of_y).to(device) if with_dy else None
    dimage = as_layout(torch.randn(n, few, height, width).to(dtype), of_image).to(device)
    weight = torch.randn(*([n] if own else []), few, channels, 1, 1).to(device, dtype)
    noise, strength = torch.randn(height, width).to(device, dtype), torch.tensor(0.3).to(device, dtype)
    bias, y = torch.randn(channels).to(device, dtype), as_layout(y, of_y).to(device)
    want_noise, want_strength, want_bias, want_dots, want_weight = flags
    args = (dy, dimage, y, weight, noise, strength, act, gain, clamp, want_noise, want_strength, want_bias)
    rest = (bias, want_dots, want_weight, want_bias)
    assert leaf(device).supports_drawn_act_backward(*args, *rest) is None

    def summed(functions: Any, *args: Any) -> list[Tensor | None]:
        g, *parts, dots, of_weight, of_bias = functions.launch_drawn_act_backward(*args, *rest[1:])
        sums = functions.launch_act_sums(*parts, args[4], args[5], y.dtype if functions is not spec else torch.float64)
        to_weight = None if of_weight is None else functions.launch_pointwise_sums(of_weight, args[3])
        exact = torch.float64 if functions is spec else y.dtype
        to_bias = None if of_bias is None else functions.launch_act_sums(None, None, of_bias, None, None, exact)[2]
        return [g, *sums, None if dots is None else dots.sum(1), to_weight, to_bias]

    spec = spec_leaf.steps("modulated_conv2d")
    found = summed(leaf(device), *args, bias)
    doubles = [value.double() if isinstance(value, Tensor) else value for value in (*args, bias)]
    want = summed(spec, *doubles)
    sizes = [value.abs() if isinstance(value, Tensor) and i != 2 else value for i, value in enumerate(doubles)]
    terms = summed(spec, *sizes)
    # of dy y - g (noise * strength + bias), and of the image's weights, whatever the signs of y
    g, seen = terms[0], doubles[2].abs()
    if terms[4] is not None:
        shift = sizes[4] * sizes[5] + sizes[-1][:, None, None]
        full = (0 if dy is None else sizes[0]) + torch.einsum(
            "nfc,nfhw->nchw", sizes[3].flatten(2 if own else 1).expand(n, few, channels), sizes[1]
        )
        terms[4] = (full * seen + g * shift).sum([2, 3])
    if terms[5] is not None:
        each = torch.einsum("nfhw,nchw->nfc", sizes[1], seen)
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
        check(shape, dtype, "channels_last channels_last", epilogue, own, device)
    for with_dy, flags in itertools.product([True, False], FLAGS):
        check(shape, torch.float16, "channels_last channels_last", EPILOGUES[0], own, device, with_dy, flags)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("layouts", ["contiguous contiguous", "channels_last contiguous", "contiguous channels_last",
                                     "strided strided"])  # fmt: skip
def test_step_in_other_layouts(layouts: str, device: str, nan_empty: None) -> None:
    for shape, own in itertools.product([SHAPES[0], SHAPES[1], SHAPES[4]], [False, True]):
        check(shape, torch.float32, layouts, EPILOGUES[0], own, device)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 32, 3, 256, 255), (3, 512, 3, 16, 16), (1, 64, 3, 512, 512), (2, 1100, 3, 2, 3)])
def test_step_of_large_images(shape: tuple[int, ...], dtype: torch.dtype, nan_empty: None) -> None:
    for with_dy, flags in itertools.product([True, False], FLAGS[:2]):
        check(shape, dtype, "channels_last contiguous", EPILOGUES[1], True, "cuda", with_dy, flags)


@pytest.mark.parametrize("device", WHERE)
def test_reasons(device: str) -> None:
    supports = leaf(device).supports_drawn_act_backward
    image, y = torch.ones(1, 3, 2, 2, device=device), torch.ones(1, 8, 2, 2, device=device)

    def why(shape: tuple[int, ...], *rest: Any, dtype: torch.dtype = torch.float32) -> Any:
        act, gain = rest or ("lrelu", 1.0)
        weight = torch.ones(shape, device=device, dtype=dtype)
        return supports(None, image, y, weight, None, None, act, gain, None, True, True, True)

    assert why((3, 8, 1, 1)) is None
    assert why((1, 3, 8, 1, 1)) is None
    assert "3x3" in why((3, 8, 3, 3))
    assert "5 of 8" in why((5, 8, 1, 1))
    assert "float64" in why((3, 8, 1, 1), dtype=torch.float64)
    assert "'swish'" in why((3, 8, 1, 1), "swish", 1.0)
    assert "gain" in why((3, 8, 1, 1), "lrelu", -1.0)


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


def every_launch() -> None:
    module = leaf("cuda")
    for (n, channels, size), dtype in itertools.product(
        [(1, 32, 1024), (5, 64, 512), (1, 128, 256), (5, 512, 64), (1, 512, 4)], [torch.bfloat16, torch.float32]
    ):
        y = meta(n, channels, size, size, dtype=dtype, channels_last=True)
        image, weight = meta(n, 3, size, size, dtype=dtype), meta(n, 3, channels, 1, 1, dtype=dtype)
        for dy, want_dots in itertools.product([y, None], [False, True]):
            rest = ("lrelu", 2**0.5, None, False, True, True, meta(channels), want_dots, True, True)
            module.launch_drawn_act_backward(dy, image, y, weight, meta(size, size), meta(), *rest)


def test_compiles_for_sm_90() -> None:
    kernels = compiled_launches(__file__, "every_launch")
    assert {kernel.name for kernel in kernels} == {"_act_backward_kernel"}
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
