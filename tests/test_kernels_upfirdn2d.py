"""The leaves of upfirdn2d, Triton and CUDA, against the reference in float64.

On a CPU the Triton kernels run interpreted, on small shapes, and are compiled ahead of time. On a GPU both leaves run
on the whole grid. Gradients are calls of the same kind, with other paddings and the filter reversed.
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

from clone_fast.reference.upfirdn2d import output_size, setup_filter, upfirdn2d

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "strided"]
BLUR = setup_filter([1, 3, 3, 1])
RANDOM = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
RESAMPLING: dict[str, tuple[int, int]] = {"same": (1, 1), "up": (2, 1), "down": (1, 2)}

pytestmark = pytest.mark.usefixtures("nan_empty")

GPU_LEAVES = [
    pytest.param("kernels", marks=pytest.mark.gpu, id="triton"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="csrc"),
]


@pytest.fixture(params=[pytest.param("interpreted", marks=needs_interpreter), *GPU_LEAVES])
def leaf(request: pytest.FixtureRequest) -> Any:
    """Each leaf, with the device that it runs on as its attribute `on`."""
    if request.param == "interpreted":
        module, on = interpreted_leaf("upfirdn2d"), "cpu"
    else:
        module, on = importlib.import_module(f"clone_fast.{request.param}.upfirdn2d"), "cuda"
    module.on = on
    return module


@pytest.fixture(params=GPU_LEAVES)
def gpu_leaf(request: pytest.FixtureRequest) -> Any:
    module = importlib.import_module(f"clone_fast.{request.param}.upfirdn2d")
    module.on = "cuda"
    return module


def check(
    leaf: Any,
    x: Tensor,
    f: Tensor,
    up: int | list[int] = 1,
    down: int | list[int] = 1,
    padding: int | list[int] = 0,
    flip: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """One call by the rule of errors, and what it promises of its result."""
    x, f = x.to(leaf.on), f.to(leaf.on)
    up, down = ([v, v] if isinstance(v, int) else v for v in (up, down))
    padding = [padding] * 4 if isinstance(padding, int) else padding
    call = (f, up, down, padding, flip, gain)
    assert leaf.supports(x, *call) is None
    y: Tensor = leaf.launch(x, *call)
    options: dict[str, Any] = {"up": up, "down": down, "padding": padding, "flip_filter": flip, "gain": gain}
    want, plain = upfirdn2d(x.double(), f.double(), **options), upfirdn2d(x, f, **options)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    error = (y.double() - want).abs().max()
    allowed = 2 * (plain.double() - want).abs().max() + torch.finfo(x.dtype).eps * want.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    return y


def image(channels: int, height: int, width: int, layout: str) -> Tensor:
    """A small one. In NCHW every channel is an image of its own, of which two tell as much as many."""
    channels = channels if layout == "channels_last" else min(channels, 2)
    return as_layout(torch.randn(1, channels, height, width), layout)


# ---- every leaf, small ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_filters_of_stylegan2(leaf: Any, resampling: str, layout: str, dtype: torch.dtype) -> None:
    x = as_layout(image(8, 9, 16, layout).to(dtype), layout)
    for padding in ([2, 1, 2, 1], [2, 2, 1, 1]):
        check(leaf, x, BLUR, *RESAMPLING[resampling], padding, gain=4.0)
    check(leaf, x, RANDOM, *RESAMPLING[resampling], [1, 2, 2, 1], flip=True, gain=-0.5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (2, 2), (5, 11), (9, 33)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("resampling", RESAMPLING)
def test_odd_sizes(leaf: Any, size: tuple[int, int], channels: int, resampling: str) -> None:
    for layout in ("contiguous", "channels_last"):
        check(leaf, image(channels, *size, layout), RANDOM, *RESAMPLING[resampling], [2, 3, 4, 1])


@pytest.mark.parametrize(
    "padding", [[-2, 3, 4, -1], [-5, 8, -7, 9], [7, -6, 6, -5], [0, 0, 0, 0], [9, 9, 9, 9]], ids=str
)
@pytest.mark.parametrize("resampling", RESAMPLING)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cropping_and_wide_padding(leaf: Any, padding: list[int], resampling: str, layout: str) -> None:
    check(leaf, image(8, 10, 16, layout).bfloat16(), RANDOM, *RESAMPLING[resampling], padding)


@pytest.mark.parametrize(
    ("taps", "up", "down", "padding"),
    [
        ([1, 1], 1, [3, 2], 0),
        ([3, 5], 1, 1, 2),
        ([2, 3], [3, 1], [1, 2], [1, 2, 3, 0]),
        ([4, 4], 3, 2, [1, 2, 3, 4]),
        ([4, 4], [2, 1], 1, 2),
        ([7, 6], 2, 2, [-3, 9, 4, 5]),
        ([9, 9], 1, 1, [6, 6, 7, 7]),
        ([3], 2, 1, 2),
        ([4], 1, 1, [2, 1, 2, 1]),
        ([4], 2, 1, [2, 1, 2, 1]),
        ([4], 1, 2, [1, 1, 1, 1]),
        ([5], 2, 3, [2, 1, 3, 4]),
        ([12], 2, 1, [6, 5, 6, 5]),
        ([12], 1, 2, [5, 5, 5, 5]),
        ([12], 4, 2, [-2, 12, 8, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_other_filters(leaf: Any, taps: list[int], up: Any, down: Any, padding: Any, layout: str) -> None:
    x, f = as_layout(torch.randn(2, 3, 5, 6), layout), torch.randn(taps)
    for dtype, flip in ((torch.float32, True), (torch.bfloat16, False)):
        check(leaf, x.to(dtype), f, up, down, padding, flip, 1.5)


@pytest.mark.parametrize(
    "f",
    [
        torch.ones(4, 4),
        torch.zeros(4, 4),
        torch.randn(4, 1, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.0, 1, 0, -3]),
        torch.eye(4),
        1e-30 * RANDOM,
        1e-30 * BLUR,
        BLUR + torch.nn.functional.pad(torch.tensor([[1e-4]]), (2, 1, 1, 2)),
        RANDOM.t(),
    ],
    ids=["ones", "zeros", "separable", "identity", "tiny", "tiny separable", "nearly separable", "transposed"],
)
def test_filters_that_are_products_of_two_and_others(leaf: Any, f: Tensor) -> None:
    """The CUDA leaf takes a shorter way where the 4x4 filter is an outer product; which it is nobody tells it."""
    for layout in ("contiguous", "channels_last"):
        check(leaf, image(8, 7, 16, layout), f, 1, 1, [2, 1, 1, 2])


def test_infinite_pixels_reach_only_what_they_touch(leaf: Any) -> None:
    for layout in ("contiguous", "channels_last"):
        x = torch.zeros_like(image(8, 8, 16, layout))
        x[:, :, 4, 8] = float("inf")
        y = leaf.launch(x.to(leaf.on), BLUR.to(leaf.on), [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0)
        assert int((~torch.isfinite(y)).sum()) == x.shape[1] * 16
        y = leaf.launch(x.to(leaf.on), BLUR.to(leaf.on), [1, 1], [1, 1], [2, 1, 2, 1], False, 1.0)
        assert int((~torch.isfinite(y)).sum()) == x.shape[1] * 16


@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("resampling", RESAMPLING)
def test_memory_that_is_not_aligned(leaf: Any, offset: int, resampling: str) -> None:
    flat = torch.randn(2 * 8 * 8 + 8, device=leaf.on).bfloat16()
    flat = flat[offset : offset + 128]
    check(leaf, flat.view(1, 2, 8, 8), BLUR, *RESAMPLING[resampling], [1, 2, 1, 2])
    check(leaf, flat.view(1, 2, 8, 8).permute(0, 3, 1, 2), BLUR, *RESAMPLING[resampling], [1, 2, 1, 2])


def test_what_is_not_supported_has_a_reason(leaf: Any) -> None:
    for dtype in (torch.float64, torch.float8_e4m3fn):
        x = torch.zeros(1, 1, 4, 4, dtype=dtype)
        assert isinstance(leaf.supports(x, BLUR, [1, 1], [1, 1], [0, 0, 0, 0], False, 1.0), str)


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        (4, 512, 4, 4),
        (2, 512, 64, 64),
        (1, 128, 256, 256),
        (2, 64, 257, 257),
        (1, 32, 513, 511),
        (3, 3, 256, 512),
        (1, 2, 40, 2048),
        (64, 512, 8, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large(gpu_leaf: Any, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = as_layout(torch.randn(shape), layout).cuda().to(dtype)
    for up, down in RESAMPLING.values():
        check(gpu_leaf, x, BLUR, up, down, [2, 1, 2, 1])
        check(gpu_leaf, x, RANDOM, up, down, [1, 2, 1, 1], flip=True)
        check(gpu_leaf, x, RANDOM, up, down, [1, -1, 0, 3])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_filters_of_stylegan3(gpu_leaf: Any, layout: str, dtype: torch.dtype) -> None:
    x, f = as_layout(torch.randn(2, 16, 148, 148), layout).cuda().to(dtype), setup_filter(torch.randn(12).tolist())
    check(gpu_leaf, x, f, 2, 1, [6, 5, 6, 5], gain=4.0)
    check(gpu_leaf, x, f, 1, 2, [5, 5, 5, 5])
    check(gpu_leaf, x, f, 4, 2, [13, 12, 13, 12], gain=16.0)


@pytest.mark.parametrize("resampling", RESAMPLING)
def test_replay_with_other_values_on_a_side_stream(gpu_leaf: Any, resampling: str) -> None:
    x, f = torch.randn(2, 16, 64, 64, device="cuda"), torch.randn(4, 4, device="cuda")
    up, down = RESAMPLING[resampling]
    call = (x, f, [up, up], [down, down], [2, 1, 2, 1], False, 1.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gpu_leaf.launch(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = gpu_leaf.launch(*call)
    for _ in range(2):
        x.normal_()
        f.normal_()
        graph.replay()
        torch.testing.assert_close(y, gpu_leaf.launch(*call), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_random_calls(gpu_leaf: Any, seed: int) -> None:
    """A hundred calls of each leaf and seed, of which nobody has chosen one."""
    pick = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, [], generator=pick))

    def one_of(values: Any) -> Any:
        return values[number(0, len(values) - 1)]

    calls = 0
    while calls < 100:
        shape = [number(1, 3), one_of([1, 3, 8, 16, 20, 64]), number(1, 70), one_of([number(1, 70), 16, 48, 64, 128])]
        any_factors = [[number(1, 3), number(1, 3)], [number(1, 3), number(1, 3)]]
        up, down = one_of([*[[[v, v] for v in pair] for pair in RESAMPLING.values()], any_factors])
        f = torch.randn(one_of([[4, 4], [4, 4], [4], [number(1, 13)], [number(1, 7), number(1, 7)]]), generator=pick)
        padding = [number(-4, 9) for _ in range(4)]
        oh = output_size(shape[2], f.shape[0], up[1], down[1], padding[2], padding[3])
        ow = output_size(shape[3], f.shape[-1], up[0], down[0], padding[0], padding[1])
        if min(oh, ow) < 1:
            continue
        x = as_layout(torch.randn(shape, generator=pick), one_of(LAYOUTS)).cuda().to(one_of(DTYPES))
        check(gpu_leaf, x, f, up, down, padding, bool(number(0, 1)), one_of([1.0, 4.0, -2.5]))
        calls += 1


# ---- ahead of time ---------------------------------------------------------------------------------------------------


def every_launch() -> None:
    """What StyleGAN2 launches, in both layouts; and a separable filter."""
    leaf = importlib.import_module("clone_fast.kernels.upfirdn2d")
    f, taps = meta(4, 4, dtype=torch.float32), meta(12, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            x = meta(1, 32, 1024, 1024, dtype=dtype, channels_last=channels_last)
            for up, down in RESAMPLING.values():
                leaf.launch(x, f, [up, up], [down, down], [2, 1, 2, 1], False, 1.0)
            leaf.launch(x, taps, [2, 2], [1, 1], [6, 5, 6, 5], False, 4.0)


def test_compiles_for_sm_90() -> None:
    found = compiled_launches(__file__, "every_launch")
    assert {kernel.name for kernel in found} == {"_same_kernel", "_up_kernel", "_down_kernel", "_general_kernel"}
    for kernel in found:
        assert kernel.spilled == 0, kernel
