"""sr-train: photographs in, a trained model out."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
import time
from pathlib import Path

import click

from .errors import TrainError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", default="fast", show_default=True, help="Name of a recipe, or a TOML file.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; an unfinished run is resumed.")
@click.option("--weights", help="Folder of pretrained weights, or 'random'. Default: SR_WEIGHTS_DIR, else a download.")
@click.option("--init", type=click.Path(path_type=Path), help="Start from the last stage of another run's weights.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--find-lr", is_flag=True, help="Only run the learning-rate finder: plot and suggestion.")
@click.option("--max-steps", type=int, default=0, help="Stop after so many steps in all (a checkpoint is kept).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that prepare samples.")
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
    """Train a super-resolution network on the photographs in folder DATA."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _train(data, recipe_name, out, weights, init, overrides, find_lr, max_steps, device, precision, workers)
    except TrainError as exc:
        raise click.ClickException(str(exc)) from exc


def _train(
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
    from .data import find_pictures
    from .recipe import load_recipe

    recipe = load_recipe(recipe_name, overrides=overrides)
    find_pictures(data)  # a wrong folder is told before PyTorch is imported

    from .checkpoint import latest_checkpoint, load_checkpoint, stage_folder
    from .feature_nets import find_weights
    from .find_rate import find_rate
    from .loop import Settings, Trainer, load_run, write_recipe

    settings = Settings(device=device, precision=precision, workers=workers, max_steps=max_steps)
    trainer = Trainer(recipe, out, weights=find_weights(weights), settings=settings)
    trainer.facts["command"] = shlex.join(["sr-train", *sys.argv[1:]])
    trainer.load_photographs(data, _show_reading())
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    click.echo(
        f"{len(trainer.train_set)} pictures to train on, {len(trainer.validation_set)} to validate; "
        f"{recipe.model.name}: {count:,} parameters; {trainer.device}, {'bf16' if trainer.autocast else 'fp32'}"
    )
    if init is not None:
        last = load_run(init).stages[-1].name
        source = load_checkpoint(stage_folder(init, last))
        trainer.start_from(source.group("model"))
        trainer.facts["init"] = {
            key: source.facts.get(key) for key in ("command", "stage", "steps", "commit", "fingerprint")
        }
    write_recipe(recipe, out)
    if find_lr:
        rate = find_rate(trainer, out / "find_lr.png")
        click.echo(f"suggested learning rate: {rate:.1e} (plot: {out / 'find_lr.png'})")
        return
    if latest_checkpoint(out) is not None:
        trainer.resume()
        click.echo(f"resumed {out} at step {trainer.done_steps}")
    (out / "run.json").write_text(json.dumps(trainer.facts, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(trainer.facts["recipe"]))
    stopped = _stop_on_signals()
    if trainer.train(report=_show_progress(), stop=lambda: bool(stopped)):
        click.echo(f"done: {', '.join(stage.name for stage in recipe.stages)} in {out / 'stages'}")
    else:
        click.echo(f"stopped at step {trainer.done_steps}; the same command goes on from there")


def _stop_on_signals() -> list[int]:
    """Collect the first SIGINT or SIGTERM, so that the loop saves before it ends; a second one ends at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return received


def _show_reading():
    last = [0.0]

    def show(done: int, total: int) -> None:
        if done == total or time.monotonic() - last[0] > 1:
            last[0] = time.monotonic()
            click.echo(f"reading pictures {done}/{total}", err=True)

    return show


def _show_progress():
    """Print a line at once, every half minute, and whenever there is a validation figure."""
    last = [float("-inf")]
    started = [time.monotonic(), -1]

    def show(progress) -> None:
        if started[1] < 0:
            started[:] = [time.monotonic(), progress.done_steps]
        if progress.psnr_y is None and time.monotonic() - last[0] < (2 if sys.stderr.isatty() else 30):
            return
        last[0] = time.monotonic()
        elapsed, steps = time.monotonic() - started[0], progress.done_steps - started[1]
        remaining = (progress.all_steps - progress.done_steps) * elapsed / steps if steps else float("nan")
        terms = " ".join(f"{name} {value:.5f}" for name, value in progress.terms.items())
        validation = f", validation {progress.psnr_y:.3f} dB" if progress.psnr_y is not None else ""
        click.echo(
            f"stage {progress.stage} {progress.phase} {progress.step}/{progress.steps} "
            f"({progress.done_steps}/{progress.all_steps}), rate {progress.learning_rate:.2e}, {terms}, "
            f"{progress.images_per_second:.0f} images/s, {remaining / 60:.1f} min left{validation}",
            err=True,
        )

    return show
