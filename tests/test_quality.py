"""The ablation of benchmarks/quality.py, on a tiny network: its rows, what they share, its table."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from tiny import one_thread  # noqa: F401 (a fixture)

from clone_fast.photo import to_pil

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / "benchmarks" / "quality.py").exists():
    pytest.skip("tests the checkout's benchmarks, and there is none", allow_module_level=True)

OPTIONS: dict[str, Any] = {"steps": 3, "latent_steps": 2, "target_psnr": 90.0, "seed": 0, "device": "cpu"}


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a tiny network and photos in place of the demo's."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.quality")
    monkeypatch.setattr(module, "load_network", lambda path, device: tiny.network().to(device))
    monkeypatch.setattr(module, "real_photo", lambda name: to_pil(tiny.photo(seed=int(name))))
    monkeypatch.setattr(module, "DRIFT_SAMPLES", 4)
    return module


def test_the_ablation_runs_every_row_on_every_photo(quality: Any, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = quality.ablation(["1", "2"], **OPTIONS)
    results = outcome["results"]
    names = [row.name for row in quality.ROWS]
    assert len(set(names)) == len(names)
    assert [(r["photo"], r["row"]) for r in results] == [(photo, name) for photo in ("1", "2") for name in names]
    for result, row in zip(results, quality.ROWS * 2, strict=True):
        assert {"psnr", "ssim", "steps", "seconds"} <= set(result)
        measured = {"drift_psnr", "drift_ssim", "drift_frechet", "editability"} & set(result)
        assert len(measured) == (0 if row.tweak is None else 4), "the latent alone moves no manifold"
        assert result["steps"] == (0 if row.tweak is None else 3)
        assert all(math.isfinite(value) for value in result.values() if isinstance(value, float))
    latent_only = next(r for r in results if r["row"] == "latent only, W+")
    tweaked = [r for r in results if r["photo"] == "1" and r["steps"]]
    assert all(r["psnr"] > latent_only["psnr"] for r in tweaked)
    assert len({r["psnr"] for r in tweaked}) == len(tweaked), "two rows are the same"
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == results[0]
    assert outcome["about"]["photos"] == ["1", "2"]
    assert {**outcome["about"], **OPTIONS} == outcome["about"]


def test_rows_share_the_latent_of_their_space(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    invert = quality.invert

    def watched(*args: Any, **options: Any) -> Any:
        made.append(invert(*args, **options))
        return made[-1]

    monkeypatch.setattr(quality, "invert", watched)
    quality.ablation(["1"], **OPTIONS)
    w = [m for m, row in zip(made, quality.ROWS, strict=True) if row.space == "w"]
    plus = [m for m, row in zip(made, quality.ROWS, strict=True) if row.space == "w+"]
    assert len(plus) > 2
    for group in (w, plus):
        assert all(torch.equal(m.latent.ws, group[0].latent.ws) for m in group)
        assert all(m.seconds["latent"] == group[0].seconds["latent"] for m in group)
        assert [m.settings["latent"]["steps"] for m in group] == [2] + [0] * (len(group) - 1)
    assert not torch.equal(w[0].latent.ws, plus[0].latent.ws)


def test_rows_stop_at_the_same_psnr(quality: Any) -> None:
    rows = [row for row in quality.ROWS if row.space == "w+"]
    (base,) = quality.ablation(["1"], rows=rows[:1], **OPTIONS)["results"]
    target = base["psnr"] + 0.5
    results = quality.ablation(["1"], rows=rows, **OPTIONS | {"target_psnr": target, "steps": 100})["results"]
    for result in results[1:]:
        assert target <= result["psnr"] < target + 1
        assert 1 < result["steps"] < 100


def test_the_table_holds_the_means_over_the_photos(quality: Any) -> None:
    results = [
        {"photo": "1", "row": "latent", "psnr": 20.0, "ssim": 0.5, "steps": 0.0, "seconds": 1.04},
        {"photo": "1", "row": "clone", "psnr": 30.0, "ssim": 0.9, "drift_psnr": 25.0, "steps": 7.0, "seconds": 2.0},
        {"photo": "2", "row": "latent", "psnr": 21.0, "ssim": 0.6, "steps": 0.0, "seconds": 1.0},
        {"photo": "2", "row": "clone", "psnr": 33.0, "ssim": 0.7, "drift_psnr": 27.0, "steps": 10.0, "seconds": 4.0},
    ]
    lines = quality.table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(lines) == 4
    assert {len(row) for row in cells} == {1 + len(quality.COLUMNS)}
    assert cells[0][:3] == ["", "PSNR", "SSIM"]
    assert set(cells[1]) == {"---", "---:"}
    assert cells[2] == ["latent", "20.50", "0.550", "", "", "", "", "0", "1.0"]
    assert cells[3] == ["clone", "31.50", "0.800", "26.00", "", "", "", "8", "3.0"]


def test_the_command_writes_the_numbers_and_prints_the_table(
    quality: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}
    result = {"photo": "1", "row": "clone", "psnr": 30.0, "ssim": 0.9, "steps": 7.0, "seconds": 2.0}

    def ablation(photos: list[str], **options: Any) -> dict[str, Any]:
        seen.update(options, photos=photos)
        return {"about": {}, "results": [result]}

    monkeypatch.setattr(quality, "ablation", ablation)
    out = tmp_path / "new" / "quality.json"
    command = ["--photos", "cat,coins", "--out", str(out), "--steps", "5", "--device", "cpu"]
    outcome = CliRunner().invoke(quality.main, command)
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(out.read_text())["results"] == [result]
    assert quality.table([result]) in outcome.output
    assert (seen["photos"], seen["steps"], seen["device"], seen["processes"]) == (["cat", "coins"], 5, "cpu", 1)
