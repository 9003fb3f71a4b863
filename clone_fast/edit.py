"""Edits: moves of the latent along a direction of W.

A direction is a tensor [w_dim], or [num_ws, w_dim] where every layer moves its own way. Those of this package
are one standard deviation long: strength s moves w by s standard deviations of w along the direction.
`standardise` brings directions from elsewhere to that length.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clone_fast.errors import SettingsError

if TYPE_CHECKING:
    from clone_fast.nn.generator import Generator

SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth")
"""Formats that `load_directions` reads."""


@torch.no_grad()
def pca_directions(generator: Generator, n: int = 8, samples: int = 4096, seed: int = 0) -> dict[str, Tensor]:
    """The `n` directions along which w varies most: principal components of w = mapping(z), z ~ N(0, I).

    Härkönen et al., "GANSpace: Discovering Interpretable GAN Controls", NeurIPS 2020, section 2.1. Each
    component of unit norm is multiplied with the standard deviation of w along it. The sign is chosen so that
    the entry of largest magnitude is positive. A class-conditional generator is sampled over uniformly random
    classes.

    Args:
        n: how many, at most w_dim.
        samples: how many w are drawn, at least 2.
        seed: of the z (and classes).

    Returns:
        "pca1" (largest variance) to "pca<n>", each [w_dim] float32 on the device of the generator.

    Raises:
        SettingsError: n or samples is out of range.
    """
    if not 1 <= n <= generator.w_dim:
        raise SettingsError(f"pca_directions: n must be in 1..{generator.w_dim}, got {n}")
    w = _sample_w(generator, samples, seed)
    centred = w - w.mean(0)
    variances, components = torch.linalg.eigh(centred.T @ centred / (samples - 1))  # ascending; columns
    components = components.T.flip(0)[:n] * variances.flip(0)[:n].clamp(min=0).sqrt()[:, None]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    where = next(generator.parameters()).device
    return {f"pca{i + 1}": row.float().to(where) for i, row in enumerate(components)}


@torch.no_grad()
def standardise(
    directions: Mapping[str, Tensor], generator: Generator, samples: int = 4096, seed: int = 0
) -> dict[str, Tensor]:
    """Scale directions of any length to one standard deviation of w (over `samples` random w) along them.

    Raises:
        SettingsError: a direction does not fit the generator, or w does not vary along it.
    """
    w = _sample_w(generator, samples, seed)
    result = {}
    for name, direction in directions.items():
        rows = direction.detach().double().cpu()
        if rows.shape not in ((generator.w_dim,), (generator.num_ws, generator.w_dim)):
            raise SettingsError(
                f"direction {name!r}: must be [{generator.w_dim}] or [{generator.num_ws}, {generator.w_dim}],"
                f" got {list(rows.shape)}"
            )
        # Along the unit vector u = d / |d| w spreads by std(w . u): one standard deviation is u * std(w . u).
        # With one row for each layer, w stands in every layer and w . u is the sum over the layers.
        squared = rows.square().sum()
        spread = (w @ (rows.sum(0) if rows.ndim == 2 else rows)).std() / squared
        if not bool(torch.isfinite(spread)) or float(spread) == 0:
            raise SettingsError(f"direction {name!r}: w does not vary along it")
        result[name] = (rows * spread).to(direction.device, torch.float32)
    return result


def load_directions(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read named directions from a file; nothing in it is executed.

    .safetensors, .npz, and .pt/.pth with a dict hold several; .npy, and .pt/.pth with one tensor, hold one,
    which is named after the file. Leading axes of length 1 are dropped. The length is kept as it is, see
    `standardise`.

    Returns:
        name -> [w_dim] or [num_ws, w_dim], float32 on the CPU.

    Raises:
        SettingsError: the file is missing, damaged, of another kind, or holds something other than
            directions.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"{path}: directions are read from {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise SettingsError(f"{path}: no such file of directions")
    try:
        found = _read(path)
    except pickle.UnpicklingError as error:
        raise SettingsError(f"{path}: holds more than tensors, or is damaged; it was not executed") from error
    except Exception as error:  # untrusted bytes: a damaged pickle alone raises five kinds of error
        raise SettingsError(f"{path}: is damaged or not a {path.suffix} file of plain numbers") from error
    if not isinstance(found, dict):
        found = {path.stem: found}
    if not found:
        raise SettingsError(f"{path}: holds no directions")
    return {str(name): _direction(value, f"{path}: {name!r}") for name, value in found.items()}


def apply(latent_ws: Tensor, direction: Tensor, strength: float, layers: Iterable[int] | None = None) -> Tensor:
    """ws + strength * direction, a new tensor.

    Args:
        latent_ws: [N, num_ws, w_dim].
        direction: [w_dim] or [num_ws, w_dim] (or either with leading axes of length 1).
        strength: how far, in lengths of the direction: standard deviations of w.
        layers: which layers move, counted from 0 (coarse) to num_ws - 1 (fine); all by default.

    Raises:
        SettingsError: shapes that do not fit, a layer that is not there, a strength that is not finite.
    """
    if latent_ws.ndim != 3:
        raise SettingsError(f"edit: ws must be [N, num_ws, w_dim], got {list(latent_ws.shape)}")
    num_ws, w_dim = latent_ws.shape[1:]
    move = direction.detach().to(latent_ws)
    while move.ndim > 1 and move.shape[0] == 1:
        move = move[0]
    if move.shape not in ((w_dim,), (num_ws, w_dim)):
        raise SettingsError(f"edit: direction must be [{w_dim}] or [{num_ws}, {w_dim}], got {list(direction.shape)}")
    if not np.isfinite(strength):
        raise SettingsError(f"edit: strength must be finite, got {strength}")
    chosen = range(num_ws) if layers is None else list(layers)
    mask = torch.zeros(num_ws, 1, dtype=latent_ws.dtype, device=latent_ws.device)
    for layer in chosen:
        if not 0 <= layer < num_ws:
            raise SettingsError(f"edit: layers must be in 0..{num_ws - 1}, got {layer}")
        mask[layer] = 1
    return latent_ws + strength * move * mask


def resolve_direction(direction: str | Tensor, directions: Mapping[str, Tensor]) -> Tensor:
    """A tensor as it is, or the direction of that name.

    Raises:
        SettingsError: the name is unknown; the message lists those that are known.
        TypeError: neither a name nor a tensor.
    """
    if isinstance(direction, Tensor):
        return direction
    if not isinstance(direction, str):
        raise TypeError(f"direction must be a name or a tensor, got {type(direction).__name__}")
    if direction not in directions:
        known = ", ".join(sorted(directions)) or "none"
        raise SettingsError(f"no direction named {direction!r}; known: {known}")
    return directions[direction]


# ------------------------------------------------------------------------------------------------------------


def _sample_w(generator: Generator, samples: int, seed: int) -> Tensor:
    """[samples, w_dim] float64 on the CPU."""
    if samples < 2:
        raise SettingsError(f"directions: at least 2 samples of w are needed, got {samples}")
    z, c = generator.sample(samples, torch.Generator().manual_seed(seed))
    return generator.mapping(z, c)[:, 0].double().cpu()


def _read(path: Path) -> Any:
    """One array or tensor, or a dict of them."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the protocol of a pickle; if it cannot be read the error says so
        return torch.load(path, map_location="cpu", weights_only=True)


def _direction(value: Any, what: str) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(value.astype(np.float32))
    if not isinstance(value, Tensor) or value.is_complex():
        raise SettingsError(f"{what}: a direction must be an array of real numbers, got {type(value).__name__}")
    tensor = value.detach().float()
    while tensor.ndim > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim not in (1, 2) or tensor.numel() == 0:
        raise SettingsError(f"{what}: a direction must be [w_dim] or [num_ws, w_dim], got {list(value.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise SettingsError(f"{what}: the direction holds NaN or infinity")
    return tensor.contiguous()
