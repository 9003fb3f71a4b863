"""The tweak: move the generator's manifold until it passes through the photo, and keep the rest of it in place.

Feng et al. 2022, "Near Perfect GAN Inversion" (arXiv 2202.11833). With the latent of the photo x fixed, G and D are
updated in turn on

    L = 1_p [L_recon + lambda * L_adv_local] + L_global

where L_recon compares G(latent) with x, L_adv_local = log D(x) + log(1 - D(G(latent))) keeps the clone realistic, and
L_global = E_x[log D(x)] + E_z[log(1 - D(G(z)))] keeps the manifold; the local term joins with probability p.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clone_fast.adversary import Adversary
from clone_fast.errors import DivergenceError, SettingsError
from clone_fast.latent import Latent
from clone_fast.losses import Reconstruction, Similarity, generator_adversarial, paired_cohesion
from clone_fast.nn import Discriminator, Generator
from clone_fast.progress import Progress, Record, quick_psnr, ramp


@dataclass(frozen=True)
class TweakSettings:
    """How the generator is tweaked.

    Attributes:
        mode: "clone" is the method, "recon" the reconstruction alone (tuning as PTI does it), kept as a yardstick.
        steps: iterations at most.
        target_psnr: stop as soon as the clone is that near to the photo, in dB; None to take all steps.
        local_probability: p, with which the local term joins an iteration.
        reconstruction_weight: of L_recon, which is a mean over pixels here; in the paper it is a sum.
        adversarial_weight: lambda, of the local adversarial term; 0 to leave it out.
        cohesion_weight: of L_global; 1 in the paper, 0 to leave it out.
        paired_weight: of a second cohesion term, this project's addition: for the same z the tweaked and the original
            generator shall draw the same image. 0 for the paper's method.
        edit_weight: of a third one, likewise ours: a random move of the photo's own latent shall change the clone as it
            changes what the original draws. 0 for the paper's method.
        edit_reach: how far these moves go at most, as a share of the way from the mean of w to another latent.
        batch: images that the discriminator sees at once; the clone takes one of these places when it joins.
        generator_lr, discriminator_lr: of Adam, at the top of the ramp.
        noise_lr: likewise, of noise maps that belong to the photo alone: no other latent sees them. 0 to leave them.
        r1_gamma, r1_interval: R1 regularisation of D in every r1_interval-th iteration; gamma 0 for none.
        saturating: the generator's adversarial terms as the formula stands, log(1 - D), instead of -log D.
        tune_mapping: move the mapping network as well; the latent is fixed, so only the cohesion terms would.
        check_every: iterations between two reads of the loss.
    """

    mode: str = "clone"
    steps: int = 150
    target_psnr: float | None = None
    local_probability: float = 1.0
    reconstruction_weight: float = 400.0
    adversarial_weight: float = 1.0
    cohesion_weight: float = 1.0
    paired_weight: float = 400.0
    edit_weight: float = 150.0
    edit_reach: float = 0.4
    batch: int = 4
    generator_lr: float = 0.002
    discriminator_lr: float = 0.001
    noise_lr: float = 1.0
    r1_gamma: float = 0.1
    r1_interval: int = 16
    saturating: bool = False
    tune_mapping: bool = False
    check_every: int = 5

    def __post_init__(self) -> None:
        if self.mode not in ("clone", "recon"):
            raise SettingsError(f"mode must be clone or recon, got {self.mode!r}")
        if self.steps < 1:
            raise SettingsError(f"steps must be >= 1, got {self.steps}")
        if not 0 < self.local_probability <= 1:
            raise SettingsError(f"local_probability must be in (0, 1], got {self.local_probability}")
        if self.batch < 2:
            raise SettingsError(f"batch must be >= 2, one for the clone and one for the rest, got {self.batch}")
        for name in ("r1_interval", "check_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be >= 1, got {getattr(self, name)}")
        weights = ("reconstruction_weight", "adversarial_weight", "cohesion_weight", "paired_weight", "edit_weight")
        for name in (*weights, "edit_reach", "noise_lr", "r1_gamma"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"{name} must be >= 0, got {getattr(self, name)}")

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator takes part."""
        return self.mode == "clone" and (self.adversarial_weight > 0 or self.cohesion_weight > 0)

    @property
    def cohesive(self) -> bool:
        """Whether a term keeps the rest of the manifold in place."""
        return self.mode == "clone" and (self.cohesion_weight > 0 or self.paired_weight > 0)

    @property
    def others(self) -> bool:
        """Whether images of other latents take part."""
        return self.mode == "clone" and (self.adversarial or self.paired_weight > 0)


@dataclass
class Tweaked:
    """What the tweak leaves.

    Attributes:
        generator, discriminator: copies, tweaked; the discriminator None where none was given.
        latent: the one that was given, with the photo's noise maps where they were moved.
        rows: see `Record`.
        steps: iterations taken.
        stopped: why it ended: "steps", "target", "interrupted" or "diverged".
    """

    generator: Generator
    discriminator: Discriminator | None
    latent: Latent
    rows: list[dict[str, float]]
    steps: int
    stopped: str


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


