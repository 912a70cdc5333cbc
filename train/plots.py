"""Pictures of a run: loss curve, sample panels, the learning-rate finder's plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

TITLES = ("low resolution", "bilinear", "prediction", "target")
TITLE_HEIGHT = 16


def write_panel(rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path) -> None:
    """Write rows of LR (nearest), bilinear, prediction and target side by side.

    rows: (lr, sr, hr) uint8 RGB; sr and hr have one size.
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
        for column, (title, cell) in enumerate(zip(TITLES, cells)):
            draw.text((column * width + 4, top + 2), title, fill="black")
            sheet.paste(cell, (column * width, top + TITLE_HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read log.jsonl; a last line cut short by a killed process is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for index, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            if index + 1 < len(lines):
                raise
    return entries


def write_loss_curve(log: Path, path: Path) -> None:
    """Plot every loss term and the validation PSNR-Y over the steps of a run."""
    entries = read_log(log)
    if len(entries) < 2:
        return
    figure, (left, right) = _figure(columns=2)
    steps = [entry["done_steps"] for entry in entries]
    for name in sorted({name for entry in entries for name in entry["terms"]}):
        left.plot(steps, [entry["terms"].get(name, np.nan) for entry in entries], label=name, linewidth=0.8)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend()
    measured = [(entry["done_steps"], entry["psnr_y"]) for entry in entries if entry["psnr_y"] is not None]
    if measured:
        right.plot(*zip(*measured), marker=".")
    right.set(xlabel="step", ylabel="validation PSNR-Y [dB], EMA weights")
    figure.savefig(path)


def write_rate_plot(rates: Sequence[float], losses: Sequence[float], suggestion: float, path: Path) -> None:
    """Plot loss over learning rate with the suggestion marked."""
    figure, (axes,) = _figure(columns=1)
    axes.plot(rates, losses)
    axes.axvline(suggestion, linestyle="--", color="tab:red", label=f"suggestion {suggestion:.1e}")
    axes.set(xlabel="learning rate", ylabel="smoothed loss", xscale="log")
    axes.legend()
    figure.savefig(path)


def _figure(*, columns: int) -> tuple[Any, Any]:
    # The object interface needs no display and no global state, unlike pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]
