"""The leaves of bias_act, Triton and CUDA, against the reference in float64: values, gradients, second gradients.

On a CPU the Triton kernels run interpreted, on small shapes, and are compiled ahead of time. On a GPU both leaves run
on the whole grid.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from ahead_of_time import compiled_launches, meta
from grids import as_layout
from interpreted import interpreted_leaf, needs_interpreter
from torch import Tensor

from clone_fast.reference.bias_act import ACTIVATIONS, bias_act

NAMES = list(ACTIVATIONS)
SMOOTH = [name for name in NAMES if not ACTIVATIONS[name].homogeneous]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "strided"]
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.usefixtures("nan_empty")


GPU_LEAVES = [
    pytest.param("kernels", marks=pytest.mark.gpu, id="triton"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="csrc"),
]


@pytest.fixture(params=[pytest.param("interpreted", marks=needs_interpreter), *GPU_LEAVES])
def leaf(request: pytest.FixtureRequest) -> Any:
    """Each leaf, with the device that it runs on as its attribute `on`."""
    if request.param == "interpreted":
        module, on = interpreted_leaf("bias_act"), "cpu"
    else:
        module, on = importlib.import_module(f"clone_fast.{request.param}.bias_act"), "cuda"
    module.on = on
    return module


@pytest.fixture(params=GPU_LEAVES)
def gpu_leaf(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"clone_fast.{request.param}.bias_act")


def options(act: str, *, clamp: float | None = None, gain: float | None = None, alpha: float | None = None) -> Any:
    """(act, alpha, gain, clamp)"""
    spec = ACTIVATIONS[act]
    return act, spec.alpha if alpha is None else alpha, spec.gain if gain is None else gain, clamp


def run(x: Tensor, b: Tensor | None, dim: int, option: Any) -> Tensor:
    act, alpha, gain, clamp = option
    return bias_act(x, b, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp)


def differentiated(x: Tensor, b: Tensor | None, dy: Tensor, v: Tensor, dim: int, option: Any) -> list[Tensor | None]:
    """y, dx, db and v times the second derivative, by PyTorch's autograd in the dtype of these tensors."""
    x, b = x.detach().requires_grad_(), None if b is None else b.detach().requires_grad_()
    y = run(x, b, dim, option)
    dx, *db = torch.autograd.grad(y, [x] if b is None else [x, b], dy, create_graph=True)
    second = torch.autograd.grad(dx, x, v)[0] if dx.requires_grad else torch.zeros_like(x)
    return [y.detach(), dx.detach(), db[0].detach() if db else None, second]


def away_from_edges(x: Tensor, b: Tensor | None, dim: int, option: Any) -> Tensor:
    """x, but not where rounding decides about a slope: at x + b = 0, and where the result just reaches the clamp."""
    *free, clamp = option
    wide = None if b is None else b.double()
    x[run(x.double(), wide, dim, ("linear", 0.0, 1.0, None)).abs() < 1e-6] += 0.5
    if clamp is not None:
        x[(run(x.double(), wide, dim, (*free, None)).abs() - clamp).abs() < 1e-5 * clamp] = 0
    return x


def check(leaf: Any, x: Tensor, b: Tensor | None, dim: int, option: Any) -> None:
    """All that a leaf offers, for one call, by the rule of errors; and what autograd would never notice."""
    x = away_from_edges(x, b, dim, option)
    dy, v = torch.randn_like(x), torch.randn_like(x)
    call = (x, b, dim, *option)
    assert leaf.supports(*call) is None
    dx, db = leaf.launch_backward(dy, *call, True)
    found = {"y": leaf.launch(*call), "dx": dx, "db": db, "second": leaf.launch_second(v, dy, *call)}
    exact = differentiated(*[None if t is None else t.double() for t in (x, b, dy, v)], dim, option)  # type: ignore[arg-type]
    plain = differentiated(x, b, dy, v, dim, option)
    for (name, got), want, rough in zip(found.items(), exact, plain, strict=True):
        assert (got is None) == (want is None), name
        if got is None or want is None or rough is None:
            continue
        assert got.dtype == x.dtype
        assert got.shape == want.shape
        size = want.abs().max()
        if name == "db":  # a sum, of this size before anything cancelled
            size = exact[1].movedim(dim, 0).flatten(1).abs().sum(1).max() if x.ndim > 1 else size  # type: ignore[union-attr]
        error = (got.double() - want).abs().max()
        allowed = 2 * (rough.double() - want).abs().max() + torch.finfo(x.dtype).eps * size
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


