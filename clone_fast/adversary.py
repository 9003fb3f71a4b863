"""The discriminator's side of the tweak: it is updated as the generator is, on the same images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clone_fast.descent import Descent
from clone_fast.errors import SettingsError
from clone_fast.losses import added, discriminator_adversarial, generator_adversarial, r1_penalty, weighted
from clone_fast.nn import Discriminator, Generator, Precision
from clone_fast.nn.layers import fast_format
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


def nearest_factor(x: Tensor, y: Tensor) -> Tensor:
    """[N, 1, 1, 1], of every sample of x [N, C, H, W] the factor that brings it nearest to that of y; 0 of zeros."""
    a, b = x.flatten(1).double(), y.flatten(1).double()  # the squares of small gradients are below float32's range
    factor = (a * b).sum(dim=1) / a.square().sum(dim=1).clamp_min(torch.finfo(a.dtype).tiny)
    return factor[:, None, None, None]


class _Known(torch.autograd.Function):
    """A loss of images whose gradient is known, up to a factor for each of them; and the images, first `count` of them,
    then the rest.

    The gradient of what is made of these parts is added to its part of the known one, in that one's memory. Those of
    slices would be filled up with zeros, and added to all of it.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, count: int, loss: Tensor, gradient: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(gradient, factor)
        ctx.count = count
        ctx.set_materialize_grads(False)
        images = images.detach()
        return loss.clone(), images[:count], images[count:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor | None, *parts: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, factor = ctx.saved_tensors
        whole = gradient * (factor * (0 if slope is None else slope))  # nobody else's: the parts may be added in place
        for mine, theirs in zip((whole[: ctx.count], whole[ctx.count :]), parts, strict=True):
            if theirs is not None:
                mine += theirs
        return whole, None, None, None, None


class _Pairs(torch.autograd.Function):
    """See `in_pairs`."""

    @staticmethod
    def forward(ctx: Any, fake: Tensor, dtype: torch.dtype, *real: Tensor) -> Tensor:
        ctx.save_for_backward(fake)
        n, *shape = fake.shape
        where = fake.device
        both = torch.empty([2 * n, *shape], dtype=dtype, device=where, memory_format=fast_format(where))
        both[1::2] = fake
        for place, part in zip(both[::2].split([len(part) for part in real]), real, strict=True):
            place.copy_(part)
        return both

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (fake,) = ctx.saved_tensors
        return torch.empty_like(fake).copy_(slope[1::2]), None, *(None for _ in ctx.needs_input_grad[2:])


def in_pairs(real: Sequence[Tensor], fake: Tensor, dtype: torch.dtype) -> Tensor:
    """[2 N, C, H, W] in dtype, and as D wants it to lie: real images, and behind each a fake.

    What D would convert is written once, and of its gradient the half that is wanted, laid out as the fakes are.

    Args:
        real: one after the other N of them. They get no gradient, and the fakes none that is differentiable again.
        fake: [N, C, H, W].

    Raises:
        ValueError: there are more or fewer of one than of the other, they differ in size, or real wants a gradient.
    """
    if sum(len(part) for part in real) != len(fake) or any(part.shape[1:] != fake.shape[1:] for part in real):
        shapes = ", ".join(str(list(part.shape)) for part in real)
        raise ValueError(f"there must be a real image of its size for each fake, got {shapes} for {list(fake.shape)}")
    if torch.is_grad_enabled() and any(part.requires_grad for part in real):
        raise ValueError("real images get no gradient here; detach them")
    both: Tensor = _Pairs.apply(fake, dtype, *real)
    return both


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

    def turn(
        self, real: Sequence[Tensor], images: Tensor, label: Tensor | None, local: bool, rate: Tensor, penalised: bool
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

        Returns:
            What D minimises; G's terms by name; and the images, those of the local term and the others, for further
            terms to begin with: that spares passes over their gradient.
        """
        s = self.settings
        self.discriminator.requires_grad_(True)
        fake = images.detach().requires_grad_(self.one_pass)
        below: list[Tensor] = []
        real_logits, fake_logits = self.compare(real, fake, label, below.append if self.one_pass else None)
        minimised = []
        if local and s.adversarial_weight > 0:
            of_clone = discriminator_adversarial(real_logits[:1], fake_logits[:1])
            minimised.append(weighted(s.adversarial_weight, of_clone))
        if s.cohesion_weight > 0:
            of_others = discriminator_adversarial(real_logits[local:], fake_logits[local:])
            minimised.append(weighted(s.cohesion_weight, of_others))
        objective = loss = added(minimised)
        if penalised:
            scale = self.precision.loss_scale
            penalty = r1_penalty(lambda images: self.judge(images, label), torch.cat(list(real)), scale=scale)
            objective = loss + penalty * (s.r1_gamma / 2 * s.r1_interval)
        if not self.one_pass:
            self.descent.step(objective, rate)
            self.discriminator.requires_grad_(False)
            return loss.detach(), self._terms(self.judge(images, label), local), parted(images, local)
        terms = self._terms(fake_logits, local)
        (features,) = below
        (wanted,) = torch.autograd.grad(added(terms.values()), features, retain_graph=True)
        features.retain_grad()
        self.descent.step(objective, rate)
        self.discriminator.requires_grad_(False)
        assert features.grad is not None  # for the type checker
        assert fake.grad is not None  # for the type checker
        mine, theirs = (g.unflatten(0, [len(fake), -1])[:, -1] for g in (features.grad, wanted))  # a fake ends its pair
        factor = nearest_factor(mine, theirs).to(fake.dtype)
        terms = {name: term.detach() for name, term in terms.items()}
        name = next(iter(terms))
        known = _Known.apply(images, int(local), terms[name], fake.grad, factor)  # the gradient of all terms, at one
        terms[name], clone, others = known
        return loss.detach(), terms, (clone, others)

    def _terms(self, logits: Tensor, local: bool) -> dict[str, Tensor]:
        """What G minimises, of the logits of its images."""
        s, terms = self.settings, dict[str, Tensor]()
        if local and s.adversarial_weight > 0:
            of_clone = generator_adversarial(logits[:1], saturating=s.saturating)
            terms["local"] = weighted(s.adversarial_weight, of_clone)
        if s.cohesion_weight > 0:
            of_others = generator_adversarial(logits[local:], saturating=s.saturating)
            terms["global"] = weighted(s.cohesion_weight, of_others)
        return terms

    def compare(
        self,
        real: Sequence[Tensor],
        fake: Tensor,
        label: Tensor | None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, 1] of both, in one forward where that leaves D's groups as they are; watch: that of the fakes.

        Sample n of M belongs to group n mod (M / size): taken in turns, even groups hold real images, odd ones fakes.
        """
        arch = self.discriminator.arch
        if arch.mbstd_num_channels and (arch.mbstd_group_size is None or len(fake) % arch.mbstd_group_size):
            return self.judge(torch.cat(list(real)), label), self.judge(fake, label, watch)
        both = in_pairs(real, fake, self.precision.dtype)
        logits = self.judge(both, None if label is None else label.repeat_interleave(2, dim=0), watch)
        return logits[::2], logits[1::2]

    def judge(
        self, images: Tensor, label: Tensor | None, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Logits [N, 1]. D's weights want a gradient for its step alone. watch: see `Discriminator.features`."""
        dtype, recompute = self.precision.dtype, self.settings.recompute
        logits: Tensor = self.discriminator(images, label, dtype=dtype, recompute=recompute, watch=watch)
        return logits
