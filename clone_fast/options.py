"""The options of the commands that invert: one table, from which each command takes what makes sense for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from clone_fast.inversion import NETWORKS
from clone_fast.nn import PRECISIONS

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _device(_: click.Context, __: click.Parameter, name: str) -> str:
    """auto, cpu, cuda or cuda:<i> -> a device that is there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise click.BadParameter(f"must be auto, cpu, cuda or cuda:<index>, got {name!r}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise click.BadParameter(f"{name} was asked for, but torch {torch.__version__} sees no CUDA device")
        index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= count:
            raise click.BadParameter(f"{name} was asked for, but there are cuda:0 to cuda:{count - 1}")
    return name


def _crop(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+,\d+,\d+", text):
        raise click.BadParameter(f"must be LEFT,TOP,SIZE in pixels of the photo, such as 40,0,512, got {text!r}")
    left, top, size = (int(number) for number in text.split(","))
    return left, top, size


def finite(_: click.Context, __: click.Parameter, number: float | None) -> float | None:
    """Callback of an option: neither NaN nor infinity."""
    if number is not None and not math.isfinite(number):
        raise click.BadParameter(f"must be a finite number, got {number}")
    return number


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "network": click.option("--network", type=click.Path(path_type=Path),
                            help="Network file; default: the shipped demo."),
    "discriminator": click.option("--discriminator", type=click.Path(path_type=Path),
                                  help="File of the discriminator, if another."),
    "out": click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True,
                        help="Folder."),
    "label": click.option("--label", type=click.IntRange(min=0), help="Class of the photo, for a conditional network."),
    "real-images": click.option("--real-images", type=click.Path(path_type=Path),
                                help="Folder of photos for the global term."),
    "resize": click.option("--resize", type=click.Choice(["crop", "pad"]), default="crop", show_default=True,
                           help="How a photo that is not square becomes one."),
    "crop": click.option("--crop", metavar="L,T,S", callback=_crop,
                         help="Left, top and size of a square of the photo."),
    "steps": click.option("--steps", type=click.IntRange(min=1), help="Steps of the tweak."),
    "latent-steps": click.option("--latent-steps", type=click.IntRange(min=1), help="Steps of the latent search."),
    "mode": click.option("--mode", type=click.Choice(["clone", "recon"]), default="clone", show_default=True,
                         help="clone: the method; recon: reconstruction loss alone."),
    "space": click.option("--space", type=click.Choice(["w", "w+"]), default="w+", show_default=True,
                          help="Where the latent is searched."),
    "target-psnr": click.option("--target-psnr", type=click.FloatRange(min=0, min_open=True), callback=finite,
                                help="Stop the tweak at this PSNR in dB."),
    "precision": click.option("--precision", type=click.Choice(list(PRECISIONS)),
                              show_default="bf16 on a GPU, else tf32",
                              help="What the networks compute in; their weights stay float32."),
    "recompute": click.option("--recompute", is_flag=True, default=None,
                              help="For small cards: a fifth less memory, a fifth more time."),
    "device": click.option("--device", default="auto", show_default=True, callback=_device,
                           help="auto, cpu, cuda or cuda:<index>."),
    "seed": click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True,
                         help="Of everything random."),
    "networks": click.option("--networks", type=click.Choice(NETWORKS), default="both", show_default=True,
                             help="Tweaked networks to keep, at 1024x1024 250 MB a photo; generator: half as much, "
                                  "enough for edit; delta: what changed in it, some 8 MB, enough for edit with the "
                                  "network at hand; none: pictures, latent and numbers alone."),
    "quiet": click.option("--quiet", is_flag=True, help="No progress and no summary; errors are still told."),
}  # fmt: skip
"""By name, in the order of the help."""

RUN = ("steps", "latent-steps", "mode", "space", "target-psnr", "precision", "recompute", "device", "seed", "quiet")
"""What every command with an inversion has."""


def options(*names: str) -> Callable[[_Command], _Command]:
    """A decorator that gives a command these options of the table, in this order."""

    def decorate(command: _Command) -> _Command:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return decorate
