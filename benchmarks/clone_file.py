"""Clone files: what they cost and lose, and what the same recipe would cost at 1024x1024.

    python -m benchmarks.clone_file                        # the demo network, three real photos
    python -m benchmarks.clone_file --network ffhq.pkl --device cuda

Each photo is inverted with the default settings and coded by each recipe, as coarsely as 0.28 dB allow. Those beside
the clone file's own are what it was chosen from; their size is the entropy of their numbers. The last column takes the
bits of a weight and of a pixel of the noise maps to config F at 1024x1024. Prints the table in Markdown.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import safetensors
import torch
from torch import Tensor

from clone_fast import Generator, Inversion, invert, load_network, metrics
from clone_fast.checkpoints import Clone, clone_file, coding, load_clone, save_clone
from clone_fast.demo import DEMO_NETWORK
from clone_fast.demo.photos import photo as real_photo
from clone_fast.latent import Latent
from clone_fast.nn import Architecture, SynthesisNetwork

PHOTOS = ("astronaut", "cat", "coffee")
HEADS = ("photo", "recipe", "bits a weight", "bits a noise pixel", "dB lost", "drift", "MB at config F")
Values = dict[str, Tensor]
Recipe = Callable[[float], tuple[Values, Values]]
"""(the change as it is decoded, its whole numbers) by a factor: the larger, the coarser."""


class Coded:
    """An inversion, and what its codings lose."""

    def __init__(self, inversion: Inversion, base: Generator) -> None:
        self.inversion, self.base = inversion, base
        self.before = clone_file.values_of(base)
        after = clone_file.values_of(inversion.generator, inversion.latent.noise)
        self.change = {
            name: value - self.before[name]
            for name, value in after.items()
            if value.ndim >= 2 and not torch.equal(value, self.before[name])
        }

    def decoded(self, change: Values) -> Clone:
        """The clone with this change in place of its own."""
        generator = copy.deepcopy(self.inversion.generator)
        noise = clone_file.fill(generator, {name: self.before[name] + value for name, value in change.items()})
        return Clone(generator, self.inversion.latent.ws, noise, {})

    def lost(self, clone: Clone) -> float:
        """PSNR in dB."""
        picture = Latent(clone.ws, clone.noise).picture(clone.generator)
        return metrics.psnr(self.inversion.image, self.inversion.photo) - metrics.psnr(picture, self.inversion.photo)

    def drift(self, generator: Generator) -> float:
        """PSNR in dB of other images, before and after."""
        return float(metrics.drift(self.base, generator, n=64)["drift_psnr"])

    def stepped(self, steps: Values) -> Recipe:
        """Multiples of these steps."""

        def code(factor: float) -> tuple[Values, Values]:
            numbers = {name: (value / (steps[name] * factor)).round() for name, value in self.change.items()}
            return {name: number * steps[name] * factor for name, number in numbers.items()}, numbers

        return code

    def low_rank(self) -> Recipe:
        """Weights by so many of their leading singular vectors, 8 bits a number; noise maps in steps of 0.3."""
        parts = {n: torch.linalg.svd(v.flatten(1), full_matrices=False) for n, v in self.change.items() if _weight(n)}

        def code(factor: float) -> tuple[Values, Values]:
            noise = {name: (value / 0.3).round() for name, value in self.change.items() if not _weight(name)}
            change, numbers = {name: value * 0.3 for name, value in noise.items()}, dict(noise)
            for name, (u, s, v) in parts.items():
                rank = max(1, round(len(s) / max(1.0, factor)))
                change[name] = ((u[:, :rank] * s[:rank]) @ v[:rank]).view_as(self.change[name])
                numbers[name] = torch.arange(rank * (len(u) + v.shape[1])) % 256  # as many as there are, 8 bits each
            return change, numbers

        return code

    def recipes(self) -> dict[str, Recipe]:
        """Those that a clone file was chosen from."""
        probe = self.decoded(self.change)
        probe.generator.requires_grad_(True)
        noise = {name: value.clone().requires_grad_() for name, value in probe.noise.items()}
        leaves: Values = {**dict(probe.generator.named_parameters()), **{f"noise.{n}": v for n, v in noise.items()}}
        seen = coding.sensitivity(
            probe.generator.synthesis(probe.ws, noise=noise), {name: leaves[name] for name in self.change}
        )
        one = {name: value.new_tensor(1.0 if _weight(name) else 75.0) for name, value in self.change.items()}
        return {
            "low rank, 8 bits": self.low_rank(),
            "one step": self.stepped(one),
            "a step a tensor": self.stepped({name: value.mean().rsqrt() for name, value in seen.items()}),
        }

    def coarsest(self, recipe: Recipe) -> tuple[Values, Values]:
        """By bisection, as coarse as the loss allows."""
        low, high = math.log(1e-6), math.log(1e3)
        for _ in range(18):
            middle = (low + high) / 2
            fits = self.lost(self.decoded(recipe(math.exp(middle))[0])) <= clone_file.LOSS
            low, high = (middle, high) if fits else (low, middle)
        return recipe(math.exp(low))


def _weight(name: str) -> bool:
    return not name.startswith("noise.")


def _packed(file: Path, base: Generator) -> dict[bool, int]:
    """Bytes of the codes of a clone file, those of weights and those of noise maps packed apart."""
    with safetensors.safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["clone_fast"])
        coded = header["coded"]
        steps = {name: (opened.get_tensor(f"rows.{name}"), opened.get_tensor(f"columns.{name}")) for name in coded}
        values = clone_file.values_of(base)
        shapes = {name: tuple(values[name].shape) for name in steps}
        numbers = coding.unpack(opened.get_tensor("codes"), header["width"], steps, shapes)
    sizes = {True: 0, False: 0}
    for kind in sizes:
        part = {name: value for name, value in numbers.items() if _weight(name) is kind}
        sizes[kind] = len(coding.pack(part, steps)[0]) if part else 0
    return sizes


def entropy(value: Tensor) -> float:
    """Bits that whole numbers take by an ideal coder that knows their frequencies."""
    counts = torch.unique(value, return_counts=True)[1].double()
    return -float((counts * (counts / counts.sum()).log2()).sum())


def at_config_f(weight: float, noise: float) -> float:
    """MB of a clone file with so many bits for a weight and a noise pixel: these, and what stands beside them."""
    with torch.device("meta"):
        network = SynthesisNetwork(Architecture())
    matrices = [value.shape for value in network.parameters() if value.ndim >= 2]
    bits = weight * sum(map(math.prod, matrices)) + noise * sum(v.numel() for v in network.noise_consts().values())
    factors = sum(2 * (shape[0] + shape[1]) for shape in matrices)
    exact = 4 * sum(value.numel() for value in network.parameters() if value.ndim < 2)
    latent, names = 4 * 512 * (network.num_ws + 8), 20_000  # with eight directions
    return (bits / 8 + factors + exact + latent + names) / 1e6


def rows(photo: str, coded: Coded) -> list[tuple[str, ...]]:
    """The lines of the table for one photo."""
    count = {kind: sum(v.numel() for n, v in coded.change.items() if _weight(n) is kind) for kind in (True, False)}

    def line(recipe: str, bits: dict[bool, float], clone: Clone) -> tuple[str, ...]:
        each = {kind: bits[kind] / max(1, count[kind]) for kind in bits}
        numbers = (each[True], each[False], coded.lost(clone), coded.drift(clone.generator))
        return (photo, recipe, *(f"{number:.2f}" for number in numbers), f"{at_config_f(each[True], each[False]):.1f}")

    table = [line("as it is, 32 bits", {kind: 32.0 * count[kind] for kind in count}, coded.decoded(coded.change))]
    for name, recipe in coded.recipes().items():
        change, numbers = coded.coarsest(recipe)
        bits = {kind: sum(entropy(v) for n, v in numbers.items() if _weight(n) is kind) for kind in count}
        table.append(line(name, bits, coded.decoded(change)))
    with tempfile.TemporaryDirectory() as folder:
        file, latent = Path(folder) / "clone.safetensors", coded.inversion.latent
        began = time.perf_counter()
        clone = Clone(coded.inversion.generator, latent.ws, latent.noise, {})
        save_clone(file, clone, coded.base, coded.inversion.photo)
        saved = time.perf_counter()
        read = load_clone(file, coded.base)
        loaded = time.perf_counter()
        table.append(line("clone file", {kind: 8.0 * size for kind, size in _packed(file, coded.base).items()}, read))
        times = f"written in {saved - began:.1f} s, read in {loaded - saved:.1f} s"
        click.echo(f"{photo}: {file.stat().st_size / 1e6:.3f} MB, {times}", err=True)
    return table


@click.command()
@click.option("--network", type=click.Path(path_type=Path), default=DEMO_NETWORK, help="Default: the demo's.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--steps", type=int, help="Of the tweak.")
@click.argument("photos", nargs=-1)
def main(network: Path, device: str, steps: int | None, photos: tuple[str, ...]) -> None:
    """Print the table for PHOTOS of scikit-image."""
    net = load_network(network, device=device)
    click.echo("| " + " | ".join(HEADS) + " |\n| --- | --- |" + " ---: |" * (len(HEADS) - 2))
    for photo in photos or PHOTOS:
        inversion = invert(real_photo(photo), net, device=device, steps=steps)
        psnr = metrics.psnr(inversion.image, inversion.photo)
        for row in rows(f"{photo}, {psnr:.1f} dB", Coded(inversion, net.generator)):
            click.echo("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
