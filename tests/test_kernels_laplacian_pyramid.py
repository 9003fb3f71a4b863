"""The leaves of laplacian_pyramid, Triton and CUDA, against the reference in float64: the loss and its gradient.

On a CPU the Triton kernels run interpreted, on small shapes, and are compiled ahead of time. On a GPU both leaves run
on the whole grid.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from ahead_of_time import compiled_launches, meta
from grids import as_layout
from interpreted import interpreted_leaf, needs_interpreter
from torch import Tensor

from clone_fast.reference.laplacian_pyramid import distance, expand, laplacian_pyramid_loss, reduce

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "strided"]
GPU_LEAVES = [pytest.param("kernels", id="triton"), pytest.param("cuda", id="csrc")]
SMALL = [(1, 1), (1, 6), (7, 1), (2, 3), (5, 9), (17, 24), (33, 30)]
LARGE = [(1, 1), (1, 1500), (700, 2), (63, 65), (129, 130), (257, 255), (300, 520)]

pytestmark = pytest.mark.usefixtures("nan_empty")


def gpu_leaf(name: str) -> ModuleType:
    return importlib.import_module(f"clone_fast.{name}.laplacian_pyramid")


def images(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Multiples of 1/16: the finest band is exact in float32, so that its sign, zero included, has one right value."""
    x, y = (torch.randint(-32, 33, shape, device=device).to(dtype) / 16 for _ in range(2))
    return x, y


def differentiated(x: Tensor, y: Tensor, dtype: torch.dtype, scale: float, *args: Any) -> tuple[Tensor, Tensor]:
    """loss and scale * its gradient to x, by PyTorch's autograd in a dtype."""
    levels, weights, charbonnier, mse = args
    x = x.detach().to(dtype).requires_grad_()
    loss = laplacian_pyramid_loss(x, y.to(dtype), levels=levels, weights=weights, charbonnier=charbonnier, mse=mse)
    return loss.detach(), torch.autograd.grad(loss * scale, x)[0]


