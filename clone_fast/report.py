"""Pictures of a result: report.png, understood at one look, and curve.png, loss and PSNR over the steps.

Pixels stay honest: small images are enlarged by a whole factor without interpolation, large ones reduced by
Lanczos, and both are put on the page one to one. The figures are made without pyplot, so no global state of
matplotlib is touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from clone_fast import edit, metrics
from clone_fast.photo import save_png, to_uint8

if TYPE_CHECKING:
    from clone_fast.inversion import Inversion

GAIN = 5
"""Errors are drawn this many times as large: a fifth of the full range has the brightest colour."""

INK, GREY, FAINT, ACCENT, SLATE = "#1c1d21", "#6b6e76", "#d9dadf", "#c2410c", "#475569"
_DPI = 100
_MARGIN, _GAP, _COLUMNS = 48, 20, 5


def save_result(inversion: Inversion, folder: str | os.PathLike[str], *, networks: str = "both") -> None:
    """Everything that there is to keep of an inversion, in a folder: what `Inversion.save` writes, report.png and
    curve.png; metrics.json last.

    Raises:
        OutputError, CheckpointError, SettingsError: see `Inversion.save`.
    """
    with inversion.saving(folder, networks=networks) as start:  # both are drawn here: matplotlib is for one thread
        start(save_png, Path(folder) / "report.png", draw_report(inversion))
        start(save_png, Path(folder) / "curve.png", draw_curve(inversion.history))


def save_report(inversion: Inversion, path: str | os.PathLike[str], strength: float = 2.0) -> None:
    """Write what `draw_report` draws as PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    save_png(path, draw_report(inversion, strength))


