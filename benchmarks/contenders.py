"""Who runs a step: the strongest plain PyTorch, the reference eagerly, and clone_fast as it stands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import steps
from benchmarks.strong import Plan, StrongNetworks
from clone_fast.latent import Latent, LatentSettings
from clone_fast.latent.optimise import Search
from clone_fast.nn import Architecture, Discriminator, Generator
from clone_fast.tweak import Tweak

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        step: "tweak", "latent" or "clone".
        precision: "bf16", "fp16", "tf32" or "fp32".
        batch: images that G draws: photos, or for "clone" the photo and the others.
        network: what the architecture is called.
        arch: unconditional; for "clone" with a minibatch group that divides the batch.
    """

    step: str
    precision: str
    batch: int
    network: str
    arch: Architecture

    def __str__(self) -> str:
        return "-".join([self.step, self.precision, str(self.batch), self.network.replace(" ", "-")])


@dataclass
class Contender:
    """Networks and a step, ready to run.

    Attributes:
        run: take so many steps; their values without a host read, [steps] or for "clone" [steps, 2] (of G and of D).
        how: what runs, in words.
        step: one of them, if it can be captured in a graph from outside.
    """

    run: Callable[[int], Tensor]
    how: str
    step: Callable[[], Tensor] | None = None


class World:
    """The inputs of a row, the same for every contender: weights, latents, photos, draws."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.row, self.device = row, device
        source = torch.Generator().manual_seed(0)
        size = row.arch.img_resolution
        photos = 1 if row.step == "clone" else row.batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.generator, self.discriminator = Generator(row.arch), Discriminator(row.arch)
        with torch.no_grad():
            self.ws = self.generator.mapping(torch.randn(photos, row.arch.z_dim, generator=source)).to(device)
        rough = torch.rand(photos, row.arch.img_channels, 8, 8, generator=source) * 1.6 - 0.8
        self.photo = torch.nn.functional.interpolate(rough, size=size, mode="bilinear").to(device)
        # all alike, so that it does not matter which of them a loop picks
        others = row.batch - 1 if row.step == "clone" else 0
        rough = torch.rand(1, row.arch.img_channels, size, size, generator=source) * 2 - 1
        self.real = rough.to(device).repeat(others, 1, 1, 1)

    def networks(self) -> tuple[Generator, Discriminator | None]:
        """Fresh ones on the device, of the same weights every time."""
        made = Generator(self.row.arch)
        made.load_state_dict(self.generator.state_dict())
        if self.row.step != "clone":
            return made.to(self.device), None
        judge = Discriminator(self.row.arch)
        judge.load_state_dict(self.discriminator.state_dict())
        return made.to(self.device), judge.to(self.device)

    def draws(self, source: torch.Generator) -> Tensor:
        """z of the next iteration, drawn as clone_fast's loop draws it."""
        torch.rand([], generator=source)
        z = torch.randn(self.real.shape[0], self.row.arch.z_dim, generator=source)
        torch.randint(self.real.shape[0], [self.real.shape[0]], generator=source)
        return z


def of_step(world: World, networks: steps.Networks, how: str, compile_: steps.Compile | None = None) -> Contender:
    """A step of benchmarks/steps.py over these networks; for "clone" every one with draws of its own."""
    step: steps.TweakStep | steps.LatentStep | steps.CloneStep
    if world.row.step != "clone":
        kind = steps.TweakStep if world.row.step == "tweak" else steps.LatentStep
        step = kind(networks, world.ws, world.photo, compile_)
        taken: Callable[[], Tensor] = step
    else:
        source = torch.Generator().manual_seed(0)
        z = torch.zeros(world.real.shape[0], world.row.arch.z_dim, device=world.device)
        step = clone = steps.CloneStep(networks, world.ws, world.photo, z, world.real, compile_)

        def taken() -> Tensor:
            clone.z.copy_(world.draws(source))
            return clone()

    return Contender(lambda n: torch.stack([taken() for _ in range(n)]), how, step)


def strong(world: World, compile_: steps.Compile | None) -> Contender:
    """The baseline. CLONE_FAST_BENCH_RGB: the other way in which it can be written, see `Plan`."""
    plan = Plan(PRECISIONS[world.row.precision], os.environ.get("CLONE_FAST_BENCH_RGB") or Plan.rgb)
    how = f"{'compiled' if compile_ else 'eager'}, rgb by {plan.rgb}"
    return of_step(world, StrongNetworks(*world.networks(), plan), how, compile_)


def reference(world: World) -> Contender:
    """clone_fast's networks on the reference, which is plain PyTorch, eagerly."""
    return of_step(world, steps.OwnNetworks(*world.networks(), "reference"), "reference, eager")


def ours(world: World, *, one_pass: bool = True) -> Contender:
    """clone_fast as a user runs it: its own loops, which capture what they run, and are timed by the wall.

    Several photos in one step have no loop of their own: its networks, eagerly.

    one_pass: see `TweakSettings`; False for the arithmetic of the other contenders.
    """
    row = world.row
    generator, discriminator = world.networks()
    if row.batch > 1 and row.step != "clone":
        return of_step(world, steps.OwnNetworks(generator, discriminator), "clone_fast's networks, eager")
    if row.step == "latent":
        return _search(world, generator)
    mode = "clone" if row.step == "clone" else "recon"
    work = Tweak(
        generator,
        discriminator,
        Latent(world.ws),
        world.photo,
        steps.tweak_settings(mode, max(row.batch, 2), precision=row.precision, one_pass=one_pass),
        real_images=world.real if row.step == "clone" else None,
    )
    names = ("loss", "loss_d") if row.step == "clone" else ("loss",)

    def run(n: int) -> Tensor:
        found = []
        for _ in range(n):
            values = work.step(1.0)  # the next one writes the same memory
            found.append(torch.stack([values[name] for name in names]))
        return torch.stack(found).squeeze(1)

    return Contender(run, "clone_fast.tweak.Tweak.step")


def _search(world: World, generator: Generator) -> Contender:
    """From the given latent, without exploration, at one learning rate."""
    settings = LatentSettings(steps=2**20, exploration=0.0, start_samples=1, precision=world.row.precision)
    generator.requires_grad_(False)
    work = Search(generator, world.photo, settings, start=Latent(world.ws), seed=0)

    def run(n: int) -> Tensor:
        found = []
        for _ in range(n):
            work.table.rows["rate"].fill_(1.0)
            work.step()
            found.append(work.board.slots["loss"].clone())
        return torch.stack(found)

    return Contender(run, "clone_fast.latent.optimise")


@contextmanager
def arithmetic(precision: str, by_trial: bool = True) -> Iterator[None]:
    """float32 multiplied as TF32 unless the precision is fp32, and cuDNN's algorithms chosen by trial or by rule."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=by_trial and torch.cuda.is_available(), allow_tf32=precision != "fp32"
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
