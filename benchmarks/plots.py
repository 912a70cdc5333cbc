"""Plots of results, for the page and the README. Needs matplotlib, of the `train` extra."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from sdk import Bundle
from sdk.bundle import shipped_models
from sdk.errors import BackendUnavailable
from train.plots import new_figure

from .report import latency_cases
from .tables import PUBLISHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Multiplications for each output pixel of published networks, in thousands: Mult-Adds for a 1280x720 result, as Ahn et
# al., "Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network", 2018, collected them.
PUBLISHED_KMAC = {
    2: {"SRCNN": 52.7e6 / 921.6e3, "FSRCNN": 6.0e6 / 921.6e3, "VDSR": 612.6e6 / 921.6e3},
    4: {"SRCNN": 52.7e6 / 921.6e3, "FSRCNN": 4.6e6 / 921.6e3, "VDSR": 612.6e6 / 921.6e3},
}
DPI = 110
OURS, OTHERS = "tab:blue", "tab:gray"


def draw(result: dict[str, Any]) -> list[Figure]:
    """Draw the plots of a result; kinds without one give none."""
    return PLOTS.get(result["kind"], lambda result: [])(result)


def draw_files(name: str, result: dict[str, Any]) -> dict[str, bytes]:
    """Draw the plots of a result as PNG files, by their names. name: of the result."""
    figures, source = draw(result), fingerprint(result)
    return {
        f"{name}{f'-{number}' if len(figures) > 1 else ''}.png": as_png(figure, source=source)
        for number, figure in enumerate(figures, 1)
    }


def draw_seams_file() -> dict[str, bytes]:
    """Draw the plot of the shipped models' seams as a PNG file, by its name."""
    tables = halo_tables()
    return {"seams.png": as_png(draw_seams(tables), source=fingerprint(tables))}


def halo_tables() -> dict[str, Any]:
    """Give each shipped model's error over the context that tiles get, as measured when it was exported."""
    return {name: [asdict(row) for row in Bundle.load(name).stage().halo] for name in shipped_models()}


def as_png(figure: Figure, *, source: str) -> bytes:
    """Give a PNG that says in its metadata what it was drawn from."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": "sr-bench", "Source": source})
    return buffer.getvalue()


def source_of(file: Path | BinaryIO) -> str:
    """Give the fingerprint of what a PNG was drawn from."""
    with Image.open(file) as opened:
        return str(opened.info.get("Source"))


def fingerprint(result: dict[str, Any]) -> str:
    """Give the SHA-256 of a result's JSON, whatever its layout."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _figure(columns: int, *, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    try:
        figure, axes = new_figure(1, columns, size=(size[0] * columns, size[1]))
    except ImportError as exc:
        raise BackendUnavailable("matplotlib is not installed; install sr-sdk[train]") from exc
    places = list(axes[0])
    for place in places:
        place.grid(alpha=0.25, linewidth=0.5)
    return figure, places


def _latency(result: dict[str, Any]) -> list[Figure]:
    cases = latency_cases(result)
    names = list(dict.fromkeys(row["contestant"] for row in result["rows"]))
    figure, places = _figure(len(cases), size=(5, 1 + 0.28 * len(names)))
    for place, (case, rows) in zip(places, cases.items()):
        heights = [len(names) - names.index(row["contestant"]) for row in rows]
        medians = [row["median_ms"] for row in rows]
        spans = [
            [row["median_ms"] - row["min_ms"] for row in rows], [row["max_ms"] - row["median_ms"] for row in rows]
        ]  # fmt: skip
        colours = [OURS if row["engine"] in ("onnxruntime", "openvino", "tensorrt") else OTHERS for row in rows]
        place.barh(heights, medians, xerr=spans, color=colours, error_kw={"linewidth": 0.7})
        place.set(xscale="log", xlabel="ms, median with least and most", title=case)
        place.set_yticks(range(len(names), 0, -1), names)
    return [figure]


