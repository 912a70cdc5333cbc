"""Results as plain text: aligned columns made from the JSON form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .lpips_like import LABEL

# Heading and decimals of each figure; those that no row has are left out.
LATENCY_COLUMNS = {
    "median_ms": ("median ms", 1),
    "p95_ms": ("p95 ms", 1),
    "p99_ms": ("p99 ms", 1),
    "min_ms": ("min ms", 1),
    "max_ms": ("max ms", 1),
    "output_mp_per_s": ("output MP/s", 1),
    "times_bilinear": ("x bilinear's time", 1),
    "speedup_over_onnxruntime_fp32": ("faster than ORT fp32", 2),
    "speedup_over_pytorch_fp32": ("faster than PyTorch fp32", 2),
    "psnr_to_onnxruntime_fp32_db": ("dB to ORT fp32", 1),
    "peak_memory_mib": ("peak MiB", 0),
    "peak_device_mib": ("GPU MiB", 0),
    "energy_j": ("J", 2),
}
ROOFLINE_COLUMNS = {
    "median_ms": ("median ms", 2),
    "floor_ms": ("floor ms", 2),
    "share_of_floor": ("share of floor", 3),
    "gigaoperations": ("Gop", 2),
    "reached_gops": ("Gop/s", 0),
    "matrix_gops": ("matrix Gop/s", 0),
    "layer_mb": ("layers MB", 1),
    "copy_gb_per_s": ("copy GB/s", 1),
    "intensity": ("op/byte", 0),
}
# Heading and decimals of each figure.
QUALITY_COLUMNS = {
    "psnr_y_db": ("PSNR-Y dB", 2),
    "ssim_y": ("SSIM-Y", 4),
    "lpips_like": (LABEL, 4),
    "colour_drift": ("colour drift", 3),
    "grid_db": ("grid dB", 2),
}

TILING_COLUMNS = {
    "median_ms": ("median ms", 1),
    "output_mp_per_s": ("output MP/s", 1),
    "error": ("largest error", 0),
    "off_percent": ("% of pixels off", 3),
    "psnr_db": ("PSNR dB to whole", 1),
}


def render(result: dict[str, Any]) -> str:
    """Turn the result of any benchmark into text; the machine first."""
    return "\n\n".join([_machine(result["machine"]), *BODIES[result["kind"]](result)])


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """Align columns: the first `text_columns` to the left, figures to the right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def figure(value: float | None, decimals: int, *, missing: str = "") -> str:
    """Write a figure that may not be there."""
    return missing if value is None else f"{value:,.{decimals}f}"


