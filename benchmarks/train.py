"""Time the training loop against its own arithmetic: what the samples cost, and all else that is not the network."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from sdk import BackendUnavailable, SRError

from .report import table
from .result import check_writable, result_head, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from train.loop import Trainer
    from train.recipe import Recipe, StageConfig

PROTOCOL = (
    "Images a second. Loop: sr-train's own, from the photographs in memory to the weights: samples drawn, cut and "
    "damaged by its worker processes (on a GPU that the photographs fit into: there), the step, the average of the "
    "weights and the running means; no validation, no panel and no checkpoint. Step: forward pass, loss, backward "
    "pass, optimisers and the average of the weights, on one batch that is in the device's memory. Forward and "
    "backward: the first three of these alone. Each stage's last phase is taken, from random weights on. The three "
    "take turns in one process, so that whatever else the machine does meets all of them; before each is timed it runs "
    "until the workers' queue is full, or two steps. While the last two run, there are no workers. Shares: the loop's "
    "speed over the other's of the same turn; median, lowest and highest of all turns."
)
PARTS = ("loop", "step", "forward_backward")
SHARES = ("step", "forward_backward")
WARM_UPS = 2  # steps
QUEUE = 6  # batches for each worker: what the loader prepares ahead, and as many as it takes to be in step


@dataclass(frozen=True)
class Settings:
    """What is timed. seconds: of each part in each turn, and at least one step."""

    recipe: Recipe
    photographs: Path
    device: str = "auto"
    precision: str = "auto"
    workers: int = 1
    seconds: float = 20.0
    turns: int = 5


def run_train(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Measure every stage of a recipe.

    Returns: the JSON form: facts, and one row for each stage.
    Raises: TrainError for photographs or a device that cannot be used; BackendUnavailable without PyTorch.
    """
    try:
        import torch
    except ImportError as exc:
        raise BackendUnavailable("PyTorch is not installed; install sr-sdk[train]") from exc

    head = result_head("train", protocol=PROTOCOL)
    rows = []
    facts: dict[str, Any] = {}
    for stage in settings.recipe.stages:
        with tempfile.TemporaryDirectory() as folder:
            trainer = _open(settings, stage, Path(folder))
            facts = {key: trainer.facts[key] for key in ("device", "precision", "samples", "data", "pictures")}
            speeds: dict[str, list[float]] = {part: [] for part in PARTS}
            for turn in range(settings.turns):
                progress(f"stage {stage.name}: turn {turn + 1} of {settings.turns}")
                speeds["loop"].append(_time_loop(trainer, settings))
                lr, hr = _batch_in_memory(trainer)
                step = partial(trainer.step, lr, hr, trainer.recipe.stages[0])
                speeds["step"].append(_time_work(step, trainer, settings))
                work = partial(_forward_backward, trainer, lr, hr)
                speeds["forward_backward"].append(_time_work(work, trainer, settings))
            rows.append(make_row(stage, speeds))
    chosen = {"recipe": settings.recipe.name, "threads": torch.get_num_threads(), "workers": settings.workers}
    chosen |= {"seconds": settings.seconds, "turns": settings.turns}
    return head | chosen | facts | {"rows": rows}


