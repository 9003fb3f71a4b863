"""The discriminator's side of the tweak: it is updated as the generator is, on the same images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from clone_fast.descent import Descent
from clone_fast.errors import SettingsError
from clone_fast.known import KnownOfEach
from clone_fast.losses import r1_penalty
from clone_fast.nn import Discriminator, Generator, Precision
from clone_fast.nn.layers import fast_format
from clone_fast.ops.scaled_copy import scaled_copy_
from clone_fast.ops.streams import aside, joined
from clone_fast.players import Game
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


def parted(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first so many, and the rest: the images as they are where that is all, since the gradient of a slice is a
    pass over the whole."""
    return images if count == len(images) else images[:count], images[count:] if count else images


def nearest_factor(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, 1, 1, 1], of every sample of x [N, C, H, W] the factor that brings it nearest to that of y; 0 of zeros."""
    a, b = x.flatten(1).double(), y.flatten(1).double()  # the squares of small gradients are below float32's range
    factor = (a * b).sum(dim=1) / a.square().sum(dim=1).clamp_min(torch.finfo(a.dtype).tiny)
    return factor[:, None, None, None].to(dtype)


@torch.no_grad()
def half_of_pairs(real: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[2 N, C, H, W] of which every second is one of N real images: what `in_pairs` begins with, made beforehand."""
    shape, where = real[0].shape[1:], real[0].device
    counts = [len(part) for part in real]
    both = torch.empty([2 * sum(counts), *shape], dtype=dtype, device=where, memory_format=fast_format(where))
    for place, part in zip(both[::2].split(counts), real, strict=True):
        scaled_copy_(place, part)
    return both


@torch.no_grad()
def in_pairs(real: Sequence[Tensor], fake: Tensor, dtype: torch.dtype, half: Tensor | None = None) -> Tensor:
    """[2 N, C, H, W] in dtype, and as D wants it to lie: real images, and behind each a fake. It leads to neither.

    What D would convert is written once.

    Args:
        real: one after the other N of them.
        fake: [N, C, H, W].
        half: what `half_of_pairs` made of these real images, to be completed in place.

    Raises:
        ValueError: there are more or fewer of one than of the other, or they differ in size.
    """
    if sum(len(part) for part in real) != len(fake) or any(part.shape[1:] != fake.shape[1:] for part in real):
        shapes = ", ".join(str(list(part.shape)) for part in real)
        raise ValueError(f"there must be a real image of its size for each fake, got {shapes} for {list(fake.shape)}")
    both = half_of_pairs(real, dtype) if half is None else half
    scaled_copy_(both[1::2], fake)
    return both


def last_of_each(both: Tensor, count: int) -> Tensor:
    """[N, ...] of [N, ...] or [2 N, ...]: of pairs, what is of the fakes."""
    return both.unflatten(0, [count, -1])[:, -1]


