"""What photos side by side can gain on a GPU: the same captured iterations on as many streams, and on one.

    python -m benchmarks.side_by_side

Config F at 1024x1024 with random weights, bf16. Prints milliseconds of an iteration of one photo; no host is in them
but the launch of a graph, so that no `invert_each` can gain more.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

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
    generator = Generator(Architecture()).to(device).eval().requires_grad_(False)
    discriminator = Discriminator(Architecture()).to(device).eval().requires_grad_(False)
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


def milliseconds(works: Sequence[Work], streams: Sequence[torch.cuda.Stream], iterations: int) -> float:
    """Of an iteration of one, when the last graph of each is launched in turn: the shortest of three, by the wall."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(iterations):
            for stream, (_, work) in zip(streams, works, strict=True):
                with torch.cuda.stream(stream):
                    list(work.iterate.replays.values())[-1]()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) * 1e3)
    return min(found) / iterations / len(works)


def told(mode: str, most: int, iterations: int) -> None:
    """Print a line for each number of photos."""
    works = tweaks(mode, most)
    for count in (n for n in (1, 2, 4, 8) if n <= most):
        streams = [stream for stream, _ in works[:count]]
        apart = milliseconds(works[:count], streams, iterations)
        alone = milliseconds(works[:count], streams[:1] * count, iterations)
        print(f"{mode}, {count} photos: {apart:.3f} ms on {count} streams, {alone:.3f} ms on one")


def main() -> None:
    """In both modes."""
    for mode, (most, iterations) in MODES.items():
        told(mode, most, iterations)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