class Tweak:
    """The networks, optimisers and fixed inputs of one tweak; `step` is one iteration.

    real_images: [N, C, R, R], x ~ p_x of the global term. Most users have no training set: without it, what the
        original generator draws for the very z of an iteration serves as its real images.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator | None,
        latent: Latent,
        photo: Tensor,
        settings: TweakSettings,
        *,
        real_images: Tensor | None = None,
        label: Tensor | None = None,
        similarity: Similarity | None = None,
        seed: int = 0,
    ) -> None:
        self.settings, self.latent, self.photo, self.label = settings, latent, photo, label
        self.real_images = real_images
        self.source = torch.Generator().manual_seed(seed)
        self.reconstruction = Reconstruction(photo, similarity=similarity)
        self.original = generator
        self.generator = copy.deepcopy(generator).train().requires_grad_(False)
        self.generator.synthesis.requires_grad_(True)
        self.generator.mapping.requires_grad_(settings.tune_mapping)
        tuned = [p for p in self.generator.parameters() if p.requires_grad]
        self.maps = dict(latent.noise)
        if settings.noise_lr > 0:
            for name, const in generator.synthesis.noise_consts().items():
                self.maps[name] = self.maps.get(name, const).detach().clone().requires_grad_(True)
        groups = [
            {"params": tuned, "peak": settings.generator_lr},
            {"params": [m for m in self.maps.values() if m.requires_grad], "peak": settings.noise_lr},
        ]
        self.optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.99))
        self.adversary: Adversary | None = None
        if settings.adversarial:
            self.adversary = Adversary(
                usable(discriminator, generator, settings, label, real_images),
                adversarial_weight=settings.adversarial_weight,
                cohesion_weight=settings.cohesion_weight,
                learning_rate=settings.discriminator_lr,
                r1_gamma=settings.r1_gamma,
                r1_interval=settings.r1_interval,
            )
        with torch.no_grad():
            self.start = latent.draw(generator)

    def modules(self) -> list[nn.Module]:
        """The networks that are moved."""
        return [self.generator] if self.adversary is None else [self.generator, self.adversary.discriminator]

    def moved(self) -> list[Tensor]:
        """All that the optimisers move: weights, and noise maps."""
        weights = [p for module in self.modules() for p in module.parameters() if p.requires_grad]
        return [*weights, *(m for m in self.maps.values() if m.requires_grad)]

    def step(self, rate: float, check: Callable[[dict[str, Tensor]], bool] | None = None) -> dict[str, Tensor]:
        """One iteration, with the learning rates times `rate`.

        check: sees the values, which are those of the generator's weights before its update, and may return False to
            leave that update out.

        Returns:
            Scalars: "loss", and what took part of "psnr", "recon", "local", "global", "paired", "edit", "loss_d".
        """
        s = self.settings
        joins = float(torch.rand([], generator=self.source)) < s.local_probability
        local = int(joins or not s.cohesive)  # without a global term there is nothing else to do
        images, before, label = self._draw(local)
        values: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        if local:
            values["psnr"] = quick_psnr(images[:1], self.photo)
            terms["recon"] = s.reconstruction_weight * self.reconstruction(images[:1])
        if self.adversary is not None and (local or s.cohesion_weight > 0):
            real = self._real(before)
            if local:
                real = torch.cat([self.photo, real])
            values["loss_d"] = self.adversary.update(real, images.detach(), label, local, rate)
            logits = self.adversary.judge(images, label)
            if local and s.adversarial_weight > 0:
                terms["local"] = s.adversarial_weight * generator_adversarial(logits[:1], saturating=s.saturating)
            if s.cohesion_weight > 0:
                terms["global"] = s.cohesion_weight * generator_adversarial(logits[local:], saturating=s.saturating)
        if s.others and s.paired_weight > 0:
            terms["paired"] = s.paired_weight * paired_cohesion(images[local:], before)
        if s.mode == "clone" and s.edit_weight > 0 and local:
            terms["edit"] = s.edit_weight * self._edit()
        loss = torch.stack(list(terms.values())).sum()
        values = {name: value.detach() for name, value in {"loss": loss, **values, **terms}.items()}
        if check is None or check(values):
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return values

    def _draw(self, local: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images of the generator, the clone first if it joins; the original's of the other latents; and labels."""
        others = self.settings.batch - local if self.settings.others else 0
        z, c = self.original.sample(others, self.source)
        ws = self.generator.mapping(z, c) if others else self.latent.ws[:0]
        with torch.no_grad():
            before = self.original.synthesis(self.original.mapping(z, c)) if others else self.photo[:0]
        if local:
            ws = torch.cat([self.latent.ws, ws])
            c = c if c is None or self.label is None else torch.cat([self.label, c])
        images = self.generator.synthesis(ws, noise_mode="const", noise=self._noise(others) if local else None)
        return images, before, c

    def _edit(self) -> Tensor:
        """Distance of the clone after a random move of its latent from the photo plus what the original changes."""
        z, c = self.original.sample(1, self.source)
        reach = self.settings.edit_reach * float(torch.rand([], generator=self.source))
        with torch.no_grad():
            move = self.original.mapping(z, c) - self.original.mapping.w_avg
            moved = Latent(self.latent.ws + reach * move, self.latent.noise)
            wanted = self.photo + moved.draw(self.original) - self.start
        return paired_cohesion(Latent(moved.ws, self.maps).draw(self.generator), wanted)

    def _noise(self, others: int) -> dict[str, Tensor]:
        """Noise maps of a batch whose first image is the clone: its own, where it has any, then the generator's."""
        consts = self.generator.synthesis.noise_consts()
        return {
            name: torch.cat([own[None, None], consts[name][None, None].expand(others, -1, -1, -1)])
            for name, own in self.maps.items()
        }

    def _real(self, before: Tensor) -> Tensor:
        if self.real_images is None:
            return before
        picked = torch.randint(self.real_images.shape[0], [before.shape[0]], generator=self.source)
        return self.real_images[picked.to(self.real_images.device)].to(before.device)


