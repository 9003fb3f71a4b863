"""What photos side by side can gain on a GPU: the same captured iterations on as many streams, and on one.

    python -m benchmarks.side_by_side

Config F at 1024x1024 with random weights, bf16. Prints milliseconds of an iteration of one photo; no host is in them
but the launch of a graph, so that no `invert_each` can gain more.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.captured import photo_of
from clone_fast.latent import Latent
from clone_fast.nn import Architecture, Discriminator, Generator
from clone_fast.tweak import Tweak, TweakSettings

Work = tuple[torch.cuda.Stream, Tweak]

MODES = {"recon": (8, 40), "clone": (4, 8)}  # photos, iterations that are timed
WARM = 6


def tweaks(mode: str, count: int) -> list[Work]:
    """So many, each captured on a stream of its own."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    networks = [kind(Architecture()).to(device).eval().requires_grad_(False) for kind in (Generator, Discriminator)]
    generator, discriminator = networks
    photo = photo_of(generator, device)
    latent = Latent(generator.mapping(torch.randn(1, generator.z_dim, device=device)).clone())
    settings = TweakSettings(steps=1000, mode=mode, precision="bf16", r1_interval=1000)
    made = []
    for _ in range(count):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work = Tweak(generator, discriminator, latent, photo, settings)
            for _ in range(WARM):
                work.step()
        torch.cuda.synchronize()
        made.append((stream, work))
    return made


def launch(streams: Sequence[torch.cuda.Stream], works: Sequence[Work], iterations: int) -> None:
    """The last graph of each, in turn, on these streams."""
    for _ in range(iterations):
        for stream, (_, work) in zip(streams, works, strict=True):
            with torch.cuda.stream(stream):
                list(work.iterate.replays.values())[-1]()


def milliseconds(run: Callable[[], None]) -> float:
    """The shorter of two, by the wall, after one."""
    run()
    found = []
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) * 1e3)
    return min(found)


def main() -> None:
    """Print a line for each number of photos."""
    for mode, (most, iterations) in MODES.items():
        works = tweaks(mode, most)
        for count in (n for n in (1, 2, 4, 8) if n <= most):
            chosen = works[:count]
            apart = milliseconds(lambda: launch([stream for stream, _ in chosen], chosen, iterations))
            alone = milliseconds(lambda: launch([chosen[0][0]] * count, chosen, iterations))
            each = iterations * count
            print(f"{mode}, {count} photos: {apart / each:.3f} ms on {count} streams, {alone / each:.3f} ms on one")
        del works, chosen
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