def check_close(name: str, got: Tensor, want: Tensor, plain: Tensor, roundings: int = 1) -> None:
    """The rule of errors: at most twice that of plain PyTorch in this dtype, plus one rounding of the result."""
    assert got.dtype == plain.dtype
    assert got.shape == want.shape
    error = (got.double() - want).abs().max()
    allowed = 2 * (plain.double() - want).abs().max() + roundings * torch.finfo(got.dtype).eps * want.abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(leaf: ModuleType, x: Tensor, y: Tensor, *args: Any, scale: float = -1.75) -> None:
    """All that a leaf offers, for one call; args are levels, weights, charbonnier, mse."""
    levels, weights, charbonnier, mse = args
    n, c, height, width = x.shape
    assert leaf.supports(x, y, *args) is None
    loss, slope, coarse = leaf.launch_keep(x, y, *args)
    assert torch.equal(leaf.launch(x, y, *args), loss)
    assert slope.dtype == (torch.int8 if charbonnier is None else torch.float32)
    assert slope.shape == x.shape
    assert slope.is_contiguous()
    assert list(coarse.shape) == ([n, c, (height + 1) // 2, (width + 1) // 2] if levels > 1 else [n, c, 0, 0])
    dloss = torch.full([], scale, device=x.device)
    read = (x, y) if mse else (torch.empty_like(x), torch.empty_like(y))  # else the values are not needed
    dx = leaf.launch_backward(dloss, slope, coarse, weights[0], *read, mse)
    assert dx.is_contiguous() or (dx.stride() == x.stride() and not x.is_contiguous())

    want_loss, want = differentiated(x, y, torch.float64, scale, *args)
    plain_loss, plain = differentiated(x, y, x.dtype, scale, *args)
    check_close("loss", loss, want_loss, plain_loss)
    check_close("dx", dx, want, plain)
    if want.any():  # a gradient that is small in float16 has few bits there, plain PyTorch's as well
        cosine, best = (torch.cosine_similarity(one.double().flatten(), want.flatten(), 0) for one in (dx, plain))
        assert cosine > best - 1e-6
    band = x.double() - y.double()
    if levels > 1:
        second = reduce(band)
        band = band - expand(second, height, width)
        zeros = torch.zeros_like(second)
        _, want = differentiated(second, zeros, torch.float64, 1.0, levels - 1, weights[1:], charbonnier, 0.0)
        _, plain = differentiated(second, zeros, torch.float32, 1.0, levels - 1, weights[1:], charbonnier, 0.0)
        # Not what a caller gets, that is dx: the sum over the levels, each of which rounds what the next one reads.
        check_close("coarse", coarse, want, plain, roundings=levels - 1)
    band = band.requires_grad_()
    (want,) = torch.autograd.grad(distance(band, charbonnier).sum(), band)
    # The slope of the smooth distance amplifies a rounding of the band, which is of unit size, by 1 / charbonnier.
    allowed = 0 if charbonnier is None else 8 * torch.finfo(torch.float32).eps / min(charbonnier, 0.1)
    torch.testing.assert_close(slope.double(), want, rtol=0, atol=allowed)


def random_calls(count: int, largest: int) -> Iterator[tuple[tuple[int, ...], torch.dtype, str, tuple[Any, ...]]]:
    for _ in range(count):
        levels = random.randint(1, 9)
        shape = (random.choice([1, 1, 2, 5]), random.choice([1, 2, 3, 3, 4]))
        sides = (random.randint(1, largest), random.randint(1, largest))
        weights = [random.choice([0.0, 0.5, 1.0, 3.0]) for _ in range(levels)]
        args = (levels, weights, random.choice([None, 0.1, 0.5]), random.choice([0.0, 0.5, 20.0]))
        yield (*shape, *sides), random.choice(DTYPES), random.choice(LAYOUTS), args


# ---- interpreted -------------------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With small tiles, so that a small image has tiles without a border too."""
    leaf = interpreted_leaf("laplacian_pyramid")
    monkeypatch.setattr(leaf, "TILES", {(9, 0): (4, 8, 4)})
    return leaf


@needs_interpreter
@pytest.mark.parametrize(
    ("size", "levels", "charbonnier", "mse"),
    [
        ((1, 1), 3, None, 0.0),
        ((1, 1), 1, None, 1.0),
        ((1, 6), 2, 0.1, 0.0),
        ((7, 1), 4, None, 2.0),
        ((2, 3), 3, 0.1, 0.0),
        ((5, 9), 1, None, 0.0),
        ((5, 9), 1, None, 0.7),
        ((9, 5), 1, 0.1, 0.0),
        ((17, 24), 6, None, 0.0),
        ((17, 24), 6, None, 1.0),
        ((33, 50), 2, 0.1, 5.0),
        ((25, 49), 2, None, 0.0),
    ],
)
def test_interpreted(
    interpreted: ModuleType, size: tuple[int, int], levels: int, charbonnier: float | None, mse: float
) -> None:
    weights = [2.0, 1.0, 0.0, 0.5, 1.0, 3.0][:levels]
    check(interpreted, *images((1, 1, *size), torch.float32, "cpu"), levels, weights, charbonnier, mse)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mse", [0.0, 1.5])
def test_interpreted_dtypes(interpreted: ModuleType, dtype: torch.dtype, layout: str, mse: float) -> None:
    x, y = (as_layout(image, layout) for image in images((2, 3, 6, 5), dtype, "cpu"))
    check(interpreted, x, y, 2, [1.0, 0.5], None, mse)


@needs_interpreter
@pytest.mark.parametrize("mse", [0.0, 1.5])
def test_interpreted_images_of_two_layouts(interpreted: ModuleType, mse: float) -> None:
    x, y = images((2, 3, 4, 6), torch.float32, "cpu")
    check(interpreted, as_layout(x, "channels_last"), as_layout(y, "strided"), 2, [1.0, 1.0], None, mse)


def test_reasons() -> None:
    leaf = interpreted_leaf("laplacian_pyramid") if not torch.cuda.is_available() else gpu_leaf("kernels")
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    assert leaf.supports(x, x, 1, [1.0], None, 0.0) == "float64 runs on the reference only"


def every_launch() -> None:
    leaf = importlib.import_module("clone_fast.kernels.laplacian_pyramid")
    for dtype, channels_last, charbonnier, mse in (
        (torch.float32, False, None, 0.0),
        (torch.float32, False, None, 1.0),
        (torch.bfloat16, True, 1e-3, 0.0),
        (torch.bfloat16, True, 1e-3, 1.0),
    ):
        x = meta(1, 3, 1024, 1024, dtype=dtype, channels_last=channels_last)
        args = (x, x, 2, [1.0] * 2, charbonnier, mse)
        leaf.launch(*args)
        leaf.launch_backward(*leaf.launch_keep(*args), 1.0, x, x, mse)


@pytest.mark.slow
def test_compiles_for_sm_90() -> None:
    compiled = compiled_launches(__file__, "every_launch")
    assert {kernel.name for kernel in compiled} == {"subtract", "reduce", "band", "sum_partials", "residue", "up"}
    for kernel in compiled:
        assert kernel.spilled == 0, kernel


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("leaf", GPU_LEAVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("charbonnier", [None, 0.1])
@pytest.mark.parametrize("mse", [0.0, 2.0])
def test_gpu(leaf: str, dtype: torch.dtype, layout: str, charbonnier: float | None, mse: float) -> None:
    for n, size in enumerate([*SMALL, *LARGE]):
        for levels in (1, 2, 3, 6, 13):
            weights = [random.choice([0.0, 0.5, 1.0, 3.0]) for _ in range(levels)]
            x, y = (as_layout(image, layout) for image in images((1 + n % 3, 3 - n % 2, *size), dtype, "cuda"))
            check(gpu_leaf(leaf), x, y, levels, weights, charbonnier, mse)


@pytest.mark.gpu
@pytest.mark.parametrize("leaf", GPU_LEAVES)
@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last", "strided")])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("mse", [0.0, 2.0])
def test_gpu_images_of_two_layouts(leaf: str, layouts: tuple[str, str], levels: int, mse: float) -> None:
    for size in ((36, 140), (33, 30)):
        pair = images((2, 3, *size), torch.float32, "cuda")
        for x, y in (pair, pair[::-1]):
            x, y = (as_layout(image, layout) for image, layout in zip((x, y), layouts, strict=True))
            check(gpu_leaf(leaf), x, y, levels, [1.0] * levels, None, mse)


@pytest.mark.gpu
@pytest.mark.parametrize("leaf", GPU_LEAVES)
def test_gpu_random_calls(leaf: str) -> None:
    for shape, dtype, layout, args in random_calls(500, 150):
        x, y = (as_layout(image, layout) for image in images(shape, dtype, "cuda"))
        check(gpu_leaf(leaf), x, y, *args)


@pytest.mark.gpu
@pytest.mark.parametrize("leaf", GPU_LEAVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 1024, 1024), torch.float32),
        ((2, 3, 1024, 1024), torch.bfloat16),
        ((16, 3, 256, 256), torch.float32),
        ((64, 3, 200, 256), torch.float16),
    ],
)
@pytest.mark.parametrize("mse", [0.0, 1.0])
def test_gpu_photographs(leaf: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, mse: float) -> None:
    """The sizes of the field. Charbonnier: among so many coefficients some are zero but for rounding."""
    x, y = (as_layout(torch.randn(shape, device="cuda").to(dtype), layout) for _ in range(2))
    check(gpu_leaf(leaf), x, y, 6, [1.0] * 6, 1e-2, mse)


