"""Write the README's tables from the JSON in benchmarks/results: `python -m benchmarks.readme`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and is made from NAME.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .report import figure, measured
from .restoration import COLUMNS as RESTORATION_COLUMNS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(text: str, results: Path = RESULTS) -> str:
    """Replace every table of a README by the one that its JSON gives.

    Raises: KeyError for a result that no table is made of, OSError or ValueError for an unreadable result.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        result = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{TABLES[result['kind']](result)}{match[3]}"

    return BLOCK.sub(fill, text)


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


def _quality(result: dict[str, Any]) -> str:
    scales = dict.fromkeys(row["scale"] for row in result["rows"])
    return "\n".join(_quality_at(scale, result) for scale in scales) + _machine(result)


def _quality_at(scale: int, result: dict[str, Any]) -> str:
    """Table of one scale: a row for each method, the nearest to the originals last; published ones have their PSNR."""
    rows = [row for row in result["rows"] if row["scale"] == scale]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    costs = {model["method"]: model for model in result["models"]}
    means: dict[str, dict[str, dict[str, float]]] = {
        f"*{name}*": {dataset: {"psnr_y_db": figures[dataset]} for dataset in datasets if dataset in figures}
        for name, figures in PUBLISHED.get(scale, {}).items()
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
    return _table([*headings, "colour drift", "grid dB"], lines)


QUALITY_COLUMNS = {"psnr_y_db": ("PSNR-Y", 2), "ssim_y": ("SSIM-Y", 4), "lpips_like": ("LPIPS-like", 4)}


# Heading and decimals of each figure; those that no row has are left out.
LATENCY_COLUMNS = {
    "median_ms": ("median ms", 1),
    "p95_ms": ("p95 ms", 1),
    "output_mp_per_s": ("output MP/s", 1),
    "times_bilinear": ("x bilinear", 1),
    "speedup_over_onnxruntime_fp32": ("x ORT fp32", 2),
    "speedup_over_pytorch_fp32": ("x PyTorch fp32", 2),
    "psnr_to_onnxruntime_fp32_db": ("dB to ORT fp32", 1),
    "peak_memory_mib": ("peak MiB", 0),
}


def _latency(result: dict[str, Any]) -> str:
    scale = result["model"]["scale"]
    columns = {key: LATENCY_COLUMNS[key] for key in LATENCY_COLUMNS if any(key in row for row in result["rows"])}
    rows = []
    for row in result["rows"]:
        height, width = row["size"]
        cells = ["-" if row[key] is None else f"{row[key]:.{decimals}f}" for key, (_, decimals) in columns.items()]
        rows.append([f"{width}x{height} -> {width * scale}x{height * scale}", row["contestant"], *cells])
    return _table(["size", "contestant", *(heading for heading, _ in columns.values())], rows) + _machine(result)


def _runtime(result: dict[str, Any]) -> str:
    rows = [[row["part"], row["case"], *measured(row)] for row in result["rows"]]
    return _table(["figure", "case", "measured", "target"], rows) + _machine(result)


def _restoration(result: dict[str, Any]) -> str:
    shown = [key for key in RESTORATION_COLUMNS if any(row["means"].get(key) is not None for row in result["rows"])]
    headings, decimals = zip(*(RESTORATION_COLUMNS[key] for key in shown))
    rows = [
        [f"{row['dataset']} x{row['scale']}", row["task"], row["method"]]
        + [figure(row["means"].get(key), places) for key, places in zip(shown, decimals)]
        for row in result["rows"]
    ]
    return _table(["test set", "task", "model", *headings], rows) + _machine(result)


def _train(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        cells = [f"{row[f'{part}_images_per_s']['median']:.1f}" for part in ("loop", "step", "forward_backward")]
        shares = [row[f"share_of_{part}"] for part in ("step", "forward_backward")]
        cells += ["{median:.2f} ({min:.2f} to {max:.2f})".format(**share) for share in shares]
        rows.append([f"{result['recipe']}, {row['batch']} of {row['size']}x{row['size']}", *cells])
    headings = ["recipe, batch", "images/s", "step alone", "forward and backward alone", "share of step"]
    return _table([*headings, "share of forward and backward"], rows) + _machine(result)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality": _quality, "latency": _latency, "runtime": _runtime, "restoration": _restoration, "train": _train,
}  # fmt: skip


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    versions = ", ".join(
        f"{name} {facts['versions'][name]}"
        for name in ("onnxruntime", "openvino", "torch")
        if name in facts["versions"]
    )
    gpus = ", ".join(facts["gpus"]) or "no GPU"
    return f"\n{facts['cpu']}, {facts['usable_cores']} cores, {gpus}; {versions}. Made by `{result['command']}`.\n"


if __name__ == "__main__":
    README.write_text(fill_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
