"""The Triton leaf's way back through a 1x1 convolution of few channels on one side, in one pass: fromRGB and toRGB."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import spec_leaf
import torch
from ahead_of_time import compiled_launches, meta
from fast import FLOATS, Call, complaints
from grids import as_layout
from interpreted import INTERPRETS, WHERE, leaf_on, needs_interpreter
from torch import Tensor

from clone_fast.ops import dispatch, modulated_conv2d
from clone_fast.ops.dispatch import Leaf
from clone_fast.ops.registration import layout_of

needs_gpu = pytest.mark.gpu
EPILOGUES = [
    ("lrelu", 2**0.5, 0.9),
    ("lrelu", 0.7, None),
    ("relu", 2.0, None),
    ("linear", 1.0, 0.9),
    ("linear", 1.0, None),
]
WANTS = [wants for wants in itertools.product([True, False], repeat=3) if any(wants[:2])]
ALL = (True, True, True)

leaf = functools.partial(leaf_on, "modulated_conv2d")


def arguments(
    case: tuple[int, ...], dtype: torch.dtype, layouts: str, epilogue: tuple[Any, ...], per_sample: bool, device: str
) -> tuple[Any, ...]:
    """(dy, y, x, weight, act, gain, clamp) of (n, inputs, outputs, height, width); layouts: of x, y and dy."""
    n, inputs, outputs, height, width = case
    act, gain, clamp = epilogue
    of_x, of_y, of_dy = layouts.split()
    y = torch.randn(n, outputs, height, width, device=device).to(dtype)
    y = y.relu() if act == "relu" else y
    if clamp is not None:
        limit = float(torch.tensor(clamp, dtype=dtype))  # as results hold it
        y = y.clamp(-limit, limit)
    x, dy = torch.randn(n, inputs, height, width, device=device).to(dtype), torch.randn_like(y)
    weight = torch.randn(*([n] if per_sample else []), outputs, inputs, 1, 1, device=device).to(dtype)
    images = (as_layout(image, layout) for image, layout in ((dy, of_dy), (y, of_y), (x, of_x)))
    return *images, weight, act, gain, clamp


def gradients(functions: Any, args: Sequence[Any], wants: tuple[bool, ...]) -> list[Tensor | None]:
    """dx, dw and dbias by the steps of a leaf; what programs have in parts must be for their sums alone."""
    dx, dw, dbias = functions.launch_pointwise_backward(*args, *wants)
    dtype, weight = args[1].dtype, args[3]
    if dw is not None and dw.ndim == 2:
        assert dw.dtype == torch.promote_types(dtype, torch.float32)
        assert len(dw) * dw.shape[1] > weight.numel()
        dw = functions.launch_pointwise_sums(dw, weight)
    if dbias is not None and dbias.ndim == 2:
        assert len(dbias) > 1
        dbias = functions.launch_act_sums(None, None, dbias, None, None, dtype)[2]
    return [dx, dw, dbias]


def check(args: tuple[Any, ...], wants: tuple[bool, ...], device: str) -> list[Tensor | None]:
    """Against float64: a rounding of the result, and roundings in float32 of the terms, which may cancel."""
    dy, y, x, weight, act, gain, clamp = args
    assert leaf(device).supports_pointwise_backward(*args, *wants) is None
    found = gradients(leaf(device), args, wants)
    exact = [value.double() for value in (dy, y, x, weight)]
    limit = None if clamp is None else float(torch.tensor(clamp, dtype=y.dtype))
    sizes = [exact[0].abs(), exact[1], exact[2].abs(), exact[3].abs()]
    spec = spec_leaf.steps("modulated_conv2d")
    want, size = (gradients(spec, (*t, act, gain, limit), wants) for t in (exact, sizes))
    pixels = y.numel() // y.shape[1]
    for got, value, terms, count, wanted in zip(found, want, size, (y.shape[1], pixels, pixels), wants, strict=True):
        assert (got is None) == (not wanted)
        if got is None or value is None or terms is None:
            continue
        about = torch.finfo(got.dtype)
        rounding = 1 if INTERPRETS and got.dtype == torch.bfloat16 else 0.51  # the interpreter cuts there
        assert got.dtype == y.dtype
        assert got.shape == value.shape
        allowed = (4 + math.log2(count)) * torch.finfo(torch.float32).eps * terms
        allowed += rounding * about.eps * value.abs() + about.tiny * about.eps
        wrong = (got.double() - value).abs() - allowed
        assert wrong.max() <= 0, wrong.max()
    dx, dw, _ = found
    assert dx is None or dx.is_contiguous(memory_format=layout_of(x))
    assert dw is None or dw.is_contiguous()
    return found


CASES = [
    (2, 3, 32, 9, 7),  # fromRGB
    (2, 32, 3, 9, 7),  # toRGB
    (1, 1, 5, 4, 4),
    (3, 40, 2, 5, 3),
    (1, 4, 512, 2, 3),
    (2, 512, 4, 3, 2),
    (1, 2, 40, 1, 1),
    (2, 5, 1, 1, 9),
    (2, 3, 1, 17, 5),  # few on either side
    (1, 4, 4, 3, 3),
    (2, 4, 70, 5, 4),  # channels that fill no block
    (2, 130, 3, 5, 4),
]


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_three_gradients(case: tuple[int, ...], per_sample: bool, device: str, nan_empty: None) -> None:
    last = "channels_last channels_last channels_last"
    for dtype in FLOATS:
        check(arguments(case, dtype, last, EPILOGUES[0], per_sample, device), ALL, device)
    for epilogue in EPILOGUES[1:]:
        check(arguments(case, torch.float16, last, epilogue, per_sample, device), ALL, device)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("wants", WANTS, ids=str)
def test_nothing_but_what_is_wanted(wants: tuple[bool, ...], per_sample: bool, device: str, nan_empty: None) -> None:
    for case, epilogue in itertools.product(CASES[:6], EPILOGUES[::2]):
        last = "channels_last channels_last channels_last"
        check(arguments(case, torch.float32, last, epilogue, per_sample, device), wants, device)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize(
    "layouts",
    [
        "contiguous contiguous contiguous",
        "channels_last contiguous channels_last",
        "contiguous channels_last contiguous",
        "strided strided strided",
        "channels_last channels_last strided",
        "channels_last channels_last contiguous",
    ],
)
def test_other_layouts(layouts: str, device: str, nan_empty: None) -> None:
    for case, per_sample in itertools.product([*CASES[:2], *CASES[4:6], *CASES[-2:]], [False, True]):
        for wants in ALL, (False, True, True):
            check(arguments(case, torch.float32, layouts, EPILOGUES[0], per_sample, device), wants, device)


@needs_interpreter
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_the_gradient_of_an_rgb_image_is_read_as_it_is(clamp: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that a generator returns is contiguous, and so is its gradient; what its layers draw is not."""
    launch = leaf("cpu").launch_pointwise_backward
    module = importlib.import_module("clone_fast.kernels._pointwise_backward")
    last = "channels_last channels_last contiguous"
    args = arguments((2, 32, 3, 9, 7), torch.float16, last, ("linear", 1.0, clamp), True, "cpu")
    given: list[Any] = []
    kernel = {(2, 1): lambda *args, **_: given.extend(args)}  # by the grid
    monkeypatch.setattr(module, "few_outputs_kernel", kernel)
    launch(*args, *ALL)
    dy, y, x = (image.data_ptr() for image in args[:3])
    assert [image.data_ptr() for image in given[:3]] == [dy, dy if clamp is None else y, x]