def save_curve(history: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Write what `draw_curve` draws as PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    save_png(path, draw_curve(history))


def draw_report(inversion: Inversion, strength: float = 2.0) -> Image.Image:
    """The report of an inversion, about 1600 pixels wide.

    First row: photo, latent-only inversion, clone, and the errors of these two, `GAIN` times. Second row:
    edits of the clone by up to five directions at `strength` standard deviations: the named ones of the
    network, or else the first principal components of W. Last steps, seconds, drift and editability.
    """
    resolution = inversion.photo.shape[-1]
    side = _panel_side(resolution)
    moves = _choose_edits(inversion, strength)
    row, first = side + 104, 118  # a picture with its title and caption; baseline of the first titles
    width = 2 * _MARGIN + _COLUMNS * side + (_COLUMNS - 1) * _GAP
    page = _Page(width, first + (2 if moves else 1) * row + 46)
    page.text(_MARGIN, 62, "Photo in, clone out", 28, weight="bold")
    page.text(width - _MARGIN, 62, _headline(inversion), 15, GREY, align="right")

    photo, found, clone = inversion.photo, inversion.latent_only, inversion.image
    columns = [
        ("Photo", to_uint8(photo), f"{resolution} × {resolution}", "pixels"),
        ("Latent only", to_uint8(found), *_fidelity(inversion, 0)),
        ("Clone", to_uint8(clone), *_fidelity(inversion, 1)),
        (f"Error of latent only, ×{GAIN}", *_error(photo, found)),
        (f"Error of the clone, ×{GAIN}", *_error(photo, clone)),
    ]
    for i, (title, picture, number, unit) in enumerate(columns):
        x, color = _MARGIN + i * (side + _GAP), ACCENT if title == "Clone" else INK
        page.text(x, first, title, 17, color, weight="bold")
        page.picture(x, first + 14, _fit(picture, side), ACCENT if title == "Clone" else FAINT)
        page.text(x, first + side + 42, number, 19, color, weight="bold")
        page.text(x + side, first + side + 42, unit, 15, GREY, align="right")

    second = first + row
    for i, (name, amount, image) in enumerate(moves):
        x = _MARGIN + i * (side + _GAP)
        if i == 0:
            page.text(x, second, "Edits of the clone", 17, weight="bold")
        page.picture(x, second + 14, _fit(to_uint8(image), side), FAINT)
        page.text(x, second + side + 42, name, 17)
        page.text(x + side, second + side + 42, amount, 15, GREY, align="right")

    for i, line in enumerate(_footer(inversion)):
        page.text(_MARGIN, page.height - 58 + 24 * i, line, 14, GREY)
    return _pixels(page.figure)


def draw_curve(history: Sequence[Mapping[str, float]]) -> Image.Image:
    """PSNR and loss over the steps, one column for each stage: their losses are different quantities.

    Args:
        history: rows with "stage" (0 latent, 1 tweak), "step" within it, "loss", "psnr"; may be empty.
    """
    figure = Figure(figsize=(12, 6.2), dpi=_DPI, facecolor="white")
    figure.text(0.075, 0.935, "How the clone was found", fontsize=17, weight="bold", color=INK)
    stages = [stage for stage in (0, 1) if any(row["stage"] == stage for row in history)]
    grid = figure.add_gridspec(
        2, max(1, len(stages)), left=0.075, right=0.975, top=0.84, bottom=0.1, hspace=0.14, wspace=0.14
    )
    shared: Any = None  # the axis of the first PSNR: both stages are read against one scale
    for column, stage in enumerate(stages):
        rows = [row for row in history if row["stage"] == stage]
        color = (SLATE, ACCENT)[stage]
        upper = figure.add_subplot(grid[0, column], sharey=shared)
        shared = shared or upper
        best = _plot(upper, rows, "psnr", color)
        upper.set_title(("Latent search", "Tweak")[stage], loc="left", fontsize=13, color=INK, weight="bold")
        upper.set_title(f"{best}{rows[-1]['step']:.0f} steps", loc="right", fontsize=11, color=color)
        upper.tick_params(labelbottom=False)
        lower = figure.add_subplot(grid[1, column], sharex=upper)
        _plot(lower, rows, "loss", color)
        lower.set_xlabel("step", fontsize=11, color=GREY)
        if column == 0:
            upper.set_ylabel("PSNR in dB", fontsize=11, color=GREY)
            lower.set_ylabel("loss", fontsize=11, color=GREY)
    if not stages:
        figure.text(0.075, 0.85, "No steps were taken.", fontsize=12, color=GREY)
    figure.align_ylabels()
    return _pixels(figure)


# ------------------------------------------------------------------------------------------------------------
# drawing


class _Page:
    """A figure addressed in pixels from its upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        color: str = INK,
        *,
        weight: str = "normal",
        align: str = "left",
    ) -> None:
        """`y` is the baseline, `size` that of the font in pixels."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size * 72 / _DPI,
            color=color,
            weight=weight,
            ha=align,
            va="baseline",
            parse_math=False,  # a direction's name may hold a dollar sign
        )

    def picture(self, x: int, y: int, pixels: np.ndarray, frame: str) -> None:
        """[h, w, 3] uint8 with its upper left pixel at (x, y), and a frame of one pixel around it."""
        height, width = pixels.shape[:2]
        framed = np.empty((height + 2, width + 2, 3), dtype=np.uint8)
        framed[:] = np.round(np.multiply(to_rgb(frame), 255))
        framed[1:-1, 1:-1] = pixels
        self.figure.figimage(framed, xo=x - 1, yo=self.height - (y + height + 1), origin="upper")


