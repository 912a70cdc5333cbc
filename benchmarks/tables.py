"""Tables for people, made from the JSON form of any result; the README and the page show the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .report import figure, latency_table, measured, roofline_table, tiling_table
from .restoration import COLUMNS as RESTORATION_COLUMNS


@dataclass(frozen=True)
class Table:
    """Cells in words; the first column names the rows. A cell between asterisks is not ours."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of(result: dict[str, Any]) -> list[Table]:
    """Give the tables of a result. Raises: KeyError for a kind that none is made of."""
    return TABLES[result["kind"]](result)


def overviews_of(result: dict[str, Any]) -> list[Table]:
    """Give the tables of a result for the README, where `latency` has one row for each contestant. Raises: KeyError."""
    return [_latency_overview(result)] if result["kind"] == "latency" else tables_of(result)


# PSNR-Y in dB as published, by scale, method and test set; collected in the papers of EDSR and SwinIR.
PUBLISHED = {
    2: {
        "SRCNN": {"Set5": 36.66, "Set14": 32.42, "BSD100": 31.36},
        "FSRCNN": {"Set5": 37.00, "Set14": 32.63, "BSD100": 31.53},
        "VDSR": {"Set5": 37.53, "Set14": 33.03, "BSD100": 31.90},
        "EDSR": {"Set5": 38.11, "Set14": 33.92, "BSD100": 32.32},
        "SwinIR": {"Set5": 38.42, "Set14": 34.46, "BSD100": 32.53},
    },
    4: {
        "SRCNN": {"Set5": 30.48, "Set14": 27.50, "BSD100": 26.90},
        "FSRCNN": {"Set5": 30.72, "Set14": 27.61, "BSD100": 26.98},
        "VDSR": {"Set5": 31.35, "Set14": 28.01, "BSD100": 27.29},
        "EDSR": {"Set5": 32.46, "Set14": 28.80, "BSD100": 27.71},
        "SwinIR": {"Set5": 32.92, "Set14": 29.09, "BSD100": 27.92},
    },
}


def _quality(result: dict[str, Any]) -> list[Table]:
    return [_quality_at(scale, result) for scale in dict.fromkeys(row["scale"] for row in result["rows"])]


def _quality_at(scale: int, result: dict[str, Any]) -> Table:
    """Table of one scale: a row for each method, the nearest to the originals last; published ones have their PSNR."""
    rows = [row for row in result["rows"] if row["scale"] == scale]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    costs = {model["method"]: model for model in result["models"]}
    means: dict[str, dict[str, dict[str, float]]] = {
        f"*{name}*": {dataset: {"psnr_y_db": figures[dataset]} for dataset in datasets if dataset in figures}
        for name, figures in PUBLISHED.get(scale, {}).items()
        if figures.keys() & set(datasets)
    }
    for row in rows:
        means.setdefault(row["method"], {})[row["dataset"]] = row["means"]
    lines = []
    for method, sets in sorted(means.items(), key=lambda item: min(each["psnr_y_db"] for each in item[1].values())):
        cost = costs.get(method, {})
        line = [method, *(figure(cost.get(key), 0) for key in ("parameters", "kmac_per_pixel"))]
        for dataset in datasets:
            found = sets.get(dataset, {})
            line += [figure(found.get(key), decimals) for key, (_, decimals) in QUALITY_COLUMNS.items()]
        for key in ("colour_drift", "grid_db"):  # the worst test set
            found_values = [each[key] for each in sets.values() if key in each]
            line.append(figure(max(found_values, default=None), 2))
        lines.append(line)
    headings = [f"x{scale}", "parameters", "kMAC/px"]
    headings += [f"{dataset} {heading}" for dataset in datasets for heading, _ in QUALITY_COLUMNS.values()]
    return Table([*headings, "colour drift", "grid dB"], lines)


QUALITY_COLUMNS = {"psnr_y_db": ("PSNR-Y", 2), "ssim_y": ("SSIM-Y", 4), "lpips_like": ("LPIPS-like", 4)}


def _latency(result: dict[str, Any]) -> list[Table]:
    headings, cases = latency_table(result)
    return [Table(["size", *headings], [[case, *cells] for case, rows in cases.items() for cells in rows])]


