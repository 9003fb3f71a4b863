"""report.py: honest pixels in the right places, every shape of result, and no trace in matplotlib's global state."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from clone_fast import report
from clone_fast.edit import pca_directions
from clone_fast.errors import OutputError
from clone_fast.inversion import Inversion
from clone_fast.latent import Latent
from clone_fast.nn import Architecture, Generator
from clone_fast.photo import to_uint8

HISTORY = [
    {
        "stage": float(stage),
        "step": float(step),
        "loss": math.exp(-step / 9) + 0.01,
        "psnr": 10 + 9 * stage + step / 4,
    }
    for stage in (0, 1)
    for step in range(1, 31)
]


def result(resolution: int = 16, **changes: Any) -> Inversion:
    """An inversion with random pictures, that no stage has made."""
    torch.manual_seed(0)
    generator = Generator(
        Architecture(img_resolution=16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8)
    ).requires_grad_(False)
    photo, image, latent_only = (torch.rand(1, 3, resolution, resolution) * 2 - 1 for _ in range(3))
    values: dict[str, Any] = {
        "photo": photo,
        "image": image,
        "latent_only": latent_only,
        "latent": Latent(torch.randn(1, generator.num_ws, 8)),
        "generator": generator,
        "metrics": {
            "psnr": 40.0,
            "ssim": 0.99,
            "latent_psnr": 20.0,
            "latent_ssim": 0.5,
            "drift_psnr": 35.0,
            "drift_ssim": 0.9,
            "editability": 0.75,
        },
        "history": HISTORY,
        "settings": {"mode": "clone", "latent": {"space": "w+"}},
        "seconds": {"latent": 1.0, "tweak": 2.0},
        "directions": pca_directions(generator, n=5, samples=32),
    }
    return Inversion(**{**values, **changes})


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def find(page: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Every (x, y) where the picture stands on the page, pixel by pixel."""
    height, width = picture.shape[:2]
    corners = np.argwhere((page == picture[0, 0]).all(axis=2))
    fits = [(x, y) for y, x in corners.tolist() if y + height <= len(page) and x + width <= page.shape[1]]
    return [(x, y) for x, y in fits if np.array_equal(page[y : y + height, x : x + width], picture)]


def enlarged(image: Tensor, factor: int) -> np.ndarray:
    return to_uint8(image).repeat(factor, axis=0).repeat(factor, axis=1)


def test_pictures_stand_where_they_should_pixel_by_pixel(tmp_path: Path) -> None:
    inversion = result()
    report.save_report(inversion, tmp_path / "report.png", strength=1.5)
    page = drawn(tmp_path / "report.png")
    assert 1400 <= page.shape[1] <= 1800
    factor = round(300 / 16)
    rows = [inversion.photo, inversion.latent_only, inversion.image]
    edits = [inversion.edit(name, 1.5) for name in inversion.directions]
    first = [find(page, enlarged(image, factor)) for image in rows]
    second = [find(page, enlarged(image, factor)) for image in edits]
    places = [hits[0] for hits in (*first, *second)]
    assert all(len(hits) == 1 for hits in (*first, *second))
    step = 16 * factor + 20
    assert [x for x, _ in places] == [48 + step * i for i in (0, 1, 2, 0, 1, 2, 3, 4)]
    assert len({y for _, y in places[:3]}) == len({y for _, y in places[3:]}) == 1
    assert places[3][1] > places[0][1] + 16 * factor


def test_errors_are_drawn_with_the_gain(tmp_path: Path) -> None:
    photo = torch.zeros(1, 3, 16, 16)
    near = photo + 2 * 10 / 255  # 10 of 255 levels
    report.save_report(result(photo=photo, image=photo, latent_only=near), tmp_path / "r.png")
    page = drawn(tmp_path / "r.png")
    for level in (0.0, report.GAIN * 10 / 255):
        color = np.array(colormaps["magma"]([level], bytes=True)[0, :3])
        assert find(page, np.tile(color, (304, 304, 1))), f"no flat panel of error {level}"