class Adversary:
    """D with its side of the game. A batch's first image is the clone, or the photo, where the local term joins.

    Clone and photo are judged within a batch of other images, since D's minibatch standard deviation means little on
    a single one: there it is always 0, which D never saw in training.
    """

    def __init__(self, discriminator: Discriminator, settings: TweakSettings) -> None:
        self.original, self.settings = discriminator, settings
        self.discriminator = copy.deepcopy(discriminator).train().requires_grad_(False)
        self.precision = Precision.named(settings.precision)
        self.one_pass = settings.one_pass and self.precision.loss_scale == 1  # else D's gradients may be infinite
        self.turns = 0
        groups: list[tuple[list[Tensor], float]] = [
            (list(self.discriminator.parameters()), settings.discriminator_lr)
        ]
        self.descent = Descent(groups, betas=(0.0, 0.99), loss_scale=self.precision.loss_scale)

    def restart(self) -> None:
        """Begin anew from the original, in the memory that is there."""
        self.discriminator.load_state_dict(self.original.state_dict())
        self.descent.restart()
        self.turns = 0

    def take_turn(self) -> bool:
        """Count an update, on the host; whether R1 joins it."""
        self.turns += 1
        return self.settings.r1_gamma > 0 and (self.turns - 1) % self.settings.r1_interval == 0

    def begin(self, real: Sequence[Tensor]) -> Tensor | None:
        """What a `turn` shows D of these real images can be made before its fakes are; None where it is nothing."""
        return half_of_pairs(real, self.precision.dtype) if self._pairs(sum(map(len, real))) else None

    def _pairs(self, count: int) -> bool:
        """Whether so many real images and their fakes are shown in one forward: where D's groups stay as they are."""
        arch = self.discriminator.arch
        return not arch.mbstd_num_channels or (arch.mbstd_group_size is not None and count % arch.mbstd_group_size == 0)

    def turn(
        self,
        real: Sequence[Tensor],
        images: Tensor,
        label: Tensor | None,
        local: bool,
        rate: Tensor,
        penalised: bool,
        begun: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        """One step of D on max 1_p[lambda L_adv_local] + L_global, with R1 if penalised.

        In one pass, G's terms are those of D before the step (Shen et al. 2021, "Training GANs in One Stage"). Below
        the minibatch standard deviation an image is on its own, and what D's backward brings to it is linear in what
        enters there: were the gradients of both players parallel there, one factor per image would make G's of D's.
        They are, but for what passes through the deviation of a group, and in the saturating form with that. So G's
        gradient is D's, times the factor that is best there: its projection, never longer nor pointing away. None
        where D's is 0 in float32, for logits below about -100.

        Args:
            real: as many as images, in any number of tensors.
            images: of G, whose graph the terms lead to.
            rate: [], factor of the learning rate, on the device.
            begun: what `begin` made of real; used up.

        Returns:
            What D minimises; G's terms by name; and the images, those of the local term and the others, for further
            terms to begin with: that spares passes over their gradient.
        """
        s, device = self.settings, images.device
        game = Game(s.adversarial_weight, s.cohesion_weight, len(images), bool(local), s.saturating)
        self.discriminator.requires_grad_(True)
        below: list[Tensor] = []
        logits, shown = self.compare(real, images, label, below.append if self.one_pass else None, begun)
        objective = loss = game.of_d(logits)
        if penalised:
            scale = self.precision.loss_scale
            penalty = r1_penalty(lambda images: self.judge(images, label), torch.cat(list(real)), scale=scale)
            objective = loss + penalty * (s.r1_gamma / 2 * s.r1_interval)
        if not self.one_pass:
            self.descent.step(objective, rate)
            self.discriminator.requires_grad_(False)
            found = game.of_g(self.judge(images, label)).unbind()
            return loss.detach(), dict(zip(game.terms, found, strict=True)), parted(images, local)
        values = game.of_g(logits)
        (features,) = below
        (wanted,) = torch.autograd.grad(values.sum(), features, retain_graph=True)
        noted: list[Tensor] = []

        def note(brought: Tensor) -> None:
            """Beside the rest of D's backward, which does not need it, and must not add to it in place."""
            mine, theirs = (last_of_each(g, len(images)) for g in (brought, wanted))
            find = partial(nearest_factor, mine, theirs, images.dtype)
            noted[:] = aside(device, "factor", find, reads=[brought, wanted]), brought

        hook = features.register_hook(note)
        self.descent.step(objective, rate)
        hook.remove()
        joined(device, "factor")
        self.discriminator.requires_grad_(False)
        assert shown.grad is not None  # for the type checker
        terms = dict(zip(game.terms, values.detach().unbind(), strict=True))
        name = next(iter(terms))
        # the gradient of all terms, at one
        known = KnownOfEach.apply(images, int(local), terms[name], last_of_each(shown.grad, len(images)), noted[0])
        terms[name], clone, others = known
        return loss.detach(), terms, (clone, others)

    def compare(
        self,
        real: Sequence[Tensor],
        fake: Tensor,
        label: Tensor | None,
        watch: Callable[[Tensor], None] | None = None,
        begun: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [2 N, 1], a fake's behind each real image's, in one forward where that leaves D's groups as they are.

        And the images that D was shown, of which the last are the fakes, or every second one: in one pass they get a
        gradient. watch: that of the forward in which the fakes are. begun: as in `turn`.

        Sample n of M belongs to group n mod (M / size): taken in turns, even groups hold real images, odd ones fakes.
        """
        if not self._pairs(len(fake)):
            fake = fake.detach().requires_grad_(self.one_pass)
            logits = [self.judge(torch.cat(list(real)), label), self.judge(fake, label, watch)]
            return torch.stack(logits, dim=1).flatten(0, 1), fake
        both = in_pairs(real, fake, self.precision.dtype, begun).requires_grad_(self.one_pass)
        return self.judge(both, None if label is None else label.repeat_interleave(2, dim=0), watch), both

    def judge(
        self, images: Tensor, label: Tensor | None, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Logits [N, 1]. D's weights want a gradient for its step alone. watch: see `Discriminator.features`."""
        dtype, recompute = self.precision.dtype, self.settings.recompute
        logits: Tensor = self.discriminator(images, label, dtype=dtype, recompute=recompute, watch=watch)
        return logits
