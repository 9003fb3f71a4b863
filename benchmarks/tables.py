"""The README's tables, made from the files in benchmarks/results: of the ops, here; of the rest, where they are made.

python -m benchmarks.tables           # print them
python -m benchmarks.tables --write   # put them between the marks in README.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import compat_table, invert_table, kept, precisions, step_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = kept.FOLDER / "ops.json"
README = ROOT / "README.md"
MEGABYTE = 1e6

Row = dict[str, Any]
Measure = Callable[[Row], float]


@dataclass(frozen=True)
class Target:
    """One line of the table of targets: the worst row of a kind against what was aimed at."""

    text: str
    op: str
    backward: bool | None  # None: both
    accepts: Callable[[Row], bool]
    measure: Measure
    limit: float
    at_least: bool
    unit: str

    def line(self, rows: Sequence[Row]) -> str:
        """A line of markdown."""
        wanted = [
            row
            for row in rows
            if row["op"] == self.op and self.backward in (None, row["backward"]) and self.accepts(row)
        ]
        sign = ">=" if self.at_least else "<="
        aim = f"{sign} {self.limit:g}{self.unit}"
        if not wanted:
            return f"| {self.text} | {aim} | not measured | |"
        ordered = sorted(wanted, key=self.measure, reverse=self.at_least)
        best, worst = ordered[0], ordered[-1]
        met = sum(
            (self.measure(row) >= self.limit) == self.at_least or self.measure(row) == self.limit for row in wanted
        )
        values = f"{self.measure(best):.3g} to {self.measure(worst):.3g}{self.unit}"
        if len(wanted) == 1:
            values = f"{self.measure(worst):.3g}{self.unit}"
        verdict = "met" if met == len(wanted) else f"met by {met} of {len(wanted)}; worst {where(worst)}"
        return f"| {self.text} | {aim} | {values} | {verdict} |"


def where(row: Row) -> str:
    """A row in a few words."""
    n, c, h, _ = row["shape"]
    return f"{row['case']} {n}x{c}x{h}^2 {row['format']}"


def _of_peak(row: Row) -> float:
    return float(100 * row["of_copy_bandwidth"])


def _of_copy(row: Row) -> float:
    return float(100 * row["copy_us"] / row["us"])


def _forward_of(rows: Sequence[Row]) -> Callable[[Row], Row | None]:
    table = {(row["op"], row["case"], str(row["shape"]), row["format"]): row for row in rows if not row["backward"]}
    return lambda row: table.get((row["op"], row["case"], str(row["shape"]), row["format"]))


def _bf16_of(rows: Sequence[Row]) -> Callable[[Row], Row | None]:
    table = {
        (row["op"], row["case"], str(row["shape"]), row["backward"]): row
        for row in rows
        if row["format"] == "bfloat16 NHWC"
    }
    return lambda row: table.get((row["op"], row["case"], str(row["shape"]), row["backward"]))


def targets(rows: Sequence[Row]) -> list[Target]:
    """Those of the project, on an H200."""
    forward, bf16 = _forward_of(rows), _bf16_of(rows)

    def is_bf16(row: Row) -> bool:
        return bool(row["format"] == "bfloat16 NHWC")

    def against(other: Callable[[Row], Row | None]) -> Measure:
        def ratio(row: Row) -> float:
            found = other(row)
            return float(row["us"] / found["us"]) if found else float("nan")

        return ratio

    def to_cudnn(row: Row) -> float:
        return float(row["us"] / row["cudnn_us"])

    def conv(low: int, high: int) -> Callable[[Row], bool]:
        return lambda row: bool(row["case"] == "conv3x3" and low <= row["shape"][1] <= high and is_bf16(row))

    def large(row: Row) -> bool:
        return bool(2 * row["result"][1] * row["result"][2] ** 2 * row["result"][0] >= 16 * 2**20)

    layers = ("conv3x3", "up2", "down2")
    streaming = [
        Target(f"{text}{suffix}", op, back, accepts, measure, 85, True, "%")
        for text, op, back, accepts in (
            ("bias_act forward, 16 MB and more", "bias_act", False, large),
            ("bias_act forward + backward, 16 MB and more", "bias_act", True, large),
            ("upfirdn2d 4x4, up 2 / down 2 / 1:1, from 256^2", "upfirdn2d", False, lambda row: True),
        )
        for suffix, measure in (
            (": of copy bandwidth", _of_peak),
            (": of a copy kernel's speed at the same bytes", _of_copy),
        )
    ]
    return [
        *streaming,
        Target(
            "laplacian_pyramid 1x3x1024^2 fp32, forward + backward",
            "laplacian_pyramid",
            True,
            lambda r: r["shape"] == [1, 3, 1024, 1024] and r["format"] == "float32 NCHW",
            lambda r: float(r["us"]),
            50,
            False,
            " us",
        ),
        Target(
            "conv3x3 fused / bare cuDNN, 128 channels and more",
            "modulated_conv2d",
            False,
            conv(128, 512),
            to_cudnn,
            1.0,
            False,
            "x",
        ),
        Target("the same, 64 channels", "modulated_conv2d", False, conv(64, 64), to_cudnn, 0.75, False, "x"),
        Target("the same, 32 channels", "modulated_conv2d", False, conv(32, 32), to_cudnn, 0.55, False, "x"),
        Target(
            "up 2 fused / its floor, from 256^2",
            "modulated_conv2d",
            False,
            lambda r: r["case"] == "up2" and r["result"][2] >= 256 and is_bf16(r),
            lambda r: float(r["over_floor"]),
            1.3,
            False,
            "x",
        ),
        Target(
            "forward + backward / forward, every layer",
            "modulated_conv2d",
            True,
            lambda r: r["case"] in layers and is_bf16(r) and forward(r) is not None,
            against(forward),
            2.7,
            False,
            "x",
        ),
        Target(
            "TF32 / bf16, every layer from 64^2",
            "modulated_conv2d",
            None,
            lambda r: r["format"] == "tf32 NHWC" and r["case"] in layers and bf16(r) is not None,
            against(bf16),
            2.2,
            False,
            "x",
        ),
    ]


def targets_table(rows: Sequence[Row]) -> str:
    """The targets, and what was measured."""
    head = ["| what | target | measured, best to worst | |", "| --- | --- | --- | --- |"]
    return "\n".join(head + [target.line(rows) for target in targets(rows)])


def _time(row: Row, key: str) -> str:
    return f"{row[key]:.1f}" if key in row else ""


def ops_table(rows: Sequence[Row]) -> str:
    """One line a row of batch 1 in bf16 (the loss: float32), forward and forward + backward side by side."""
    lines = [
        "| op | shape | backend | us | floor | eager | compiled | cuDNN alone "
        "| with backward, us | floor | eager | cuDNN alone |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    shown = [row for row in rows if row["shape"][0] == 1 and row["format"] in ("bfloat16 NHWC", "float32 NCHW")]
    shown = [row for row in shown if (row["op"] == "laplacian_pyramid") == (row["format"] == "float32 NCHW")]
    forward = _forward_of(rows)
    both = {id(forward(row)): row for row in shown if row["backward"]}
    for row in shown:
        if row["backward"]:
            continue
        back = both.get(id(row), {})
        _, c, h, w = row["shape"]
        cells = [
            f"{row['op']} {row['case']}",
            f"{c}x{h}x{w} -> {row['result'][1] if row['result'] else ''}",
            row["backend"],
        ]
        cells[1] = cells[1].removesuffix(" -> ")
        cells += [_time(row, key) for key in ("us", "floor_us", "eager_us", "compiled_us", "cudnn_us")]
        cells += [_time(back, key) for key in ("us", "floor_us", "eager_us", "cudnn_us")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block(results: dict[str, Any]) -> str:
    """What stands in the README about the ops."""
    about, rows = results["about"], results["rows"]
    origin = (
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}: copy kernel "
        f"{about['copy_tb_per_s']:.2f} TB/s, bf16 matrix product {about['bf16_tflop_per_s']:.0f} TFLOP/s. Captured "
        "graphs, medians, inputs rotated past the L2 cache, every row checked against float64 in the same run; "
        "`pytest benchmarks/ --benchmark-only` prints and writes them."
    )
    return "\n\n".join([targets_table(rows), ops_table(rows), origin])


BLOCKS: dict[str, tuple[Path, Callable[[Any], str]]] = {
    "steps": (step_table.RESULTS, step_table.block),
    "inversions": (invert_table.RESULTS, invert_table.block),
    "precisions": (precisions.RESULTS, precisions.block),
    "codebases": (compat_table.RESULTS, compat_table.block),
    "ops": (RESULTS, block),
}
"""By name: the file of results, and what the README says of it between the marks of that name."""


def blocks() -> dict[str, str]:
    """The text of every block that has results."""
    return {name: make(json.loads(path.read_text())) for name, (path, make) in BLOCKS.items() if path.exists()}


def written(readme: str, texts: dict[str, str]) -> str:
    """The README with these blocks renewed; the others stay.

    Raises:
        ValueError: it has no marks for a block.
    """
    for name, text in texts.items():
        start, end = f"<!-- {name}: made by benchmarks/tables.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"{README.name} has no block between {start} and {end}")
        whole = "\n\n".join([start, text, end])
        readme = pattern.sub(lambda _, whole=whole: whole, readme)  # type: ignore[misc]
    return readme


def main() -> None:
    if "--write" in sys.argv[1:]:
        README.write_text(written(README.read_text(), blocks()))
    else:
        print("\n\n".join(blocks().values()))


if __name__ == "__main__":
    main()