@pytest.mark.parametrize("resolution", [8, 16, 64, 256, 512])
def test_every_resolution(tmp_path: Path, resolution: int) -> None:
    inversion = result(resolution)
    report.save_report(inversion, tmp_path / "report.png")
    page = drawn(tmp_path / "report.png")
    assert 1400 <= page.shape[1] <= 1800
    if resolution == 512:
        photo = Image.fromarray(to_uint8(inversion.photo)).resize((300, 300), Image.Resampling.LANCZOS)
        assert len(find(page, np.asarray(photo))) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_any_number_of_directions(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inversion = result()
    directions = {f"a name ${i}": torch.randn(8) for i in range(count)}  # the dollar is no formula
    inversion.directions = directions
    moves: list[tuple[Tensor, float]] = []

    def watched(direction: Tensor, strength: float) -> Tensor:
        moves.append((direction, strength))
        return inversion.image

    monkeypatch.setattr(inversion, "edit", watched)
    report.save_report(inversion, tmp_path / "report.png")
    forwards, backwards = ([d for d, s in moves if s == strength] for strength in (2.0, -2.0))
    assert len(forwards) == (count or 5)
    assert len(backwards) == (count if 0 < count < 5 else 0)


def test_of_many_directions_those_that_change_the_most() -> None:
    inversion = result()
    inversion.directions = {f"d_{i}": torch.full((8,), float(i)) for i in (3, 0, 7, 1, 9, 4, 2)}
    inversion.edit = lambda direction, strength: inversion.image + direction[0] * strength / 100  # type: ignore[method-assign]
    chosen = report._choose_edits(inversion, 2.0)
    assert [name for name, _, _ in chosen] == ["d 3", "d 7", "d 9", "d 4", "d 2"]
    assert {amount for _, amount, _ in chosen} == {"+2 σ"}


def test_of_few_directions_both_ways() -> None:
    inversion = result()
    inversion.directions = {"b": torch.randn(8), "a": torch.randn(8)}
    chosen = report._choose_edits(inversion, 1.5)
    assert [(name, amount) for name, amount, _ in chosen] == [
        ("b", "−1.5 σ"),
        ("b", "+1.5 σ"),
        ("a", "−1.5 σ"),
        ("a", "+1.5 σ"),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {}},
        {"history": [], "seconds": {}, "settings": {}},
        {"settings": {"mode": "recon", "interrupted": True}},
        {"metrics": {"psnr": math.inf, "ssim": 1.0, "latent_psnr": None, "latent_ssim": None}},
    ],
)
def test_what_is_missing_is_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    report.save_report(result(**changes), tmp_path / "report.png")
    assert drawn(tmp_path / "report.png").std() > 0


def test_words(tmp_path: Path) -> None:
    inversion = result(settings={"mode": "clone", "latent": {"space": "w+"}, "interrupted": True})
    assert report._headline(inversion) == "tweak with all losses   ·   latent in W+   ·   interrupted"
    footer = "\n".join(report._footer(inversion))
    assert "30 latent steps, 30 tweak steps" in footer
    assert "3.0 s (latent 1.0, tweak 2.0)" in footer
    assert "35.0 dB, SSIM 0.900" in footer
    assert "correlate 0.75" in footer
    assert report.describe_drift({"drift_psnr": math.inf, "drift_ssim": 1.0}) == [
        "no drift: other images are as before"
    ]
    assert report.describe_drift({}) == []
    assert report._fidelity(inversion, 0) == ("20.00 dB", "SSIM 0.500")
    assert report._fidelity(inversion, 1) == ("40.00 dB", "SSIM 0.990")


def test_same_result_same_bytes_and_no_global_state(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = dict(mpl.rcParams)
    for name in ("a", "b"):
        report.save_report(result(), tmp_path / f"report_{name}.png")
        report.save_curve(HISTORY, tmp_path / f"curve_{name}.png")
    for kind in ("report", "curve"):
        assert (tmp_path / f"{kind}_a.png").read_bytes() == (tmp_path / f"{kind}_b.png").read_bytes()
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []


def ink(page: np.ndarray, color: str) -> int:
    """How many pixels have exactly this colour."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((page == rgb).all(axis=2).sum())


def test_curve_shows_both_stages(tmp_path: Path) -> None:
    report.save_curve(HISTORY, tmp_path / "both.png")
    both = drawn(tmp_path / "both.png")
    report.save_curve([row for row in HISTORY if row["stage"] == 1], tmp_path / "tweak.png")
    tweak = drawn(tmp_path / "tweak.png")
    assert ink(both, report.SLATE) > 300
    assert ink(both, report.ACCENT) > 300
    assert ink(tweak, report.SLATE) == 0
    assert ink(tweak, report.ACCENT) > 600  # the one stage has the whole width


@pytest.mark.parametrize(
    "history",
    [
        [],
        HISTORY[:1],
        [{"stage": 0.0, "step": 1.0, "loss": math.nan, "psnr": math.inf}],
        [{"stage": 1.0, "step": float(i), "loss": -float(i), "psnr": 20.0} for i in range(5)],
        [{"stage": 1.0, "step": float(i), "psnr": 20.0} for i in range(5)],
    ],
)
def test_curve_of_any_history(tmp_path: Path, history: list[dict[str, float]]) -> None:
    report.save_curve(history, tmp_path / "curve.png")
    assert drawn(tmp_path / "curve.png").std() > 0


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        report.save_curve(HISTORY, tmp_path / "file" / "curve.png")
    with pytest.raises(OutputError, match="cannot be written"):
        report.save_report(result(), tmp_path / "file" / "report.png")


def test_a_result_is_complete_when_its_numbers_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = report.save_png
    late: list[bool] = []

    def slowly(path: Path, image: Image.Image) -> None:
        time.sleep(0.3)
        late.append((tmp_path / "metrics.json").exists())
        write(path, image)

    monkeypatch.setattr(report, "save_png", slowly)
    inversion = result()
    report.save_result(inversion, tmp_path, networks="none")
    assert late == [False, False]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("clone.png", "latent_only.png", "latent.safetensors", "metrics.json", "report.png", "curve.png")
    }
    for name, picture in (("report", report.draw_report(inversion)), ("curve", report.draw_curve(HISTORY))):
        np.testing.assert_array_equal(drawn(tmp_path / f"{name}.png"), np.asarray(picture))


@pytest.mark.parametrize("name", ["report.png", "curve.png"])
def test_a_result_without_its_pictures_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match=f"{name}: a directory"):
        report.save_result(result(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("clone.png", "latent_only.png", "generator.safetensors", "latent.safetensors", "report.png", "curve.png")
    }
