"""What each precision costs in fidelity: its curve beside float32 on the reference, and the PSNR that it reaches.

    python -m benchmarks.precisions [--steps 200] [--curve 20] [--photos astronaut,cat] [--json FILE]

The demo network and real photos, both modes. Rows go to the file as they are known; the table is the README's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks import kept as results
from benchmarks.captured import apart
from clone_fast import backend, metrics
from clone_fast.checkpoints import load_network
from clone_fast.demo import DEMO_NETWORK
from clone_fast.demo.photos import photo as real_photo
from clone_fast.latent import Latent, LatentSettings, optimise
from clone_fast.nn import Network
from clone_fast.photo import load_photo
from clone_fast.tweak import TweakSettings, tweak

RESULTS = results.FOLDER / "precisions.json"
KEY = ("photo", "precision", "mode", "device")
NAMES = ("fp32", "tf32", "bf16", "fp16")
MODES = ("recon", "clone")


def searched(net: Network, photo: Tensor, name: str, steps: int) -> tuple[Latent, dict[str, Any]]:
    """The latent after so many steps, and its PSNR, its image drawn in float32."""
    found = optimise(net.generator, photo, LatentSettings(steps=steps, precision=name)).latent
    return found, {"steps": steps, "latent_psnr": metrics.psnr(found.picture(net.generator), photo)}


def reached(net: Network, photo: Tensor, found: Latent, name: str, mode: str, steps: int) -> dict[str, Any]:
    """The PSNR after so many steps of the tweak, its image drawn in float32."""
    settings = TweakSettings(mode=mode, steps=steps, precision=name)
    done = tweak(net.generator, net.discriminator, found, photo, settings)
    picture = done.latent.picture(done.generator)
    return {"taken": done.steps, "stopped": done.stopped, "psnr": metrics.psnr(picture, photo)}


def losses(net: Network, photo: Tensor, name: str, mode: str, steps: int) -> list[dict[str, float]]:
    """The curve of a tweak from a latent that is the same for all."""
    start = optimise(net.generator, photo, LatentSettings(steps=0)).latent
    settings = TweakSettings(mode=mode, steps=steps, check_every=1, r1_interval=4, precision=name)
    return tweak(net.generator, net.discriminator, start, photo, settings).rows


def measured(net: Network, photo: Tensor, steps: int, curve: int) -> Iterator[dict[str, Any]]:
    """Parts of rows as they are known; "failed" in the place of what could not be measured.

    The reference comes last: before it, the kernels are compiled side by side, and it is no occasion for that.
    """
    for name in NAMES:
        for mode in MODES:
            with _failure() as failed:
                found, before = searched(net, photo, name, steps)
                yield {"precision": name, "mode": mode, **before}
                yield {"precision": name, "mode": mode, **reached(net, photo, found, name, mode, steps)}
            yield {"precision": name, "mode": mode, **failed}
    for mode in MODES:
        with backend("reference"):
            wanted = losses(net, photo, "fp32", mode, curve)
        for name in NAMES:
            with _failure() as failed:
                got = losses(net, photo, name, mode, curve)
                yield {"precision": name, "mode": mode, "curve": len(got), "apart": apart(got, wanted[: len(got)])}
            yield {"precision": name, "mode": mode, **failed}


@contextmanager
def _failure() -> Iterator[dict[str, str]]:
    """What is wrong within the block is a part of a row, that the other rows are measured all the same."""
    found: dict[str, str] = {}
    try:
        yield found
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a precision, in Markdown; means over the photos, the largest difference of all."""
    found = ["| precision | latent alone | recon | clone | curve of recon | curve of clone |"]
    found.append("| --- | ---: | ---: | ---: | ---: | ---: |")

    def cell(name: str, mode: str, value: str, form: str, take: Any) -> str:
        mine = [row for row in rows if (row["precision"], row["mode"]) == (name, mode) and row.get(value) is not None]
        return form.format(take(row[value] for row in mine)) if mine else ""

    for name in NAMES:
        cells = [name, cell(name, "clone", "latent_psnr", "{:.2f} dB", statistics.mean)]
        cells += [cell(name, mode, "psnr", "{:.2f} dB", statistics.mean) for mode in MODES]
        cells += [cell(name, mode, "apart", "{:.2g}", max) for mode in MODES]
        found.append("| " + " | ".join(cells) + " |")
    return "\n".join(found)


def block(rows: Sequence[dict[str, Any]]) -> str:
    """What stands in the README."""
    photos, steps = (
        dict.fromkeys(row["photo"] for row in rows),
        sorted({row["steps"] for row in rows if "steps" in row}),
    )
    text = (
        f"{results.origin(rows)}: the demo network, {', '.join(photos)}, {' or '.join(map(str, steps))} steps of the "
        "search and of the tweak. Curve: the largest relative difference of a step's loss from float32 on the "
        "reference backend, over the first steps. `python -m benchmarks.precisions` prints and writes them."
    )
    return f"{table(rows)}\n\n{text}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the search, and of the tweak")
    parser.add_argument("--curve", type=int, default=20, help="steps beside the reference")
    parser.add_argument("--photos", default="astronaut,cat", help="names of clone_fast.demo.photos")
    parser.add_argument("--json", type=Path, help="file of the rows; on a GPU that of the README's table by default")
    options = parser.parse_args()
    path = options.json or (RESULTS if common.ON_GPU else None)
    net = load_network(DEMO_NETWORK).to(common.DEVICE)
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    for name in options.photos.split(","):
        photo = load_photo(real_photo(name), net.generator.img_resolution).to(common.DEVICE)
        for part in measured(net, photo, options.steps, options.curve):
            key = (name, part["precision"], part["mode"])
            row = known[key] = known.get(key, {}) | {"photo": name} | part | common.origin()
            if path is not None:
                results.kept([row], path, KEY)
            print({"photo": name, **part}, flush=True)
    print(table(list(known.values())))
    raise SystemExit(1 if any("failed" in row for row in known.values()) else 0)


if __name__ == "__main__":
    with torch.backends.cudnn.flags(enabled=True, benchmark=torch.cuda.is_available()):
        main()