def _quality(result: dict[str, Any]) -> list[Figure]:
    costs = {model["method"]: model["kmac_per_pixel"] for model in result["models"]}
    figures = []
    for scale in dict.fromkeys(row["scale"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["scale"] == scale]
        datasets = list(dict.fromkeys(row["dataset"] for row in rows))
        figure, places = _figure(len(datasets), size=(4.2, 3.6))
        for place, dataset in zip(places, datasets):
            ours = {row["method"]: row["means"]["psnr_y_db"] for row in rows if row["dataset"] == dataset}
            points = [(name, costs[name], ours[name], OURS) for name in ours if costs.get(name)]
            points += [
                (name, cost, PUBLISHED[scale][name][dataset], OTHERS)
                for name, cost in PUBLISHED_KMAC.get(scale, {}).items()
                if dataset in PUBLISHED[scale][name]
            ]
            for name, cost, psnr, colour in points:
                place.plot(cost, psnr, "o", color=colour)
                offset = (0, 5) if colour == OURS else (0, -11)
                place.annotate(name, (cost, psnr), offset, textcoords="offset points", fontsize=7, ha="center")
            if "bicubic" in ours:
                place.axhline(ours["bicubic"], linestyle="--", linewidth=0.8, color=OTHERS, label="bicubic")
                place.legend(fontsize=7)
            place.set(xscale="log", xlabel="kMAC for an output pixel", title=f"{dataset} x{scale}")
            place.margins(x=0.25, y=0.12)
        places[0].set_ylabel("PSNR-Y dB")
        figures.append(figure)
    return figures


def _roofline(result: dict[str, Any]) -> list[Figure]:
    if not result["rows"]:
        return []
    figure, (place,) = _figure(1, size=(6.5, 4.2))
    ceilings = dict.fromkeys(
        (row["device"], row["precision"], row["matrix_gops"], row["copy_gb_per_s"]) for row in result["rows"]
    )
    span = np.array([0.5, 2 * max(row["intensity"] for row in result["rows"])])
    for index, (device, precision, matrix, copy) in enumerate(ceilings):
        knee = matrix / copy
        x = np.array([span[0], knee, max(span[1], 2 * knee)])
        place.plot(x, np.minimum(x * copy, matrix), color=f"C{index}", linewidth=1, label=f"{device} {precision} bound")
    for index, engine in enumerate(dict.fromkeys(row["engine"] for row in result["rows"])):
        rows = [row for row in result["rows"] if row["engine"] == engine]
        intensity, reached = ([row[key] for row in rows] for key in ("intensity", "reached_gops"))
        place.plot(intensity, reached, "osD^v"[index % 5], color=f"C{index + len(ceilings)}", label=engine, alpha=0.8)
    place.set(xscale="log", yscale="log", xlabel="operations for a byte that the layers move", ylabel="Gop/s")
    place.legend(fontsize=7)
    return [figure]


def _scaling(result: dict[str, Any]) -> list[Figure]:
    axes = list(result["fits"])
    if not axes:
        return []
    figure, places = _figure(len(axes), size=(3.4, 3))
    labels = {"pixels": "LR pixels", "tile": "side of the tile", "batch": "windows at once", "threads": "cores"}
    for place, axis in zip(places, axes):
        rows = [row for row in result["rows"] if row["axis"] == axis]
        x, y = (np.array([row[key] for row in rows]) for key in ("value", "median_ms"))
        least, most = (np.array([row[key] for row in rows]) for key in ("min_ms", "max_ms"))
        place.errorbar(x, y, yerr=(y - least, most - y), fmt="o", markersize=4, linewidth=0.8)
        exponent = result["fits"][axis]["exponent"]
        if exponent is not None:
            level = np.exp(np.log(y).mean() - exponent * np.log(x).mean())
            place.plot(x, level * x**exponent, "--", linewidth=0.8, color=OTHERS, label=f"exponent {exponent:.2f}")
            place.legend(fontsize=7)
        place.set(xscale="log", yscale="log", xlabel=labels[axis])
    places[0].set_ylabel("ms")
    return [figure]


def _soak(result: dict[str, Any]) -> list[Figure]:
    figure, places = _figure(2, size=(4.5, 3))
    minutes = [each["seconds"] / 60 for each in result["intervals"]]
    places[0].plot(minutes, [each["rss_mib"] or np.nan for each in result["intervals"]])
    places[0].set(xlabel="minutes", ylabel="resident MiB", ylim=(0, None))
    for row in result["rows"]:
        times = [each["latency"].get(row["kind"], np.nan) for each in result["intervals"]]
        places[1].plot(minutes, times, linewidth=0.8, label=row["kind"])
    places[1].set(xlabel="minutes", ylabel="latency, times that alone", ylim=(0, None))
    places[1].legend(fontsize=6, ncols=2)
    return [figure]


PLOTS: dict[str, Callable[[dict[str, Any]], list[Figure]]] = {
    "latency": _latency, "quality": _quality, "roofline": _roofline, "scaling": _scaling, "soak": _soak,
}  # fmt: skip


def draw_seams(tables: dict[str, Any]) -> Figure:
    """Draw the halo tables of models."""
    figure, (place,) = _figure(1, size=(6.5, 3.6))
    for name, rows in tables.items():
        steps = [row["context"] for row in rows], [row["error"] for row in rows]
        place.step(*steps, where="post", label=name, linewidth=1)
    place.axhline(1, linestyle=":", linewidth=1, color=OTHERS)
    place.set(xlabel="context around a tile, LR pixels", ylabel="largest error, code values of 255", ylim=(0, 255))
    place.set_yscale("symlog", linthresh=1)
    place.legend(fontsize=7)
    return figure
