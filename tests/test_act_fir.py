"""The CUDA leaf's first pass back through an upsampling convolution: activation, sums and filter in one.

On a CPU csrc/_upfirdn2d_gate.cu runs emulated, which covers the order of its copies, barriers and reads, too.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import types
from types import ModuleType
from typing import Any

import emulated as emulation
import pytest
import spec_leaf
import torch
from fast import cosine
from grids import as_layout, assert_close_as_dtype
from naive import array
from torch import Tensor

from clone_fast.ops import convolution_gradients, dispatch, modulated_conv2d, setup_filter
from clone_fast.ops.dispatch import Leaf
from clone_fast.reference.upfirdn2d import upfirdn2d

pytestmark = pytest.mark.usefixtures("nan_empty")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
AROUND = [2, 2, 2, 2]  # the adjoint of what stands behind a transposed convolution with a 3x3 kernel
# one piece, several of them in a block, several splits of the channels, bands, strips
SHAPES = [(1, 8, 2, 3), (3, 8, 5, 7), (2, 24, 9, 4), (2, 136, 10, 5), (3, 16, 37, 30), (1, 64, 21, 70)]
# act, gain, clamp; the last holds a number that half precision rounds
EPILOGUES = [
    ("lrelu", 2**0.5, 1.5),
    ("lrelu", 0.7, None),
    ("relu", 2.0, None),
    ("linear", 1.3, 0.75),
    ("lrelu", 1.0, 0.7),
]
WANTS = list(itertools.product([False, True], repeat=3))  # strength, bias, dots


compiled, device, leaf = emulation.fixtures("upfirdn2d", "upfirdn2d_gate", "_act_fir")


def made(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, epilogue: tuple[Any, ...], noise: str, bias: bool
) -> list[Any]:
    """dy, y, noise, strength, bias, act, gain and clamp."""
    n, c, h, w = shape
    act, gain, clamp = epilogue
    y = torch.randn(shape, device=device)
    y[torch.rand_like(y) < 0.1] = 0  # which counts as below zero
    if act == "relu":
        y = y.relu()
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    size = {"map": [h, w], "one": [1, 1, h, w], "each": [n, 1, h, w]}.get(noise)
    maps = None if size is None else torch.randn(size, device=device).to(dtype)
    strength = torch.tensor(-0.3, device=device, dtype=dtype) if noise == "each" else None
    shift = torch.randn(c, device=device).to(dtype) if bias else None
    dy, y = (as_layout(image.to(dtype), "channels_last") for image in (torch.randn_like(y), y))
    return [dy, y, maps, strength, shift, act, gain, clamp]


def exactly(args: list[Any]) -> list[Any]:
    """In float64, with the clamp that a result in this dtype holds."""
    *tensors, act, gain, clamp = (arg.double() if isinstance(arg, Tensor) else arg for arg in args)
    return [*tensors, act, gain, None if clamp is None else float(torch.tensor(clamp, dtype=args[1].dtype))]


def smooth(device: str) -> Tensor:
    return setup_filter([1, 3, 3, 1]).to(device)


def close_sum(got: Tensor | None, want: Tensor, sizes: Tensor, terms: int) -> None:
    """A sum in float32 of so many terms that may cancel, and the sum of their sizes: roundings of these."""
    assert got is not None
    assert got.dtype == torch.float32
    roundings = (4 + math.log2(terms)) * torch.finfo(torch.float32).eps
    assert ((got - want).abs() <= roundings * sizes).all()


def check(leaf: Any, args: list[Any], f: Tensor, padding: list[int], wants: tuple[bool, ...]) -> Any:
    dy, y, noise, _, _, *activation = args
    want_strength, want_bias, want_dots = wants
    n, c, h, w = y.shape
    call = (*args, False, *wants, f, padding, True, 4.0)
    assert leaf.supports_act_fir(*call) is None
    got, noise_sums, strength_sums, bias_sums, dots = leaf.launch_act_fir(*call)
    exact = exactly(args)
    shifts, options = exact[2:5], exact[5:]
    g, *_ = spec_leaf.act_backward(exact[0], exact[1], None, None, *options, False, False, False)
    rounded = spec_leaf.act_backward(dy, y, None, None, *activation, False, False, False)[0]
    want, plain = (
        upfirdn2d(image, f.to(image.dtype) if image is g else f, padding=padding, flip_filter=True, gain=4.0)
        for image in (g, rounded)
    )
    assert got.dtype == y.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close_as_dtype(got.cpu(), array(want.cpu()), plain.cpu())
    assert noise_sums is None
    assert (strength_sums is not None) == (want_strength and noise is not None)
    if strength_sums is not None:
        assert strength_sums.ndim == 1
        each = g * shifts[0]
        close_sum(strength_sums.double().sum().float(), each.sum(), each.abs().sum(), each.numel())
    assert (bias_sums is not None) == want_bias
    if bias_sums is not None:
        assert bias_sums.shape[1:] == (c,)
        close_sum(bias_sums.double().sum(0).float(), g.sum([0, 2, 3]), g.abs().sum([0, 2, 3]), n * h * w)
    assert (dots is not None) == want_dots
    if dots is not None:
        assert dots.shape[::2] == (n, c)
        *_, of_dots = spec_leaf.act_backward(*exact[:2], *shifts[:2], *options, False, False, False, shifts[2], True)
        added = g.new_zeros([]) if shifts[0] is None else shifts[0] * (1 if shifts[1] is None else shifts[1])
        added = added.abs() + (0 if shifts[2] is None else shifts[2].abs()[:, None, None])
        sizes = ((exact[0] * exact[1]).abs() + g.abs() * added).sum([2, 3])
        close_sum(dots.double().sum(1).float(), of_dots[:, 0], sizes, h * w)
    return got, strength_sums, bias_sums, dots


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(leaf: Any, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    f = smooth(device)
    for i, epilogue in enumerate(EPILOGUES):
        args = made(shape, dtype, device, epilogue, ["map", "one", "each", "none"][i % 4], i != 3)
        check(leaf, args, f, AROUND, (True, True, True))


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["map", "each", "none"])
def test_what_is_wanted_and_nothing_else(leaf: Any, device: str, noise: str) -> None:
    args = made((2, 16, 19, 23), torch.bfloat16, device, EPILOGUES[0], noise, noise != "map")
    whole = check(leaf, args, smooth(device), AROUND, (True, True, True))
    for wants in WANTS:
        some = check(leaf, args, smooth(device), AROUND, wants)
        assert torch.equal(some[0], whole[0])


@pytest.mark.slow
def test_filters_and_paddings(leaf: Any, device: str) -> None:
    """Asymmetric, dense and separable; windows that begin before a piece, and not."""
    filters = [torch.rand(4, device=device), torch.rand(4, 4, device=device), torch.zeros(4, 4, device=device)]
    for f, padding in itertools.product(filters, [AROUND, [0, 3, 1, 2], [3, 0, 3, 3]]):
        args = made((1, 16, 18, 21), torch.float32, device, EPILOGUES[0], "each", True)
        check(leaf, args, f, padding, (True, True, True))


def test_a_gradient_of_another_layout_or_off_16_bytes(leaf: Any, device: str) -> None:
    args = made((2, 8, 6, 9), torch.float16, device, EPILOGUES[0], "none", False)
    want = check(leaf, args, smooth(device), AROUND, (False, True, False))
    off = args[0].new_zeros(args[0].numel() + 1)[1:].view(2, 6, 9, 8).permute(0, 3, 1, 2)
    for dy in (args[0].contiguous(), off.copy_(args[0])):
        got = check(leaf, [dy, *args[1:]], smooth(device), AROUND, (False, True, False))
        for one, other in zip(got, want, strict=True):
            assert one is other is None or torch.equal(one, other)


def test_nan_stays_in_the_image_and_the_channel(leaf: Any, device: str) -> None:
    args = made((1, 16, 9, 12), torch.bfloat16, device, EPILOGUES[0], "none", False)
    args[1].fill_(0.5)
    args[0][0, 3, 4, 5] = float("nan")
    h, _, _, bias_sums, _ = leaf.launch_act_fir(*args, False, False, True, False, smooth(device), AROUND, True, 4.0)
    assert h[0, 3, 3:7, 4:8].isnan().all()
    assert h.isnan().sum() == 16
    assert bias_sums.isnan().any(0).nonzero().tolist() == [[3]]


def test_reasons(leaf: Any, device: str) -> None:
    args = made((1, 16, 4, 4), torch.float16, device, EPILOGUES[0], "map", True)
    f = smooth(device)

    def reason(args: list[Any], want_noise: bool = False, f: Tensor = f, padding: list[int] = AROUND) -> str:
        return str(leaf.supports_act_fir(*args, want_noise, True, True, True, f, padding, True, 4.0))

    assert reason(args) == "None"
    assert reason([*args[:2], None, *args[3:]], want_noise=True) == "None"
    assert "for the noise" in reason(args, want_noise=True)
    assert "swish" in reason([*args[:5], "swish", 1.0, None])
    assert "gain above zero" in reason([*args[:5], "lrelu", -1.0, None])
    assert "channels_last" in reason([args[0], args[1].contiguous(), *args[2:]])
    assert "multiple of 8" in reason([as_layout(one[:, :12], "channels_last") for one in args[:2]] + args[2:])
    assert "[4, 4]" in reason(args, f=f[:3, :3])
    assert "no smaller" in reason(args, padding=[1, 1, 1, 1])
    assert "no smaller" in reason(args, padding=[4, 0, 2, 2])
    assert "one dtype" in reason([args[0].float(), *args[1:]])
    assert "one dtype" in reason([*args[:4], args[4].float(), *args[5:]])
    assert "float64" in reason([one.double() if isinstance(one, Tensor) else one for one in args])


def test_what_the_launcher_refuses(compiled: ModuleType) -> None:
    def sums(**change: Any) -> Any:
        sizes = {"shape": (1, 8, 4, 4), "size": (5, 5), "channels_last": True, "filter": (4, 4), "separable": False}
        sizes |= {"up": (1, 1), "down": (1, 1), "pad": (2, 2), "flip": True, "gain": 1.0}
        return compiled.upfirdn2d_gate_sums(compiled.Upfirdn2d(**sizes | change), 2, True, True)

    assert sums() == (1, 1)
    for change in {"pad": (4, 2)}, {"size": (3, 5)}, {"up": (2, 2)}, {"filter": (3, 4)}:
        with pytest.raises(RuntimeError, match="upfirdn2d: gating wants a 4x4 filter without resampling"):
            sums(**change)
    for change in {"channels_last": False}, {"shape": (1, 4, 4, 4)}:
        with pytest.raises(RuntimeError, match="upfirdn2d: gating wants channels in vectors of 16 bytes"):
            sums(**change)


# ---- what clone_fast/ops makes of it ---------------------------------------------------------------------------------


IN_TWO = {"act_backward", "launch"}  # the latter is upfirdn2d's


@pytest.mark.parametrize(
    ("up", "act", "frozen", "least", "refused", "steps"),
    [
        (2, "lrelu", False, 64, False, {"act_fir"}),
        (2, "lrelu", True, 64, False, {"act_fir"}),
        (2, "lrelu", False, 65, False, IN_TWO),
        (2, "lrelu", False, 64, True, IN_TWO),
        (2, "lrelu", True, 64, True, IN_TWO),
        (2, "linear", False, 64, False, {"launch"}),  # where there is nothing to do but to filter
        (1, "lrelu", False, 16, False, {"act_backward"}),
        (1, "lrelu", True, 16, False, {"act_backward"}),
    ],
)
def test_when_it_is_taken(
    up: int, act: str, frozen: bool, least: int, refused: bool, steps: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def noting(op: str, name: str) -> Leaf:
        def noted(step: str, function: Any) -> Any:
            return lambda *args: used.append(step) or function(*args)

        functions = {
            step: noted(step.removeprefix("launch_"), function) for step, function in vars(spec_leaf.steps(op)).items()
        }
        if refused:
            functions["supports_act_fir"] = lambda *args: "not this one"
        return Leaf(types.SimpleNamespace(**functions))

    monkeypatch.setattr(convolution_gradients, "IN_ONE_PASS", least)
    monkeypatch.setattr(dispatch, "leaf", noting)
    monkeypatch.setattr(sys.modules["clone_fast.ops.modulated_conv2d"], "resolve", lambda *args: "triton")
    x, weight = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16), torch.randn(16, 8, 3, 3)
    values = {"x": x, "weight": weight, "styles": torch.randn(1, 8)}
    wanted = [values[name].requires_grad_() for name in values if not (frozen and name == "weight")]
    y = modulated_conv2d(**values, up=up, resample_filter=setup_filter([1, 3, 3, 1]), act=act, gain=1.0)
    used.clear()
    torch.autograd.grad(y, wanted, torch.randn_like(y))
    assert ("factor_gradients" in used) == frozen
    assert {"act_fir", *IN_TWO} & set(used) == steps


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 32, 1024, 1024), (5, 64, 255, 257), (3, 256, 128, 128), (2, 512, 33, 31), (1, 1104, 17, 64)], ids=str
)
def test_large_images(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """And the sums and dots as the Triton leaf goes on with them, the same every time."""
    pytest.importorskip("clone_fast._C")
    leaf: Any = importlib.import_module("clone_fast.cuda._act_fir")
    from clone_fast.kernels import modulated_conv2d as triton

    args = made(shape, dtype, "cuda", EPILOGUES[0], "each", True)
    found = check(leaf, args, smooth("cuda"), AROUND, (True, True, True))
    h, _, *again = leaf.launch_act_fir(*args, False, True, True, True, smooth("cuda"), AROUND, True, 4.0)
    for one, other in zip(found, (h, *again), strict=True):
        assert torch.equal(one, other)
    dy, y, noise, strength, bias, *activation = args
    wants = (False, True, True, bias, True)
    _, *parts, dots = triton.launch_act_backward(dy, y, noise, strength, *activation, *wants)
    _, *sums, other_dots = found
    for one, other in zip(
        triton.launch_act_sums(None, *sums, noise, strength, torch.float32)[1:],
        triton.launch_act_sums(*parts, noise, strength, torch.float32)[1:],
        strict=True,
    ):
        assert cosine(one, other) > 0.99999
    s, d = torch.ones(shape[:2], device="cuda"), torch.rand(shape[:2], device="cuda") + 0.1
    (_, one), (_, other) = (triton.launch_factor_gradients(y, dy, s, each, d) for each in (other_dots, dots))
    assert cosine(one, other) > 0.99999
