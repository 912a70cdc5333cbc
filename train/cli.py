"""sr-train: photographs in, a trained model out."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import TrainError

if TYPE_CHECKING:
    from .loop import Progress

EXTRA = {"torch", "torchvision", "safetensors", "matplotlib", "tomli"}


class _OneLineErrors(click.Command):
    """A command that ends with one line, not a traceback, on errors that are raised on purpose."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrainError as exc:
            raise click.ClickException(" ".join(str(exc).split())) from exc
        except ModuleNotFoundError as exc:
            if exc.name not in EXTRA:
                raise
            raise click.ClickException(f"{exc.name} is not installed: pip install 'sr-sdk[train]'") from exc


@click.command(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", default="fast", show_default=True, help="Name of a recipe, or a TOML file.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; an unfinished run is resumed.")
@click.option("--weights", help="Folder of pretrained weights, or 'random'. Default: SR_WEIGHTS_DIR, else a download.")
@click.option("--init", type=click.Path(path_type=Path), help="Start from the last stage of another run's weights.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--find-lr", is_flag=True, help="Only run the learning-rate finder: plot and suggestion.")
@click.option(
    "--max-steps",
    type=click.IntRange(min=0),
    default=0,
    help="Stop after so many steps in all, with a checkpoint and the stage as it stands; 0: at the recipe's end.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option(
    "--workers", type=click.IntRange(min=0), default=1, show_default=True, help="Processes that prepare samples."
)
def main(
    data: Path,
    recipe_name: str,
    out: Path,
    weights: str | None,
    init: Path | None,
    overrides: tuple[str, ...],
    find_lr: bool,
    max_steps: int,
    device: str,
    precision: str,
    workers: int,
) -> None:
    """Train a super-resolution network on the photographs in folder DATA.

    Ctrl-C or SIGTERM saves a checkpoint and ends with exit code 0; the same command goes on from there.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # PyTorch takes seconds to import, so a wrong recipe and --help come before it.
    from .recipe import load_recipe

    recipe = load_recipe(recipe_name, overrides=overrides)

    from .data import find_pictures
    from .feature_nets import find_weights
    from .find_rate import find_rate
    from .loop import Settings, Trainer

    find_pictures(data)  # a wrong folder is told before a network is built
    settings = Settings(device=device, precision=precision, workers=workers, max_steps=max_steps)
    trainer = Trainer(recipe, out, weights=find_weights(weights), settings=settings)
    trainer.facts["command"] = shlex.join(["sr-train", *map(_without_folder, sys.argv[1:])])
    trainer.load_photographs(data, _show_count("reading pictures"))
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    click.echo(
        f"{len(trainer.train_set)} pictures to train on, {len(trainer.validation_set)} to validate; "
        f"{recipe.model.name}: {count:,} parameters; {trainer.device}, {trainer.facts['precision']}"
    )
    if find_lr:
        if init is not None:
            trainer.start_from_run(init)
        plot = out / "find_lr.png"
        rate = find_rate(trainer, plot, report=_show_count("learning-rate finder: step"))
        advice = f"suggested learning rate: {rate:.1e}" if rate else "no rate suggested: the loss hardly falls at any"
        click.echo(f"{advice} (plot: {plot})")
        return
    if trainer.resume():
        if trainer.finished:
            click.echo(f"finished already, at step {trainer.done_steps}: nothing to do; the stages are in {out}/stages")
            return
        click.echo(f"resumed {out} at step {trainer.done_steps}")
    elif init is not None:
        trainer.start_from_run(init)
    trainer.begin()
    click.echo(json.dumps(trainer.facts["recipe"]))
    stopped = _stop_on_signals()
    if trainer.train(report=_show_progress(), stop=lambda: bool(stopped)):
        click.echo(f"done: {', '.join(stage.name for stage in recipe.stages)} in {out / 'stages'}")
    else:
        click.echo(f"stopped at step {trainer.done_steps}; the same command goes on from there")


def _without_folder(argument: str) -> str:
    """Shorten a path that leads out of the working directory to its last part: commands are published in models."""
    return Path(argument).name if Path(argument).is_absolute() or argument.startswith("..") else argument


def _stop_on_signals() -> list[int]:
    """Collect the first SIGINT or SIGTERM, so that the loop saves before it ends; a second one ends at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return received


def _show_count(what: str) -> Callable[[int, int], None]:
    """Print how far something is, at most once a second."""
    last = 0.0

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 1:
            last = time.monotonic()
            click.echo(f"{what} {done}/{total}", err=True)

    return show


def _show_progress() -> Callable[[Progress], None]:
    """Print a line at once, every half minute (two seconds on a terminal), and at every validation."""
    last = float("-inf")
    first: tuple[float, int] | None = None

    def show(progress: Progress) -> None:
        nonlocal last, first
        now = time.monotonic()
        first = first or (now, progress.done_steps)
        if progress.psnr_y is None and now - last < (2 if sys.stderr.isatty() else 30):
            return
        last = now
        steps = progress.done_steps - first[1]
        minutes = (progress.all_steps - progress.done_steps) * (now - first[0]) / steps / 60 if steps else None
        terms = " ".join(f"{name} {value:.5f}" for name, value in progress.terms.items())
        left = f", {minutes:.1f} min left" if minutes is not None else ""
        validation = f", validation {progress.psnr_y:.3f} dB" if progress.psnr_y is not None else ""
        click.echo(
            f"stage {progress.stage} {progress.phase} {progress.step}/{progress.steps} "
            f"({progress.done_steps}/{progress.all_steps}), rate {progress.learning_rate:.2e}, {terms}, "
            f"{progress.images_per_second:.3g} images/s{left}{validation}",
            err=True,
        )

    return show
