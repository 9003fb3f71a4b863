"""The tweak for networks of other codebases: their modules in, the same modules out, with other numbers in them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clone_fast.checkpoints import counterparts, write_back
from clone_fast.errors import DivergenceError
from clone_fast.invert import one_hot, override, read_real_images
from clone_fast.latent import Latent
from clone_fast.losses import Similarity
from clone_fast.photo import load_photo
from clone_fast.progress import Progress, quick_psnr
from clone_fast.tweak import TweakSettings, tweak


@dataclass(frozen=True)
class Tuned:
    """What `tune` tells; the tuned weights are in the modules that it was given.

    Attributes:
        image: [1, C, R, R] float32 in [-1, 1], the clone: what G now draws for the latent with constant noise, in
            float32.
        psnr: of the clone and the photo, in dB.
        history: {"step", "loss", "psnr", ...} of every check: the curve.
        steps: iterations taken.
        stopped: why it ended: "steps", "target", "interrupted", "diverged" or "memory", see `Tweaked`.
        slowed: how often it went on from its last good check with half the learning rates.
    """

    image: Tensor
    psnr: float
    history: list[dict[str, float]]
    steps: int
    stopped: str
    slowed: int


def tune(
    G: nn.Module,
    D: nn.Module | None,
    photo: Any,
    latent: Latent | Tensor,
    *,
    steps: int | None = None,
    mode: str | None = None,
    target_psnr: float | None = None,
    precision: str | None = None,
    recompute: bool | None = None,
    real_images: str | os.PathLike[str] | Tensor | None = None,
    label: int | None = None,
    seed: int = 0,
    similarity: Similarity | None = None,
    tweak_settings: TweakSettings | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Tune a generator of another codebase to a photo, in place, with the iterations of `invert`.

    The modules stay the same objects with the same parameters in the same order, and so do their optimisers, modes and
    `requires_grad`; what the tweak moved is copied into them at the very end, all at once. That is the synthesis
    network and, unless noise_lr is 0, the constant noise, which takes the photo's maps; and D in mode clone.

    Args:
        G: NVIDIA's StyleGAN2 generator (stylegan2-ada-pytorch, stylegan3), from a pickle or constructed, or
            rosinality's (and the decoder of pSp, e4e, ...), in float32; what is computed in is `precision`.
        D: its discriminator, of either family; None for mode recon.
        photo: anything that `load_photo` reads, such as [1, 3, R, R] in [-1, 1].
        latent: its latent, which stays: [w_dim], [num_ws, w_dim], [1, num_ws, w_dim] or a `Latent`.
        steps, target_psnr, precision, recompute, real_images, label, seed, similarity, progress: as of `invert`.
        mode: "clone" or "recon"; by default "clone" with a D, "recon" without.
        tweak_settings: everything else; the arguments above take precedence.

    Returns:
        The clone and the curve. Ctrl-C ends the tweak with the best so far.

    Raises:
        CheckpointError: G or D is no such network, or a variant that draws or judges otherwise than StyleGAN2 does.
        PhotoError, SettingsError: the photo, the latent or a setting cannot be used.
        DivergenceError, MemoryLimitError: see `clone_fast.tweak.tweak`.
        Whatever is raised, Ctrl-C included, G and D are as they were.
    """
    if mode is None and tweak_settings is None and D is None:
        mode = "recon"
    asked = {"steps": steps, "mode": mode, "target_psnr": target_psnr, "precision": precision, "recompute": recompute}
    settings: TweakSettings = override(tweak_settings or TweakSettings(), **asked)
    judging = D if settings.adversarial else None
    with torch.inference_mode(False), torch.enable_grad():
        generator, judge = counterparts(G, judging)
        original = generator.ours
        start = Latent.of(latent, original)
        device = start.ws.device
        target = load_photo(photo, original.img_resolution).to(device)
        with torch.autocast(device.type, enabled=False):
            done = tweak(
                original,
                None if judge is None else judge.ours,
                start,
                target,
                settings,
                real_images=read_real_images(real_images, original),
                label=one_hot(label, original, device),
                similarity=similarity,
                seed=seed,
                progress=progress,
            )
            done.latent.settle(done.generator)
            image = done.latent.picture(done.generator)
        updates = generator.updates(done.generator)
        if judge is not None and done.discriminator is not None:
            updates += judge.updates(done.discriminator)
        if not all(bool(value.isfinite().all()) for _, value in updates):
            raise DivergenceError("the tweak ended with weights that are not finite; nothing was changed")
        told = Tuned(image, float(quick_psnr(image, target)), done.rows, done.steps, done.stopped, done.slowed)
        write_back(updates)
    return told
