"""Coding a tweak in few bits: what it changed, rounded as coarsely as the picture allows.

A number is stored as a multiple of a step. The steps follow from how much the picture depends on the number: of all
ways to spend the same error in the picture, the cheapest gives every number the same share, so that a step is
inversely proportional to the root of the number's sensitivity (reverse water-filling; Cover and Thomas, "Elements of
Information Theory", section 10.3). The sensitivity of a matrix is taken as an outer product of its rows' and its
columns', as Adafactor does for second moments (Shazeer and Stern 2018). The multiples, mostly 0 and ±1, go through
LZMA, whose adaptive range coder needs no table of frequencies.
"""

from __future__ import annotations

import lzma
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

PROBES = 4
_FLOOR = 1e-3  # of the mean sensitivity: what one picture does not see at all, another one may
_LEAST = 0.2  # of a column's energy that its multiples must hold to be made longer
_PART = 1 << 22  # bytes that are packed by themselves, side by side
_THREADS = 8  # at most; each takes some 50 MB
# no context: neighbours tell nothing
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": _PART, "lc": 0, "lp": 0, "pb": 0}]
_MEMORY = 1 << 28  # bytes that unpacking may take; its dictionary needs a fraction of it
_TRIES = 24

Steps = dict[str, tuple[Tensor, Tensor]]
"""By name, the factors of the steps along the first axis [O, 1, ...] and along the second [1, I, ...], bfloat16."""


