"""The discriminator's side of the tweak: it is updated as the generator is, on the same images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from clone_fast.capture import adam, descend, forget
from clone_fast.errors import SettingsError
from clone_fast.losses import discriminator_adversarial, r1_penalty
from clone_fast.nn import Discriminator, Generator, Precision
from clone_fast.settings import TweakSettings


def usable(
    discriminator: Discriminator | None,
    generator: Generator,
    settings: TweakSettings,
    label: Tensor | None,
    real_images: Tensor | None,
) -> Discriminator:
    """The discriminator, if the adversarial terms can be had with all of these; raises SettingsError if not."""
    if discriminator is None:
        raise SettingsError("mode clone needs a discriminator; give one, or use mode recon")
    if generator.c_dim and (label is None or real_images is not None):
        raise SettingsError("a conditional network needs the photo's label, and takes no folder of real images")
    group = discriminator.arch.mbstd_group_size or 1
    if settings.batch > group and settings.batch % group:
        raise SettingsError(f"batch must be <= {group}, the discriminator's group, or a multiple, got {settings.batch}")
    return discriminator


class Adversary:
    """D with its side of the game. A batch's first image is the clone, or the photo, where the local term joins.

    Clone and photo are judged within a batch of other images, since D's minibatch standard deviation means little on
    a single one: there it is always 0, which D never saw in training.
    """

    def __init__(self, discriminator: Discriminator, settings: TweakSettings) -> None:
        self.original, self.settings = discriminator, settings
        self.discriminator = copy.deepcopy(discriminator).train().requires_grad_(False)
        self.precision = Precision.named(settings.precision)
        self.turns = 0
        groups: list[tuple[list[Tensor], float]] = [
            (list(self.discriminator.parameters()), settings.discriminator_lr)
        ]
        self.optimizer = adam(groups, betas=(0.0, 0.99), loss_scale=self.precision.loss_scale)

    def restart(self) -> None:
        """Begin anew from the original, in the memory that is there."""
        self.discriminator.load_state_dict(self.original.state_dict())
        forget(self.optimizer)
        self.turns = 0

    def take_turn(self) -> bool:
        """Count an update, on the host; whether R1 joins it."""
        self.turns += 1
        return self.settings.r1_gamma > 0 and (self.turns - 1) % self.settings.r1_interval == 0

    def update(
        self, real: Tensor, fake: Tensor, label: Tensor | None, local: bool, rate: Tensor, penalised: bool
    ) -> Tensor:
        """One step of D on max 1_p[lambda L_adv_local] + L_global, with R1 if penalised. Returns what it minimises.

        rate: [], factor of the learning rate, on the device.
        """
        s = self.settings
        self.discriminator.requires_grad_(True)
        real_logits, fake_logits = self.compare(real, fake, label)
        loss = real.new_zeros([])
        if local and s.adversarial_weight > 0:
            loss = loss + s.adversarial_weight * discriminator_adversarial(real_logits[:1], fake_logits[:1])
        if s.cohesion_weight > 0:
            loss = loss + s.cohesion_weight * discriminator_adversarial(real_logits[local:], fake_logits[local:])
        objective = loss
        if penalised:
            scale = self.precision.loss_scale
            penalty = r1_penalty(lambda images: self.judge(images, label), real, scale=scale)
            objective = loss + penalty * (s.r1_gamma / 2 * s.r1_interval)
        descend(self.optimizer, objective, rate)
        self.discriminator.requires_grad_(False)
        return loss.detach()

    def compare(self, real: Tensor, fake: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [N, 1] of both, in one forward where that leaves D's groups as they are.

        Sample n of M belongs to group n mod (M / size): taken in turns, even groups hold real images, odd ones fakes.
        """
        arch = self.discriminator.arch
        if arch.mbstd_num_channels and (arch.mbstd_group_size is None or len(real) % arch.mbstd_group_size):
            return self.judge(real, label), self.judge(fake, label)
        both = torch.stack([real, fake], dim=1).flatten(0, 1)
        logits = self.judge(both, None if label is None else label.repeat_interleave(2, dim=0))
        return logits[::2], logits[1::2]

    def judge(self, images: Tensor, label: Tensor | None) -> Tensor:
        """Logits [N, 1]. D's weights want a gradient in `update` alone."""
        options = {"dtype": self.precision.dtype, "recompute": self.settings.recompute}
        logits: Tensor = self.discriminator(images, label, **options)
        return logits