def make_row(stage: StageConfig, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Reduce the speeds of all turns, in images a second, to medians and spreads."""
    row: dict[str, Any] = {"stage": stage.name, "size": stage.size, "batch": stage.batch}
    row |= {f"{part}_images_per_s": _spread(speeds[part]) for part in PARTS}
    for part in SHARES:
        row[f"share_of_{part}"] = _spread(
            [loop / pure for loop, pure in zip(speeds["loop"], speeds[part], strict=True)]
        )
    return row


def _spread(values: list[float]) -> dict[str, float]:
    return {name: round(float(of(values)), 4) for name, of in (("median", np.median), ("min", min), ("max", max))}


def _open(settings: Settings, stage: StageConfig, out: Path) -> Trainer:
    """Make a trainer whose only phase is the last one of a stage, and does not end."""
    from train.feature_nets import find_weights
    from train.loop import Settings as TrainSettings
    from train.loop import Trainer

    phase = replace(stage.phases[-1], epochs=1e9)
    recipe = replace(settings.recipe, stages=(replace(stage, phases=(phase,)),), validation_pictures=0)
    never = float("inf")
    trainer = Trainer(
        recipe, out, weights=find_weights(None),
        settings=TrainSettings(
            device=settings.device, precision=settings.precision, workers=settings.workers,
            checkpoint_seconds=never, panel_seconds=never,
        ),
    )  # fmt: skip
    trainer.load_photographs(settings.photographs, lambda done, total: None)
    trainer.begin()
    return trainer


def _time_loop(trainer: Trainer, settings: Settings) -> float:
    """Let the trainer go on for a while: images a second, of whole steps after the first ones."""
    first = trainer.done_steps + WARM_UPS + QUEUE * settings.workers
    started = ended = 0.0

    def stop() -> bool:
        nonlocal started, ended
        if trainer.done_steps == first:
            _wait_for(trainer.device)
            started = time.perf_counter()
        if trainer.done_steps <= first or time.perf_counter() - started < settings.seconds:
            return False
        _wait_for(trainer.device)
        ended = time.perf_counter()
        return True

    trainer.train(stop=stop)
    return (trainer.done_steps - first) * trainer.recipe.stages[0].batch / (ended - started)


def _batch_in_memory(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Make one batch and put it where a step would."""
    import torch

    from train.loading import Steps

    source = trainer.samples(0, 0, Steps(0, 1, batch=trainer.recipe.stages[0].batch))
    lr, hr = (part.to(trainer.device, memory_format=torch.channels_last) for part in next(source))
    source.close()
    return lr, hr


def _forward_backward(trainer: Trainer, lr: Tensor, hr: Tensor) -> None:
    trainer.model.zero_grad(set_to_none=True)
    trainer.losses(lr, hr)[0].backward()


def _time_work(work: Callable[[], object], trainer: Trainer, settings: Settings) -> float:
    """Repeat what does one batch for a while: images a second."""
    for _ in range(WARM_UPS):
        work()
    _wait_for(trainer.device)
    started = time.perf_counter()
    count = 0
    while not count or time.perf_counter() - started < settings.seconds:
        work()
        count += 1
    _wait_for(trainer.device)
    return count * trainer.recipe.stages[0].batch / (time.perf_counter() - started)


def _wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def render(result: dict[str, Any]) -> str:
    """Turn the result into text: medians, with the lowest and highest of all turns."""
    head = (
        f"{result['recipe']} on {result['device']} in {result['precision']}, {result['threads']} threads and "
        f"{result['workers']} workers, samples made on {result['samples']}: {result['turns']} turns of "
        f"{result['seconds']:g} s each"
    )
    columns = {
        "loop": "loop images/s",
        "step": "step alone",
        "forward_backward": "forward and backward alone",
    }
    rows = [
        [f"{row['stage']} ({row['batch']} of {row['size']}x{row['size']})"]
        + [_cell(row[f"{part}_images_per_s"], 1) for part in columns]
        + [_cell(row[f"share_of_{part}"], 3) for part in SHARES]
        for row in result["rows"]
    ]
    headings = ["stage", *columns.values(), "loop / step", "loop / forward and backward"]
    return f"{head}\n\n{table(headings, rows)}"


def _cell(figure: dict[str, float], decimals: int) -> str:
    return "{median:.{0}f} ({min:.{0}f} to {max:.{0}f})".format(decimals, **figure)


@click.command("train")
@click.argument("photographs", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", default="fast", show_default=True, help="Name, or a .toml file.")
@click.option("--task", help="Lay a task over the recipe.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a value of the recipe.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes that make samples.")
@click.option("--seconds", type=click.FloatRange(0), default=20.0, show_default=True, help="Of each part in a turn.")
@click.option("--turns", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result here too.")
def train_command(
    recipe_name: str, task: str | None, overrides: tuple[str, ...], json_path: Path | None, **options: Any
) -> None:
    """Compare the speed of training on the photographs in DIR with that of the network's passes alone."""
    from train.errors import TrainError
    from train.recipe import load_recipe

    try:
        if json_path is not None:
            check_writable(json_path)
        settings = Settings(recipe=load_recipe(recipe_name, task=task, overrides=overrides), **options)
        result = run_train(settings, progress=partial(click.echo, err=True))
        click.echo(render(result))
        if json_path is not None:
            write_json(result, json_path)
    except (SRError, TrainError) as exc:
        raise click.ClickException(str(exc)) from exc
