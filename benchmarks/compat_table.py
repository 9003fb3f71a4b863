"""The tables of other codebases, made from benchmarks/results/compat.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept as results
from benchmarks.invert_table import lines

RESULTS = results.FOLDER / "compat.json"
ROWS: list[dict[str, Any]] = []  # of this run
KEY = ("target", "row", "arithmetic", "how", "network", "device")
COSINE = 0.99  # of all gradients
NAMES = {
    "ada": "stylegan2-ada-pytorch",
    "sg3": "stylegan3's StyleGAN2",
    "rosinality": "rosinality's stylegan2-pytorch",
    "PTI": "PTI",
}
TEXTS = {
    "tuning step": "PTI's tuning step, the generator's part",
    "forward + backward": "forward and backward, its own fp16 mode",
    "projector step": "projector.py, MSE for its VGG, a step",
    "coach step": "SingleIDCoach.train(), a step with LPIPS",
    "coach step, LPIPS aside": "SingleIDCoach.train(), a step without the cost of LPIPS",
}
AIMS = {"tuning step": 3.0, "forward + backward": 2.0, "tune": 10.0}  # speed-ups
WAYS = {"install": "`install()`", "accelerate": "`accelerate(G)`", "run": "`clone-fast run`"}

Row = dict[str, Any]


def kept(now: Sequence[Row], path: Path = RESULTS) -> list[Row]:
    """Write them, and return all."""
    return results.kept(now, path, KEY)


def whole(row: Row) -> Row:
    """With every name of the key, which a row that failed early lacks."""
    return dict.fromkeys(KEY, "") | row


def name(row: Row) -> str:
    """Of a row, in a message."""
    return " ".join(filter(None, (row["target"], row["row"], row["arithmetic"], row["how"])))


def wrong(row: Row) -> str | None:
    """What differs from the original by more than is allowed; such a row has no time in the table."""
    if not row.get("worst", 0.0) <= row.get("allowed", 0.0):
        return f"the values differ by {row['worst']:.2g}, allowed is {row['allowed']:.2g}"
    if not row.get("cosine", 1.0) >= COSINE:
        return f"the gradients' cosine is {row['cosine']:.4f}, wanted is {COSINE}"
    if row.get("ours_steps", row.get("steps")) != row.get("steps"):
        return f"tune took {row['ours_steps']} of {row['steps']} steps: {row['stopped']}"
    return None


def _speedup(row: Row) -> str:
    aim = AIMS.get(row["row"])
    return f"{row['speedup']:.1f}x" + (f" (>= {aim:g}x)" if aim else "")


def _peaks(row: Row) -> str:
    return ", ".join(f"{row[f'{who}_peak_gb']:.1f}" for who in ("theirs", "ours") if f"{who}_peak_gb" in row)


def steps(rows: Sequence[Row]) -> str:
    """A line a loop, arithmetic and way in."""
    found = []
    for row in rows:
        if "theirs_ms" not in row:
            continue
        cells = [NAMES[row["target"]], TEXTS[row["row"]], row["arithmetic"], WAYS[row["how"]]]
        if problem := wrong(row):
            found.append([*cells, "", problem, "", "", ""])
            continue
        cells += [f"{row['theirs_ms']:.1f}", f"{row['ours_ms']:.1f}", _speedup(row)]
        found.append([*cells, f"{row['worst']:.1e}", _peaks(row)])
    heads = ["code", "what", "arithmetic", "way in", "theirs, ms", "with us, ms", "speed-up (aim)", "apart"]
    return lines([*heads, "peaks, GB"], found, 4) if found else ""


def loops(rows: Sequence[Row]) -> str:
    """`tune` against their loop."""
    found = []
    for row in rows:
        if row["row"] != "tune" or "theirs_s" not in row:
            continue
        theirs = "theirs_tf32" if row["arithmetic"] == "tf32" else "theirs"
        cells = [f"{row['steps']} steps of PTI's tuning", row["arithmetic"]]
        cells += [f"{row[f'{theirs}_s']:.1f} s, {row[f'{theirs}_psnr']:.1f} dB"]
        if problem := wrong(row):
            found.append([*cells, problem, "", ""])
            continue
        cells += [f"{row['ours_s']:.1f} s, {row['ours_psnr']:.1f} dB", f"{row['first_s']:.1f} s", _speedup(row)]
        found.append(cells)
    heads = ["modules of stylegan2-ada-pytorch", "precision of `tune`", "eager, theirs", "`tune`"]
    return lines([*heads, "its first call, 3 steps", "speed-up (aim)"], found, 2) if found else ""


def _grounds(rows: Sequence[Row]) -> str:
    """What the baselines ran on, each codebase once."""
    said = {}
    for row in rows:
        if "ops" in row:
            built = f", built in {row['build_s']:.0f} s" if "build_s" in row else ""
            said[NAMES[row["target"]]] = f"{NAMES[row['target']]} on {row['ops']}{built}"
    return "; ".join(said.values())


def block(rows: Sequence[Row]) -> str:
    """What stands in the README."""
    networks = ", ".join(dict.fromkeys(row["network"] for row in rows))
    origin = (
        f"{results.origin(rows)}; {networks}, random weights. Baselines: {_grounds(rows)}. Eager, medians of the later "
        "of 20 steps, launches included, both in one process from the same weights; tf32 is PyTorch's default for "
        "convolutions, fp32 has it off. Apart: the largest relative difference of a step's loss, of fp16 of the image. "
        "LPIPS is AlexNet with random weights, and is theirs. bf16's `tune` is held against their fp32. "
        "`pytest benchmarks/bench_compat.py --benchmark-only` writes them."
    )
    return "\n\n".join(filter(None, (steps(rows), loops(rows), origin)))