@pytest.mark.parametrize("device", WHERE)
def test_weights_of_any_memory_order(device: str, nan_empty: None) -> None:
    for case, per_sample in itertools.product(CASES[:2], [False, True]):
        dy, y, x, weight, *rest = arguments(
            case, torch.float32, "channels_last channels_last channels_last", EPILOGUES[0], per_sample, device
        )
        want = check((dy, y, x, weight, *rest), ALL, device)
        turned = weight.transpose(-3, -4).contiguous().transpose(-3, -4)
        wider = torch.cat([weight, weight], -3)[..., : weight.shape[-3], :, :]
        for one in turned, wider:
            for got, same in zip(check((dy, y, x, one, *rest), ALL, device), want, strict=True):
                assert torch.equal(got, same)


@needs_interpreter
@pytest.mark.parametrize("per_sample", [False, True])
def test_many_shares_are_added(per_sample: bool, monkeypatch: pytest.MonkeyPatch, nan_empty: None) -> None:
    """Few pixels cut into as many tiles as a large image has."""
    leaf("cpu")
    module = importlib.import_module("clone_fast.kernels._pointwise_backward")
    monkeypatch.setattr(module, "ELEMENTS", 64)
    monkeypatch.setattr(module, "LONGEST", 2)
    monkeypatch.setattr(module, "ROWS", 16)
    for case, layouts in itertools.product(CASES[:2], ["channels_last channels_last channels_last", "contiguous " * 3]):
        check(arguments((3, *case[1:3], 19, 5), torch.float32, layouts, EPILOGUES[0], per_sample, "cpu"), ALL, "cpu")


