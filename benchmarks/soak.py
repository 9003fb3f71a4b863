"""Thousands of iterations of Clone: memory must not grow, nothing become NaN, no iteration grow slower.

    python -m benchmarks.soak --iterations 2000 [--resolution 1024] [--precision bf16] [--json FILE]

Config F with random weights, every default term and R1. Prints, and writes to the file, a line every 100 iterations,
and at the end a verdict; where that is bad, the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.captured import photo_of
from clone_fast.latent import Latent
from clone_fast.nn import PRECISIONS, Architecture, Discriminator, Generator
from clone_fast.tweak import Tweak, TweakSettings

EVERY = 100  # iterations; the first so many compile and capture
DRAWN_GB = 0.02  # a block that the allocator may keep when rows are drawn anew, every 1024 iterations
SLOWER = 1.05  # the last two lines over the first two after the warm-up, at most


def soak(
    arch: Architecture, iterations: int, precision: str, device: torch.device, every: int = EVERY
) -> Iterator[dict[str, Any]]:
    """A row for every so many iterations: memory in GB, milliseconds of an iteration, loss, whether all is finite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator, judge = Generator(arch).to(device), Discriminator(arch).to(device)
    for network in (generator, judge):
        network.eval().requires_grad_(False)
    ws = generator.mapping(*generator.sample(1, torch.Generator().manual_seed(0))).clone()
    settings = TweakSettings(steps=iterations, precision=precision)
    work = Tweak(generator, judge, Latent(ws), photo_of(generator, device), settings)
    for done in range(every, iterations + 1, every):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(every):
            values = work.step()
        _synchronize(device)
        row: dict[str, Any] = {"iterations": done, "ms": (time.perf_counter() - began) * 1e3 / every}
        row |= {name: float(values[name]) for name in ("loss", "loss_d", "psnr")}
        row["finite"] = all(bool(torch.isfinite(p).all()) for p in (*work.moved(), *work.judged()))
        row |= {"captured": bool(work.iterate.replays), "allocated_gb": 0.0, "reserved_gb": 0.0}
        if device.type == "cuda":
            row["allocated_gb"] = torch.cuda.memory_allocated(device) / 1e9
            row["reserved_gb"] = torch.cuda.memory_reserved(device) / 1e9
        yield row


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def complaints(rows: list[dict[str, Any]]) -> list[str]:
    """What is bad about a run; nothing if it is flat. rows: at least five, of which the first is the warm-up."""
    found = []
    for kind, spare in (("allocated_gb", 0.0), ("reserved_gb", DRAWN_GB)):
        settled, last = rows[1][kind], rows[-1][kind]
        if last > settled + spare:
            name = f"{last:.3f} GB {kind.removesuffix('_gb')}"
            found.append(f"memory grew: {name}, {settled:.3f} after the first {rows[1]['iterations']}")
    wrong = [row["iterations"] for row in rows if not (row["finite"] and math.isfinite(row["loss"]))]
    if wrong:
        found.append(f"not finite at iteration {wrong[0]}")
    before, after = (sum(row["ms"] for row in part) / 2 for part in (rows[1:3], rows[-2:]))
    if after > SLOWER * before:
        found.append(f"slower: {after:.2f} ms an iteration at the end, {before:.2f} after the warm-up")
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--every", type=int, default=EVERY, help="iterations of a line, a fifth of all at most")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.every < 1 or options.iterations < 5 * options.every:
        parser.error(f"--iterations must be at least 5 times --every, got {options.iterations} and {options.every}")
    about = {"resolution": options.resolution, "precision": options.precision, **common.origin()}
    print(about, flush=True)
    rows: list[dict[str, Any]] = []
    arch = Architecture(img_resolution=options.resolution)

    def keep(**more: Any) -> None:
        if options.json is not None:
            options.json.write_text(json.dumps({"about": about, "rows": rows, **more}, indent=1) + "\n")

    for row in soak(arch, options.iterations, options.precision, common.DEVICE, options.every):
        rows.append(row)
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
        keep()
    bad = complaints(rows)
    keep(complaints=bad)
    print("; ".join(bad) if bad else f"flat over {rows[-1]['iterations']} iterations", flush=True)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
