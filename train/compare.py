"""Compare runs: where their recipes differ, what they reached, and the same pictures by each of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image

from .atomic import write_json
from .commands import OneLineErrors
from .errors import CheckpointError, DataError, TrainError
from .plots import Metric, number, printable, read_metrics, read_panel, write_comparison, write_sheet
from .recipe import Recipe
from .run_folder import load_run, read_log

if TYPE_CHECKING:
    from .models import Network

PICTURES = 4
LARGEST_SIDE = 256
NOTHING = "-"


@dataclass(frozen=True)
class Run:
    """A run that is compared: its name in the table, which no other has, and what its folder tells."""

    name: str
    path: Path
    recipe: Recipe
    log: list[Any]
    metrics: dict[str, Metric]


def compare_runs(
    runs: Sequence[Path], out: Path, *, data: Path | None = None, show: Callable[[str], None] = lambda text: None
) -> None:
    """Write compare.json, compare.png (validation curves) and compare_panel.png (predictions) into folder `out`.

    data: photographs for the predictions, the first four of them; without it, those of the newest panel are taken.
    show: is given the table for the terminal as soon as it is known.
    Raises: CheckpointError for a folder that is no run, runs of several scales, or a run that has no stage yet; the
    last two come after the table and the curves. DataError if there are no pictures; ResourceError if `out` cannot be
    written.
    """
    read = read_runs(runs)
    comparison = compare(read)
    show(format_comparison(comparison))
    write_json(comparison, out / "compare.json")
    _write_curves(read, out / "compare.png")
    _write_predictions(read, out / "compare_panel.png", data)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read what is compared. Raises: CheckpointError if a folder is not a run, or there are fewer than two."""
    if len({path.resolve() for path in paths}) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise CheckpointError(f"a comparison needs two different runs or more, got {len(paths)}")
    recipes = [load_run(path) for path in paths]
    counts = Counter(path.resolve().name for path in paths)
    runs = []
    for path, recipe in zip(paths, recipes, strict=True):
        name = path.resolve().name if counts[path.resolve().name] == 1 else str(path)
        log = read_log(path)
        runs.append(Run(name, path, recipe, log, {metric.name: metric for metric in read_metrics(log)}))
    return runs


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Give, as plain values, the differing keys of the recipes and what each run reached; None: not known."""
    values = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in values for key in recipe)
    differing = [key for key in keys if any(recipe.get(key) != values[0].get(key) for recipe in values)]
    return {
        "runs": [run.name for run in runs],
        "recipe": {key: [recipe.get(key) for recipe in values] for key in differing},
        "results": {name: [measure(run) for run in runs] for name, measure in RESULTS.items()},
    }


def flat(recipe: Recipe) -> dict[str, Any]:
    """Give the values of a recipe by dotted key, as JSON has them: "stages.0.batch" -> 16."""

    def walk(value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if not isinstance(value, dict) or not value:
            return {where: value}
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= walk(item, f"{where}.{key}" if where else str(key))
        return found

    return walk(json.loads(json.dumps(asdict(recipe))), "")


def as_text(value: object) -> str:
    """Show a value of a recipe or of run.json; a recipe holds no null, so None is what it lacks."""
    if value is None:
        return NOTHING
    return value if isinstance(value, str) and value else json.dumps(value)


def _last(name: str) -> Callable[[Run], float | None]:
    def measure(run: Run) -> float | None:
        metric = run.metrics.get(name)
        if metric is None or metric.validation is None:
            return None
        return float(metric.validation.values[np.isfinite(metric.validation.values)][-1])

    return measure


def _best_psnr(run: Run) -> float | None:
    best = run.metrics["psnr_y"].best() if "psnr_y" in run.metrics else None
    return best[1] if best else None


def _steps(run: Run) -> int | None:
    steps = [value for entry in run.log if math.isfinite(value := _logged(entry, "done_steps"))]
    return int(max(steps)) if steps else None


def _speed(run: Run) -> float | None:
    speeds = [value for entry in run.log if math.isfinite(value := _logged(entry, "images_per_second"))]
    return median(speeds) if speeds else None


def _logged(entry: Any, key: str) -> float:
    return number(entry.get(key)) if isinstance(entry, dict) else math.nan


def _parameters(run: Run) -> int | None:
    from .models import build_model

    try:
        model = build_model(run.recipe.model, weights="random")
    except TrainError:  # a network of another version of this package
        return None
    return sum(parameter.numel() for parameter in model.parameters())


RESULTS: dict[str, Callable[[Run], float | None]] = {
    "last PSNR-Y [dB]": _last("psnr_y"),
    "best PSNR-Y [dB]": _best_psnr,
    "last colour drift": _last("colour_drift"),
    "steps": _steps,
    "images/s": _speed,
    "parameters": _parameters,
}


def format_comparison(comparison: dict[str, Any]) -> str:
    """Lay the comparison out as aligned text, a column for each run."""
    rows = [["", *comparison["runs"]]]
    rows += [[key, *map(as_text, row)] for key, row in comparison["recipe"].items()]
    if len(rows) == 1:
        rows.append(["(the recipes are the same)", *[""] * len(comparison["runs"])])
    rows += [[name, *map(_short, row)] for name, row in comparison["results"].items()]
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(len(lines) - len(comparison["results"]), "-" * len("  ".join("x" * width for width in widths)))
    return "\n".join(lines)


def _short(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _write_curves(runs: Sequence[Run], path: Path) -> None:
    names = [name for name in ("psnr_y", "colour_drift", "loss") if any(name in run.metrics for run in runs)]
    curves = []
    for name in names or ["psnr_y"]:
        found = [run.metrics.get(name) for run in runs]
        title = next((metric.title for metric in found if metric), "no validation is logged")
        curves.append((title, [metric.validation if metric else None for metric in found]))
    # Names that begin with an underscore would be left out of the legend.
    write_comparison(curves, [f"{index + 1}: {run.name}" for index, run in enumerate(runs)], path)


def _write_predictions(runs: Sequence[Run], path: Path, data: Path | None) -> None:
    from .stages import last_stage, load_network
    from .validation import psnr_y

    scales = {run.recipe.model.scales[0] for run in runs}
    if len(scales) > 1:
        listed = ", ".join(f"{run.name} x{run.recipe.model.scales[0]}" for run in runs)
        raise CheckpointError(
            f"runs of several scales have no pictures in common: {listed}; compare those of one scale"
        )
    scale = scales.pop()
    models = [load_network(run.path, run.recipe, last_stage(run.path, run.recipe))[0] for run in runs]
    grid = math.lcm(*(model.output_grid() for model in models))
    pairs = _pairs_of_panel(runs) if data is None else _pairs_of_data(data, runs[0].recipe, grid=grid)
    titles, cells = [], []
    for lr, hr in pairs:
        height, width = (side // grid * grid for side in hr.shape[:2])
        lr, hr = lr[: height // scale, : width // scale], hr[:height, :width]
        if not lr.size:
            raise DataError(f"the pictures are smaller than {grid} pixels, which these networks need; give --data")
        results = [_predict(model, lr, scale) for model in models]
        quality = [f"{run.name} {psnr_y(sr, hr, shave=scale):.2f} dB" for run, sr in zip(runs, results, strict=True)]
        nearest = np.asarray(Image.fromarray(lr).resize((width, height), Image.Resampling.NEAREST))
        titles.append(["nearest" if scale > 1 else "input", *quality, "target"])
        cells.append([nearest, *results, hr])
    height, width = cells[0][-1].shape[:2]
    write_sheet(titles, cells, path, lr_size=(height // scale, width // scale))


def _predict(model: Network, lr: np.ndarray, scale: int) -> np.ndarray:
    import torch

    from .validation import to_batch, to_picture

    with torch.inference_mode():
        return to_picture(model(to_batch(np.ascontiguousarray(lr), torch.device("cpu")), scale)[0])


def _pairs_of_panel(runs: Sequence[Run]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut LR and HR out of the newest panel that any of the runs has written."""
    paths = [path for run in runs for path in (run.path / "panels").glob("*.png") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return [(lr, hr) for lr, _, hr in read_panel(path)[:PICTURES]]
        except (OSError, ValueError):
            continue
    raise DataError("none of the runs has a readable panel to take pictures from; give photographs with --data")


def _pairs_of_data(data: Path, recipe: Recipe, *, grid: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut one crop of each of the first photographs, degraded as the recipe says, the same every time."""
    from .data import random_pair
    from .pictures import describe_fault, find_pictures, read_picture

    pictures = []
    for path in find_pictures(data)[:PICTURES]:
        try:
            pictures.append(read_picture(path))
        except Exception as exc:  # nearly anything, see read_picture
            raise DataError(f"{path}: cannot be read ({describe_fault(exc)})") from exc
    size = min(LARGEST_SIDE, *(side for picture in pictures for side in picture.shape[:2])) // grid * grid
    if not size:
        raise DataError(f"{data}: a picture is smaller than {grid} pixels, which these networks need")
    scale, config = recipe.model.scales[0], recipe.degrade
    rngs = [np.random.default_rng((recipe.seed, index)) for index in range(len(pictures))]
    return [
        random_pair(picture, size=size, scale=scale, config=config, rng=rng)
        for picture, rng in zip(pictures, rngs, strict=True)
    ]


@click.command("compare", cls=OneLineErrors)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("compare"), show_default=True, help="Folder.")
@click.option("--data", type=click.Path(path_type=Path), help="Photographs for the predictions. Default: a panel's.")
def compare_command(runs: tuple[Path, ...], out: Path, data: Path | None) -> None:
    """Compare the runs in the folders RUNS: a table, their validation curves, and the same pictures by each."""
    compare_runs(runs, out, data=data, show=click.echo)
    click.echo(f"curves, predictions and table: {out}")
