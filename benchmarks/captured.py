"""Captured iterations against eager ones on a GPU: the same curve, and how long one takes.

    python -m benchmarks.captured [--json FILE] [--resolution 1024] [--precision bf16] [--only-times]

First, with the demo network and 20 steps, in both modes, with and without the local term and R1, and for the search of
the latent: captured and eager runs must end as near to one another as two eager runs do, whose sums are not always in
the same order. A similarity that reads on the host must fall back. Then config F with random weights is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from clone_fast.adversary import Adversary
from clone_fast.checkpoints import load_network
from clone_fast.demo import DEMO_NETWORK
from clone_fast.latent import Latent, LatentSettings, optimise
from clone_fast.latent.optimise import Search
from clone_fast.nn import PRECISIONS, Architecture, Discriminator, Generator, Network
from clone_fast.tweak import Tweak, TweakSettings, tweak

APART = "clone, real and fake apart"
CURVE = 0.05  # how far two curves may be apart, relative, where two eager ones are nearer than a third of it


def captures(allowed: bool) -> AbstractContextManager[Any]:
    """With CLONE_FAST_CAPTURE set."""
    return mock.patch.dict(os.environ, CLONE_FAST_CAPTURE=str(int(allowed)))


def apart_in_d(wanted: bool) -> AbstractContextManager[Any]:
    """With D's real images and fakes in two forwards, as without this project's `Adversary.compare`."""
    if not wanted:
        return nullcontext()

    def compare(
        self: Adversary, real: Sequence[Tensor], fake: Tensor, label: Tensor | None, watch: Any = None, _: Any = None
    ) -> Any:
        fake = fake.detach().requires_grad_(self.one_pass)
        logits = [self.judge(torch.cat(list(real)), label), self.judge(fake, label, watch)]
        return torch.stack(logits, dim=1).flatten(0, 1), fake

    return mock.patch.object(Adversary, "compare", compare)


def photo_of(generator: Generator, device: torch.device, seed: int = 5) -> Tensor:
    """A photo that the generator cannot draw: one of its images, under a smooth pattern."""
    source = torch.Generator().manual_seed(seed)
    size = generator.img_resolution
    with torch.no_grad():
        image: Tensor = generator(*generator.sample(1, source), noise_mode="const")
    rough = torch.rand(1, 3, 4, 4, generator=source).to(device) * 2 - 1
    return (0.7 * image + 0.3 * F.interpolate(rough, size=size, mode="bilinear")).clamp(-1, 1)


def apart(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """The largest relative difference of two curves' losses."""
    pairs = zip(one, other, strict=True)
    return max(abs(a["loss"] - b["loss"]) / (abs(b["loss"]) + 1e-9) for a, b in pairs)


def compare(net: Network, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the comparison; raises AssertionError where a captured curve is not the eager one."""
    generator, found = net.generator, []
    photo = photo_of(generator, device)
    start = optimise(generator, photo, LatentSettings(steps=0)).latent
    base = TweakSettings(steps=20, check_every=1, r1_interval=4)
    cases: dict[str, TweakSettings] = {
        "recon": replace(base, mode="recon"),
        "clone": base,
        "clone, p 0.6": replace(base, local_probability=0.6),
        "clone, mapping": replace(base, tune_mapping=True),
    }
    runs: dict[str, Any] = {
        name: lambda s=s: tweak(generator, net.discriminator, start, photo, s).rows for name, s in cases.items()
    }
    for maps in (False, True):
        search = LatentSettings(steps=20, check_every=1, noise_maps=maps)
        runs[f"latent{', maps' * maps}"] = lambda s=search: optimise(generator, photo, s).rows
    for name, run in runs.items():
        with captures(False):
            eager, again = run(), run()
        with captures(True), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a fallback is no capture
            captured = run()
        noise, difference = apart(again, eager), apart(captured, eager)
        row = {"case": name, "eager_eager": noise, "captured_eager": difference}
        row |= {"psnr_eager": eager[-1]["psnr"], "psnr_captured": captured[-1]["psnr"]}
        found.append(row)
        print(row, flush=True)
        if difference > max(3 * noise, 1e-3) and difference > CURVE:
            raise AssertionError(f"{name}: the captured curve is {difference:.2g} from the eager one")

    def reading(image: Tensor, wanted: Tensor) -> Tensor:
        loss = F.mse_loss(image, wanted)
        return loss * (1.0 if loss.item() > 0 else 0.0)

    may = mock.patch.dict(os.environ, CLONE_FAST_STRICT="0")
    with may, captures(True), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fallen = tweak(generator, net.discriminator, start, photo, base, similarity=reading).rows
    with captures(False):
        eager = tweak(generator, net.discriminator, start, photo, base, similarity=reading).rows
    row = {"case": "falls back", "captured_eager": apart(fallen, eager), "told": [str(one.message) for one in told]}
    found.append(row)
    print(row, flush=True)
    return found


def timed(work: Any, steps: int, key: Any) -> dict[str, list[float]]:
    """Milliseconds of the GPU by `key()` of each of so many steps, and under "host" those of the host."""
    events, found = [], defaultdict(list)
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        name = key()
        began = time.perf_counter()
        start.record()
        work.step()
        end.record()
        found[f"host {name}"].append((time.perf_counter() - began) * 1e3)
        events.append((name, start, end))
    torch.cuda.synchronize()
    for name, start, end in events:
        found[name].append(start.elapsed_time(end))
    return found


def clock(resolution: int, precision: str, device: torch.device) -> list[dict[str, Any]]:
    """Times and memory of an iteration of config F, captured and eager, by variant."""
    arch = Architecture(img_resolution=resolution)
    torch.manual_seed(0)
    generator = Generator(arch).to(device).eval().requires_grad_(False)
    judge = Discriminator(arch).to(device).eval().requires_grad_(False)
    photo = photo_of(generator, device)
    latent = Latent(generator.mapping(torch.randn(1, arch.z_dim, device=device)).clone())
    settings = TweakSettings(steps=40, r1_interval=2, precision=precision)
    rows = []
    for name in ("recon", "clone", APART, "latent"):
        for capture in (False, True):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            with captures(capture), apart_in_d(name == APART):
                work: Any
                if name == "latent":
                    work = Search(generator, photo, LatentSettings(steps=40, precision=precision), start=latent, seed=0)
                else:
                    work = Tweak(generator, judge, latent, photo, replace(settings, mode=name[:5]))

                def variant(work: Any = work) -> str:
                    adversary = getattr(work, "adversary", None)
                    due = adversary is not None and adversary.turns % work.settings.r1_interval == 0
                    return "R1" if due else "plain"

                began = time.perf_counter()
                timed(work, 6 if name.startswith("clone") else 3, variant)  # eager calls of both variants, and captures
                warm = time.perf_counter() - began
                times = timed(work, 12 if capture else 4, variant)
            row: dict[str, Any] = {"what": name, "captured": bool(work.iterate.replays), "warm_up_s": round(warm, 2)}
            row |= {f"ms {key}": round(statistics.median(value), 3) for key, value in times.items()}
            row |= {"peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
            row |= {"reserved_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2)}
            rows.append(row)
            print(row, flush=True)
            work.release()
            del work, variant
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    parser.add_argument("--only-times", action="store_true", help="leave the comparison out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.captured needs a CUDA device")
    device = torch.device("cuda")
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "precision": arguments.precision}
    print(about, flush=True)
    compared = [] if arguments.only_times else compare(load_network(DEMO_NETWORK).to(device), device)
    result = about | {"compared": compared, "timed": clock(arguments.resolution, arguments.precision, device)}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
