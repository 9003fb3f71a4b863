"""The result of an inversion: a clone, what drew it, and how it came about; saved to a folder and loaded again."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from clone_fast.checkpoints import (
    Clone,
    load_clone,
    load_network,
    save_clone,
    save_network,
    save_nvidia,
    save_pti,
    save_rosinality,
)
from clone_fast.edit import apply, resolve_direction
from clone_fast.errors import CheckpointError, OutputError, PhotoError, SettingsError
from clone_fast.files import Start, side_by_side, write_aside
from clone_fast.latent import Latent
from clone_fast.nn import Discriminator, Generator, Network
from clone_fast.photo import load_photo, save_png, to_uint8

StrPath = str | os.PathLike[str]

NETWORKS = ("both", "generator", "delta", "none")
"""What `Inversion.save` can keep of the tweaked networks."""

FORMATS = ("rosinality", "nvidia", "pti")
"""Whose files `Inversion.export` writes."""

_OF_NETWORKS = {  # the files that depend on what is kept of the networks
    "both": ("generator.safetensors", "latent.safetensors"),
    "generator": ("generator.safetensors", "latent.safetensors"),
    "delta": ("clone.safetensors", "photo.png"),
    "none": ("latent.safetensors",),
}


@dataclass
class Inversion:
    """A photo, its clone, and the tweaked networks. Images are [1, 3, R, R] float32 in [-1, 1].

    Attributes:
        photo: the target, at the network's resolution.
        image: the clone, which the tweaked generator draws for the latent.
        latent_only: what the original generator draws for it.
        latent: of the photo, with the noise maps that the tweak made for it.
        found: the latent as the search left it, which `latent_only` is drawn for; None after `load`.
        generator, discriminator: tweaked; the discriminator None where it was not saved.
        metrics: see `clone_fast.invert.measure`.
        history: a row per check of a stage (0 latent, 1 tweak): "stage", "step", "loss", "psnr" in dB, and the terms.
        settings: everything that was asked for and how it ended.
        seconds: of each stage: "load", "latent", "tweak", "metrics".
        directions: named directions of W for `edit`.
        original, original_discriminator: as they were before; None after `load`, but of a clone file, and the
            discriminator where the network had none.
    """

    photo: Tensor
    image: Tensor
    latent_only: Tensor
    latent: Latent
    generator: Generator
    discriminator: Discriminator | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    directions: dict[str, Tensor] = field(default_factory=dict)
    found: Latent | None = None
    original: Generator | None = None
    original_discriminator: Discriminator | None = None

    @torch.no_grad()
    def edit(self, direction: str | Tensor, strength: float) -> Tensor:
        """The clone after a move of its latent.

        Args:
            direction: a name in `directions`, or a tensor [w_dim] or [num_ws, w_dim].
            strength: in lengths of the direction; those that come with a network are one standard deviation long.

        Raises:
            SettingsError: the name is unknown, or the shape does not fit.
        """
        move = resolve_direction(direction, self.directions)
        moved = Latent(apply(self.latent.ws, move, strength), self.latent.noise)
        return moved.picture(self.generator)

    def save(self, folder: StrPath, *, networks: str = "both") -> None:
        """Write clone.png, latent_only.png, generator.safetensors (with the discriminator and the directions),
        latent.safetensors (with the photo) and metrics.json. Each is written aside and renamed, metrics.json last;
        there, null stands for a number that is not finite.

        Args:
            networks: what is kept of the tweaked networks, nearly all of the bytes. "both" in generator.safetensors;
                there the "generator" alone, with which the clone can be loaded and edited; "delta", what the tweak
                changed in the generator, with the latent and the noise maps, as a clone file (clone.safetensors) of a
                thirtieth of the size: it costs at most 0.28 dB, `load` needs the network that the clone was made from,
                and the photo is in photo.png; "none": no `load` is possible.

        Raises:
            OutputError, CheckpointError: the folder or a file in it cannot be written.
            SettingsError: `networks` is unknown, or "delta" with no `original` at hand.
        """
        with self.saving(folder, networks=networks):
            pass

    @contextmanager
    def saving(self, folder: StrPath, *, networks: str = "both") -> Iterator[Start]:
        """`save` at the same time as the block, which may start more files: metrics.json waits for them too, and is not
        written if the block or a file fails. See `clone_fast.files.side_by_side`.
        """
        if networks not in NETWORKS:
            raise SettingsError(f"networks must be one of {', '.join(NETWORKS)}, got {networks!r}")
        if networks == "delta" and self.original is None:
            raise SettingsError("networks='delta' needs the original generator, and this inversion has none")
        out = Path(folder)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: cannot be a folder, since it is a file")
        for name in {name for names in _OF_NETWORKS.values() for name in names}.difference(_OF_NETWORKS[networks]):
            (out / name).unlink(missing_ok=True)  # that of an earlier save would not fit the rest
        if self.image.is_cuda:  # threads have streams of their own
            torch.cuda.current_stream(self.image.device).synchronize()
        with side_by_side() as start:
            self._start(start, out, networks)
            yield start
        measured = {name: value for name, value in self.metrics.items() if value is not None and math.isfinite(value)}
        content = {
            **dict.fromkeys(self.metrics),
            **measured,
            "steps": self.settings.get("steps"),
            "seconds": self.seconds,
            "settings": self.settings,
            "history": self.history,
        }
        with write_aside(out / "metrics.json") as file:
            file.write((json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n").encode())

    def _start(self, start: Start, out: Path, networks: str) -> None:
        """All files but metrics.json."""
        name = str(self.settings.get("network", ""))
        if networks in ("both", "generator"):
            discriminator = self.discriminator if networks == "both" else None
            metadata = {"kind": "inversion", "network": name}
            network = Network(self.generator, discriminator, metadata, self.directions)
            start(save_network, network, out / "generator.safetensors")
        if networks != "delta":
            start(self._save_latent, out / "latent.safetensors")
        start(save_png, out / "clone.png", self.image)
        start(save_png, out / "latent_only.png", self.latent_only)
        if networks == "delta" and self.original is not None:
            start(save_png, out / "photo.png", self.photo)
            clone = Clone(self.generator, self.latent.ws, self.latent.noise, self.directions)
            save_clone(out / "clone.safetensors", clone, self.original, self.photo, network=name)  # draws: not aside

    def _save_latent(self, path: Path) -> None:
        """With the photo, in 8 bits."""
        tensors = {"ws": self.latent.ws.cpu().contiguous(), "photo": torch.from_numpy(to_uint8(self.photo))}
        tensors |= {f"noise.{name}": value.cpu().contiguous() for name, value in self.latent.noise.items()}
        with write_aside(path) as file:
            file.write(safetensors.torch.save(tensors))

    @classmethod
    def load(
        cls, folder: StrPath, network: StrPath | Network | None = None, *, device: torch.device | str = "cpu"
    ) -> Inversion:
        """What `save` wrote. The clone is drawn again; `latent_only` comes from its PNG.

        Args:
            network: that the clone was made from, for a folder that holds what changed against it ("delta"); by default
                the file that it came from, if that is still there. Other folders need none.

        Returns:
            Without the originals, but where a network was given or needed.

        Raises:
            CheckpointError: a file is missing or damaged, or the network is needed and is not the one.
        """
        source = Path(folder)
        base: Network | None = None
        if (source / "clone.safetensors").exists():
            base = _base(source, network, device)
            clone = load_clone(source / "clone.safetensors", base.generator)
            loaded = Network(clone.generator, directions=clone.directions)
        else:
            loaded = load_network(source / "generator.safetensors", device=device)
        resolution = loaded.generator.img_resolution
        try:
            if base is not None:
                latent = Latent(clone.ws, clone.noise)
                photo = load_photo(source / "photo.png", resolution).to(device)
            else:
                photo, latent = _read_latent(source / "latent.safetensors", loaded.generator, device)
            content = dict(json.loads((source / "metrics.json").read_text()))
            image = latent.picture(loaded.generator)
            latent_only = load_photo(source / "latent_only.png", resolution).to(device)
            known = {name: content.pop(name) for name in ("seconds", "settings", "history")}
            known["history"] = [
                {name: math.nan if v is None else v for name, v in dict(row).items()} for row in known["history"]
            ]
            content.pop("steps", None)
        except (OSError, SafetensorError, PhotoError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{source}: not an inversion that was saved whole ({reason})") from error
        return cls(
            photo=photo,
            image=image,
            latent_only=latent_only,
            latent=latent,
            generator=loaded.generator,
            discriminator=loaded.discriminator,
            metrics=content,
            directions=loaded.directions,
            original=None if base is None else base.generator,
            original_discriminator=None if base is None else base.discriminator,
            **known,
        )

    def export(self, path: StrPath, to: str, *, base: StrPath | None = None, strict: bool = True) -> Path:
        """Write the tweaked network for another codebase, and beside it the latent of the photo.

        The photo's noise maps take the place of the generator's constant ones, since the others have none for a photo:
        what they draw for the latent with constant noise is the clone.

        Args:
            path: the file.
            to: "rosinality", a .pt with g_ema, latent_avg and the tweaked discriminator; "nvidia", the pickle `base`
                with the tweaked tensors in the place of its own (G and G_ema both; D where there is one); "pti", the
                generator of that pickle alone, as a module that `torch.load` returns.
            base: the NVIDIA .pkl that the network came from, for "nvidia" and "pti": the classes are its own.
            strict: of rosinality's files, see `save_rosinality`.

        Returns:
            The file of the latent [1, num_ws, w_dim]: for NVIDIA's tools <name>_w.npz with "w", as its projector
            writes, for the others <name>_w.pt with the tensor.

        Raises:
            SettingsError: `to` is unknown, or `base` is missing or not wanted.
            CheckpointError: the format cannot hold this network, or the base is another one, damaged, or no pickle.
            OutputError: a file cannot be written.
        """
        if to not in FORMATS:
            raise SettingsError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
        if (base is None) == (to != "rosinality"):
            raise SettingsError(
                "rosinality files need no base" if base else f"{to} needs base: the NVIDIA .pkl of the network"
            )
        generator = copy.deepcopy(self.generator)
        self.latent.settle(generator)
        network = Network(generator, self.discriminator)
        if base is None:
            save_rosinality(network, path, strict=strict)
        else:
            (save_nvidia if to == "nvidia" else save_pti)(network, path, base)
        ws = self.latent.ws.detach().cpu().contiguous()
        beside = Path(path).with_name(Path(path).stem + ("_w.npz" if to == "nvidia" else "_w.pt"))
        with write_aside(beside) as file:
            if to == "nvidia":
                np.savez(file, w=ws.numpy())
            else:
                torch.save(ws, file)
        return beside


def _base(folder: Path, network: StrPath | Network | None, device: torch.device | str) -> Network:
    """The network of a clone file: the one given, or the one that the folder's numbers name."""
    if isinstance(network, Network):
        return network.to(device)
    if network is None:
        try:
            name = str(json.loads((folder / "metrics.json").read_text())["settings"]["network"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder}: not an inversion that was saved whole (metrics.json)") from error
        if name == "demo":
            from clone_fast.demo import DEMO_NETWORK  # imported here, as in invert.py

            network = DEMO_NETWORK
        elif Path(name).is_file():
            network = name
        else:
            raise CheckpointError(
                f"{folder}: holds what changed against the network {name}, which is not there; give it as --network"
            )
    return load_network(network, device=device)


def _read_latent(file: Path, generator: Generator, device: torch.device | str) -> tuple[Tensor, Latent]:
    """(photo, latent) of a latent.safetensors."""
    tensors = safetensors.torch.load_file(file, device=str(device))
    photo, resolution = tensors.pop("photo"), generator.img_resolution
    if photo.shape != (resolution, resolution, 3):
        raise ValueError(f"photo must be [{resolution}, {resolution}, 3], got {list(photo.shape)}")
    noise = {name.removeprefix("noise."): value for name, value in tensors.items() if name != "ws"}
    latent = Latent(Latent.expanded(tensors["ws"], generator), noise)
    return photo.permute(2, 0, 1)[None].float() / 127.5 - 1, latent


def _without_nan(value: Any) -> Any:
    """The same nest of dicts and lists with None for NaN and infinity, which JSON has no names for."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
