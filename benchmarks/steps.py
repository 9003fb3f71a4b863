"""The three steps that are timed, each written once, over any networks: the baseline's or clone_fast's.

A step is called without arguments, reads its inputs from tensors that stay where they are, returns the loss without
reading it, and with capturable optimisers it can be captured in a CUDA graph as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from clone_fast import backend
from clone_fast.losses import Reconstruction, discriminator_adversarial, generator_adversarial
from clone_fast.nn import Discriminator, Generator
from clone_fast.tweak import TweakSettings

GENERATOR_LR, DISCRIMINATOR_LR, LATENT_LR = 0.002, 0.001, 0.1
RECONSTRUCTION_WEIGHT, ADVERSARIAL_WEIGHT, COHESION_WEIGHT = 400.0, 1.0, 1.0


class Networks(Protocol):
    """What a step needs of the networks; tensors as in clone_fast.nn."""

    generator: Generator
    discriminator: Discriminator | None

    def mapping(self, z: Tensor) -> Tensor: ...
    def synthesis(self, ws: Tensor) -> Tensor: ...
    def logits(self, images: Tensor) -> Tensor: ...
    def paired_logits(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]: ...
    def reconstruction(self, images: Tensor, photo: Tensor) -> Tensor: ...


class OwnNetworks:
    """clone_fast's modules, on the backend of this name."""

    def __init__(self, generator: Generator, discriminator: Discriminator | None, name: str = "auto") -> None:
        self.generator, self.discriminator, self.name = generator, discriminator, name

    def mapping(self, z: Tensor) -> Tensor:
        with backend(self.name):
            ws: Tensor = self.generator.mapping(z)
        return ws

    def synthesis(self, ws: Tensor) -> Tensor:
        with backend(self.name):
            images: Tensor = self.generator.synthesis(ws)
        return images

    def logits(self, images: Tensor) -> Tensor:
        if self.discriminator is None:
            raise ValueError("these networks have no discriminator")
        with backend(self.name):
            judged: Tensor = self.discriminator(images)
        return judged

    def paired_logits(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(real), self.logits(fake)

    def reconstruction(self, images: Tensor, photo: Tensor) -> Tensor:
        with backend(self.name):
            return Reconstruction(photo)(images)


Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As the baseline is compiled: every shape for itself, and no break in the graph.

    CLONE_FAST_BENCH_MODE: torch.compile's mode, say "max-autotune-no-cudagraphs", which takes many minutes.
    """
    mode = os.environ.get("CLONE_FAST_BENCH_MODE")
    found: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
    return found


def adam(parameters: Sequence[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.Adam:
    """Fused, and on a GPU capturable."""
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True, capturable=parameters[0].is_cuda)


def tuned(networks: Networks) -> list[Tensor]:
    """The weights of the synthesis network, all of which the tweak moves; the mapping network stays."""
    networks.generator.requires_grad_(False)
    networks.generator.synthesis.requires_grad_(True)
    return list(networks.generator.synthesis.parameters())


class TweakStep:
    """G forward at fixed latents, loss against the photos, backward to all synthesis weights, Adam.

    Args:
        ws: [N, num_ws, w_dim].
        photo: [N, C, R, R].
    """

    def __init__(self, networks: Networks, ws: Tensor, photo: Tensor, compile_: Compile | None = None) -> None:
        self.networks, self.ws, self.photo = networks, ws, photo
        self.optimizer = adam(tuned(networks), GENERATOR_LR)
        self.loss = compile_(self._loss) if compile_ else self._loss

    def _loss(self, ws: Tensor, photo: Tensor) -> Tensor:
        return RECONSTRUCTION_WEIGHT * self.networks.reconstruction(self.networks.synthesis(ws), photo)

    def __call__(self) -> Tensor:
        loss: Tensor = self.loss(self.ws, self.photo)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class LatentStep:
    """The same at fixed weights: backward to the latents alone. ws is moved in place of a copy of it."""

    def __init__(self, networks: Networks, ws: Tensor, photo: Tensor, compile_: Compile | None = None) -> None:
        self.networks, self.photo = networks, photo
        networks.generator.requires_grad_(False)
        self.ws = ws.detach().clone().requires_grad_(True)
        self.jitter = torch.zeros_like(ws)  # the exploration of this step
        self.optimizer = adam([self.ws], LATENT_LR)
        self.loss = compile_(self._loss) if compile_ else self._loss

    def _loss(self, ws: Tensor, jitter: Tensor, photo: Tensor) -> Tensor:
        return self.networks.reconstruction(self.networks.synthesis(ws + jitter), photo)

    def __call__(self) -> Tensor:
        loss: Tensor = self.loss(self.ws, self.jitter, self.photo)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class CloneStep:
    """An iteration of Clone, L = L_recon + lambda L_adv_local + L_global, that updates D and then G with it.

    The clone is the first image of the batch, the others are drawn for z. No R1, which joins every sixteenth iteration
    only, and none of this project's additions to the loss.

    Args:
        ws: [1, num_ws, w_dim], of the photo.
        photo: [1, C, R, R].
        z: [N - 1, z_dim]; what is copied into `z` and `real` before a call is what that call works on.
        real: [N - 1, C, R, R].
    """

    def __init__(
        self,
        networks: Networks,
        ws: Tensor,
        photo: Tensor,
        z: Tensor,
        real: Tensor,
        compile_: Compile | None = None,
    ) -> None:
        if networks.discriminator is None:
            raise ValueError("an iteration of Clone needs a discriminator")
        self.networks, self.discriminator = networks, networks.discriminator
        self.ws, self.photo, self.z, self.real = ws, photo, z.clone(), real.clone()
        self.optimizer = adam(tuned(networks), GENERATOR_LR)
        self.discriminator.requires_grad_(True)
        self.judge_optimizer = adam(list(self.discriminator.parameters()), DISCRIMINATOR_LR, (0.0, 0.99))
        functions: list[Callable[..., Tensor]] = [self._draw, self._judge_loss, self._generator_loss]
        self.draw, self.judge_loss, self.generator_loss = (compile_(f) if compile_ else f for f in functions)

    def _draw(self, ws: Tensor, z: Tensor) -> Tensor:
        return self.networks.synthesis(torch.cat([ws, self.networks.mapping(z)]))

    def _judge_loss(self, photo: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        on_real, on_fake = self.networks.paired_logits(torch.cat([photo, real]), fake)
        local = discriminator_adversarial(on_real[:1], on_fake[:1])
        cohesion = discriminator_adversarial(on_real[1:], on_fake[1:])
        return ADVERSARIAL_WEIGHT * local + COHESION_WEIGHT * cohesion

    def _generator_loss(self, images: Tensor, photo: Tensor) -> Tensor:
        judged = self.networks.logits(images)
        loss = RECONSTRUCTION_WEIGHT * self.networks.reconstruction(images[:1], photo)
        loss = loss + ADVERSARIAL_WEIGHT * generator_adversarial(judged[:1])
        return loss + COHESION_WEIGHT * generator_adversarial(judged[1:])

    def __call__(self) -> Tensor:
        images = self.draw(self.ws, self.z)
        judge_loss = self.judge_loss(self.photo, self.real, images.detach())
        self.judge_optimizer.zero_grad(set_to_none=True)
        judge_loss.backward()
        self.judge_optimizer.step()
        self.discriminator.requires_grad_(False)
        loss = self.generator_loss(images, self.photo)
        self.discriminator.requires_grad_(True)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return torch.stack([loss.detach(), judge_loss.detach()])


# relative, of the losses of three steps to those of the reference
NEAR = {"fp32": 2e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 5e-2}


def tweak_settings(mode: str, batch: int, **changes: Any) -> TweakSettings:
    """Of clone_fast's own loop, with the terms that the steps above have and no others."""
    values: dict[str, Any] = {
        "mode": mode,
        "batch": batch,
        "reconstruction_weight": RECONSTRUCTION_WEIGHT,
        "adversarial_weight": ADVERSARIAL_WEIGHT,
        "cohesion_weight": COHESION_WEIGHT,
        "generator_lr": GENERATOR_LR,
        "discriminator_lr": DISCRIMINATOR_LR,
        "local_probability": 1.0,
        "paired_weight": 0.0,
        "edit_weight": 0.0,
        "noise_lr": 0.0,
        "r1_gamma": 0.0,
    }
    return TweakSettings(**values | changes)
