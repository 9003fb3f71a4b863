"""Train the demo network: StyleGAN2 on the portraits that `clone_fast.demo.portraits` draws.

    python -m clone_fast.demo.train --out runs/portraits --kimg 3000 --minutes 9

Karras et al. 2020: non-saturating logistic loss, R1 and path length regularisation applied lazily, style mixing, and
an exponential moving average of the generator. A run stops after `--minutes` or `--kimg`, whichever comes first, and
goes on from its folder when it is started again. On a GPU every phase is a CUDA graph.
"""

from __future__ import annotations

import copy
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor

from clone_fast.demo import portraits
from clone_fast.losses import discriminator_adversarial, generator_adversarial, path_length_penalty, r1_penalty
from clone_fast.nn import Architecture, Discriminator, Generator

ARCHITECTURE = Architecture(
    img_resolution=128, z_dim=128, w_dim=128, channel_base=2048, channel_max=128, mapping_layers=4
)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training, in the field's usual units."""

    batch: int = 32
    learning_rate: float = 0.0025
    r1_gamma: float = 0.1
    r1_interval: int = 16
    path_weight: float = 2.0
    path_interval: int = 8
    path_batch: int = 16
    mixing: float = 0.9
    ema_kimg: float = 10.0
    ema_rampup: float = 0.05
    chunk: int = 1024
    pool: int = 32 * 1024
    reuse: int = 6


class PortraitStream:
    """Endless batches of portraits [N, 3, R, R] in [-1, 1], picked at random from a pool that is renewed in turn.

    Drawing costs more than a training step, so every portrait is shown about `reuse` times before it is replaced.
    """

    def __init__(self, recipe: Recipe, resolution: int, seed: int, device: torch.device) -> None:
        if recipe.pool % recipe.chunk:
            raise ValueError(f"pool must be a multiple of chunk, {recipe.chunk}, got {recipe.pool}")
        self.recipe, self.resolution, self.device = recipe, resolution, device
        self.random = torch.Generator(device=device).manual_seed(seed)
        self.pool = torch.empty([recipe.pool, 3, resolution, resolution], dtype=torch.uint8, device=device)
        self.drawn = self.shown = 0

    @torch.no_grad()
    def _draw(self) -> None:
        attributes = portraits.sample(self.recipe.chunk, generator=self.random, device=self.device)
        images = portraits.render(attributes, resolution=self.resolution)
        first = self.drawn % self.recipe.pool
        self.pool[first : first + self.recipe.chunk] = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        self.drawn += self.recipe.chunk

    def __next__(self) -> Tensor:
        if self.drawn * self.recipe.reuse <= self.shown:
            self._draw()
        self.shown += self.recipe.batch
        filled = min(self.drawn, self.recipe.pool)
        picked = torch.randint(filled, [self.recipe.batch], generator=self.random, device=self.device)
        return self.pool[picked].float() / 127.5 - 1


