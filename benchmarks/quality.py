"""The ablation: every way to invert, over real photos, at equal fidelity.

    python benchmarks/quality.py --out benchmarks/results/quality.json

Each row is run on each photo with the demo network, from the same W+ latent, and stops at the same PSNR, so that drift
and editability can be compared. Prints the table in Markdown, as it stands in the README.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.multiprocessing

from clone_fast import invert, load_network, metrics
from clone_fast.demo import DEMO_NETWORK
from clone_fast.demo.photos import photo as real_photo
from clone_fast.inversion import Inversion
from clone_fast.latent import Latent, LatentSettings
from clone_fast.tweak import TweakSettings

PHOTOS = ("astronaut", "cat", "coffee", "rocket", "photographer", "motorcycle")
DRIFT_SAMPLES = 256
STRENGTHS = (-2.0, 2.0)


@dataclass(frozen=True)
class Row:
    """One way to invert: the settings that differ from the defaults."""

    name: str
    space: str = "w+"
    tweak: dict[str, Any] | None = None  # None: the latent alone


PAPER = {"paired_weight": 0.0, "edit_weight": 0.0, "one_pass": False}  # its method alone
ROWS = (
    Row("latent only, W", space="w"),
    Row("latent only, W+"),
    Row("recon-only, weights alone (as PTI)", tweak={"mode": "recon", "noise_lr": 0.0}),
    Row("recon-only", tweak={"mode": "recon"}),
    Row("clone without local adversarial", tweak={**PAPER, "adversarial_weight": 0.0}),
    Row("clone without cohesion", tweak={**PAPER, "cohesion_weight": 0.0}),
    Row("clone (the paper's terms)", tweak=PAPER),
    Row("clone + paired cohesion", tweak={"edit_weight": 0.0}),
    Row("clone + paired + edit cohesion (default)", tweak={}),
    Row("the same, G and D in turns", tweak={"one_pass": False}),
    Row("the same without adversarial terms", tweak={"adversarial_weight": 0.0, "cohesion_weight": 0.0}),
)
COLUMNS = ("psnr", "ssim", "drift_psnr", "drift_ssim", "drift_frechet", "editability", "steps", "seconds")


def measure(inversion: Inversion, row: Row) -> dict[str, float]:
    """The columns of one inversion. Without a tweak nothing drifts, and the edits are the reference themselves."""
    image = inversion.latent_only if row.tweak is None else inversion.image
    result = {"psnr": metrics.psnr(image, inversion.photo), "ssim": metrics.ssim(image, inversion.photo)}
    result["steps"] = 0.0 if row.tweak is None else float(inversion.settings["steps"])
    result["seconds"] = inversion.seconds["latent"] + (0.0 if row.tweak is None else inversion.seconds["tweak"])
    before, judge, found = inversion.original, inversion.original_discriminator, inversion.found
    if row.tweak is None or before is None or judge is None or found is None:
        return result
    features = partial(judge.features, per_image=True)
    result |= metrics.drift(before, inversion.generator, n=DRIFT_SAMPLES, batch=32, features=features)
    result["editability"] = metrics.editability(
        before,
        inversion.generator,
        found.ws,
        inversion.directions,
        STRENGTHS,
        noise=inversion.latent.noise,
        noise_before=found.noise,
    )
    return result


def run_photo(name: str, rows: Iterable[Row], options: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows on one photo; the latent in W+ is found once and shared, the time it took counted in each."""
    torch.set_num_threads(options["threads"])
    network = load_network(DEMO_NETWORK, device=options["device"])
    found: dict[str, Inversion] = {}
    results = []
    for row in rows:
        base = found.get(row.space)
        common = TweakSettings(steps=options["steps"], target_psnr=options["target_psnr"], check_every=2)
        settings = replace(common, **(row.tweak or {}))
        if row.tweak is None:
            settings = replace(settings, mode="recon", steps=1)
        inversion = invert(
            real_photo(name),
            network,
            device=options["device"],
            seed=options["seed"],
            latent=Latent(base.latent.ws) if base else None,  # without noise maps, which its own tweak moved
            latent_settings=LatentSettings(space=row.space, steps=0 if base else options["latent_steps"]),
            tweak_settings=settings,
        )
        if base:
            inversion.seconds["latent"] = base.seconds["latent"]
        found.setdefault(row.space, inversion)
        results.append({"photo": name, "row": row.name, **measure(inversion, row)})
        print(json.dumps(results[-1]), flush=True)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Means over the photos, a line for each row, in Markdown."""
    heads = ("", "PSNR", "SSIM", "drift PSNR", "drift SSIM", "drift Frechet", "editability", "steps", "seconds")
    digits = (2, 3, 2, 3, 3, 3, 0, 1)
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name in dict.fromkeys(result["row"] for result in results):
        mine = [result for result in results if result["row"] == name]
        cells = []
        for column, places in zip(COLUMNS, digits, strict=True):
            values = [result[column] for result in mine if column in result]
            cells.append(f"{statistics.mean(values):.{places}f}" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablation(
    photos: Iterable[str], *, processes: int = 1, rows: Iterable[Row] = ROWS, **options: Any
) -> dict[str, Any]:
    """Run the rows on the photos, in so many processes, and say where."""
    options = {"threads": max(1, torch.get_num_threads() // processes), **options}
    work = partial(run_photo, rows=tuple(rows), options=options)
    names = list(photos)
    if processes == 1:
        parts = [work(name) for name in names]
    else:
        with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.map(work, names, chunksize=1)
    where = torch.cuda.get_device_name() if str(options["device"]).startswith("cuda") else platform.processor() or "CPU"
    about = {"device": where, "torch": torch.__version__, "photos": names, "processes": processes, **options}
    return {"about": about, "results": [result for part in parts for result in part]}


@click.command()
@click.option("--photos", default=",".join(PHOTOS), show_default=True, help="Names of clone_fast.demo.photos.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/quality.json"))
@click.option("--steps", default=200, show_default=True)
@click.option("--latent-steps", default=200, show_default=True)
@click.option("--target-psnr", default=35.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--processes", default=1, show_default=True, help="Photos at a time.")
def main(photos: str, out: Path, processes: int, **options: Any) -> None:
    """Run the ablation, write its numbers, print the table."""
    outcome = ablation(photos.split(","), processes=processes, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(outcome, indent=1) + "\n")
    click.echo(table(outcome["results"]))


if __name__ == "__main__":
    main()
