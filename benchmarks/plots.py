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
        ends = [(row["min_ms"], row["max_ms"]) for row in rows]
        colours = [OURS if row["engine"] in ("onnxruntime", "openvino", "tensorrt") else OTHERS for row in rows]
        place.hlines(heights, *zip(*ends), color=OTHERS, linewidth=1)
        place.scatter(medians, heights, c=colours, s=18, zorder=3)
        for height, median in zip(heights, medians):
            place.annotate(f"{median:,.3g}" if median < 1000 else f"{median:,.0f}", (median, height), (5, 3),
                           textcoords="offset points", fontsize=7)  # fmt: skip
        baseline = [row["median_ms"] for row in rows if row["contestant"] == "bilinear"]
        for median in baseline:
            place.axvline(median, linestyle="--", linewidth=0.8, color=OTHERS)
        place.set(xscale="log", xlabel="ms, median with least and most", title=case)
        place.margins(x=0.12)
        place.set_yticks(range(len(names), 0, -1), names if place is places[0] else [""] * len(names))
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
            heights = [*ours.values(), *(psnr for _, _, psnr, _ in points)]
            for name, cost, psnr, colour in points:
                place.plot(cost, psnr, "o", color=colour)
                # On the side where the nearest other point is not; labels are wide and low.
                reach = max(heights) - min(heights) or 1
                distances = [(np.hypot(np.log10(x / cost), 16 * (y - psnr) / reach), x < cost) for _, x, y, _ in points]
                is_after = len(points) == 1 or sorted(distances)[1][1]
                side, offset = ("left", (5, -3)) if is_after else ("right", (-5, -3))
                place.annotate(name, (cost, psnr), offset, textcoords="offset points", fontsize=7, ha=side)
            if "bicubic" in ours:
                place.axhline(ours["bicubic"], linestyle="--", linewidth=0.8, color=OTHERS, label="bicubic")
                place.legend(fontsize=7, loc="center right")
            place.set(xscale="log", xlabel="kMAC for an output pixel", title=f"{dataset} x{scale}")
            place.margins(x=0.4, y=0.12)
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
    intensities = [row["intensity"] for row in result["rows"]]
    span = np.array([min(intensities) / 8, 2 * max(intensities)])
    for index, (device, precision, matrix, copy) in enumerate(ceilings):
        knee = matrix / copy
        x = np.array([span[0], knee, max(span[1], 2 * knee)])
        place.plot(x, np.minimum(x * copy, matrix), color=f"C{index}", linewidth=1, label=f"{device} {precision} bound")
    for index, engine in enumerate(dict.fromkeys(row["engine"] for row in result["rows"])):
        rows = [row for row in result["rows"] if row["engine"] == engine]
        intensity, reached = ([row[key] for row in rows] for key in ("intensity", "reached_gops"))
        place.plot(intensity, reached, "osD^v"[index % 5], color=f"C{index + len(ceilings)}", label=engine, alpha=0.8)
    place.set(xscale="log", yscale="log", xlabel="operations for a byte that the layers move", ylabel="Gop/s")
    _write_ticks(place, span, wide=True)
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
        _write_ticks(place, x, wide=axis == "pixels")
    places[0].set_ylabel("ms")
    return [figure]


def _write_ticks(place: Axes, x: np.ndarray, *, wide: bool) -> None:
    """Write plain numbers at the ticks of logarithmic axes. wide: x goes over decades, so that not each has a place."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if not wide:
        shown = x if len(x) < 6 else x[::2]
        place.set_xticks(shown, [f"{value:g}" for value in shown])
    for scale in (place.xaxis, place.yaxis):
        scale.set_minor_formatter(NullFormatter())


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
