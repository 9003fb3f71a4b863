"""One iteration of the tweak: what the two generators draw, what the terms say of it, and a step of both players."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clone_fast.adversary import Adversary, parted, usable
from clone_fast.capture import Board, Captured, alike, rehearse
from clone_fast.descent import Descent
from clone_fast.draws import Draws, Wanted
from clone_fast.known import Known, known
from clone_fast.latent import Latent
from clone_fast.losses import Reconstruction, Similarity, added, paired_cohesion
from clone_fast.nn import Discriminator, Generator, Precision, settled
from clone_fast.ops.streams import aside, joined
from clone_fast.progress import quick_psnr, ramp
from clone_fast.settings import TweakSettings


class Tweak:
    """The networks, optimisers, draws and fixed inputs of one tweak; `step` is one iteration.

    On a GPU an iteration becomes a CUDA graph, one for each of its variants: with and without the local term, with and
    without R1. What it needs is on the device before it starts, and what it reports stays there. After its end another
    photo can take its place with `restart`, and goes on with the same graphs.

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
        s = settled(settings, photo.device)
        self.settings, self.label, self.photo = s, label, torch.empty_like(photo)
        self.others = real_images, similarity
        self.latent = Latent(torch.empty_like(latent.ws), {k: torch.empty_like(v) for k, v in latent.noise.items()})
        self.reconstruction = Reconstruction(self.photo, similarity=similarity, weight=s.reconstruction_weight)
        self.original, self.precision = generator, Precision.named(s.precision)
        self.generator = copy.deepcopy(generator).train().requires_grad_(False)
        self.generator.synthesis.requires_grad_(True)
        self.generator.mapping.requires_grad_(s.tune_mapping)
        self.maps = dict(self.latent.noise)
        if s.noise_lr > 0:
            for name, const in generator.synthesis.noise_consts().items():
                self.maps[name] = torch.empty_like(const).requires_grad_(True)
        tuned: list[Tensor] = [p for p in self.generator.parameters() if p.requires_grad]
        groups: list[tuple[list[Tensor], float]] = [
            (tuned, s.generator_lr),
            ([m for m in self.maps.values() if m.requires_grad], s.noise_lr),
        ]
        groups = [group for group in groups if group[0]]
        self.descent = Descent(groups, betas=(0.9, 0.99), loss_scale=self.precision.loss_scale)
        self.adversary: Adversary | None = None
        if s.adversarial:
            self.adversary = Adversary(usable(discriminator, generator, s, label, real_images), s)
        self.offset = torch.empty_like(photo)  # what the original lacks: the same after any edit, which reads it alone
        self.pool = real_images if self.adversary is not None else None
        self.real = photo.new_empty([0 if self.pool is None else s.batch, *photo.shape[1:]])
        wanted = Wanted(
            local_probability=s.local_probability if s.cohesive else 1.0,  # else there is nothing else to do
            batch=s.batch if s.others else 0,
            reach=s.edit_reach if s.edits else None,
            real_images=0 if self.pool is None else len(self.pool),
            real_without_clone=s.cohesion_weight > 0,
            inputs=s.tune_mapping,
        )
        self.draws = Draws(generator, wanted, rate=lambda i: ramp(i, s.steps, up=0.05, down=0.3), total=s.steps)
        self.board = Board(("loss", "psnr", "recon", "local", "global", "paired", "edit", "loss_d"), photo.device)
        self.names: dict[bool, tuple[str, ...]] = {}
        judge = None if self.adversary is None else self.adversary.discriminator.arch
        kind = "tweak", generator.arch, judge, alike(s), given(real_images, label, similarity)
        self.iterate = Captured(self._iterate, photo.device, kind, at_once=similarity is None)
        self.restart(latent, photo, seed=seed)

    @torch.no_grad()
    def restart(self, latent: Latent, photo: Tensor, *, seed: int) -> None:
        """Begin anew with a photo, in the memory that is there, so that captured graphs serve it. Nothing is left of
        the photo before; everything else is as it was given at first, and the shapes must be.
        """
        self.photo.copy_(photo)
        self.latent.ws.copy_(latent.ws)
        for name, value in self.latent.noise.items():
            value.copy_(latent.noise[name])
        consts = self.original.synthesis.noise_consts()
        for name, value in self.maps.items():
            value.copy_(latent.noise.get(name, consts[name]))
        self.generator.load_state_dict(self.original.state_dict())
        self.descent.restart()
        if self.adversary is not None:
            self.adversary.restart()
        self.draws.restart(seed)
        rehearse(photo.device, self.iterate.kind, self._rehearse)  # now, before any network is run
        self.board.clear()
        if self.settings.edits:
            with self.precision.active():
                drawn = _synthesise(self.original, [latent.ws], [], [], latent.noise, self.settings)
                torch.sub(photo, drawn, out=self.offset)

    def serves(
        self,
        settings: TweakSettings,
        *,
        real_images: Tensor | None = None,
        label: Tensor | None = None,
        similarity: Similarity | None = None,
    ) -> bool:
        """Whether `restart` can take a photo that is tweaked with these."""
        if self.settings != settled(settings, self.photo.device) or (self.label is None) != (label is None):
            return False
        same = self.others[0] is real_images and self.others[1] is similarity
        return same and (self.label is None or label is None or torch.equal(self.label, label))

    def moved(self) -> list[Tensor]:
        """What the generator's descent moves: weights, and noise maps."""
        return self.descent.tensors

    def judged(self) -> list[Tensor]:
        """What the discriminator's descent moves."""
        return [] if self.adversary is None else self.adversary.descent.tensors

    def step(self, rate: float | None = None) -> dict[str, Tensor]:
        """One iteration, with the learning rates of its place on the ramp, or times `rate`; reads nothing back.

        Returns:
            Scalars, of the weights before the update: "loss", and what took part of "psnr", "recon", "local",
            "global", "paired", "edit", "loss_d". The next iteration writes the same memory.
        """
        local, picked = self.draws.next()
        if rate is not None:
            self.draws.override_rate(rate)
        if picked is not None and self.pool is not None and len(picked):
            chosen = self.pool[picked.to(self.pool.device)]
            if self.real.is_cuda and not chosen.is_cuda:
                chosen = chosen.pin_memory()  # or the copy would wait for the GPU
            self.real[: len(picked)].copy_(chosen, non_blocking=True)
        penalised = self.adversary is not None and self.settings.judges(local) and self.adversary.take_turn()
        with self.precision.active():
            self.iterate(local, penalised)
        return self.board.read(self.names[local])

    def slow_down(self, factor: float) -> None:
        """Learning rates times this from here on, and the moments of Adam as before its first step."""
        self.draws.slow_down(factor)
        self.descent.restart()
        if self.adversary is not None:
            self.adversary.descent.restart()

    def release(self) -> None:
        """Let go of what only further iterations need: graphs, and gradients in their memory."""
        self.iterate.release()
        for parameter in (*self.moved(), *self.judged()):
            parameter.grad = None

    def _rehearse(self) -> None:
        with torch.enable_grad(), self.precision.active():
            for variant in self.settings.variants:
                self.iterate.rehearse(*variant)

    def _iterate(self, local: bool, penalised: bool) -> None:
        """All that an iteration does, on static memory: what a graph replays. penalised: whether R1 joins."""
        s, table, device = self.settings, self.draws.table, self.photo.device
        # beside the networks, as is all that only a step of Adam or a later iteration needs
        rate = aside(device, "measure", lambda: table["rate"], reads=[])
        images, before, label, edited, wanted, begun = self._draw(local)
        joined(device, "measure")
        values: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        clone, others = parted(images, local)
        judged = self.adversary is not None and s.judges(local)
        # beside D, which fills a GPU at its largest images alone
        early = judged and local
        likeness = aside(device, "recon", partial(known, self.reconstruction, clone), [clone]) if early else None
        if self.adversary is not None and judged:
            joined(device, "pairs")
            done = self.adversary.turn(self._real(local, before), images, label, local, rate, penalised, begun)
            values["loss_d"], terms, (clone, others) = done  # what is made of these joins the gradient of its terms
        if local:
            # beside the loss, which does not need it
            values["psnr"] = aside(device, "measure", partial(quick_psnr, clone, self.photo), reads=[clone])
            if likeness is None:
                terms = {"recon": self.reconstruction(clone), **terms}
            else:
                joined(device, "recon")
                terms = {"recon": Known.apply(clone, *likeness), **terms}
        if s.others and s.paired_weight > 0:
            terms["paired"] = paired_cohesion(others, before, weight=s.paired_weight)
        if s.edits and local:
            terms["edit"] = paired_cohesion(edited, wanted, weight=s.edit_weight)
        loss = added(terms.values())
        values = {"loss": loss, **values, **terms}

        def note() -> None:
            self.board.write(values)
            table.advance()

        aside(device, "measure", note, reads=list(values.values()))
        self.descent.step(loss, rate)
        joined(device, "measure")
        self.names[local] = tuple(values)

    def _real(self, local: bool, before: Tensor) -> list[Tensor]:
        """What D takes for real: the photo, and images of the pool or of the original."""
        return [*([self.photo] if local else []), before if self.pool is None else self.real[: len(before)]]

    def _draw(self, local: bool | int) -> Drawn:
        """What the two generators draw in an iteration, each in one batch."""
        s, table = self.settings, self.draws.table
        others = s.batch - local if s.others else 0
        c = table["c"][:others] if others and self.generator.c_dim else None
        own = [self.latent.ws] if local else []
        moved = [self.latent.ws + table["move"]] if local and s.edits else []
        rest = [table["w"][:others, None].expand(-1, self.generator.num_ws, -1)] if others else []
        before = wanted = self.photo[:0]
        if rest or moved:
            with torch.no_grad():
                known = _synthesise(self.original, [], rest, moved, self.latent.noise, s)
            before, wanted = known[:others], self.offset + known[others:]
        begun = None
        if self.adversary is not None and s.judges(bool(local)):
            real = self._real(bool(local), before)
            begun = aside(self.photo.device, "pairs", partial(self.adversary.begin, real), reads=real)
        if rest and s.tune_mapping:
            rest = [self.generator.mapping(table["z"][:others], c)]
        drawn = _synthesise(self.generator, own, rest, moved, self.maps, s)
        if local and c is not None and self.label is not None:
            c = torch.cat([self.label, c])
        # both parts get a gradient: a split puts them together in one pass, slices in several
        images, edited = drawn.split([local + others, len(moved)]) if moved else (drawn, drawn[:0])
        return Drawn(images, before, c, edited, wanted, begun)


