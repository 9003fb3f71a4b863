"""Find the latent by gradient descent, in W or W+, with the noise maps if wanted.

Karras et al. 2020 (StyleGAN2, appendix D) for the schedule, the noise on w and the regularisation of the noise maps;
Abdal et al. 2019 (Image2StyleGAN) for W+.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clone_fast.errors import DivergenceError, SettingsError
from clone_fast.latent.latent import Latent
from clone_fast.losses import Reconstruction, Similarity
from clone_fast.nn import Generator
from clone_fast.progress import Progress, Record, quick_psnr, ramp


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
    check_every: int = 5

    def __post_init__(self) -> None:
        if self.space not in ("w", "w+"):
            raise SettingsError(f"space must be w or w+, got {self.space!r}")
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


def noise_structure(noise: Tensor) -> Tensor:
    """How far a map [r, r] is from white noise: squared autocorrelation at distance 1, over its pyramid down to 8x8."""
    total = noise.new_zeros([])
    level = noise[None, None]
    while True:
        for axis in (2, 3):
            total = total + (level * level.roll(1, dims=axis)).mean().square()
        if level.shape[2] <= 8:
            return total
        level = F.avg_pool2d(level, 2)


@torch.no_grad()
def _sample_w(generator: Generator, n: int, source: torch.Generator) -> Tensor:
    """Random w [n, w_dim], over all classes."""
    w: Tensor = generator.mapping(*generator.sample(n, source))[:, 0]
    return w


@torch.no_grad()
def _nearest(generator: Generator, photo: Tensor, w: Tensor) -> Tensor:
    """Of w_avg and a few of the w, pulled half-way to it, the one most like the photo at 8x8; [w_dim]."""
    mean = generator.mapping.w_avg
    tried = torch.cat([mean[None], mean.lerp(w[:32], 0.5)])
    small, errors = F.adaptive_avg_pool2d(photo, 8), []
    for part in tried.split(8):
        images = generator.synthesis(part[:, None].repeat(1, generator.num_ws, 1))
        errors.append((F.adaptive_avg_pool2d(images, 8) - small).square().mean(dim=[1, 2, 3]))
    return tried[torch.cat(errors).argmin()]


def optimise(
    generator: Generator,
    photo: Tensor,
    settings: LatentSettings,
    *,
    start: Latent | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """Find the latent whose image is most similar to the photo; the generator stays as it is.

    Args:
        generator: on the photo's device; its parameters get no gradient.
        photo: [1, C, R, R] in [-1, 1].
        start: where to begin, say an encoder's latent; by default near w_avg.
        progress: called at every check.

    Returns:
        The latent found. Ctrl-C ends the search with the latent so far. With 0 steps, the start itself.

    Raises:
        DivergenceError: the loss was not finite from the first step on.
        SettingsError: lpips was asked for and is not there.
    """
    source = torch.Generator().manual_seed(seed)
    similarity = lpips_similarity(photo.device) if settings.similarity == "lpips" else None
    loss_of = Reconstruction(photo, similarity=similarity)
    w = _sample_w(generator, settings.start_samples, source)
    spread = float((w - w.mean(dim=0)).square().sum(dim=1).mean().sqrt())
    first = _nearest(generator, photo, w) if start is None else start.ws.to(photo.device)
    base = Latent.expanded(first, generator)
    if settings.space == "w" and settings.steps > 0:
        base = base.mean(dim=1, keepdim=True)
    ws = base.detach().clone().requires_grad_(True)
    maps = dict(start.noise) if start is not None else {}
    if settings.noise_maps:
        for name, const in generator.synthesis.noise_consts().items():
            maps[name] = maps.get(name, const).detach().clone().requires_grad_(True)
    tuned = [ws, *(m for m in maps.values() if m.requires_grad)]
    optimizer = torch.optim.Adam(tuned, lr=settings.learning_rate, betas=(0.9, 0.99))
    record = Record("latent", settings.steps, settings.check_every, progress)

    def current() -> Latent:
        expanded = ws.detach().expand(-1, generator.num_ws, -1).clone()
        return Latent(expanded, {name: noise.detach().clone() for name, noise in maps.items()})

    good, interrupted = current(), False
    required = [p.requires_grad for p in generator.parameters()]
    generator.requires_grad_(False)
    try:
        for step in range(1, settings.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * ramp(step - 1, settings.steps, up=0.05, down=0.25)
            strength = settings.exploration * spread / math.sqrt(generator.w_dim)
            strength *= max(0.0, 1 - (step - 1) / (0.75 * settings.steps)) ** 2
            jitter = torch.randn(ws.shape, generator=source).to(ws.device) * strength
            image = generator.synthesis((ws + jitter).expand(-1, generator.num_ws, -1), noise_mode="const", noise=maps)
            loss = loss_of(image)
            if settings.noise_maps:
                loss = loss + settings.noise_regularization * sum(
                    (noise_structure(m) for m in maps.values()), start=loss.new_zeros([])
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if record.due(step):
                row = record.add(step, loss, quick_psnr(image, photo))
                if not math.isfinite(row["loss"]):
                    if len(record.rows) == 1:
                        raise DivergenceError("the search of the latent is not finite from the first step on")
                    break
                good = current()
            optimizer.step()
            with torch.no_grad():
                for m in tuned[1:]:  # keep the maps at zero mean and unit variance
                    m.sub_(m.mean()).mul_(m.square().mean().rsqrt())
        else:
            good = current()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for parameter, flag in zip(generator.parameters(), required, strict=True):
            parameter.requires_grad_(flag)
    return Outcome(good, record.rows, interrupted)
