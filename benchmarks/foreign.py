"""The networks of other codebases with random weights, by one interface, and loops of theirs that are timed."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import clone_fast
from benchmarks import common

SIZE = 1024 if common.ON_GPU else 32
STEPS = 20 if common.ON_GPU else 4
SETTLED = 5 if common.ON_GPU else 1  # the steps before have first calls in them
RATE = 3e-4  # PTI's
NETWORK = "F 1024" if common.ON_GPU else "tiny 32"
WIDTH = {"channel_base": 32768, "channel_max": 512} if common.ON_GPU else {"channel_base": 512, "channel_max": 16}
W_DIM, LAYERS = (512, 8) if common.ON_GPU else (32, 2)


@dataclass
class Run:
    """A loop that was watched: the loss and the milliseconds of each step, and the peak of memory."""

    losses: list[Tensor] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    peak_gb: float | None = None

    def told(self, prefix: str) -> dict[str, float]:
        """Of the steps that are settled."""
        found = {f"{prefix}_ms": median(self.ms[SETTLED:])}
        return found if self.peak_gb is None else found | {f"{prefix}_peak_gb": self.peak_gb}

    def apart(self, other: Run) -> float:
        """The largest relative difference of a step's loss."""
        one, two = (torch.stack([loss.detach().flatten()[0] for loss in run.losses]) for run in (self, other))
        return float(((one.double() - two.double()) / two.double()).abs().max())


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def synchronize() -> None:
    if common.ON_GPU:
        torch.cuda.synchronize()


@contextmanager
def watched() -> Iterator[Run]:
    """A run whose peak of memory is that of the block; what the last one held is given back before."""
    gc.collect()
    if common.ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = Run()
    yield run
    if common.ON_GPU:
        run.peak_gb = torch.cuda.max_memory_allocated() / 1e9


def looped(step: Callable[[], Tensor], steps: int = STEPS) -> Run:
    """Run a step so often; it returns its loss."""
    with watched() as run:
        for _ in range(steps):
            synchronize()
            began = time.perf_counter()
            run.losses.append(step().detach())
            synchronize()
            run.ms.append((time.perf_counter() - began) * 1e3)
    return run


@contextmanager
def with_us(how: str, network: nn.Module | None = None) -> Iterator[Callable[[], dict[str, Any]]]:
    """`install`, or `accelerate` of this network, for the block; what is yielded tells how many calls we answered.

    Raises:
        RuntimeError: none, in a block that came to its end.
    """
    with warnings.catch_warnings(record=True) as warned:
        report = clone_fast.accelerate(network) if how == "accelerate" and network is not None else clone_fast.install()

        def told() -> dict[str, Any]:
            entries = report.replaced.values()
            passed = {entry.where: dict(entry.passed) for entry in entries if entry.passed}
            fallbacks = [str(one.message) for one in warned if issubclass(one.category, RuntimeWarning)]
            return {"served": sum(entry.served for entry in entries), "passed": passed, "warned": fallbacks}

        try:
            yield told
        finally:
            clone_fast.uninstall()
    if not told()["served"]:
        raise RuntimeError(f"{how}: nothing was served; {report}")


@dataclass(frozen=True)
class Drawn:
    """A generator of either family and what its tuning needs.

    Attributes:
        generator: theirs, in eval mode, on the device.
        draw: image [1, 3, R, R] of such a generator for `ws`; NVIDIA's takes force_fp32.
        ws: the latent, [1, num_ws, w_dim] or rosinality's [1, n_latent, w_dim].
        photo: [1, 3, R, R] in [-1, 1], smooth, of no such generator.
    """

    generator: Any
    draw: Callable[..., Tensor]
    ws: Tensor
    photo: Tensor

    def tuning(self, **options: Any) -> Callable[[], Tensor]:
        """The generator's part of PTI's step on a copy: eager, constant noise, MSE, Adam over all parameters."""
        generator = copy.deepcopy(self.generator).requires_grad_(True)
        adam = torch.optim.Adam(generator.parameters(), lr=RATE)

        def step() -> Tensor:
            loss = nn.functional.mse_loss(self.draw(generator, **options), self.photo)
            adam.zero_grad()
            loss.backward()
            adam.step()
            return loss

        return step


def nvidia_generator(networks: ModuleType) -> Any:
    """Of stylegan2-ada-pytorch or stylegan3, as trained at 1024x1024: clamped, and fp16 where it is asked for."""
    options = {**WIDTH, "num_fp16_res": 4, "conv_clamp": 256}
    nested = not networks.__name__.endswith("stylegan2")  # stylegan3 passes them on
    shape = {"z_dim": W_DIM, "c_dim": 0, "w_dim": W_DIM, "img_resolution": SIZE, "img_channels": 3}
    more: dict[str, Any] = {"synthesis_kwargs": options} if nested else options
    generator = networks.Generator(**shape, mapping_kwargs={"num_layers": LAYERS}, **more)
    return _ready(generator, "noise_strength")


def rosinality_generator(networks: ModuleType) -> Any:
    """Of stylegan2-pytorch; its channels are its own, and its latents have 512 numbers in its scripts."""
    generator = networks.Generator(SIZE, 512, 8)
    for kind in [module for module in generator.modules() if type(module).__name__ == "NoiseInjection"]:
        nn.init.constant_(kind.weight, 0.1)
    return _ready(generator)


def _ready(generator: nn.Module, strength: str = "") -> Any:
    for module in generator.modules():
        if strength and hasattr(module, strength):  # zero in an untrained one
            nn.init.constant_(getattr(module, strength), 0.1)
    return generator.eval().requires_grad_(False).to(common.DEVICE)


def photo() -> Tensor:
    """[1, 3, R, R] in [-1, 1]."""
    coarse = torch.rand(1, 3, 8, 8) * 2 - 1
    return nn.functional.interpolate(coarse, size=SIZE, mode="bilinear").to(common.DEVICE)


def drawn(networks: ModuleType, nvidia: bool) -> Drawn:
    """A generator of this module with a latent and a photo."""
    torch.manual_seed(0)
    if nvidia:
        generator = nvidia_generator(networks)
        ws = torch.randn(1, generator.num_ws, W_DIM).to(common.DEVICE)

        def draw(g: Any, **options: Any) -> Tensor:
            return g.synthesis(ws, noise_mode="const", **options)
    else:
        generator = rosinality_generator(networks)
        ws = torch.randn(1, generator.n_latent, 512).to(common.DEVICE)

        def draw(g: Any, **options: Any) -> Tensor:
            return g([ws], input_is_latent=True, randomize_noise=False)[0]

    return Drawn(generator, draw, ws, photo())