def _latency_overview(result: dict[str, Any]) -> Table:
    """Medians of every case, and all about the last one."""
    headings, cases = latency_table(result, leave_out=("p95_ms", "p99_ms", "min_ms", "max_ms"))
    about = dict.fromkeys(name for rows in cases.values() for name, *_ in rows)  # contestants, in their order
    lines = []
    for name in about:
        found = [next((cells[1:] for cells in rows if cells[0] == name), None) for rows in cases.values()]
        last = found[-1] or ["-"] * (len(headings) - 1)
        lines.append([name, *(cells[0] if cells else "-" for cells in found), *last[1:]])
    return Table(["contestant", *(f"{case}, median ms" for case in cases), *headings[2:]], lines)


def _runtime(result: dict[str, Any]) -> list[Table]:
    rows = [[row["part"], row["case"], *measured(row)] for row in result["rows"]]
    return [Table(["figure", "case", "measured", "target"], rows)]


def _restoration(result: dict[str, Any]) -> list[Table]:
    shown = [key for key in RESTORATION_COLUMNS if any(row["means"].get(key) is not None for row in result["rows"])]
    headings, decimals = zip(*(RESTORATION_COLUMNS[key] for key in shown))
    rows = [
        [f"{row['dataset']} x{row['scale']}", row["task"], row["method"]]
        + [figure(row["means"].get(key), places) for key, places in zip(shown, decimals)]
        for row in result["rows"]
    ]
    return [Table(["test set", "task", "model", *headings], rows)]


def _train(result: dict[str, Any]) -> list[Table]:
    rows = []
    for row in result["rows"]:
        cells = [f"{row[f'{part}_images_per_s']['median']:.1f}" for part in ("loop", "step", "forward_backward")]
        shares = [row[f"share_of_{part}"] for part in ("step", "forward_backward")]
        cells += ["{median:.2f} ({min:.2f} to {max:.2f})".format(**share) for share in shares]
        rows.append([f"{result['recipe']}, {row['batch']} of {row['size']}x{row['size']}", *cells])
    headings = ["recipe, batch", "images/s", "step alone", "forward and backward alone", "share of step"]
    return [Table([*headings, "share of forward and backward"], rows)]


def _roofline(result: dict[str, Any]) -> list[Table]:
    return [Table(*roofline_table(result))]


def _scaling(result: dict[str, Any]) -> list[Table]:
    rows = []
    for axis, fit in result["fits"].items():
        points = [row for row in result["rows"] if row["axis"] == axis]
        ends = [f"{row['value']}: {row['median_ms']:.1f} ms" for row in (points[0], points[-1])]
        rows.append([axis, *ends, figure(fit["exponent"], 2), figure(fit["r2"], 3)])
    return [Table(["axis", "first point", "last point", "exponent", "r2"], rows)]


def _soak(result: dict[str, Any]) -> list[Table]:
    rows = [[row["kind"], *(figure(row[key], 2) for key in ("first", "last", "drift"))] for row in result["rows"]]
    totals = [str(result["totals"][key]) for key in ("right", "refused", "wrong", "error")]
    seconds = result["intervals"][-1]["seconds"]
    about = [[f"{seconds / 60:.0f} min, {result['clients']} clients", *totals, figure(result["growth_mib"], 1)]]
    return [
        Table(["soak", "right", "refused", "wrong", "errors", "growth MiB"], about),
        Table(["request", "first quarter x alone", "last quarter x alone", "drift"], rows),
    ]


def _tiling(result: dict[str, Any]) -> list[Table]:
    return [Table(*tiling_table(result))]


TABLES: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "quality": _quality, "latency": _latency, "runtime": _runtime, "large": _runtime, "serve": _runtime,
    "restoration": _restoration, "train": _train, "roofline": _roofline, "scaling": _scaling, "soak": _soak,
    "tiling": _tiling,
}  # fmt: skip


def provenance(result: dict[str, Any]) -> str:
    """Say on what machine and by what command a result was made."""
    facts = result["machine"]
    versions = ", ".join(
        f"{name} {facts['versions'][name]}"
        for name in ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch")
        if name in facts["versions"]
    )
    gpus = ", ".join(facts["gpus"]) or "no GPU"
    return f"{facts['cpu']}, {facts['usable_cores']} cores, {gpus}; {versions}. Made by `{result['command']}`."
