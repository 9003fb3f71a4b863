"""scaled_copy_ against float64, its messages, and the Triton kernel: interpreted on a CPU, compiled ahead, on a GPU."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from ahead_of_time import compiled_launches, meta
from grids import as_layout
from interpreted import WHERE, leaf_on
from torch import Tensor

from clone_fast.ops.scaled_copy import scaled_copy_
from clone_fast.reference import scaled_copy as spec

LAYOUTS = ["contiguous", "channels_last", "strided"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [*itertools.product(["none", "one", "each"], [False, True])]  # of the factor; whether something is added


def images(layout: str, dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return as_layout(torch.randn(shape, device=device).to(dtype), layout)


def place(layout: str, dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    """To be written, with no number in it; "strided" is every other image of twice as many, by pixels."""
    n, *rest = shape
    if layout == "strided":
        both = torch.full([2 * n, *rest], torch.nan, dtype=dtype, device=device)
        return both.contiguous(memory_format=torch.channels_last)[1::2]
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.full(shape, torch.nan, dtype=dtype, device=device).contiguous(memory_format=form)


def factors(kind: str, n: int, device: str) -> Tensor | None:
    return {"none": None, "one": torch.randn([], device=device), "each": torch.randn(n, 1, 1, 1, device=device)}[kind]


def assert_exact(out: Tensor, x: Tensor, factor: Tensor | None, added: Tensor | None, steps: float = 0.5) -> None:
    """To half a step of the result's dtype, and what float32 loses of a product and a sum."""
    product = x.double() * (1 if factor is None else factor.double())
    want = product + (0 if added is None else added.double())
    size = steps * torch.finfo(out.dtype).eps * want.abs() + 2 * 2**-24 * (product.abs() + want.abs())
    tiny = torch.finfo(out.dtype).smallest_normal
    assert bool(((out.double() - want).abs() <= size + tiny).all())


@pytest.mark.parametrize(("kind", "adds"), FORMS)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_the_reference(dtypes: tuple[torch.dtype, torch.dtype], kind: str, adds: bool) -> None:
    shape = (3, 2, 4, 5)
    x, factor = images("strided", dtypes[0], "cpu", *shape), factors(kind, 3, "cpu")
    added = images("channels_last", torch.float32, "cpu", *shape) if adds else None
    out = place("strided", dtypes[1], "cpu", *shape)
    spec.scaled_copy_(out, x, factor, added)
    assert_exact(out, x, factor, added)


def test_float64_keeps_its_digits() -> None:
    x, factor = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 1, 1, 1, dtype=torch.float64)
    out = torch.empty_like(x)
    assert scaled_copy_(out, x, factor, x) is out
    assert torch.equal(out, x * factor + x)


def test_nothing_is_copied_of_no_images() -> None:
    assert scaled_copy_(torch.empty(0, 3, 4, 4), torch.empty(0, 3, 4, 4), torch.empty(0, 1, 1, 1)).numel() == 0


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"x must be \[2, 3, 4, 5\], got \[2, 3, 5, 4\]", {"x": torch.zeros(2, 3, 5, 4)}),
        (r"added must be \[2, 3, 4, 5\], got \[1, 3, 4, 5\]", {"added": torch.zeros(1, 3, 4, 5)}),
        (r"factor must be \[\] or \[2, 1, 1, 1\], got \[2\]", {"factor": torch.zeros(2)}),
    ],
)
def test_bad_shapes(message: str, change: dict[str, Tensor]) -> None:
    args: dict[str, Any] = {"out": torch.zeros(2, 3, 4, 5), "x": torch.zeros(2, 3, 4, 5)}
    with pytest.raises(ValueError, match=message):
        scaled_copy_(**args | change)


# ---- the kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("kind", "adds"), FORMS)
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_the_kernel(
    dtypes: tuple[torch.dtype, torch.dtype], layout: str, to: str, kind: str, adds: bool, where: str
) -> None:
    leaf = leaf_on("scaled_copy", where)
    shape = (3, 3, 8, 48) if to == "contiguous" else (2, 3, 9, 41)
    x, factor = images(layout, dtypes[0], where, *shape), factors(kind, shape[0], where)
    added = images("contiguous", torch.float32, where, *shape) if adds else None
    out = place(to, dtypes[1], where, *shape)
    assert leaf.supports(out, x, factor, added) is None
    assert leaf.launch(out, x, factor, added)
    assert_exact(out, x, factor, added, steps=1 if where == "cpu" else 0.5)  # Triton's interpreter cuts bits off
    if to == "strided":
        assert out._base is not None
        assert out._base[::2].isnan().all()  # what lies between is not written


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 7), (1, 4, 7, 1), (1, 2, 33, 65)], ids=str)
def test_the_kernel_on_odd_shapes(shape: tuple[int, ...], where: str) -> None:
    leaf = leaf_on("scaled_copy", where)
    for layout, to in itertools.product(LAYOUTS[:2], LAYOUTS):
        x, out = images(layout, torch.float16, where, *shape), place(to, torch.float32, where, *shape)
        assert leaf.launch(out, x, None, None)
        assert torch.equal(out, x.float())


def test_what_the_leaf_refuses() -> None:
    leaf = importlib.import_module("clone_fast.kernels.scaled_copy")
    x = torch.zeros(1, 3, 4, 4)
    assert leaf.supports(x, x, None, None) is None
    assert "5" in leaf.supports(*[torch.zeros(1, 5, 4, 4)] * 2, None, None)
    assert "float32" in leaf.supports(x, x.double(), None, None)
    assert "float32" in leaf.supports(x, x, torch.ones([]).double(), None)
    assert "rows" in leaf.supports(x, x, None, torch.zeros(1, 3, 4, 8)[..., ::2][..., :4].transpose(2, 3))
    huge = torch.empty(1, 3, 1 << 15, 1 << 15, device="meta")
    assert "rows" in leaf.supports(huge, huge, None, None)


def every_launch() -> None:
    leaf = importlib.import_module("clone_fast.kernels.scaled_copy")
    planes, pixels = meta(5, 3, 1024, 1024), meta(10, 3, 1024, 1024, dtype=torch.bfloat16, channels_last=True)[1::2]
    leaf.launch(pixels, planes, None, None)
    leaf.launch(planes, pixels, meta(5, 1, 1, 1), None)
    leaf.launch(planes, pixels, meta(5, 1, 1, 1), planes)
    leaf.launch(planes, planes, meta(), None)


def test_compiles_for_sm_90() -> None:
    kernels = compiled_launches(__file__, "every_launch")
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= 64, kernel


@pytest.mark.gpu
def test_the_op_takes_the_kernel() -> None:
    """Of the sizes of an iteration; and what it does not take goes by the reference."""
    x = torch.randn(5, 3, 256, 256, device="cuda")
    both = torch.full([10, 3, 256, 256], torch.nan, device="cuda", dtype=torch.bfloat16)
    both = both.contiguous(memory_format=torch.channels_last)
    version = both._version
    scaled_copy_(both[1::2], x)
    assert both._version > version
    assert torch.equal(both[1::2], x.bfloat16())
    assert both[::2].isnan().all()
    wide = torch.randn(2, 5, 9, 9, device="cuda", dtype=torch.float64)
    assert torch.equal(scaled_copy_(torch.empty_like(wide), wide, added=wide), 2 * wide)