def given(real_images: Tensor | None, label: Tensor | None, similarity: Similarity | None) -> Hashable:
    """For a kind: what these arguments of a tweak change in the kernels that it launches. What a loss of one's own
    launches nobody knows; with its class in it, a kind has no mark on disk (`clone_fast.ops.marks`)."""
    return real_images is None, label is None, None if similarity is None else type(similarity)


class Drawn(NamedTuple):
    """The images of an iteration.

    Attributes:
        images: [n, C, R, R] of the tweaked generator, the clone first if the local term joins.
        before: [n or n - 1, C, R, R], what the original draws for the latents other than the photo's.
        label: [n, c_dim] of `images`, None if unconditional.
        edited: [1, C, R, R], the clone after a random move of its latent; [0, C, R, R] without edits.
        wanted: likewise, what it shall be: the photo plus what that move changes in the original's image.
        begun: what D is shown, as far as it was there before `images`; on the lane "pairs".
    """

    images: Tensor
    before: Tensor
    label: Tensor | None
    edited: Tensor
    wanted: Tensor
    begun: Tensor | None


def _synthesise(
    generator: Generator,
    own: list[Tensor],
    rest: list[Tensor],
    moved: list[Tensor],
    maps: dict[str, Tensor],
    settings: TweakSettings,
) -> Tensor:
    """Images of ws [n, num_ws, w_dim], of all lists in turn; those in `own` and `moved` have the photo's noise maps."""
    lists = [*own, *rest, *moved]
    ws, consts = lists[0] if len(lists) == 1 else torch.cat(lists), generator.synthesis.noise_consts()
    noise = dict(maps) if own + moved and len(ws) == 1 else {}
    if own + moved and len(ws) > 1:
        for name, mine in maps.items():
            parts = [(mine, own), (consts[name], rest), (mine, moved)]
            noise[name] = torch.cat([value.expand(len(one), 1, -1, -1) for value, group in parts for one in group])
    dtype = Precision.named(settings.precision).dtype
    images: Tensor = generator.synthesis(
        ws, noise_mode="const", noise=noise, dtype=dtype, recompute=settings.recompute
    )
    return images
