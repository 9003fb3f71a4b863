"""The table of the steps, made from benchmarks/results/step.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept as results

RESULTS = results.FOLDER / "step.json"
ROWS: list[dict[str, Any]] = []  # of this run on a GPU
KEY = ("step", "precision", "batch", "network", "device")
NAMES = {
    "tweak": "tweak: G forward, loss, backward to all weights, Adam",
    "clone": "Clone iteration: local 1 + global {others}, G and D updated, both Adams",
    "latent": "latent optimisation, no weight gradients",
}


def kept(now: Sequence[dict[str, Any]], path: Path = RESULTS) -> list[dict[str, Any]]:
    """Write them, and return all."""
    return results.kept(now, path, KEY)


def _cell(row: dict[str, Any], name: str) -> str:
    if f"{name}_ms" not in row:
        return str(row.get(f"{name}_how", ""))
    peak = f", {row[f'{name}_peak_gb']:.1f} GB" if f"{name}_peak_gb" in row else ""
    return f"{row[f'{name}_ms']:.2f} ms{peak}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row, in Markdown: ours, the baselines, the floor, and the ratios that count."""
    lines = [
        "| step | network | precision | batch | ours | reference, eager | strongest plain PyTorch | floor "
        "| plain PyTorch / ours | ours / floor |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [NAMES[row["step"]].format(others=row["batch"] - 1), row["network"], row["precision"]]
        cells += [str(row["batch"]), *(_cell(row, name) for name in ("ours", "reference", "strong"))]
        if "turns_ms" in row:
            cells[-3] += f" (in turns {_cell(row, 'turns')})"
        cells.append(f"{row['floor_ms']:.2f} ms" if "floor_ms" in row else "")
        for above, below in (("strong_ms", "ours_ms"), ("ours_ms", "floor_ms")):
            cells.append(f"{row[above] / row[below]:.2f}" if above in row and below in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block(rows: Sequence[dict[str, Any]]) -> str:
    """What stands in the README."""
    text = (
        f"{results.origin(rows)}. Milliseconds of a step and peak memory, one process, the losses of each checked "
        "against float32 first. Ours and the reference by the wall; the strongest plain PyTorch (benchmarks/strong.py: "
        "compiled, one CUDA graph) by the GPU's time alone. In turns: `one_pass=False`, the others' arithmetic. "
        "Floor: the fewest bytes and operations (benchmarks/floors.py) at measured rates. "
        "`pytest benchmarks/bench_step.py --benchmark-only` writes them."
    )
    return f"{table(rows)}\n\n{text}"
