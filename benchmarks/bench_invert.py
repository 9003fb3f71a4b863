"""The whole job: photo to clone, the command from cold, PSNR over time, photos per hour.

    pytest benchmarks/bench_invert.py --benchmark-only                      # all rows, or those of -k:
    pytest benchmarks/bench_invert.py --benchmark-only -k "photo or (each and recon-8)"

On a GPU config F at 1024x1024 with random weights, bf16; each row is written to benchmarks/results/invert.json as soon
as it is known, and one that fails costs no other. Times are the wall's, of a photo that is loaded, searched, tweaked
and measured, as `invert` does it. CLONE_FAST_BENCH_PHOTOS: photos of a row of many, 16 by default; under torchrun so
many for each GPU. On a CPU a tiny network, to see that it works.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import common, invert_table
from benchmarks.captured import photo_of
from clone_fast import invert, invert_each
from clone_fast.checkpoints import save_network
from clone_fast.demo.photos import photo as real_photo
from clone_fast.errors import CloneFastError
from clone_fast.inversion import Inversion
from clone_fast.invert import open_network
from clone_fast.nn import PRECISIONS, Architecture, Discriminator, Generator, Network
from clone_fast.photo import save_png

ROOT = Path(__file__).resolve().parent.parent
ARCH = Architecture() if common.ON_GPU else Architecture(
    img_resolution=32, z_dim=16, w_dim=16, channel_base=512, channel_max=16, mapping_layers=2
)  # fmt: skip
NAME = "F 1024" if common.ON_GPU else "tiny 32"
PRECISION = "bf16" if common.ON_GPU else "fp32"
PHOTOS = int(os.environ.get("CLONE_FAST_BENCH_PHOTOS") or (16 if common.ON_GPU else 2))
LATENT = 200 if common.ON_GPU else 3
STEPS = {"photo": 100, "recon": 100, "clone": 30} if common.ON_GPU else {"photo": 2, "recon": 2, "clone": 2}
FEW: dict[str, Any] = {"latent_steps": 2, "steps": 2}  # with R1 and without: what compiles all kernels of a mode
AT_ONCE: tuple[str, ...] = ("loop", "1", "4", "8") if common.ON_GPU else ("loop", "2")
PROCESSES = [n for n in (1, 2, 4, 8) if n <= max(1, torch.cuda.device_count())]
PATIENCE = 400  # seconds of a command
FOUND: dict[str, Any] = {"network": NAME, "precision": PRECISION}


@dataclass(frozen=True)
class World:
    """The files of a run.

    Attributes:
        folder: of files of this run alone.
        network: a file, random weights.
        photos: [3, R, R] each, on the CPU.
    """

    folder: Path
    network: Path
    photos: list[Tensor]

    def pictures(self, count: int, name: str) -> Path:
        """A folder with so many photos."""
        folder = self.folder / name
        folder.mkdir()
        for i, one in zip(range(count), itertools.cycle(self.photos), strict=False):
            save_png(folder / f"{i}.png", one[None])
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("invert")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(Generator(ARCH).eval(), Discriminator(ARCH).eval())
    save_network(network, folder / "network.safetensors")
    generator = network.generator.to(common.DEVICE)
    photos = [photo_of(generator, common.DEVICE, seed)[0].cpu() for seed in range(PHOTOS)]
    return World(folder, folder / "network.safetensors", photos)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No fallback to another backend, and a row begins with the memory that there is."""
    monkeypatch.setenv("CLONE_FAST_STRICT", "1")
    yield
    gc.collect()
    if common.ON_GPU:
        torch.cuda.empty_cache()


def written(row: str, **values: Any) -> None:
    """A row, on a GPU in the file."""
    about = {"row": row, **FOUND, **values, **common.origin()}
    invert_table.ROWS.append(about)
    if common.ON_GPU:
        invert_table.kept([about])