def _machine(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    processors = ", ".join([f"{facts['cpu']} ({facts['usable_cores']} of {facts['cores']} cores)", *facts["gpus"]])
    return f"{processors}\nPython {facts['python']}, {versions}; commit {facts['commit'] or 'unknown'}"


def latency_cases(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Sort the rows of `sr-bench latency` by what was enlarged: size, batch and, if there are several, stage."""
    scale, cases = result["model"]["scale"], dict[str, list[dict[str, Any]]]()
    stages = {row.get("stage") for row in result["rows"]}
    for row in result["rows"]:
        height, width = row["size"]
        case = f"{width}x{height} -> {width * scale}x{height * scale}"
        if row.get("batch", 1) > 1:
            case += f", {row['batch']} at once"
        if len(stages) > 1:
            case += f", stage {row['stage']}"
        cases.setdefault(case, []).append(row)
    return cases


def latency_table(
    result: dict[str, Any], *, leave_out: Sequence[str] = ()
) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Give headings, and for each case of `sr-bench latency` the cells, a row for each contestant."""
    columns = {
        key: column
        for key, column in LATENCY_COLUMNS.items()
        if key not in leave_out and any(row.get(key) is not None for row in result["rows"])
    }
    cases = {
        case: [
            [
                row["contestant"],
                *(figure(row.get(key), decimals, missing="-") for key, (_, decimals) in columns.items()),
            ]
            for row in rows
        ]
        for case, rows in latency_cases(result).items()
    }
    return ["contestant", *(heading for heading, _ in columns.values())], cases


def _latency(result: dict[str, Any]) -> list[str]:
    model = result["model"]
    blocks = [
        f"{model['name']}, stage {model['stage']}: {result['repeats']} repetitions; "
        f"PyTorch's weights: {result['torch_weights']}"
    ]
    headings, cases = latency_table(result)
    blocks += [f"{title}\n{table(headings, rows)}" for title, rows in cases.items()]
    if result["skipped"]:
        blocks.append("\n".join(f"skipped {item['contestant']}: {item['reason']}" for item in result["skipped"]))
    return blocks


def _quality(result: dict[str, Any]) -> list[str]:
    columns = {key: QUALITY_COLUMNS[key] for key in QUALITY_COLUMNS if key in result["rows"][0]["means"]}
    rows = [
        [f"{row['dataset']} x{row['scale']}", row["method"]]
        + [str(len(row["pictures"])), *(f"{row['means'][key]:.{decimals}f}" for key, (_, decimals) in columns.items())]
        for row in result["rows"]
    ]
    headings = ["dataset", "method", "pictures", *(heading for heading, _ in columns.values())]
    notes = [f"no {LABEL}: {result['lpips_like_missing']}"] if result["lpips_like_missing"] else []
    return [table(headings, rows, text_columns=2), *notes]


def roofline_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Give headings and rows."""
    rows = [
        [row["stage"], "x".join(map(str, row["size"])), row["engine"]]
        + [figure(row[key], decimals) for key, (_, decimals) in ROOFLINE_COLUMNS.items()]
        for row in result["rows"]
    ]
    return ["stage", "LR size", "engine", *(heading for heading, _ in ROOFLINE_COLUMNS.values())], rows


def _roofline(result: dict[str, Any]) -> list[str]:
    headings, rows = roofline_table(result)
    skipped = [f"skipped {item['engine']}, stage {item['stage']}: {item['reason']}" for item in result["skipped"]]
    return [block for block in (table(headings, rows, text_columns=3), "\n".join(skipped)) if block]


def _runtime(result: dict[str, Any]) -> list[str]:
    rows = [[row["part"], row["case"], *measured(row), {None: "", True: "yes", False: "NO"}[row["met"]]]
            for row in result["rows"]]  # fmt: skip
    details = [
        f"{row['part']}, {row['case']}: " + ", ".join(f"{key} {_text(value)}" for key, value in row["details"].items())
        for row in result["rows"]
        if row["details"]
    ]
    skipped = [f"skipped {item['part']}: {item['reason']}" for item in result["skipped"]]
    info = ", ".join(f"{key} {_text(value)}" for key, value in result["info"].items())
    headings = ["figure", "case", "measured", "target", "met"]
    blocks = [info, table(headings, rows, text_columns=2), "\n".join(details), "\n".join(skipped)]
    return [block for block in blocks if block]


def _scaling(result: dict[str, Any]) -> list[str]:
    rows = [
        [row["axis"], str(row["value"]), *(figure(row[key], 2) for key in ("median_ms", "min_ms", "max_ms"))]
        for row in result["rows"]
    ]
    fits = [
        f"{axis}: time ~ {axis} ** {figure(fit['exponent'], 2, missing='?')} (r2 {figure(fit['r2'], 3, missing='?')})"
        for axis, fit in result["fits"].items()
    ]
    skipped = [f"skipped {item['axis']}: {item['reason']}" for item in result["skipped"]]
    points = [table(["axis", "value", "median ms", "min ms", "max ms"], rows)] if rows else []
    return [*points, "\n".join([*fits, *skipped])]


def _soak(result: dict[str, Any]) -> list[str]:
    rows = [
        [row["kind"], *(figure(row[key], 2, missing="-") for key in ("first", "last", "drift"))]
        for row in result["rows"]
    ]
    totals = ", ".join(f"{count} {outcome}" for outcome, count in result["totals"].items())
    seconds = result["intervals"][-1]["seconds"]
    about = f"{totals}, in {seconds:.0f} s from {result['clients']} clients"
    memory = f"growth of resident memory: {figure(result['growth_mib'], 1, missing='not known')} MiB"
    error = [f"first error: {result['first_error']}"] if result["first_error"] else []
    headings = ["request", "first quarter x alone", "last quarter x alone", "drift"]
    return [table(headings, rows), "\n".join([about, memory, *error])]


def tiling_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Give headings and rows of a result of `sr-bench tiling`."""
    (height, width), tile = result["size"], result["tile"]
    rows = [
        [f"{row['network']}, {width}x{height} in tiles of {tile}", row["way"]]
        + [figure(row[key], decimals) for key, (_, decimals) in TILING_COLUMNS.items()]
        for row in result["rows"]
    ]
    return ["network", "cut", *(heading for heading, _ in TILING_COLUMNS.values())], rows


def _tiling(result: dict[str, Any]) -> list[str]:
    return [table(*tiling_table(result), text_columns=2)]


BODIES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "latency": _latency, "quality": _quality, "roofline": _roofline, "runtime": _runtime,
    "large": _runtime, "serve": _runtime,
    "scaling": _scaling, "soak": _soak, "tiling": _tiling,
}  # fmt: skip


def measured(row: dict[str, Any]) -> tuple[str, str]:
    """Write the value and the target of a row of the runtime's result, with their unit."""
    decimals = 2 if row["unit"] == "x" else 0
    target = "" if row["target"] is None else f"{row['target']:.{decimals}f} {row['unit']}"
    return f"{row['value']:.{decimals}f} {row['unit']}", target


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "/".join(f"{item:.4g}" for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