class Training:
    """The networks, their optimisers and the four phases of a StyleGAN2 iteration."""

    def __init__(self, recipe: Recipe, arch: Architecture, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.generator = Generator(arch).to(device)
        self.discriminator = Discriminator(arch).to(device)
        self.average = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.path_mean = torch.zeros([], device=device)
        self.images_seen = 0
        self.commands: list[str] = []  # each run that went into these weights
        side, names = arch.img_resolution, ("loss_d", "loss_g", "r1", "path", "real", "fake")
        self.real = torch.zeros(recipe.batch, arch.img_channels, side, side, device=device)
        self.stats = {name: torch.zeros([], device=device) for name in names}
        # lazy regularisation counts as extra steps, hence the adjusted rates (Karras et al. 2020, appendix B)
        self.optimizers = {
            "g": self._adam(self.generator, recipe.path_interval),
            "d": self._adam(self.discriminator, recipe.r1_interval),
        }
        self.phases: dict[str, Callable[[], None]] = {
            "d_main": self._d_main,
            "d_r1": self._d_r1,
            "g_main": self._g_main,
            "g_path": self._g_path,
        }

    def _adam(self, module: torch.nn.Module, interval: int) -> torch.optim.Adam:
        ratio = interval / (interval + 1)
        on_gpu = self.device.type == "cuda"
        return torch.optim.Adam(
            module.parameters(),
            lr=self.recipe.learning_rate * ratio,
            betas=(0.0, 0.99**ratio),
            eps=1e-8,
            capturable=on_gpu,
            fused=on_gpu,
        )

    def _mixed_ws(self, n: int) -> Tensor:
        """ws [n, num_ws, w_dim] of which a share `mixing` changes from one latent to another at a random layer."""
        g = self.generator
        first, second = (g.mapping(torch.randn(n, g.z_dim, device=self.device)) for _ in range(2))
        cut = torch.randint(1, g.num_ws, [n, 1], device=self.device)
        cut = torch.where(torch.rand([n, 1], device=self.device) < self.recipe.mixing, cut, g.num_ws)
        keep = torch.arange(g.num_ws, device=self.device)[None] < cut
        g.mapping.update_w_avg(first)
        return torch.where(keep[:, :, None], first, second)

    def _step(self, name: str, loss: Tensor) -> None:
        loss.backward()
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)

    def _d_main(self) -> None:
        with torch.no_grad():
            fake = self.generator.synthesis(self._mixed_ws(self.recipe.batch), noise_mode="random")
        real_logits, fake_logits = self.discriminator(self.real), self.discriminator(fake)
        loss = discriminator_adversarial(real_logits, fake_logits)
        for name, value in (("loss_d", loss), ("real", real_logits.mean()), ("fake", fake_logits.mean())):
            self.stats[name].copy_(value.detach())
        self._step("d", loss)

    def _d_r1(self) -> None:
        penalty = r1_penalty(self.discriminator, self.real)
        self.stats["r1"].copy_(penalty.detach())
        self._step("d", penalty * (self.recipe.r1_gamma / 2 * self.recipe.r1_interval))

    def _g_main(self) -> None:
        self.discriminator.requires_grad_(False)
        fake = self.generator.synthesis(self._mixed_ws(self.recipe.batch), noise_mode="random")
        loss = generator_adversarial(self.discriminator(fake))
        self.stats["loss_g"].copy_(loss.detach())
        self._step("g", loss)
        self.discriminator.requires_grad_(True)

    def _g_path(self) -> None:
        ws = self._mixed_ws(self.recipe.path_batch)
        penalty = path_length_penalty(
            lambda w: self.generator.synthesis(w, noise_mode="random"), ws, self.path_mean
        )
        self.stats["path"].copy_(penalty.detach())
        self._step("g", penalty * (self.recipe.path_weight * self.recipe.path_interval))

    def capture(self) -> None:
        """Turn each phase into a CUDA graph. The warm-up steps are real steps; nothing else is lost or repeated."""
        for name, phase in list(self.phases.items()):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    phase()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                phase()
            self.phases[name] = graph.replay

    def step(self, iteration: int, real: Tensor) -> None:
        """One iteration: both networks once, their regularisers when it is their turn."""
        self.real.copy_(real)
        self.phases["d_main"]()
        if iteration % self.recipe.r1_interval == 0:
            self.phases["d_r1"]()
        self.phases["g_main"]()
        if iteration % self.recipe.path_interval == 0:
            self.phases["g_path"]()
        self.images_seen += self.recipe.batch
        self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        half_life = min(self.recipe.ema_kimg * 1000, self.images_seen * self.recipe.ema_rampup)
        beta = 0.5 ** (self.recipe.batch / max(half_life, 1e-8))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - beta)
        self.average.mapping.w_avg.copy_(self.generator.mapping.w_avg)

    def losses(self) -> dict[str, float]:
        """The statistics of the last iteration; raises RuntimeError if one is not finite."""
        values = {name: float(value) for name, value in self.stats.items()}
        if not all(math.isfinite(value) for value in values.values()):
            raise RuntimeError(f"diverged by image {self.images_seen}: {values}; the last snapshot is still good")
        return values

    def parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
        """What a snapshot holds, by name."""
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "average": self.average,
            "optimizer_g": self.optimizers["g"],
            "optimizer_d": self.optimizers["d"],
        }

    def save(self, folder: Path) -> None:
        """Write one file a part, each aside and renamed, then the counters; load() reads them back."""
        for name, part in self.parts().items():
            aside = folder / f".{name}.pt"
            torch.save(part.state_dict(), aside)
            aside.replace(folder / f"{name}.pt")
        counters = {"images_seen": self.images_seen, "path_mean": float(self.path_mean), "commands": self.commands}
        (folder / "counters.json").write_text(json.dumps(counters, indent=1))

    def load(self, folder: Path) -> None:
        """Go on from what save() wrote."""
        for name, part in self.parts().items():
            part.load_state_dict(torch.load(folder / f"{name}.pt", map_location=self.device, weights_only=True))
        counters = json.loads((folder / "counters.json").read_text())
        self.images_seen = int(counters["images_seen"])
        self.path_mean.fill_(counters["path_mean"])
        self.commands = list(counters["commands"])


