"""Make the file that comes with the package out of a training run.

    python -m clone_fast.demo.export runs/portraits clone_fast/demo/generator.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from clone_fast.checkpoints import save_network
from clone_fast.demo.directions import fit_directions, train_reader
from clone_fast.demo.train import ARCHITECTURE
from clone_fast.nn import Discriminator, Generator, Network


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--reader-seconds", default=45.0, show_default=True, help="Training time of the attribute reader.")
@click.option("--seed", default=0, show_default=True, help="Of the reader and of the sampled latents.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(run: Path, out: Path, reader_seconds: float, seed: int, device: str) -> None:
    """Write the averaged generator, the discriminator and the named directions of RUN to OUT, weights in float16."""
    generator, discriminator = Generator(ARCHITECTURE), Discriminator(ARCHITECTURE)
    for module, name in ((generator, "average"), (discriminator, "discriminator")):
        module.load_state_dict(torch.load(run / f"{name}.pt", map_location="cpu", weights_only=True))
        module.to(device).eval().requires_grad_(False)
    reader, read = train_reader(seconds=reader_seconds, seed=seed, device=torch.device(device))
    directions, explained = fit_directions(generator, reader, seed=seed)
    for name in directions:
        click.echo(f"{name}: reader explains {read[name]:.2f}, linear fit {explained[name]:.2f} of the variance")
    counters = json.loads((run / "counters.json").read_text())
    metadata = {
        "name": "demo",
        "data": "portraits drawn by clone_fast.demo.portraits",
        "images_seen": str(counters["images_seen"]),
        "commands": "\n".join(counters["commands"]),
        "seed": str(seed),
        "directions": "clone_fast.demo.directions",
    }
    network = Network(generator.cpu(), discriminator.cpu(), metadata, directions)
    save_network(network, out, dtype=torch.float16)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {counters['images_seen']} images seen")


if __name__ == "__main__":
    main()
