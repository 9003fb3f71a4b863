"""The result of an inversion: a clone, what drew it, and how it came about; saved to a folder and loaded again."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from clone_fast.checkpoints import load_network, save_network
from clone_fast.edit import apply, resolve_direction
from clone_fast.errors import CheckpointError, OutputError, PhotoError, SettingsError
from clone_fast.files import write_aside
from clone_fast.latent import Latent
from clone_fast.nn import Discriminator, Generator, Network
from clone_fast.photo import load_photo, save_png, to_uint8

StrPath = str | os.PathLike[str]

NETWORKS = ("both", "generator", "none")
"""What `Inversion.save` can keep of the tweaked networks."""


@dataclass
class Inversion:
    """A photo, its clone, and the tweaked networks. Images are [1, 3, R, R] float32 in [-1, 1].

    Attributes:
        photo: the target, at the network's resolution.
        image: the clone, which the tweaked generator draws for the latent.
        latent_only: what the original generator draws for it.
        latent: of the photo, with the noise maps that the tweak made for it.
        found: the latent as the search left it, which `latent_only` is drawn for; None after `load`.
        generator, discriminator: tweaked.
        metrics: see `clone_fast.invert.measure`.
        history: a row per check of a stage (0 latent, 1 tweak): "stage", "step", "loss", "psnr" in dB, and the terms.
        settings: everything that was asked for and how it ended.
        seconds: of each stage: "load", "latent", "tweak", "metrics".
        directions: named directions of W for `edit`.
        original, original_discriminator: as they were before; None after `load`, and the discriminator where the
            network had none.
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
            networks: what generator.safetensors, nearly all of the bytes, holds: "both" networks, the "generator",
                with which the clone can be loaded and edited, or "none": it is not written, and no `load` is possible.

        Raises:
            OutputError, CheckpointError: the folder or a file in it cannot be written.
            SettingsError: `networks` is unknown.
        """
        if networks not in NETWORKS:
            raise SettingsError(f"networks must be one of {', '.join(NETWORKS)}, got {networks!r}")
        out = Path(folder)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: cannot be a folder, since it is a file")
        metadata = {"kind": "inversion", "network": str(self.settings.get("network", ""))}
        weights = out / "generator.safetensors"
        if networks == "none":
            weights.unlink(missing_ok=True)  # that of an earlier save would not fit the rest
        else:
            discriminator = self.discriminator if networks == "both" else None
            save_network(Network(self.generator, discriminator, metadata, self.directions), weights)
        tensors = {"ws": self.latent.ws.cpu().contiguous(), "photo": torch.from_numpy(to_uint8(self.photo))}
        tensors |= {f"noise.{name}": value.cpu().contiguous() for name, value in self.latent.noise.items()}
        with write_aside(out / "latent.safetensors") as file:
            file.write(safetensors.torch.save(tensors))
        save_png(out / "clone.png", self.image)
        save_png(out / "latent_only.png", self.latent_only)
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

    @classmethod
    def load(cls, folder: StrPath, *, device: torch.device | str = "cpu") -> Inversion:
        """What `save` wrote. The clone is drawn again; `latent_only` comes from its PNG, the original stays away.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        source = Path(folder)
        network = load_network(source / "generator.safetensors", device=device)
        resolution = network.generator.img_resolution
        try:
            tensors = safetensors.torch.load_file(source / "latent.safetensors", device=str(device))
            content = dict(json.loads((source / "metrics.json").read_text()))
            photo = tensors.pop("photo")
            if photo.shape != (resolution, resolution, 3):
                raise ValueError(f"photo must be [{resolution}, {resolution}, 3], got {list(photo.shape)}")
            noise = {name.removeprefix("noise."): value for name, value in tensors.items() if name != "ws"}
            latent = Latent(Latent.expanded(tensors["ws"], network.generator), noise)
            image = latent.picture(network.generator)
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
            photo=photo.permute(2, 0, 1)[None].float() / 127.5 - 1,
            image=image,
            latent_only=latent_only,
            latent=latent,
            generator=network.generator,
            discriminator=network.discriminator,
            metrics=content,
            directions=network.directions,
            **known,
        )


def _without_nan(value: Any) -> Any:
    """The same nest of dicts and lists with None for NaN and infinity, which JSON has no names for."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