class Keeper:
    """A copy of weights, to go back to."""

    def __init__(self, live: list[Tensor]) -> None:
        self.live = live
        self.kept = [p.detach().clone() for p in live]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy them as they are."""
        torch._foreach_copy_(self.kept, self.live)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept ones back."""
        torch._foreach_copy_(self.live, self.kept)


COLLAPSE_DB = 8.0  # a PSNR that far below the best so far is not going to recover within the steps of a tweak


def tweak(
    generator: Generator,
    discriminator: Discriminator | None,
    latent: Latent,
    photo: Tensor,
    settings: TweakSettings,
    *,
    real_images: Tensor | None = None,
    label: Tensor | None = None,
    similarity: Similarity | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    interrupted: bool = False,
) -> Tweaked:
    """Tweak copies of the generator and the discriminator until the generator draws the photo for the latent.

    Args:
        generator, discriminator: on the photo's device; neither is changed. Mode recon needs no discriminator.
        latent: of the photo; fixed.
        photo: [1, C, R, R] in [-1, 1].
        real_images: see `Tweak`.
        label: [1, c_dim] of the photo, for a conditional network.
        similarity: a loss (image, photo) -> scalar in place of L_recon's pyramid and mean square error.
        progress: called at every check.
        interrupted: whether Ctrl-C came before; the copies are then returned as they are.

    Returns:
        The tweaked networks. Ctrl-C, a loss that is not finite, or a PSNR that collapses end the tweak with the
        weights of the last good check.

    Raises:
        SettingsError: the settings need a discriminator or a label that was not given.
        DivergenceError: the loss was not finite from the first step on.
    """
    work = Tweak(
        generator,
        discriminator,
        latent,
        photo,
        settings,
        real_images=real_images,
        label=label,
        similarity=similarity,
        seed=seed,
    )
    record = Record("tweak", settings.steps, settings.check_every, progress)
    keeper = Keeper(work.moved())
    stopped, step, best = "interrupted" if interrupted else "", 0, -math.inf
    psnr = torch.full([], math.nan, device=photo.device)

    def check(values: dict[str, Tensor]) -> bool:
        nonlocal psnr, best, stopped
        fresh = "psnr" in values  # an iteration without the local term says nothing new of the clone
        psnr = values.pop("psnr", psnr)
        if not record.due(step):
            return True
        row = record.add(step, values.pop("loss"), psnr, **values)
        best = max(best, row["psnr"])
        if not math.isfinite(row["loss"]) or row["psnr"] < best - COLLAPSE_DB:
            stopped = "diverged"
        else:
            keeper.keep()
            if fresh and settings.target_psnr is not None and row["psnr"] >= settings.target_psnr:
                stopped = "target"
        return not stopped

    try:
        while not stopped and step < settings.steps:
            step += 1
            work.step(ramp(step - 1, settings.steps, up=0.05, down=0.3), check)
    except KeyboardInterrupt:
        stopped = "interrupted"
    if not stopped and not all(torch.isfinite(value).all() for value in work.moved()):
        stopped = "diverged"  # in the very last update, which no check has seen
    if stopped == "diverged" and len(record.rows) == 1:
        raise DivergenceError("the tweak is not finite from the first step on; nothing was changed")
    if stopped in ("diverged", "interrupted"):
        keeper.restore()
    for module in work.modules():
        module.eval().requires_grad_(False)
    judge = copy.deepcopy(discriminator) if work.adversary is None else work.adversary.discriminator
    moved = Latent(latent.ws, {name: noise.detach() for name, noise in work.maps.items()})
    return Tweaked(work.generator, judge, moved, record.rows, step, stopped or "steps")