@needs_gpu
@pytest.mark.parametrize(
    ("case", "per_sample"),
    [
        ((10, 3, 32, 1024, 1024), False),
        ((5, 32, 3, 1024, 1024), True),
        ((1, 32, 3, 1024, 1024), True),
        ((4, 3, 64, 512, 512), False),
        ((5, 64, 3, 512, 512), True),
        ((10, 512, 3, 64, 64), True),
        ((1, 512, 3, 4, 4), True),
        ((5, 512, 3, 4, 4), True),
    ],
    ids=str,
)
def test_stylegan_images(case: tuple[int, ...], per_sample: bool, nan_empty: None) -> None:
    last = "channels_last channels_last channels_last"
    for dtype, wants in (*zip(FLOATS, [ALL] * 3, strict=True), (torch.bfloat16, (True, False, False))):
        args = arguments(case, dtype, last, EPILOGUES[0 if case[1] == 3 else -1], per_sample, "cuda")
        found = check(args, wants, "cuda")
        again = gradients(leaf("cuda"), args, wants)
        for one, other in zip(found, again, strict=True):
            assert one is None or torch.equal(one, other)


@needs_gpu
def test_more_elements_than_32_bits_count(nan_empty: None) -> None:
    """9 images of 64 x 2048 x 2048: the last one lies beyond."""
    last = "channels_last channels_last channels_last"
    for inputs, outputs in (3, 64), (64, 3):
        dy, y, x, weight, *rest = (
            value[:1] if isinstance(value, Tensor) and value.shape[0] == 9 else value
            for value in arguments((1, inputs, outputs, 2048, 2048), torch.bfloat16, last, EPILOGUES[0], False, "cuda")
        )
        nine = [image.expand(9, -1, -1, -1).contiguous(memory_format=torch.channels_last) for image in (dy, y, x)]
        dx, dw, dbias = gradients(leaf("cuda"), (*nine, weight, *rest), ALL)
        assert dx is not None
        alone, *sums = check((dy, y, x, weight, *rest), ALL, "cuda")
        assert all(torch.equal(image[None], alone) for image in dx)
        for got, one in zip((dw, dbias), sums, strict=True):
            torch.testing.assert_close(got, 9 * one, rtol=0.02, atol=0.02 * one.abs().max().item())


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["fromRGB", "toRGB"])
def test_the_op_goes_this_way(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    launch = leaf("cuda").launch_pointwise_backward
    monkeypatch.setattr(leaf("cuda"), "launch_pointwise_backward", lambda *a: launches.append(a) or launch(*a))
    for n, channels, size in (1, 512, 4), (5, 64, 128), (2, 32, 256):
        inputs, outputs = (3, channels) if kind == "fromRGB" else (channels, 3)
        tensors = {"x": torch.randn(n, inputs, size, size).double()}
        tensors["weight"] = torch.randn(outputs, inputs, 1, 1).double() / math.sqrt(inputs)
        tensors["bias"] = torch.randn(outputs).double()
        options: dict[str, Any] = {"demodulate": False, "styles": None, "act": "lrelu", "clamp": 2.0}
        if kind == "toRGB":
            tensors["styles"] = 1 + torch.randn(n, inputs).double() / 2
            options = {"demodulate": False, "clamp": 2.0}
        for dtype, layout in itertools.product(FLOATS, ["channels_last", "contiguous"]):
            for tf32, fixed in itertools.product([False, True], [(), ("weight", "bias")]):
                call = Call("modulated_conv2d", tensors, options, dtype, layout, fixed, tf32)
                launches.clear()
                assert complaints(call, backend) == [], str(call)
                assert len(launches) == 1


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that the op takes, on the leaves of tests/spec_leaf.py."""
    taken: list[str] = []

    def noted(name: str, step: Any) -> Any:
        return lambda *args: taken.append(name.removeprefix("launch_")) or step(*args)

    def noting(op: str, name: str) -> Leaf:
        functions = spec_leaf.steps(op)
        for one, step in list(vars(functions).items()):
            setattr(functions, one, noted(one, step))
        functions.supports_pointwise_backward = lambda *args: "many" if min(args[3].shape[-4:-2]) > 4 else None
        return Leaf(functions)

    monkeypatch.setattr(dispatch, "leaf", noting)
    monkeypatch.setattr(sys.modules["clone_fast.ops.modulated_conv2d"], "resolve", lambda *args: "triton")
    return taken


@pytest.mark.parametrize(
    ("shape", "noise", "want", "steps"),
    [
        ([8, 3, 1, 1], False, "x weight bias", ["pointwise_backward", "act_sums", "pointwise_sums"]),
        ([3, 8, 1, 1], False, "x", ["pointwise_backward"]),
        ([3, 8, 1, 1], True, "weight", ["pointwise_backward", "pointwise_sums"]),  # noise that wants nothing
        ([3, 8, 1, 1], True, "x noise", ["act_backward", "act_sums", "conv"]),
        ([8, 3, 1, 1], False, "bias", ["pointwise_backward", "act_sums"]),
        ([8, 8, 1, 1], False, "x weight", ["act_backward", "wgrad", "conv"]),
        ([3, 8, 3, 3], False, "x weight", ["act_backward", "wgrad", "conv"]),
    ],
    ids=str,
)
def test_when_it_is_taken(shape: list[int], noise: bool, want: str, steps: list[str], steps_taken: list[str]) -> None:
    values = {"x": torch.randn(2, shape[1], 4, 4), "weight": torch.randn(shape), "bias": torch.randn(shape[0])}
    values |= {"noise": torch.randn(4, 4)} if noise else {}
    for name in want.split():
        values[name].requires_grad_()
    y = modulated_conv2d(**values, styles=None, demodulate=False, act="lrelu")
    steps_taken.clear()
    y.sum().backward()
    assert steps_taken == steps


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("height", [1, 3])
def test_only_sums_of_several_programs_are_added(height: int, n: int, own: bool, steps_taken: list[str]) -> None:
    x, y, dy = torch.randn(n, 8, height, 4), torch.randn(n, 3, height, 4), torch.randn(n, 3, height, 4)
    weight, bias = torch.randn(*([n] if own else []), 3, 8, 1, 1), torch.randn(3)
    args = (x, weight, None, None, bias, None, 1, 1, "linear", 1.0, None, [True, True, False, False, True])
    steps_taken.clear()
    _, dw, _, _, dbias = torch.ops.clone_fast.modulated_conv2d_backward(dy, y, *args, "triton")
    torch.testing.assert_close(dbias, dy.sum([0, 2, 3]))
    each = torch.einsum("nohw,nihw->noi", dy, x)[..., None, None]
    torch.testing.assert_close(dw, each if own else each.sum(0))
    sums = ["act_sums"] * (n * height > 1) + ["pointwise_sums"] * (height > 1 or (n > 1 and not own))
    assert steps_taken == ["pointwise_backward", *sums]


def test_nothing_waits_for_the_sums(steps_taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the weight may stay on the lane that made the weights, those of the bias on that of the tables."""
    module = sys.modules["clone_fast.ops.convolution_gradients"]
    left: list[tuple[Tensor, list[str]]] = []

    def left_beside(device: Any, lane: str, of: Sequence[Tensor], run: Any, meanwhile: Any, reads: Any) -> Any:
        before = len(steps_taken)
        found = run()
        (one,) = of
        left.append((one, steps_taken[before:]))
        assert [tensor.ndim for tensor in reads] == [2]  # sums, and no image that would be kept for them
        return found, meanwhile()

    monkeypatch.setattr(module, "left_beside", left_beside)
    dy, y, x = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 8, 4, 4)
    weight, bias = torch.randn(2, 3, 8, 1, 1), torch.randn(3)
    wanted = [True, True, False, False, True]
    module.convolution_gradients(
        "triton", dy, y, x, weight, None, None, bias, None, 1, 1, "linear", 1.0, None, wanted
    )
    assert [steps for _, steps in left] == [["act_sums"], ["pointwise_sums"]]
    assert left[0][0] is bias
    assert left[1][0] is weight


