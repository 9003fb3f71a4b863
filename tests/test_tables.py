"""The README's tables: they are those of benchmarks/results, and those of the ops say what their rows say."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "tables.py").exists():
    pytest.skip("tests the checkout's benchmarks, and there is none", allow_module_level=True)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.tables")


def row(**changes: Any) -> dict[str, Any]:
    made = {"op": "modulated_conv2d", "case": "conv3x3", "shape": [1, 128, 256, 256], "result": [1, 128, 256, 256]}
    made |= {"format": "bfloat16 NHWC", "backward": False, "backend": "triton", "us": 40.0, "cudnn_us": 50.0}
    return (
        made
        | {"floor_us": 25.0, "over_floor": 1.6, "eager_us": 300.0, "copy_us": 30.0, "of_copy_bandwidth": 0.5}
        | changes
    )


def line(tables: Any, rows: list[dict[str, Any]], start: str) -> str:
    found = [text for text in tables.targets_table(rows).splitlines() if text.startswith(f"| {start}")]
    assert len(found) == 1
    return str(found[0])


def test_a_target_is_met_or_says_by_how_many(tables: Any) -> None:
    name = "conv3x3 fused / bare cuDNN, 128 channels"
    assert line(tables, [row()], name).endswith("| <= 1x | 0.8x | met |")
    slow = row(shape=[1, 512, 64, 64], us=75.0)
    assert line(tables, [row(), slow], name).endswith(
        "| <= 1x | 0.8 to 1.5x | met by 1 of 2; worst conv3x3 1x512x64^2 bfloat16 NHWC |"
    )
    assert line(tables, [], name).endswith("| not measured | |")


def test_backward_is_held_against_its_own_forward(tables: Any) -> None:
    rows = [row(), row(backward=True, us=120.0), row(case="up2", us=10.0), row(case="up2", us=20.0, backward=True)]
    assert "2 to 3x" in line(tables, rows, "forward + backward / forward")
    tf32 = [row(format="tf32 NHWC", us=60.0), row(format="tf32 NHWC", us=240.0, backward=True)]
    assert "1.5 to 2x" in line(tables, rows + tf32, "TF32 / bf16")


def test_bandwidth_counts_from_sixteen_megabytes(tables: Any) -> None:
    small = row(op="bias_act", case="lrelu", shape=[1, 8, 64, 64], result=[1, 8, 64, 64], of_copy_bandwidth=0.1)
    large = row(
        op="bias_act", case="lrelu", shape=[1, 32, 1024, 1024], result=[1, 32, 1024, 1024], of_copy_bandwidth=0.9
    )
    assert "| 90% | met |" in line(tables, [small, large], "bias_act forward, 16 MB and more: of copy bandwidth")


def test_one_line_a_shape(tables: Any) -> None:
    text = tables.ops_table([row(), row(backward=True, us=99.0), row(shape=[4, 128, 256, 256])])
    lines = text.splitlines()
    assert len(lines) == 3
    assert (
        "| modulated_conv2d conv3x3 | 128x256x256 -> 128 | triton | 40.0 | 25.0 | 300.0 |  | 50.0 | 99.0 |" in lines[2]
    )


def test_the_readme_shows_the_results(tables: Any) -> None:
    readme = (ROOT / "README.md").read_text()
    found = tables.blocks()
    assert "ops" in found
    assert tables.written(readme, found) == readme


def test_the_readme_has_a_place_for_all_that_can_be_measured(tables: Any) -> None:
    readme = (ROOT / "README.md").read_text()
    made = tables.written(readme, {name: f"| {name} |" for name in tables.BLOCKS})
    for name in tables.BLOCKS:
        marks = f"<!-- {name}: made by benchmarks/tables.py -->", f"<!-- end of {name} -->"
        assert made.count(f"{marks[0]}\n\n| {name} |\n\n{marks[1]}") == 1


def test_what_has_no_results_has_no_block(tables: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("[1, 2]")
    made = {"one": (tmp_path / "one.json", str), "other": (tmp_path / "other.json", str)}
    monkeypatch.setattr(tables, "BLOCKS", made)
    assert tables.blocks() == {"one": "[1, 2]"}
    text = "a <!-- one: made by benchmarks/tables.py -->old<!-- end of one --> b"
    again = tables.written(text, tables.blocks())
    assert again == "a <!-- one: made by benchmarks/tables.py -->\n\n[1, 2]\n\n<!-- end of one --> b"


def test_a_readme_without_marks_is_refused(tables: Any) -> None:
    with pytest.raises(ValueError, match=r"README\.md has no block between"):
        tables.written("# nothing", {"ops": ""})