def timed(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns, seconds of the wall, and the peaks of memory."""
    if common.ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = run()
    if common.ON_GPU:
        torch.cuda.synchronize()
    values = {"seconds": time.perf_counter() - began}
    if common.ON_GPU:
        values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        values["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return result, values


def of(inversion: Inversion) -> dict[str, Any]:
    """What an inversion tells of itself."""
    told = {"stages": inversion.seconds, "steps": inversion.settings["steps"], "stopped": inversion.settings["stopped"]}
    return told | {"psnr": inversion.metrics["psnr"]}


def once(benchmark: BenchmarkFixture, group: str, run: Callable[[], Any]) -> Any:
    """`run`, a single time, as a row of pytest-benchmark."""
    benchmark.group = f"invert, {group}"
    return benchmark.pedantic(run, rounds=1, iterations=1)


def test_photo(world: World, benchmark: BenchmarkFixture) -> None:
    """A photo from the file of the network on, the first of a process and the second; and of a network that was opened
    before, and has had a photo."""
    asked: dict[str, Any] = {"latent_steps": LATENT, "steps": STEPS["photo"], "precision": PRECISION}

    def row(name: str, network: Any) -> None:
        inversion, values = timed(lambda: invert(world.photos[0], network, **asked))
        written(name, mode="clone", latent_steps=LATENT, **values, **of(inversion))

    def run() -> None:
        row("photo, first call", world.network)
        row("photo", world.network)
        opened = open_network(world.network)
        invert(world.photos[0], opened, **asked)
        row("photo, opened network", opened)

    once(benchmark, "a photo", run)


def command(*arguments: object, module: tuple[object, ...] = (), **environment: str) -> tuple[str, float]:
    """Run the command; its standard output, and seconds. module: what runs it, if it is not python itself."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, *map(str, (*module, "-m", "clone_fast", *arguments))]
    began = time.perf_counter()
    ended = subprocess.run(
        line, env=os.environ | {"PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=PATIENCE
    )
    seconds = time.perf_counter() - began
    if ended.returncode:
        pytest.fail(f"{' '.join(line)} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout, seconds


def arguments(world: World, out: Path, **options: object) -> list[object]:
    """Of both commands, behind what they are to work on."""
    common_ones = {"--network": world.network, "--out": out, "--precision": PRECISION, "--latent-steps": LATENT}
    return [part for pair in (common_ones | options).items() for part in pair]


def test_command(world: World, benchmark: BenchmarkFixture) -> None:
    """The whole command: nothing compiled, then with the caches of Triton and of Python as the first left them."""
    (picture,) = world.pictures(1, "one").iterdir()
    caches: dict[str, Any] = {
        name: str(world.folder / name) for name in ("TRITON_CACHE_DIR", "PYTHONPYCACHEPREFIX")
    }

    def run() -> None:
        for row in ("command, nothing compiled", "command"):
            out = world.folder / "command"
            options = arguments(world, out, **{"--steps": STEPS["photo"]})
            _, seconds = command("invert", picture, *options, **caches)
            told = json.loads((out / "metrics.json").read_text())
            of_it = {"stages": told["seconds"], "steps": told["steps"], "psnr": told["psnr"]}
            written(row, mode="clone", latent_steps=LATENT, seconds=seconds, **of_it)

    once(benchmark, "the command", run)


@pytest.mark.parametrize("precision", list(PRECISIONS) if common.ON_GPU else ["fp32"])
def test_curve(precision: str, benchmark: BenchmarkFixture) -> None:
    """PSNR over the seconds, the demo network, a real photo, defaults; kernels are compiled before."""
    picture, defaults = real_photo("astronaut"), {} if common.ON_GPU else FEW
    if common.ON_GPU:
        invert(picture, precision=precision, **FEW)

    def run() -> None:
        curve: dict[str, list[list[float]]] = {"latent": [], "tweak": []}
        began = time.perf_counter()

        def progress(stage: str, step: int, total: int, loss: float, psnr: float) -> None:
            curve[stage].append([round(time.perf_counter() - began, 4), round(psnr, 3)])

        inversion, values = timed(lambda: invert(picture, precision=precision, progress=progress, **defaults))
        written(
            f"curve, {precision}",
            **{"network": "demo", "precision": precision, "mode": "clone", "curve": curve},
            **values,
            **of(inversion),
        )

    once(benchmark, "PSNR over time", run)


def inverted(world: World, network: Any, at_once: str, photos: Iterable[Tensor], **options: Any) -> int:
    """Invert them, at_once of them or in a loop of `invert`; how many came to their last step."""
    asked = {"precision": PRECISION, "mode": options.pop("mode"), **options}
    if at_once == "loop":
        results: Iterable[Any] = (invert(photo, network, **asked) for photo in photos)
    else:
        results = (result for _, result in invert_each(photos, network, at_once=int(at_once), **asked))
    done = 0
    for result in results:
        if isinstance(result, CloneFastError):
            raise result
        done += result.settings["stopped"] == "steps"
        del result
    return done


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("mode", ["recon", "clone"])
def test_each(mode: str, at_once: str, world: World, benchmark: BenchmarkFixture) -> None:
    """Photos per hour of an opened network; kernels are compiled before, graphs are captured within."""
    network = open_network(world.network, device=common.DEVICE)
    first = world.photos[: 1 if at_once == "loop" else int(at_once)]
    loop = network if at_once == "loop" else network.network
    network.network.directions.update(network.directions)  # found once for both
    inverted(world, loop, at_once, first, mode=mode, **FEW)

    def run() -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", RuntimeWarning)
            done, values = timed(
                lambda: inverted(world, loop, at_once, world.photos, mode=mode, latent_steps=LATENT, steps=STEPS[mode])
            )
        messages = [str(one.message) for one in told if issubclass(one.category, RuntimeWarning)]
        asked = {"latent_steps": LATENT, "steps": STEPS[mode], "photos": len(world.photos), "all_steps": done}
        rate = {"per_hour": len(world.photos) / values["seconds"] * 3600, "warned": messages}
        written(f"each, {mode}, {at_once}", mode=mode, at_once=at_once, **asked, **rate, **values)

    once(benchmark, "photos per hour", run)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("mode", ["recon", "clone"] if common.ON_GPU else ["recon"])
def test_folder(mode: str, processes: int, world: World, benchmark: BenchmarkFixture) -> None:
    """A folder under torchrun, by the command's own summary: from the first photo handed out to the last result."""
    name = f"folder-{mode}-{processes}"
    photos, out = world.pictures(PHOTOS * processes, name), world.folder / f"{name}-out"
    options = arguments(world, out, **{"--steps": STEPS[mode], "--mode": mode, "--networks": "none"})
    if common.ON_GPU:  # compiled into Triton's cache, as on a machine that has done such work before
        invert(world.photos[0], world.network, mode=mode, precision=PRECISION, **FEW)
        gc.collect()
        torch.cuda.empty_cache()
    torchrun = ("-m", "torch.distributed.run", f"--nproc-per-node={processes}")

    def run() -> None:
        said, seconds = command("invert-folder", photos, *options, module=torchrun, OMP_NUM_THREADS="1")
        found = re.search(r"done +(\d+) in ([\d.]+) s, (\d+) an hour", said)
        if found is None:
            pytest.fail(f"no summary in {said!r}")
        ends = sorted(path.stat().st_mtime for path in out.rglob("metrics.json"))
        values: dict[str, Any] = {"photos": int(found[1]), "seconds": float(found[2]), "per_hour": float(found[3])}
        values |= {"command_s": seconds, "ends_s": [round(end - ends[0], 2) for end in ends]}
        written(f"folder, {mode}, {processes}", mode=mode, processes=processes, steps=STEPS[mode], **values)

    once(benchmark, "a folder", run)