def _pixels(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _plot(axis: Any, rows: Sequence[Mapping[str, float]], key: str, color: str) -> str:
    """One curve; returns the best PSNR in words for the title."""
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(FAINT)
    axis.tick_params(colors=GREY, labelsize=10, length=0)
    axis.grid(axis="y", color="#eceef2", linewidth=1)
    axis.set_axisbelow(True)
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    points = [(row["step"], row[key]) for row in rows if np.isfinite(row.get(key, np.nan))]
    if not points:
        return ""
    x, y = np.array(points, dtype=np.float64).T
    axis.plot(x, y, color=color, linewidth=1.8, marker="o" if len(x) == 1 else None)
    if key == "loss" and y.min() > 0 and y.max() > 3 * y.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    return f"best {y.max():.2f} dB in "


def _panel_side(resolution: int) -> int:
    """About 300 pixels: a whole multiple of the resolution where that is small, else 300 itself."""
    return resolution * round(300 / resolution) if resolution <= 300 else 300


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """[R, R, 3] uint8 -> [side, side, 3] uint8."""
    factor, rest = divmod(side, pixels.shape[0])
    if factor and not rest:
        return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


def _error(photo: Tensor, image: Tensor) -> tuple[np.ndarray, str, str]:
    """The absolute difference, mean over channels, `GAIN` times, dark to bright; and its mean in words."""
    values = np.abs(to_uint8(photo).astype(np.float64) - to_uint8(image)).mean(axis=2)
    picture = colormaps["magma"](np.clip(GAIN * values / 255, 0, 1), bytes=True)[..., :3]
    return picture, f"{values.mean():.1f}", "of 255, mean"


def _choose_edits(inversion: Inversion, strength: float) -> list[tuple[str, str, Tensor]]:
    """Up to five (name, amount, image). Of many directions those that change the most; of few, backwards as well."""
    directions = dict(inversion.directions) or edit.pca_directions(inversion.generator, _COLUMNS, samples=1024)
    signs = (1, -1) if len(directions) < _COLUMNS else (1,)
    moves = [(name, sign * strength) for sign in signs for name in directions]
    drawn = [(name, amount, inversion.edit(directions[name], amount)) for name, amount in moves]
    if len(directions) > _COLUMNS:
        drawn.sort(key=lambda move: -float((move[2] - inversion.image).abs().mean()))
    names = list(directions)
    kept = sorted(drawn[:_COLUMNS], key=lambda move: (names.index(move[0]), move[1]))
    return [(name.replace("_", " "), f"{amount:+g} σ".replace("-", "−"), image) for name, amount, image in kept]


# ------------------------------------------------------------------------------------------------------------
# words


def _fidelity(inversion: Inversion, which: int) -> tuple[str, str]:
    """PSNR and SSIM of the latent-only image (0) or the clone (1)."""
    image = (inversion.latent_only, inversion.image)[which]
    psnr = inversion.metrics.get(("latent_psnr", "psnr")[which])
    ssim = inversion.metrics.get(("latent_ssim", "ssim")[which])
    psnr = metrics.psnr(image, inversion.photo) if psnr is None else psnr
    ssim = metrics.ssim(image, inversion.photo) if ssim is None else ssim
    return f"{psnr:.2f} dB", f"SSIM {ssim:.3f}"


def _headline(inversion: Inversion) -> str:
    settings = inversion.settings
    modes = {"clone": "tweak with all losses", "recon": "tweak by reconstruction only"}
    parts = [modes.get(str(settings.get("mode")), "")]
    space = settings.get("latent", {}).get("space")
    if space:
        parts.append(f"latent in {str(space).upper()}")
    if settings.get("interrupted"):
        parts.append("interrupted")
    return "   ·   ".join(part for part in parts if part)


def describe_drift(values: Mapping[str, float | None]) -> list[str]:
    """One phrase, or none where the drift was not measured."""
    psnr, ssim = values.get("drift_psnr"), values.get("drift_ssim")
    if psnr is None or ssim is None:
        return []
    if math.isinf(psnr):
        return ["no drift: other images are as before"]
    return [f"drift: other images before and after agree to {psnr:.1f} dB, SSIM {ssim:.3f}"]


def _footer(inversion: Inversion) -> list[str]:
    """What it took, and what it did to the rest."""
    steps = [max((row["step"] for row in inversion.history if row["stage"] == s), default=0) for s in (0, 1)]
    parts = [f"{steps[0]:.0f} latent steps, {steps[1]:.0f} tweak steps"]
    if inversion.seconds:
        each = ", ".join(f"{name} {value:.1f}" for name, value in inversion.seconds.items())
        parts.append(f"{sum(inversion.seconds.values()):.1f} s ({each})")
    others = describe_drift(inversion.metrics)
    edits = inversion.metrics.get("editability")
    if edits is not None:
        others.append(f"edits correlate {edits:.2f} with those of latent only")
    return ["   ·   ".join(line) for line in (parts, others)]
