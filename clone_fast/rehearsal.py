"""All that an inversion launches on a GPU, compiled side by side before its first step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clone_fast.capture import alike, rehearse, within_memory
from clone_fast.iteration import Tweak, given
from clone_fast.latent import Latent, LatentSettings, Search
from clone_fast.nn import Discriminator, Generator, frozen
from clone_fast.settings import TweakSettings
from clone_fast.stills import Stills

MEASURED = (1, 8)  # images that the metrics draw at once


def rehearse_inversion(
    generator: Generator,
    discriminator: Discriminator | None,
    photo: Tensor,
    search: LatentSettings,
    settings: TweakSettings,
    stills: Stills,
    *,
    start: Latent | None,
    **others: Any,
) -> None:
    """Once for a network and settings: one start of the compilers for search, tweak and metrics, not one for each.

    Args:
        generator, discriminator, photo, search, settings, stills, start: what the stages get.
        others: further arguments of `Tweak`: real_images, label and similarity.
    """
    device = photo.device

    def run() -> None:
        ws = generator.mapping.w_avg.expand(1, generator.num_ws, -1)
        # what does not fit into the memory is told by the stage itself
        if search.steps:
            with within_memory(), frozen(generator):
                seek = Search(generator, photo, search, start=start, seed=0, draw=stills.draw)
                with seek.precision.active():
                    seek.iterate.rehearse()
        with within_memory():
            Tweak(generator, discriminator, Latent(ws.clone()), photo, settings, **others)  # rehearses by itself
        with within_memory():
            for n in MEASURED:
                images = stills.draw(generator, ws.repeat(n, 1, 1))
                stills.draw(generator, ws.repeat(n, 1, 1), generator.synthesis.noise_consts())  # as of a copy
            if discriminator is not None:
                stills.features(images)  # of the most alone

    judge = None if discriminator is None else discriminator.arch
    kind = "invert", generator.arch, judge, alike(search), start is None, alike(settings), given(**others)
    rehearse(device, kind, run)
