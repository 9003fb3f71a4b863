"""The tweak: move the generator's manifold until it passes through the photo, and keep the rest of it in place.

Feng et al. 2022, "Near Perfect GAN Inversion" (arXiv 2202.11833). With the latent of the photo x fixed, G and D are
updated on

    L = 1_p [L_recon + lambda * L_adv_local] + L_global

where L_recon compares G(latent) with x, L_adv_local = log D(x) + log(1 - D(G(latent))) keeps the clone realistic, and
L_global = E_x[log D(x)] + E_z[log(1 - D(G(z)))] keeps the manifold; the local term joins with probability p.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from clone_fast.adversary import usable
from clone_fast.errors import DivergenceError, MemoryLimitError
from clone_fast.iteration import Tweak
from clone_fast.latent import Latent
from clone_fast.losses import Similarity
from clone_fast.memory import full, without_frames
from clone_fast.nn import Discriminator, Generator, settled
from clone_fast.progress import Keeper, Progress, Record
from clone_fast.settings import TweakSettings
from clone_fast.stepwise import Pause, Steps, stepwise

__all__ = ["Tweak", "TweakSettings", "Tweaked", "tweak", "usable"]


@dataclass
class Tweaked:
    """What the tweak leaves.

    Attributes:
        generator, discriminator: copies, tweaked; the discriminator None where none was given.
        latent: the one that was given, with the photo's noise maps where they were moved.
        rows: see `Record`.
        steps: iterations taken.
        stopped: why it ended: "steps", "target", "interrupted", "diverged" or "memory" (it was full).
        slowed: how often it went back to its last good check, to go on with half the learning rates.
    """

    generator: Generator
    discriminator: Discriminator | None
    latent: Latent
    rows: list[dict[str, float]]
    steps: int
    stopped: str
    slowed: int = 0


COLLAPSE_DB = 8.0  # a PSNR that far below the best so far is not going to recover within the steps of a tweak
PATIENCE = 6  # times that a tweak goes back to its last good check with half the learning rates, before it gives up


@stepwise
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
    spare: list[Tweak] | None = None,
) -> Steps[Tweaked]:
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
        spare: the work of photos before, of the same networks and settings: one is taken for this photo and put there
            again at its end. Without it the memory is given back.

    Returns:
        The tweaked networks. After a loss that is not finite, or a PSNR that collapses, the tweak goes on from the last
        good check with half the learning rates: what is right for them depends on the network's width. Ctrl-C, the
        seventh such check, or a memory that is full (with a RuntimeWarning) end it with the weights of the last good
        one.

    Raises:
        SettingsError: the settings need a discriminator or a label that was not given.
        DivergenceError: the loss was not finite from the first step on.
        MemoryLimitError: the first iteration does not fit into the device's memory.
    """
    settings = settled(settings, photo.device)
    try:
        if spare:
            work = spare.pop()
            work.restart(latent, photo, seed=seed)
        else:
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
        keeper = Keeper(work.moved(), work.judged())
    except torch.OutOfMemoryError as error:
        without_frames(error)  # what was half made, before the memory that is free is asked for
        raise MemoryLimitError(full("tweak", generator.arch, photo.device, settings)) from error
    record = Record("tweak", settings.steps, settings.check_every, progress)
    stopped, step, slowed, best = "interrupted" if interrupted else "", 0, 0, -math.inf
    try:
        while not stopped and step < settings.steps:
            step += 1
            due = record.due(step)
            if due:
                keeper.look()
            values = work.step()
            yield Pause.READ if due else Pause.STEP
            if not due:
                continue
            fresh = "psnr" in values  # an iteration without the local term says nothing new of the clone
            loss, psnr = values.pop("loss"), work.board.slots["psnr"]
            values.pop("psnr", None)
            row = record.add(step, loss, psnr, **values)
            best = max(best, row["psnr"])
            if not math.isfinite(row["loss"]) or row["psnr"] < best - COLLAPSE_DB:
                if slowed == PATIENCE or len(record.rows) == 1:
                    stopped = "diverged"
                else:
                    slowed += 1
                    keeper.restore()
                    work.slow_down(0.5)
            else:
                keeper.keep()
                if fresh and settings.target_psnr is not None and row["psnr"] >= settings.target_psnr:
                    stopped = "target"
    except KeyboardInterrupt:
        stopped = "interrupted"
    except torch.OutOfMemoryError:
        stopped = "memory"
    if stopped == "memory":
        work.release()
        message = full("tweak", generator.arch, photo.device, settings)
        if not record.rows:
            raise MemoryLimitError(message)
        yield Pause.FULL
        warnings.warn(f"{message}; the weights of the last check are kept", RuntimeWarning, stacklevel=4)
    if not stopped and not all(torch.isfinite(value).all() for value in work.moved()):
        stopped = "diverged"  # in the very last update, which no check has seen
    if stopped == "diverged" and len(record.rows) == 1:
        raise DivergenceError("the tweak is not finite from the first step on; nothing was changed")
    if stopped:
        keeper.restore()
    moved = Latent(latent.ws, {name: noise.detach().clone() for name, noise in work.maps.items()})
    generator, judge = work.generator, None if work.adversary is None else work.adversary.discriminator
    if spare is not None and stopped != "memory":  # the work keeps its own for the next photo
        generator, judge = copy.deepcopy(generator), copy.deepcopy(judge)
        spare.append(work)
    else:
        work.release()
    judge = judge or copy.deepcopy(discriminator)
    for module in (generator, judge):
        if module is not None:
            module.eval().requires_grad_(False)
    return Tweaked(generator, judge, moved, record.rows, step, stopped or "steps", slowed)