# ---- every leaf, small ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(leaf: Any, act: str, dtype: torch.dtype) -> None:
    x, b = (3 * torch.randn(2, 5, 4, 6, device=leaf.on)).to(dtype), torch.randn(5, device=leaf.on).to(dtype)
    check(leaf, x, b, 1, options(act, clamp=0.9, gain=-1.3, alpha=0.3))
    if dtype == torch.float32:
        check(leaf, x, b, 1, options(act))


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_gradient_without_that_of_the_bias(leaf: Any, act: str) -> None:
    x, dy, b = (torch.randn(size, device=leaf.on) for size in ((2, 5, 4, 6), (2, 5, 4, 6), (5,)))
    call = (dy, x, b, 1, *options(act, clamp=0.9))
    both, alone = leaf.launch_backward(*call, True), leaf.launch_backward(*call, False)
    assert alone[1] is None
    torch.testing.assert_close(alone[0], both[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 8, 40])
def test_layouts(leaf: Any, layout: str, channels: int) -> None:
    x, b = torch.randn(2, channels, 5, 7), torch.randn(channels, 2)[:, 1].to(leaf.on)
    x = as_layout(x, layout).to(leaf.on)
    check(leaf, x, b, 1, options("lrelu", clamp=0.7))
    y = leaf.launch(x, b, 1, *options("lrelu"))
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    check(leaf, x, None, 0, options("swish"))


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ([1], 0),
        ([37], 0),
        ([3, 4], 1),
        ([3, 4], 0),
        ([33, 17], 1),
        ([2, 3, 4], 2),
        ([2, 3, 2, 3, 2], 2),
        ([4, 16, 4], 1),
        ([2, 3, 1030], 1),
        ([1, 2, 1], 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(leaf: Any, shape: list[int], dim: int, dtype: torch.dtype) -> None:
    x, b = torch.randn(shape, device=leaf.on).to(dtype), torch.randn(shape[dim], device=leaf.on).to(dtype)
    check(leaf, x, b, dim, options("lrelu"))
    check(leaf, x, b, dim, options("tanh", clamp=0.5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dim", range(4))
def test_any_axis(leaf: Any, layout: str, dim: int) -> None:
    x = as_layout(torch.randn(2, 8, 3, 5), layout).to(leaf.on)
    check(leaf, x, torch.randn(x.shape[dim], device=leaf.on), dim, options("elu"))


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_memory_that_is_not_aligned(leaf: Any, offset: int) -> None:
    flat, b = torch.randn(2 * 8 * 6 + 8, device=leaf.on).bfloat16(), torch.randn(16 + 8, device=leaf.on).bfloat16()
    x = flat[offset : offset + 96]
    check(leaf, x.view(2, 8, 6), b[offset : offset + 8], 1, options("lrelu"))
    check(leaf, x.view(6, 16), b[offset : offset + 16], 1, options("lrelu"))


def test_scalar(leaf: Any) -> None:
    x = torch.tensor(1.5, device=leaf.on)
    assert leaf.launch(x, None, 0, *options("linear", gain=3)).item() == pytest.approx(4.5)


@pytest.mark.parametrize("act", NAMES)
def test_infinity_and_nan_pass_as_in_the_reference(leaf: Any, act: str) -> None:
    x = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1e-30, -100.0, 100.0], device=leaf.on)
    for clamp in (None, 7.0, 0.0, INF):
        option = options(act, clamp=clamp)
        torch.testing.assert_close(
            leaf.launch(x, None, 0, *option), run(x, None, 0, option), equal_nan=True, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu"])
def test_no_gradient_at_the_clamp_and_beyond(leaf: Any, act: str) -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.5, 1.0, 3.0], device=leaf.on)
    dy = torch.tensor([INF, 1.0, 1.0, 1.0, 1.0, INF], device=leaf.on)
    option = options(act, gain=2.0, clamp=2.0, alpha=1.0)
    wide = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(run(wide, None, 0, option), wide, dy)
    got, _ = leaf.launch_backward(dy, x, None, 0, *option, False)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0]


