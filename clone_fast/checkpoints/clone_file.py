"""Clone files: what a tweak changed against its base network, in a few MB.

A safetensors file with the latent ("ws"), the directions ("directions.*"), the changed tensors of fewer than two
dimensions as they are ("exact.*"), and of all others and of the photo's noise maps the change in coarse steps (see
coding.py): "codes", and "rows.*" and "columns.*", whose products are the steps. The header has one entry,
"clone_fast": JSON with `format_version`, `kind`, `base` (the `network_hash` of the base), `network` (its name), `coded`
(the names in the order of the codes) and `width`.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clone_fast.checkpoints.coding import (
    Steps,
    coarsest,
    fitted,
    pack,
    rounded,
    scaled,
    sensitivity,
    step_of,
    unit_steps,
    unpack,
)
from clone_fast.checkpoints.native import ENTRY, network_hash
from clone_fast.errors import CheckpointError
from clone_fast.files import write_aside
from clone_fast.nn import Generator, Network

FORMAT_VERSION = 1
KIND = "clone"
LOSS = 0.28
"""PSNR in dB that a clone file may cost, against the photo."""

_FAITHFUL = 50.0  # dB: a clone that is nearer to the photo than this is coded as if it were that near
_NOISE = "noise."


@dataclass
class Clone:
    """What a clone file and its base make.

    Attributes:
        generator: the tweaked one, frozen, in eval mode.
        ws: [1, num_ws, w_dim] float32.
        noise: maps [r, r] by layer name that belong to the photo; may be empty.
        directions: [w_dim] or [num_ws, w_dim] by name.
    """

    generator: Generator
    ws: Tensor
    noise: dict[str, Tensor]
    directions: dict[str, Tensor]


def save_clone(
    path: str | os.PathLike[str],
    clone: Clone,
    base: Generator,
    photo: Tensor,
    *,
    network: str = "",
    loss: float = LOSS,
) -> None:
    """Write a clone file.

    Takes `PROBES` backward passes of the generator and about ten forward ones, on its device.

    Args:
        path: written aside first.
        clone: what to write.
        base: the generator as it was before the tweak.
        photo: [1, C, R, R] in [-1, 1].
        network: how to name the base in messages.
        loss: PSNR in dB against the photo that the coding may cost. What it adds to the picture is also no larger than
            what would cost as much if it were independent of the clone's own error.

    Raises:
        ValueError: loss is not positive.
        CheckpointError: the two generators are of different architectures, or a value is not finite.
        OutputError: the file cannot be written.
    """
    if not loss > 0:
        raise ValueError(f"save_clone: loss must be positive, got {loss}")
    if clone.generator.arch != base.arch:
        raise CheckpointError(f"{path}: the clone's generator is no tweak of this base; not written")
    before, after = values_of(base), values_of(clone.generator, clone.noise)
    changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
    for name, value in {**changed, "ws": clone.ws}.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name} is not finite; not written")
    exact = {name: value for name, value in changed.items() if value.ndim < 2}
    change = {name: value - before[name] for name, value in changed.items() if value.ndim >= 2}
    multiples, steps = _coded(change, before, clone, photo, loss)
    tensors = {"ws": clone.ws} | {f"directions.{name}": value for name, value in clone.directions.items()}
    tensors |= {f"exact.{name}": value for name, value in exact.items()}
    width = 1
    if change:
        tensors["codes"], width = pack(multiples, steps)
    for name, (rows, columns) in steps.items():
        tensors |= {f"rows.{name}": rows, f"columns.{name}": columns}
    header = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "base": network_hash(Network(base)),
        "network": network,
        "coded": list(change),
        "width": width,
    }
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    content = safetensors.torch.save(stored, metadata={ENTRY: json.dumps(header, sort_keys=True)})
    with write_aside(path) as file:
        file.write(content)


def load_clone(path: str | os.PathLike[str], base: Generator) -> Clone:
    """Read a clone file; the base stays as it is.

    Args:
        base: the generator that the clone was made from, on the device where the clone shall be.

    Raises:
        CheckpointError: the file is missing, damaged or none of this kind, or the base is another one.
    """
    file = Path(path)
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            header = _header((opened.metadata() or {}).get(ENTRY), file.name)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name}: a damaged or truncated safetensors file ({error})") from error
    given = network_hash(Network(base))
    if header["base"] != given:
        named = f" ({header['network']})" if header["network"] else ""
        raise CheckpointError(
            f"{file.name}: was made from another network: give the one with the hash {header['base'][:12]}{named}, "
            f"not {given[:12]}"
        )
    try:
        return _decoded(header, tensors, base)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file.name}: damaged: {' '.join(str(error).split())}") from error


def values_of(generator: Generator, noise: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state, and under "noise.<layer>" the noise maps: those given, or else the generator's own."""
    maps = generator.synthesis.noise_consts() | dict(noise or {})
    state = {name: value.detach() for name, value in generator.state_dict().items()}
    return state | {_NOISE + name: value.detach() for name, value in maps.items()}