@pytest.mark.gpu
@pytest.mark.parametrize("leaf", GPU_LEAVES)
@pytest.mark.parametrize("size", [(300, 517), (64, 64)])
def test_gpu_a_constant_has_no_detail(leaf: str, size: tuple[int, int]) -> None:
    """Exactly: rounding leaves nothing whose sign would be a gradient."""
    x = torch.full([1, 3, *size], 0.3, device="cuda")
    loss, slope, _ = gpu_leaf(leaf).launch_keep(x, torch.zeros_like(x), 6, [1.0] * 6, None, 0.0)
    torch.testing.assert_close(loss.item(), 0.3)
    assert not slope.any()


@pytest.mark.gpu
@pytest.mark.parametrize("leaf", GPU_LEAVES)
def test_gpu_twice_the_same(leaf: str) -> None:
    """To the last bit: no sum depends on which block comes first."""
    x, y = (torch.randn(2, 3, 500, 333, device="cuda") for _ in range(2))
    first, second = (gpu_leaf(leaf).launch_keep(x, y, 6, [1.0] * 6, 1e-3, 0.5) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("leaf", GPU_LEAVES)
@pytest.mark.parametrize("mse", [0.0, 1.0])
def test_gpu_between_other_kernels(leaf: str, mse: float) -> None:
    """Its kernels may begin while those before them still run: they read what these wrote, and not what comes after."""
    functions = gpu_leaf(leaf)
    image, y = images((2, 3, 1024, 1024), torch.float32, "cuda")
    args = (3, [1.0] * 3, None, mse)
    want = functions.launch_keep(image, y, *args)
    want_dx = functions.launch_backward(torch.ones_like(want[0]), want[1], want[2], 1.0, image, y, mse)
    for _ in range(20):
        x = torch.full_like(image, float("nan"))
        x.copy_(image)
        got = functions.launch_keep(x, y, *args)
        if not mse:
            x.fill_(float("nan"))
        dloss = torch.zeros_like(got[0]).add_(1)
        dx = functions.launch_backward(dloss, got[1], got[2], 1.0, x, y, mse)
        got[1].zero_(), got[2].zero_(), dloss.zero_(), x.fill_(float("nan"))
        assert torch.equal(got[0], want[0])
        assert torch.equal(dx, want_dx)


@pytest.mark.gpu
@pytest.mark.parametrize("leaf", GPU_LEAVES)
def test_gpu_graph_on_a_side_stream(leaf: str) -> None:
    functions = gpu_leaf(leaf)
    x, y = images((1, 3, 300, 260), torch.float32, "cuda")
    args = (5, [1.0] * 5, None, 0.5)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def run() -> tuple[Tensor, Tensor]:
        loss, slope, coarse = functions.launch_keep(x, y, *args)
        return loss, functions.launch_backward(torch.ones_like(loss), slope, coarse, 1.0, x, y, 0.5)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        loss, dx = run()
    for _ in range(2):
        for image, fresh in zip((x, y), images((1, 3, 300, 260), torch.float32, "cuda"), strict=True):
            image.copy_(fresh)
        graph.replay()
        want_loss, want = differentiated(x, y, torch.float64, 1.0, *args)
        plain_loss, plain = differentiated(x, y, torch.float32, 1.0, *args)
        check_close("loss", loss, want_loss, plain_loss)
        check_close("dx", dx, want, plain)
