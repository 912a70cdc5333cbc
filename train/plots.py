"""Pictures of a run: loss curve, sample panels, the learning-rate finder's plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .atomic import replacing

TITLES = ("low resolution", "bilinear", "prediction", "target")
TITLE_HEIGHT = 16


def write_panel(rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path) -> None:
    """Write rows of LR (nearest), bilinear, prediction and target side by side.

    rows: (lr, sr, hr) uint8 RGB; sr and hr have one size.
    Raises: ResourceError if the file cannot be written.
    """
    height, width = rows[0][2].shape[:2]
    sheet = Image.new("RGB", (width * len(TITLES), (height + TITLE_HEIGHT) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (lr, sr, hr) in enumerate(rows):
        top = row * (height + TITLE_HEIGHT)
        small = Image.fromarray(lr)
        cells = (
            small.resize((width, height), Image.Resampling.NEAREST),
            small.resize((width, height), Image.Resampling.BILINEAR),
            Image.fromarray(sr),
            Image.fromarray(hr),
        )
        for column, (title, cell) in enumerate(zip(TITLES, cells, strict=True)):
            draw.text((column * width + 4, top + 2), title, fill="black")
            sheet.paste(cell, (column * width, top + TITLE_HEIGHT))
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def write_loss_curve(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot every loss term and the validation PSNR-Y over the steps of a run.

    entries: the log, see train.run_folder.read_log.
    Raises: ResourceError if the file cannot be written.
    """
    figure, (left, right) = _figure(columns=2)
    steps = [entry["done_steps"] for entry in entries]
    names = sorted({name for entry in entries for name in entry["terms"]})
    for name in names:
        values = [entry["terms"].get(name, np.nan) for entry in entries]
        left.plot(steps, values, label=name, linewidth=0.8, marker="." if len(steps) < 20 else None)
    if names:
        left.set_yscale("log")
        left.legend()
    left.set(xlabel="step", ylabel="loss")
    measured = [(entry["done_steps"], entry["psnr_y"]) for entry in entries if entry["psnr_y"] is not None]
    if measured:
        right.plot(*zip(*measured, strict=True), marker=".")
    right.set(xlabel="step", ylabel="validation PSNR-Y [dB], EMA weights")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def write_rate_plot(rates: Sequence[float], losses: Sequence[float], suggestion: float | None, path: Path) -> None:
    """Plot loss over learning rate with the suggestion marked, if there is one.

    Raises: ResourceError if the file cannot be written.
    """
    figure, (axes,) = _figure(columns=1)
    axes.plot(rates, losses)
    axes.set(xlabel="learning rate", ylabel="smoothed loss", xscale="log")
    if suggestion is not None:
        axes.axvline(suggestion, linestyle="--", color="tab:red", label=f"suggestion {suggestion:.1e}")
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _figure(*, columns: int) -> tuple[Any, Any]:
    # The object interface needs no display and no global state, unlike pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]
