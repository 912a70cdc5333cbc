"""Score models on pictures that were damaged on purpose: over whole pictures, and where the damage is."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from sdk import Bundle, ImageError, SRError, Upscaler

from .lpips_like import LABEL, MIN_SIDE, Distance, load_distance
from .metrics import colour_drift, psnr
from .pictures import BICUBIC, enlarge, find_pictures, read_picture
from .report import figure, table
from .result import check_writable, model_facts, result_head, write_json

if TYPE_CHECKING:
    from train.recipe import DegradeConfig

PROTOCOL = (
    "HR is cropped to a multiple of the model's scale, damaged as the task says (train/tasks) and reduced by it; "
    "what is drawn depends on the seed, the task and the file's name alone. Damaged: that picture, enlarged by PIL's "
    "bicubic where the scale is not 1. Results are uint8. PSNR: on RGB, nothing shaved off, at most 100 dB; region: "
    "over the pixels that holes or text lie on, in pictures that have any. Gain: restored less damaged. LPIPS-like "
    "(SqueezeNet): the LPIPS v0.1 form on whole RGB pictures; not LPIPS, whose SqueezeNet weights may differ. Colour "
    "drift: the largest difference of a channel's mean, in 8-bit code values. Every figure of a set is the mean over "
    "its pictures."
)
# Heading and decimals of each figure.
COLUMNS = {
    "damaged_psnr_db": ("damaged dB", 2),
    "restored_psnr_db": ("restored dB", 2),
    "gain_db": ("gain dB", 2),
    "damaged_region_psnr_db": ("region damaged dB", 2),
    "restored_region_psnr_db": ("region restored dB", 2),
    "region_gain_db": ("region gain dB", 2),
    "damaged_lpips_like": ("damaged LPIPS-like", 4),
    "restored_lpips_like": ("restored LPIPS-like", 4),
    "colour_drift": ("colour drift", 2),
}

Track = Callable[[Sequence[Path], str], AbstractContextManager[Iterable[Path]]]


def measure(
    models: Sequence[str | Path | None],
    folders: Sequence[Path],
    tasks: Sequence[str],
    *,
    seed: int = 1,
    backend: str = "auto",
    precision: str = "auto",
    weights: str | None = None,
    track: Track = lambda paths, label: nullcontext(paths),
) -> dict[str, Any]:
    """Score every model at every task on every folder.

    models: shipped names or bundle folders, None for the default one. tasks: names, see train.tasks.
    weights: folder of the perceptual distance; None: SR_WEIGHTS_DIR, and without that the figure is left out.
    track: wraps the pictures of a folder, to show how far it is.
    Returns: the JSON form: facts, and one row for each folder, task and model.
    Raises: SRError for a missing model, a folder without pictures, or a picture that is unreadable or too small;
    RecipeError for an unknown task.
    """
    configs = {task: task_config(task) for task in tasks}
    for folder in folders:
        find_pictures(folder)  # a wrong folder is told before anything is loaded
    distance, missing = load_distance(weights)
    head = result_head("restoration", protocol=PROTOCOL)
    facts: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for number, model in enumerate(models, 1):
            upscaler = stack.enter_context(Upscaler(model, backend=backend, precision=precision))
            bundle = Bundle.load(model)
            name = bundle.manifest.name
            if any(each["method"] == name for each in facts):
                name = f"{name} #{number}"
            engine = {key: upscaler.info[key] for key in ("backend", "engine", "device", "precision")}
            facts.append({"method": name} | model_facts(bundle) | engine)
            for folder in folders:
                for task, config in configs.items():
                    about = {
                        "dataset": folder.resolve().name, "scale": upscaler.scale, "task": task, "method": name
                    }  # fmt: skip
                    with track(find_pictures(folder), f"{about['dataset']}, {task}, {name}") as paths:
                        pictures = evaluate(
                            paths,
                            restore=upscaler.upscale,
                            scale=upscaler.scale,
                            config=config,
                            entropy=(seed, zlib.crc32(task.encode())),
                            distance=distance,
                        )
                    rows.append(about | {"means": means(pictures), "pictures": pictures})
    return head | {"seed": seed, "models": facts, "lpips_like_missing": missing, "rows": rows}


def task_config(task: str) -> DegradeConfig:
    """Give the damages of a task, on their own.

    Raises: RecipeError for an unknown task.
    """
    from train.recipe import recipe_from_dict
    from train.tasks import load_task

    return recipe_from_dict(load_task(task)).degrade


def evaluate(
    paths: Iterable[Path],
    *,
    restore: Callable[[np.ndarray], np.ndarray],
    scale: int,
    config: DegradeConfig,
    entropy: tuple[int, ...],
    distance: Distance | None = None,
) -> list[dict[str, Any]]:
    """Damage and restore pictures, one after the other: the scores of each, with its file's name."""
    from train.degrade import degrade_with_mask

    scores = []
    for path in paths:
        hr = _cut_to_scale(read_picture(path), scale, name=str(path))
        rng = np.random.default_rng((*entropy, zlib.crc32(path.name.encode("utf-8", "surrogateescape"))))
        lr, mask = degrade_with_mask(hr, scale=scale, config=config, rng=rng)
        damaged = lr if scale == 1 else enlarge(lr, scale, resample=BICUBIC)
        region = mask.repeat(scale, axis=0).repeat(scale, axis=1)  # (h, w) -> (H, W)
        scores.append({"file": path.name} | score(restore(lr), damaged, hr, region=region, distance=distance))
    return scores