@pytest.mark.parametrize("device", WHERE)
def test_reasons(device: str) -> None:
    supports = leaf(device).supports_pointwise_backward

    def why(
        inputs: int, outputs: int, *rest: Any, k: int = 1, dtype: torch.dtype = torch.float32, size: int = 4
    ) -> Any:
        x, y = (torch.zeros(1, c, 1, 1, device=device).expand(-1, -1, size, size) for c in (inputs, outputs))
        weight = torch.zeros(outputs, inputs, k, k, device=device, dtype=dtype)
        act, gain, *wants = rest or ("lrelu", 1.0, True, True, True)
        return supports(y, y, x, weight, act, gain, None, *wants)

    assert why(3, 32) is None
    assert "1x1" in why(3, 32, k=3)
    assert "up to 4 channels" in why(5, 32)
    assert "one dtype" in why(3, 32, dtype=torch.float16)
    assert "pixels" in why(3, 32, size=8192)
    assert "1024" in why(3, 1025)
    assert why(3, 1025, "lrelu", 1.0, False, True, True) is None
    assert why(1025, 3) is None
    assert "act_backward" in why(3, 32, "lrelu", 1.0, False, False, True)
    assert "'swish'" in why(3, 32, "swish", 1.0, True, True, True)
    assert "gain" in why(3, 32, "lrelu", -1.0, True, True, True)