def test_what_is_not_supported_has_a_reason(leaf: Any) -> None:
    for dtype in (torch.float64, torch.float8_e4m3fn):
        assert isinstance(leaf.supports(torch.zeros(2, dtype=dtype), None, 0, *options("relu")), str)


# ---- on a GPU ------------------------------------------------------------------------------------------------------

STYLEGAN2 = [
    (4, 512, 4, 4),
    (2, 512, 64, 64),
    (1, 64, 256, 256),
    (2, 32, 511, 513),
    (3, 3, 1024, 1024),
    (64, 512, 8, 8),
]


@pytest.mark.parametrize("shape", STYLEGAN2, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large(gpu_leaf: Any, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = as_layout(torch.randn(shape, device="cuda"), layout).to(dtype)
    b = torch.randn(shape[1], device="cuda").to(dtype)
    check(gpu_leaf, x, b, 1, options("lrelu", clamp=1.1))
    check(gpu_leaf, x, b, 1, options("softplus"))


def test_same_sums_on_every_run(gpu_leaf: Any) -> None:
    x, dy = torch.randn(2, 8, 16, 200, 200, device="cuda")
    b = torch.randn(16, device="cuda")
    sums = [gpu_leaf.launch_backward(dy, x, b, 1, *options("lrelu"), True)[1] for _ in range(3)]
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_replay_with_other_values_on_a_side_stream(gpu_leaf: Any) -> None:
    x, dy, b = (torch.randn(s, device="cuda") for s in ((2, 16, 64, 64), (2, 16, 64, 64), (16,)))
    call = (dy, x, b, 1, *options("lrelu", clamp=1.0), True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gpu_leaf.launch_backward(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        dx, db = gpu_leaf.launch_backward(*call)
    for _ in range(2):
        for tensor in (x, dy, b):
            tensor.normal_()
        graph.replay()
        want = gpu_leaf.launch_backward(*call)
        torch.testing.assert_close((dx, db), want, rtol=0, atol=0)


# ---- random --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_random_calls(leaf: Any, seed: int) -> None:
    """500 calls of the CUDA leaf, 50 of the Triton one, of which nobody has chosen one."""
    pick = torch.Generator().manual_seed(seed)

    def one_of(values: Any) -> Any:
        return values[int(torch.randint(len(values), [], generator=pick))]

    for _ in range(50 if leaf.__name__.startswith("clone_fast.cuda") else 5):
        longest = one_of([3, 12, 40])
        shape = [int(torch.randint(1, longest + 1, [], generator=pick)) for _ in range(one_of([1, 2, 3, 4, 4, 4]))]
        dim, dtype = one_of(range(len(shape))), one_of(DTYPES)
        x = 2 * torch.randn(shape, generator=pick)
        if len(shape) == 4:
            x = as_layout(x, one_of(LAYOUTS))
        b = one_of([None, torch.randn(shape[dim], generator=pick)])
        clamp, gain, alpha = one_of([None, 0.3, 1.0]), one_of([None, 0.5, -2.0]), one_of([None, 0.1, 1.5])
        option = options(one_of(NAMES), clamp=clamp, gain=gain, alpha=alpha)
        check(leaf, x.to(leaf.on, dtype), None if b is None else b.to(leaf.on, dtype), dim, option)


# ---- ahead of time -------------------------------------------------------------------------------------------------


def every_launch() -> None:
    """What StyleGAN2 launches: both layouts, with a clamp."""
    leaf = importlib.import_module("clone_fast.kernels.bias_act")
    for dtype in DTYPES:
        for channels_last in (False, True):
            x = meta(4, 32, 1024, 1024, dtype=dtype, channels_last=channels_last)
            call = (x, meta(32, dtype=dtype), 1, *options("lrelu", clamp=256.0))
            leaf.launch(*call)
            leaf.launch_backward(x, *call, True)


def test_compiles_for_sm_90() -> None:
    found = compiled_launches(__file__, "every_launch")
    assert {kernel.name for kernel in found} == {"elementwise_kernel", "gradients_kernel", "sum_kernel"}
    for kernel in found:
        assert kernel.spilled == 0, kernel