def _cut_to_scale(picture: np.ndarray, scale: int, *, name: str) -> np.ndarray:
    height, width = (side // scale * scale for side in picture.shape[:2])
    if min(height, width) < MIN_SIDE:
        raise ImageError(f"{name}: {width}x{height} pixels, at least {MIN_SIDE}x{MIN_SIDE} are needed")
    return picture[:height, :width]


def score(
    sr: np.ndarray, damaged: np.ndarray, hr: np.ndarray, *, region: np.ndarray, distance: Distance | None = None
) -> dict[str, float | None]:
    """Compare a result and the damaged picture with the original, all (H, W, 3) uint8 RGB.

    region: (H, W) bool, where holes or text lie; the figures of an empty one are None, as those of no distance.
    """
    before, after = psnr(damaged, hr), psnr(sr, hr)
    scores: dict[str, float | None] = {
        "damaged_psnr_db": before,
        "restored_psnr_db": after,
        "gain_db": after - before,
        "region_share": float(region.mean()),
        "damaged_region_psnr_db": None,
        "restored_region_psnr_db": None,
        "region_gain_db": None,
        "damaged_lpips_like": distance(damaged, hr) if distance else None,
        "restored_lpips_like": distance(sr, hr) if distance else None,
        "colour_drift": colour_drift(sr, hr),
    }
    if region.any():
        before, after = psnr(damaged[region], hr[region]), psnr(sr[region], hr[region])
        scores |= {
            "damaged_region_psnr_db": before, "restored_region_psnr_db": after, "region_gain_db": after - before
        }  # fmt: skip
    return scores


def means(pictures: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Average every figure over the pictures that have it; None where none has."""
    figures = {key: [each[key] for each in pictures if each[key] is not None] for key in pictures[0] if key != "file"}
    return {key: float(np.mean(values)) if values else None for key, values in figures.items()}


def render(result: Mapping[str, Any]) -> str:
    """Turn the result into a table."""
    lines = [
        [f"{row['dataset']} x{row['scale']}", row["task"], row["method"], str(len(row["pictures"]))]
        + [figure(row["means"][key], decimals, missing="-") for key, (_, decimals) in COLUMNS.items()]
        for row in result["rows"]
    ]
    headings = ["dataset", "task", "method", "pictures", *(heading for heading, _ in COLUMNS.values())]
    notes = [f"no {LABEL}: {result['lpips_like_missing']}"] if result["lpips_like_missing"] else []
    return "\n\n".join([table(headings, lines, text_columns=3), *notes])


@click.command("restoration")
@click.argument("folders", metavar="DIR...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--model", "models", multiple=True, required=True, help="Bundle folder or shipped model; repeatable.")
@click.option("--task", "tasks", multiple=True, required=True, help="Name of a task; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the damages.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--weights", help=f"Folder with the weights of {LABEL}. Default: SR_WEIGHTS_DIR.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result here too.")
def restoration_command(
    folders: tuple[Path, ...], models: tuple[str, ...], tasks: tuple[str, ...], json_path: Path | None, **options: Any
) -> None:
    """Damage the pictures in each DIR as a task says, restore them, and score both against the originals."""
    from train.errors import TrainError

    def track(paths: Sequence[Path], label: str) -> Any:
        return click.progressbar(paths, label=label, file=sys.stderr)

    try:
        if json_path is not None:
            check_writable(json_path)
        result = measure(models, folders, tasks, track=track, **options)
        click.echo(render(result))
        if json_path is not None:
            write_json(result, json_path)
    except (SRError, TrainError) as exc:
        raise click.ClickException(str(exc)) from exc