def every_launch() -> None:
    module = leaf("cuda")
    layers = [(10, 3, 32, 1024), (10, 3, 64, 512), (1, 3, 512, 16), (1, 4, 32, 64)]
    layers += [(5, 32, 3, 1024), (1, 64, 3, 512), (1, 512, 3, 4), (10, 512, 3, 64)]
    for (n, inputs, outputs, size), dtype in itertools.product(layers, [torch.bfloat16, torch.float32]):
        x, y = (meta(n, c, size, size, dtype=dtype, channels_last=True) for c in (inputs, outputs))
        own = [n] if outputs < inputs else []
        weight = meta(*own, outputs, inputs, 1, 1, dtype=dtype)
        for wants in ALL, (True, False, False), (False, True, True):
            for act, clamp in (("linear", None), ("linear", 256.0)) if own else (("lrelu", None), ("lrelu", 256.0)):
                dy = meta(n, outputs, size, size, dtype=dtype, channels_last=False) if own else y
                gradients(module, (dy, y, x, weight, act, 1.4, clamp), wants)


def test_compiles_for_sm_90() -> None:
    kernels = compiled_launches(__file__, "every_launch")
    names = {"few_inputs_kernel", "few_outputs_kernel", "add_shares", "_add_sums"}
    assert {kernel.name for kernel in kernels} == names
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
