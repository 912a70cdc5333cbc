"""Write the README's tables from the JSON in benchmarks/results: `python -m benchmarks.readme`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(text: str, results: Path = RESULTS) -> str:
    """Replace every table of a README by the one that its JSON gives.

    Raises: KeyError for a table that nothing makes, OSError or ValueError for an unreadable result.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        result = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{TABLES[name](result)}{match[3]}"

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


def _latency(result: dict[str, Any]) -> str:
    scale = result["model"]["scale"]
    rows = []
    for row in result["rows"]:
        height, width = row["size"]
        speedup = row["speedup_over_onnxruntime_fp32"]
        rows.append(
            [
                f"{width}x{height} -> {width * scale}x{height * scale}",
                row["contestant"],
                f"{row['median_ms']:.1f}",
                f"{row['p95_ms']:.1f}",
                f"{row['output_mp_per_s']:.1f}",
                f"{row['times_bilinear']:.1f}",
                "-" if speedup is None else f"{speedup:.2f}",
                "-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}",
            ]
        )
    headings = ["size", "contestant", "median ms", "p95 ms", "output MP/s", "x bilinear", "x ORT fp32", "peak MiB"]
    return _table(headings, rows) + _machine(result)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"quality": _quality, "latency": _latency}


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