@torch.no_grad()
def sample_sheet(generator: Generator, path: Path, *, columns: int = 12, rows: int = 6, seed: int = 0) -> None:
    """Write a grid of images drawn from consecutive latents of a seed, untruncated, as a PNG."""
    device = generator.mapping.w_avg.device
    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed)).to(device)
    images = torch.cat([generator(part, noise_mode="const") for part in z.split(32)])
    grid = images.reshape(rows, columns, *images.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(((grid + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()).save(path)


def train(
    out: Path,
    *,
    kimg: float,
    minutes: float,
    seed: int,
    device: torch.device,
    recipe: Recipe,
    arch: Architecture = ARCHITECTURE,
) -> Training:
    """Train into a folder, or go on there, until `kimg` thousand images were seen in all or the minutes are over."""
    began = time.monotonic()
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    training = Training(recipe, arch, device)
    if (out / "counters.json").exists():
        training.load(out)
        torch.manual_seed(seed + training.images_seen)
    stream = PortraitStream(recipe, arch.img_resolution, seed + training.images_seen, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        training.real.copy_(next(stream))
        training.capture()
    started, first, iteration = time.monotonic(), training.images_seen, 0
    while training.images_seen < kimg * 1000 and time.monotonic() - began < minutes * 60:
        training.step(iteration, next(stream))
        iteration += 1
        if iteration % 500 == 0:
            values = training.losses()
            rate = (training.images_seen - first) / (time.monotonic() - started)
            row = {"kimg": training.images_seen / 1000, "images_per_second": round(rate), **values}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            click.echo(" ".join(f"{key} {value:.4g}" for key, value in row.items()))
    training.losses()
    command = "python -m clone_fast.demo.train " + shlex.join(sys.argv[1:])
    training.commands.append(f"{command}  # {first} to {training.images_seen} images")
    training.save(out)
    sample_sheet(training.average, out / f"samples-{training.images_seen // 1000:05d}.png")
    return training


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; continued if there.")
@click.option("--kimg", default=3000.0, show_default=True, help="Thousands of images to see in all.")
@click.option("--minutes", default=float("inf"), help="Stop and save after so many minutes.")
@click.option("--batch", default=Recipe.batch, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(out: Path, kimg: float, minutes: float, batch: int, seed: int, device: str) -> None:
    """Train the demo network on drawn portraits, or go on with a run."""
    recipe = Recipe(batch=batch, path_batch=max(batch // 2, 1))
    training = train(out, kimg=kimg, minutes=minutes, seed=seed, device=torch.device(device), recipe=recipe)
    click.echo(f"{training.images_seen} images seen; snapshot and samples are in {out}")


if __name__ == "__main__":
    main()