def sensitivity(picture: Tensor, values: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """How much the picture changes with each number: the squared norm of its derivative, estimated.

    For random signs u in the place of the pixels, E[(d(u . picture) / dv)^2] = |d picture / dv|^2 (Hutchinson 1989).

    Args:
        picture: drawn with the graph of `values`, which want gradients.

    Returns:
        By name, of the value's shape; without those that the picture does not depend on.
    """
    source = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for probe in range(PROBES):
        signs = torch.randint(2, picture.shape, generator=source).to(picture) * 2 - 1
        gradients = torch.autograd.grad(  # of a scalar: PyTorch imports sympy where it is given gradients
            (picture * signs).sum(), list(values.values()), retain_graph=probe < PROBES - 1, allow_unused=True
        )
        for name, gradient in zip(values, gradients, strict=True):
            if gradient is not None:
                found[name] = found.get(name, 0) + gradient.square() / PROBES
    return found


def unit_steps(change: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Steps:
    """The steps that share the error evenly, up to a common factor. A change that the picture does not depend on is
    kept to 8 bits whatever the factor, see `scaled`."""
    steps = {}
    for name in change:
        seen = found.get(name)
        if seen is None or not float(seen.mean()) > 0:
            continue
        mean = seen.mean()
        rows = seen.mean(tuple(range(1, seen.ndim)), keepdim=True) + _FLOOR * mean
        columns = seen.mean((0, *range(2, seen.ndim)), keepdim=True) + _FLOOR * mean
        if name.startswith("noise."):  # its axes are places, not channels: a step for the whole map
            rows, columns = rows.mean(0, keepdim=True), columns.mean(1, keepdim=True)
        steps[name] = ((rows / mean).rsqrt().bfloat16(), columns.rsqrt().bfloat16())
    return steps


def scaled(steps: Steps, factor: float, change: Mapping[str, Tensor]) -> Steps:
    """The steps times a factor; for what has none, a 127th of its largest change."""
    made = {}
    for name, value in change.items():
        if name in steps:
            rows, columns = steps[name]
            made[name] = (rows, (columns.float() * factor).bfloat16())
        else:
            largest = value.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            one = torch.ones([1] * value.ndim, dtype=torch.bfloat16, device=value.device)
            made[name] = (one, (one * (largest / 127)).bfloat16())
    return made


def rounded(change: Mapping[str, Tensor], steps: Steps) -> dict[str, Tensor]:
    """The multiples, int32."""
    return {name: (value / step_of(*steps[name])).round().int() for name, value in change.items()}


def fitted(change: Mapping[str, Tensor], multiples: Mapping[str, Tensor], steps: Steps) -> Steps:
    """The steps by which the multiples stand for the change without bias.

    Where steps are coarse most numbers become 0, and what is left is shorter than the change along its own direction,
    along which the picture changes most. So the factor of a column is such that change and multiples times steps have
    the same component along the change, weighted as the steps are.
    """
    made = {}
    for name, value in change.items():
        rows, columns = steps[name]
        relative = value / step_of(rows, columns)
        dims = [dim for dim, size in enumerate(columns.shape) if size == 1]
        wanted = relative.square().sum(dims, keepdim=True)
        found = (relative * multiples[name]).sum(dims, keepdim=True)
        gain = torch.where(found > _LEAST * wanted, wanted / found.clamp(min=1e-30), 1.0)
        made[name] = (rows, (columns.float() * gain).bfloat16())
    return made


def step_of(rows: Tensor, columns: Tensor) -> Tensor:
    """The steps of a tensor, float32, to be broadcast over it."""
    return rows.float() * columns.float()


def coarsest(error: Callable[[float], float], allowed: float, start: float) -> float:
    """About the largest factor of which `error`, which grows as its square, is at most `allowed`.

    Args:
        error: of a factor.
        start: where to look first.

    Returns:
        A factor that was tried and fits, by at most 5 % too small.
    """
    fits, too_large, factor = 0.0, math.inf, start
    for _ in range(_TRIES):
        found = error(factor)
        if found <= allowed:
            fits = max(fits, factor)
        else:
            too_large = min(too_large, factor)
        if fits and too_large <= fits * 1.05:
            break
        guess = factor * min(4.0, max(0.25, 0.985 * math.sqrt(allowed / found) if found > 0 else 4.0))
        inside = fits < guess < too_large
        factor = guess if inside else math.sqrt(fits * too_large) if fits else too_large / 2
    return fits or start * 0.25**_TRIES


def in_order(steps: Steps, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """The order in which numbers are packed, int64: matrices before noise maps, in each coarse steps before fine ones.

    How large a multiple is to be expected follows from its step, and LZMA learns what it meets for a while. Steps count
    by their power of two, which every machine finds the same.
    """
    keys = []
    for name, shape in shapes.items():
        exponent = torch.frexp(step_of(*steps[name])).exponent.cpu().expand(shape)
        keys.append((1024 * name.startswith("noise.") - exponent).to(torch.int16).reshape(-1))
    return torch.cat(keys).sort(stable=True).indices


def pack(multiples: Mapping[str, Tensor], steps: Steps) -> tuple[Tensor, int]:
    """All multiples as one run of bytes, uint8 [B], and how many bytes each took before LZMA.

    The signs alternate (0, -1, 1, -2, ... are 0, 1, 2, 3, ...), so that small ones are small bytes, and the first
    bytes of all stand before the second ones, which are nearly all 0.
    """
    order = in_order(steps, {name: tuple(value.shape) for name, value in multiples.items()})
    flat = torch.cat([value.reshape(-1).cpu() for value in multiples.values()])[order].long()
    folded = torch.where(flat < 0, -2 * flat - 1, 2 * flat)
    width = max(1, (int(folded.max()).bit_length() + 7) // 8)
    raw = b"".join(((folded >> (8 * i)) & 255).to(torch.uint8).numpy().tobytes() for i in range(width))
    compress = partial(lzma.compress, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=_FILTERS)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        packed = b"".join(pool.map(compress, (raw[i : i + _PART] for i in range(0, len(raw), _PART))))
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8), width


def unpack(packed: Tensor, width: int, steps: Steps, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What `pack` was given, int32, for the shapes by name.

    Raises:
        ValueError: the bytes are damaged, or are not those of so many numbers.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1 or type(width) is not int or not 1 <= width <= 4:
        raise ValueError("codes of an unknown kind")
    order = in_order(steps, shapes)
    count = len(order)
    raw = _unpacked(packed.numpy().tobytes(), width * count)
    planes = torch.frombuffer(raw, dtype=torch.uint8).view(width, count)
    folded = torch.zeros(count, dtype=torch.int64)
    for i, plane in enumerate(planes):
        folded |= plane.long() << (8 * i)
    flat = torch.empty(count, dtype=torch.int32)
    flat[order] = torch.where(folded % 2 == 1, -(folded // 2) - 1, folded // 2).int()
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _unpacked(packed: bytes, size: int) -> bytearray:
    """So many bytes, out of streams one after the other."""
    raw = bytearray()
    try:
        while packed and len(raw) <= size:
            reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY)
            raw += reader.decompress(packed, max_length=size - len(raw) + 1)  # never more than is wanted
            if not reader.eof:
                break
            packed = reader.unused_data
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"damaged codes ({error})") from error
    if len(raw) != size or packed:
        raise ValueError(f"codes of {size} bytes wanted, got {len(raw)}")
    return raw
