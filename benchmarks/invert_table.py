"""The tables of the whole job, made from benchmarks/results/invert.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept as results

RESULTS = results.FOLDER / "invert.json"
ROWS: list[dict[str, Any]] = []  # of this run
KEY = ("row", "network", "device")
STAGES = ("load", "latent", "tweak", "metrics")
MARKS = (25.0, 30.0, 35.0)  # dB

Row = dict[str, Any]


def kept(now: Sequence[Row], path: Path = RESULTS) -> list[Row]:
    """Write them, and return all."""
    return results.kept(now, path, KEY)


def lines(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown; the first columns hold words, the others numbers."""
    rule = ["---" if i < words else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def _number(row: Row, name: str, form: str) -> str:
    return form.format(row[name]) if row.get(name) is not None else ""


def photos(rows: Sequence[Row]) -> str:
    """A line a photo: seconds of the wall, and of each stage."""
    chosen = [row for row in rows if row["row"].startswith(("photo", "command"))]
    found = []
    for row in chosen:
        ended = "" if row.get("stopped", "steps") == "steps" else f" ({row['stopped']} at {row['steps']})"
        cells = [row["row"] + ended, row["network"], row["precision"], f"{row['latent_steps']} + {row['steps']}"]
        cells += [f"{row['seconds']:.2f}", *(_number(row["stages"], stage, "{:.2f}") for stage in STAGES)]
        found.append([*cells, _number(row, "peak_gb", "{:.1f}")])
    heads = ["photo to clone", "network", "precision", "latent steps + iterations", "seconds", *STAGES, "peak, GB"]
    return lines(heads, found, 4) if found else ""


def rates(rows: Sequence[Row]) -> str:
    """Photos per hour: of `invert` in a loop, side by side, and of a folder by several processes."""
    chosen = [row for row in rows if row["row"].startswith(("each", "folder"))]
    first = {row["mode"]: row["per_hour"] for row in chosen if row.get("at_once") == "loop"}
    alone = {row["mode"]: row["per_hour"] for row in chosen if row.get("processes") == 1}
    found = []
    for row in chosen:
        if "processes" in row:
            how, base = f"`invert-folder`, {row['processes']} GPUs".replace("1 GPUs", "1 GPU"), alone.get(row["mode"])
        elif row["at_once"] == "loop":
            how, base = "`invert` in a loop", first.get(row["mode"])
        else:
            how, base = f"`invert_each`, at_once={row['at_once']}", first.get(row["mode"])
        if row.get("all_steps", row["photos"]) < row["photos"]:
            how += f" ({row['photos'] - row['all_steps']} stopped early)"
        if row.get("warned"):
            how += " (fewer at once: memory)"
        ratio = f"{row['per_hour'] / base:.2f}" if base else ""
        cells = [how, row["mode"], str(row["steps"]), str(row["photos"]), f"{row['per_hour']:.0f}", ratio]
        found.append([*cells, _number(row, "peak_gb", "{:.1f}")])
    heads = ["many photos", "mode", "iterations", "photos", "photos per hour", "ratio", "peak, GB"]
    return lines(heads, found, 2) if found else ""


def curves(rows: Sequence[Row]) -> str:
    """Seconds until the clone was so near, by precision; the demo network."""
    found = []
    for row in rows:
        if "curve" not in row:
            continue
        tweak = row["curve"]["tweak"]
        reached = [next((seconds for seconds, psnr in tweak if psnr >= mark), None) for mark in MARKS]
        latent = row["curve"]["latent"][-1]
        cells = [row["precision"], f"{latent[1]:.1f} dB at {latent[0]:.2f} s"]
        cells += ["" if seconds is None else f"{seconds:.2f} s" for seconds in reached]
        found.append([*cells, f"{tweak[-1][1]:.1f} dB at {tweak[-1][0]:.2f} s"])
    heads = ["demo network", "latent alone", *(f"{mark:.0f} dB" for mark in MARKS), "last iteration"]
    return lines(heads, found) if found else ""


def block(rows: Sequence[Row]) -> str:
    """What stands in the README."""
    tables = [table for table in (photos(rows), rates(rows), curves(rows)) if table]
    origin = (
        f"{results.origin(rows)}. Random weights but for the demo network; seconds of the wall, the measuring (drift, "
        "edits) and all files of a command included; first call: of `invert` in its process. Photos per hour: of a "
        "loop and side by side with one opened network and compiled kernels, captures included, the ratio to the loop; "
        "of a folder as its summary says, from the first photo handed out to the last result written, the ratio to one "
        "GPU. `pytest benchmarks/bench_invert.py --benchmark-only` writes them."
    )
    return "\n\n".join([*tables, origin])
