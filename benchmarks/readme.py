"""Write the README's tables from the JSON in benchmarks/results: `python -m benchmarks.readme`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and is made from NAME.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .report import measured

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


def _quality(result: dict[str, Any]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    datasets = list(dict.fromkeys(row["dataset"] for row in result["rows"]))
    cells = {(row["dataset"], row["method"]): row["means"] for row in result["rows"]}
    rows = []
    for method in sorted(methods, key=lambda name: cells[datasets[0], name]["psnr_y_db"]):
        row = [method]
        for dataset in datasets:
            means = cells[dataset, method]
            row += [f"{means['psnr_y_db']:.2f}", f"{means['ssim_y']:.4f}", f"{means['lpips_like']:.4f}"]
        rows.append(row)
    headings = ["x2"] + [f"{dataset} {figure}" for dataset in datasets for figure in ("PSNR-Y", "SSIM-Y", "LPIPS-like")]
    return _table(headings, rows) + _machine(result)


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


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality": _quality, "latency": _latency, "runtime": _runtime,
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
