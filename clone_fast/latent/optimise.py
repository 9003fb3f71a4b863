"""Find the latent by gradient descent, in W or W+, with the noise maps if wanted.

Karras et al. 2020 (StyleGAN2, appendix D) for the schedule, the noise on w and the regularisation of the noise maps;
Abdal et al. 2019 (Image2StyleGAN) for W+.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clone_fast.capture import ROWS, Board, Captured, Table, alike, rehearsing
from clone_fast.descent import Descent
from clone_fast.errors import DivergenceError, MemoryLimitError, SettingsError
from clone_fast.latent.latent import Latent
from clone_fast.losses import Reconstruction, Similarity, weighted
from clone_fast.memory import full, without_frames
from clone_fast.nn import Draw, Generator, Precision, drawn, frozen, settled
from clone_fast.ops.streams import aside, joined
from clone_fast.progress import Keeper, Progress, Record, quick_psnr, ramp
from clone_fast.stepwise import Pause, Steps, stepwise


@dataclass(frozen=True)
class LatentSettings:
    """How the latent is searched.

    Attributes:
        space: "w", one latent for all layers, or "w+", one for each.
        steps: of Adam.
        learning_rate: at the top of the ramp.
        noise_maps: optimise the noise maps, too, and keep them with the latent.
        noise_regularization: weight that keeps the maps free of structure, while they are optimised.
        exploration: standard deviation of the noise on w at the start, in units of w's own; gone at 3/4 of the way.
        start_samples: random latents for the mean and spread of w, and to choose the start among.
        similarity: "laplacian" (pyramid and mean square) or "lpips" (needs the lpips extra and its weights).
        precision: what the generator computes in, see `clone_fast.nn.PRECISIONS`; None for the device's, see `settled`.
        recompute: save memory: the backward computes block after block of the generator once more.
        check_every: steps between two reads of the loss.
    """

    space: str = "w+"
    steps: int = 200
    learning_rate: float = 0.1
    noise_maps: bool = False
    noise_regularization: float = 1e5
    exploration: float = 0.05
    start_samples: int = 512
    similarity: str = "laplacian"
    precision: str | None = None
    recompute: bool = False
    check_every: int = 5

    def __post_init__(self) -> None:
        if self.space not in ("w", "w+"):
            raise SettingsError(f"space must be w or w+, got {self.space!r}")
        Precision.named(self.precision)
        if self.steps < 0:
            raise SettingsError(f"the steps of the latent must be >= 0, got {self.steps}")
        for name in ("start_samples", "check_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.similarity not in ("laplacian", "lpips"):
            raise SettingsError(f"similarity must be laplacian or lpips, got {self.similarity!r}")


@dataclass
class Outcome:
    """A latent with the curve of its search.

    Attributes:
        latent: the last one, or the last finite one.
        rows: see `Record`.
        interrupted: whether Ctrl-C ended the search.
    """

    latent: Latent
    rows: list[dict[str, float]]
    interrupted: bool = False


def lpips_similarity(device: torch.device) -> Similarity:
    """LPIPS (Zhang et al. 2018) as a similarity, from the package `lpips` and the weights of its backbone.

    Raises:
        SettingsError: the package or the weights are not there.
    """
    try:
        import lpips
    except ImportError as error:
        raise SettingsError("similarity lpips needs the package: pip install 'clone_fast[lpips]'") from error
    try:
        model = lpips.LPIPS(net="alex", verbose=False).to(device).requires_grad_(False)
    except Exception as error:  # a download that failed, a missing backbone: every cause means the same to the user
        raise SettingsError(
            f"similarity lpips: the weights of its backbone cannot be loaded ({type(error).__name__}); "
            "fetch torchvision's AlexNet weights once, or use similarity laplacian"
        ) from error
    return lambda image, photo: model(image, photo).mean()


def noise_structure(maps: Sequence[Tensor]) -> Tensor:
    """How far maps [r, r] are from white noise: squared autocorrelation at distance 1, over their pyramids down to 8x8,
    added up. Levels of one size are a batch, or they would be hundreds of launches."""
    sizes: dict[int, list[Tensor]] = {}
    for one in maps:
        sizes.setdefault(len(one), []).append(one[None])
    found = []
    while sizes:
        size = max(sizes)
        level = torch.cat(sizes.pop(size))
        found += [(level * level.roll(1, dims=axis)).mean(dim=[1, 2]) for axis in (1, 2)]
        if size > 8:
            sizes.setdefault(size // 2, []).append(F.avg_pool2d(level[:, None], 2)[:, 0])
    return torch.cat(found).square().sum()


@torch.no_grad()
def _sample_w(generator: Generator, n: int, source: torch.Generator) -> Tensor:
    """Random w [n, w_dim], over all classes."""
    w: Tensor = generator.mapping(*generator.sample(n, source))[:, 0]
    return w


@torch.no_grad()
def _nearest(generator: Generator, photo: Tensor, w: Tensor, draw: Draw) -> Tensor:
    """Of w_avg and a few of the w, pulled half-way to it, the one most like the photo at 8x8; [w_dim]."""
    mean = generator.mapping.w_avg
    tried = torch.cat([mean[None], mean.lerp(w[:32], 0.5)])
    small, errors = F.adaptive_avg_pool2d(photo, 8), []
    for part in tried.split(8):
        images = draw(generator, part[:, None], None)
        errors.append((F.adaptive_avg_pool2d(images, 8) - small).square().mean(dim=[1, 2, 3]))
    return tried[torch.cat(errors).argmin()]


class Search:
    """The latent, its descent and the draws of one search; `step` is one iteration, a CUDA graph where possible.

    After its end another photo can take its place with `restart`, and goes on with the same graph.
    """

    def __init__(
        self,
        generator: Generator,
        photo: Tensor,
        settings: LatentSettings,
        *,
        start: Latent | None,
        seed: int,
        draw: Draw = drawn,
    ) -> None:
        settings = settled(settings, photo.device)
        self.generator, self.photo, self.settings = generator, torch.empty_like(photo), settings
        self.draw = draw
        self.precision = Precision.named(settings.precision)
        similarity = lpips_similarity(photo.device) if settings.similarity == "lpips" else None
        self.loss_of = Reconstruction(self.photo, similarity=similarity)
        rows = 1 if settings.space == "w" and settings.steps > 0 else generator.num_ws
        self.ws = photo.new_empty([1, rows, generator.w_dim]).requires_grad_(True)
        self.maps = {name: torch.empty_like(noise) for name, noise in start.noise.items()} if start is not None else {}
        if settings.noise_maps:
            for name, const in generator.synthesis.noise_consts().items():
                self.maps[name] = torch.empty_like(const).requires_grad_(True)
        self.tuned = [self.ws, *(m for m in self.maps.values() if m.requires_grad)]
        self.descent = Descent(
            [(self.tuned, settings.learning_rate)], betas=(0.9, 0.99), loss_scale=self.precision.loss_scale
        )
        self.source, self.spread = torch.Generator(), 0.0
        self.taken, self.size = 0, min(settings.steps, ROWS)
        self.table = Table({}, photo.device)
        self.board = Board(("loss", "psnr"), photo.device)
        kind = "latent", generator.arch, alike(settings)
        self.iterate = Captured(self._iterate, photo.device, kind, at_once=similarity is None)
        self.restart(photo, start=start, seed=seed)

    @torch.no_grad()
    def restart(self, photo: Tensor, *, start: Latent | None, seed: int) -> None:
        """Begin anew with a photo, in the memory that is there, so that a captured graph serves it. Nothing is left of
        the photo before; everything else is as it was given at first, and the shapes must be.
        """
        self.photo.copy_(photo)
        self.source.manual_seed(seed)
        w = _sample_w(self.generator, self.settings.start_samples, self.source)
        spread = float((w - w.mean(dim=0)).square().sum(dim=1).mean().sqrt())
        self.spread = spread / math.sqrt(self.generator.w_dim)
        first = _nearest(self.generator, photo, w, self.draw) if start is None else start.ws.to(photo.device)
        base = Latent.expanded(first, self.generator)
        self.ws.copy_(base if len(self.ws[0]) > 1 else base.mean(dim=1, keepdim=True))
        consts = self.generator.synthesis.noise_consts()
        for name, value in self.maps.items():
            value.copy_(consts[name] if start is None else start.noise.get(name, consts[name]))
        self.descent.restart()
        self.taken = 0
        self.table.refill(self._draw())
        self.board.clear()

    def serves(self, settings: LatentSettings, start: Latent | None) -> bool:
        """Whether `restart` can take a photo that is searched with these."""
        maps = set() if start is None else set(start.noise)
        return self.settings == settled(settings, self.photo.device) and (settings.noise_maps or maps == set(self.maps))

    def latent(self) -> Latent:
        """A copy of it as it is."""
        ws = self.ws.detach().expand(-1, self.generator.num_ws, -1).clone()
        return Latent(ws, {name: noise.detach().clone() for name, noise in self.maps.items()})

    def step(self) -> None:
        """One iteration; the board then holds loss and PSNR of the latent before its update."""
        if self.taken and self.taken % self.size == 0:
            self.table.refill(self._draw())
        self.taken += 1
        with self.precision.active():
            self.iterate()

    def release(self) -> None:
        """Let go of what only further iterations need: the graph, and gradients in its memory."""
        self.iterate.release()
        for tensor in self.tuned:
            tensor.grad = None

    def _draw(self) -> dict[str, Tensor]:
        """The rows of the next iterations: "rate" [], and "jitter" of the shape of ws, the noise on w."""
        total, rates, jitter = self.settings.steps, [], []
        for step in range(self.taken, self.taken + self.size):
            rates.append(ramp(step, total, up=0.05, down=0.25))
            strength = self.settings.exploration * self.spread * max(0.0, 1 - step / (0.75 * total)) ** 2
            jitter.append(torch.randn(self.ws.shape, generator=self.source) * strength)
        rows = torch.stack(jitter) if jitter else torch.zeros(0, *self.ws.shape)
        return {"rate": torch.tensor(rates), "jitter": rows}

    def _iterate(self) -> None:
        """All that an iteration does, on static memory: what a graph replays."""
        s, device = self.settings, self.photo.device
        # beside the network, as is all that only a step of Adam or a later iteration needs
        rate = aside(device, "measure", lambda: self.table["rate"], reads=[])
        structure = None
        if s.noise_maps:
            structure = aside(device, "structure", partial(noise_structure, list(self.maps.values())), reads=[])
        ws = (self.ws + self.table["jitter"]).expand(-1, self.generator.num_ws, -1)
        image = self.generator.synthesis(
            ws, noise_mode="const", noise=self.maps, dtype=self.precision.dtype, recompute=s.recompute
        )
        joined(device, "measure")
        psnr = aside(device, "measure", partial(quick_psnr, image, self.photo), reads=[image])
        loss = self.loss_of(image)
        if structure is not None:
            joined(device, "structure")
            loss = loss + weighted(s.noise_regularization, structure)

        def note() -> None:
            self.board.write({"loss": loss, "psnr": psnr})
            self.table.advance()

        aside(device, "measure", note, reads=[loss, psnr])
        self.descent.step(loss, rate)
        joined(device, "measure")
        with torch.no_grad():
            for m in [] if rehearsing() else self.tuned[1:]:  # keep the maps at zero mean and unit variance
                variance, mean = torch.var_mean(m, correction=0)
                m.sub_(mean).mul_(variance.rsqrt())


@stepwise
def optimise(
    generator: Generator,
    photo: Tensor,
    settings: LatentSettings,
    *,
    start: Latent | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    spare: list[Search] | None = None,
    draw: Draw = drawn,
) -> Steps[Outcome]:
    """Find the latent whose image is most similar to the photo; the generator stays as it is.

    Args:
        generator: on the photo's device; its parameters get no gradient.
        photo: [1, C, R, R] in [-1, 1].
        start: where to begin, say an encoder's latent; by default near w_avg.
        progress: called at every check.
        spare: the work of photos before, of the same generator and settings: one is taken for this photo and put there
            again at its end. Without it the memory is given back.
        draw: how the images are drawn among which the search begins.

    Returns:
        The latent found. Ctrl-C, or a memory that is full (with a RuntimeWarning), end the search with the latent of
        the last check. With 0 steps, the start itself.

    Raises:
        DivergenceError: the loss was not finite from the first step on.
        MemoryLimitError: the first step does not fit into the device's memory.
        SettingsError: lpips was asked for and is not there.
    """
    try:
        if spare:
            work = spare.pop()
            work.restart(photo, start=start, seed=seed)
        else:
            work = Search(generator, photo, settings, start=start, seed=seed, draw=draw)
    except torch.OutOfMemoryError as error:
        without_frames(error)
        raise MemoryLimitError(full("latent", generator.arch, photo.device)) from error
    record = Record("latent", settings.steps, settings.check_every, progress)
    keeper = Keeper(work.tuned, [])
    interrupted = diverged = memory = False
    with frozen(generator):
        try:
            for step in range(1, settings.steps + 1):
                due = record.due(step)
                if due:
                    keeper.look()
                work.step()
                yield Pause.READ if due else Pause.STEP
                if not due:
                    continue
                row = record.add(step, **work.board.slots)
                if not math.isfinite(row["loss"]):
                    if len(record.rows) == 1:
                        raise DivergenceError("the search of the latent is not finite from the first step on")
                    diverged = True
                    break
                keeper.keep()
        except KeyboardInterrupt:
            interrupted = True
        except torch.OutOfMemoryError:
            memory = True
        finally:
            if spare is None or memory:
                work.release()
    if memory:
        message = full("latent", generator.arch, photo.device)
        if not record.rows:
            raise MemoryLimitError(message)
        yield Pause.FULL
        warnings.warn(f"{message}; the latent of the last check is kept", RuntimeWarning, stacklevel=4)
    if interrupted or diverged or memory:
        keeper.restore()
    if spare is not None and not memory:
        spare.append(work)
    return Outcome(work.latent(), record.rows, interrupted)