def fill(generator: Generator, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put what `_values` gives into a generator of this shape; returns its noise maps by layer."""
    state = {name: value for name, value in values.items() if not name.startswith(_NOISE)}
    generator.load_state_dict({**generator.state_dict(), **state})
    return {name.removeprefix(_NOISE): value for name, value in values.items() if name.startswith(_NOISE)}


def _coded(
    change: dict[str, Tensor], before: dict[str, Tensor], clone: Clone, photo: Tensor, loss: float
) -> tuple[dict[str, Tensor], Steps]:
    """The change in multiples of the coarsest steps that the loss allows, and these steps."""
    if not change:
        return {}, {}
    scratch = copy.deepcopy(clone.generator).requires_grad_(True)
    values: dict[str, Tensor] = dict(scratch.named_parameters())
    maps = {name: value.clone().requires_grad_() for name, value in clone.noise.items()}
    values |= {_NOISE + name: value for name, value in maps.items()}
    with torch.enable_grad():
        drawn = scratch.synthesis(clone.ws, noise=maps)
        found = sensitivity(drawn, {name: values[name] for name in change if name in values})
    units = unit_steps(change, found)
    with torch.no_grad():
        picture = drawn.detach().clamp(-1, 1)
        own = float((picture - photo).square().mean())
    allowed = max(own, 4 * 10 ** (-_FAITHFUL / 10)) * (10 ** (loss / 10) - 1)

    def code(factor: float) -> tuple[dict[str, Tensor], Steps]:
        steps = scaled(units, factor, change)
        multiples = rounded(change, steps)
        return multiples, fitted(change, multiples, steps)

    @torch.no_grad()
    def error(factor: float) -> float:
        multiples, steps = code(factor)
        noise = fill(scratch, {name: before[name] + multiples[name] * step_of(*steps[name]) for name in change})
        coded = scratch.synthesis(clone.ws, noise=noise).clamp(-1, 1)
        # both, as what is added may happen to lie along the clone's own error, or against it
        return max(float((coded - picture).square().mean()), float((coded - photo).square().mean()) - own)

    # a number that is rounded to steps s is wrong by s^2 / 12 in the mean
    count = sum(change[name].numel() for name in units)
    start = math.sqrt(12 * allowed * picture.numel() / max(1, count))
    return code(coarsest(error, allowed, start) if units else 1.0)


def _header(text: str | None, name: str) -> dict[str, Any]:
    try:
        header = json.loads(text or "")
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise CheckpointError(f"{name}: not a clone file; networks are loaded by load_network")
    version = header.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(f"{name}: of format {version}, newer than this clone_fast reads; update clone_fast")
    texts = all(isinstance(header.get(key), str) for key in ("base", "network"))
    coded = header.get("coded")
    if version != FORMAT_VERSION or not texts or not isinstance(coded, list):
        raise CheckpointError(f"{name}: damaged: its header lacks an entry")
    return header


def _decoded(header: dict[str, Any], tensors: dict[str, Tensor], base: Generator) -> Clone:
    """ValueError, KeyError, TypeError or RuntimeError where the parts do not fit together."""
    before = values_of(base)
    device = base.mapping.w_avg.device
    shapes = {name: tuple(before[name].shape) for name in header["coded"]}
    steps = {name: (tensors[f"rows.{name}"], tensors[f"columns.{name}"]) for name in shapes}
    multiples = unpack(tensors["codes"], header["width"], steps, shapes) if shapes else {}
    after = {name: before[name] + (value * step_of(*steps[name])).to(device) for name, value in multiples.items()}
    after |= {name.removeprefix("exact."): v.to(device) for name, v in tensors.items() if name.startswith("exact.")}
    for name, value in after.items():
        if value.shape != before[name].shape or not torch.isfinite(value).all():
            raise ValueError(f"{name} does not fit the network")
    generator = copy.deepcopy(base).eval().requires_grad_(False)
    noise = fill(generator, after)
    ws = tensors["ws"]
    if tuple(ws.shape) != (1, base.num_ws, base.w_dim) or not torch.isfinite(ws).all():
        raise ValueError(f"ws must be [1, {base.num_ws}, {base.w_dim}], got {list(ws.shape)}")
    return Clone(
        generator,
        ws.to(device, torch.float32),
        noise,
        {
            name.removeprefix("directions."): value.to(device)
            for name, value in tensors.items()
            if name.startswith("directions.")
        },
    )
