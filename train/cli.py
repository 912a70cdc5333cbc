"""sr-train: photographs in, a trained model out."""

from __future__ import annotations

import importlib
import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .commands import OneLineErrors

if TYPE_CHECKING:
    from .loop import Progress, Trainer

# Recipe -> what it is meant to go on from.
NEEDS_INIT = {"fast-perceptual": "a run of fast", "fast-wide": "a run of fast", "srgan": "a run of srgan-mse"}
FEW_STEPS = 1000  # of a run: after fewer, networks are hardly better than an interpolation
# Word behind sr-train -> where its command is; every other first word is a folder to train on.
TOOLS = {
    "check": "train.check:check_command",
    "degrade": "train.pairs:degrade_command",
    "compare": "train.compare:compare_command",
    "report": "train.report:report_command",
}


class _WithTools(OneLineErrors):
    """A command with a few others beside it."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0] in TOOLS:
            module, _, name = TOOLS[words[0]].partition(":")
            tool: click.Command = getattr(importlib.import_module(module), name)
            return tool.main(words[1:], **options | {"prog_name": f"sr-train {words[0]}"})
        return super().main(words, *rest, **options)


@click.command(
    cls=_WithTools,
    epilog=f"Beside it: {', '.join(f'sr-train {name}' for name in TOOLS)}; each has its own --help.",
)
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", default="fast", show_default=True, help="Name of a recipe, or a TOML file.")
@click.option("--task", help="What is wrong with the pictures: x4, jpeg, denoise, inpaint, ... (train/tasks).")
@click.option("--paired", type=click.Path(path_type=Path), metavar="LR", help="Folder of the LR pictures of DATA.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; an unfinished run is resumed.")
@click.option("--weights", help="Folder of pretrained weights, or 'random'. Default: SR_WEIGHTS_DIR, else a download.")
@click.option("--init", type=click.Path(path_type=Path), help="Start from another run's, or a bundle's, last stage.")
@click.option("--teacher", type=click.Path(path_type=Path), help="Run to learn from, for loss.teacher_weight.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--find-lr", is_flag=True, help="Only run the learning-rate finder: plot and suggestion.")
@click.option(
    "--max-steps",
    type=click.IntRange(min=0),
    default=0,
    help="Stop after so many steps in all, with a checkpoint and the stage as it stands; 0: at the recipe's end.",
)
@click.option("--tensorboard", is_flag=True, help="Also write events for `tensorboard --logdir RUN`.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option(
    "--workers", type=click.IntRange(0, 256), default=1, show_default=True, help="Processes that prepare samples."
)
def main(
    data: Path,
    recipe_name: str,
    task: str | None,
    paired: Path | None,
    out: Path,
    weights: str | None,
    init: Path | None,
    teacher: Path | None,
    overrides: tuple[str, ...],
    find_lr: bool,
    max_steps: int,
    tensorboard: bool,
    device: str,
    precision: str,
    workers: int,
) -> None:
    """Train a super-resolution network on the photographs in folder DATA.

    DATA and the folders below it are searched for PNG, JPEG, WebP, BMP and TIFF. Once the training has begun, Ctrl-C
    or SIGTERM saves a checkpoint and ends with exit code 0; the same command goes on from there. The recipes and
    tasks are in the README, and in the message after a wrong name.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # PyTorch takes seconds to import, so a wrong recipe and --help come before it.
    from .recipe import load_recipe

    recipe = load_recipe(recipe_name, task=task, overrides=overrides)
    if bool(recipe.loss.teacher_weight) != (teacher is not None):
        raise click.UsageError("--teacher RUN goes with --set loss.teacher_weight=..., and the other way round")
    if paired is not None:
        _check_paired(task, overrides)

    from .pictures import find_pictures

    find_pictures(data, tells_others=True)
    if any(out.resolve().is_relative_to(folder.resolve()) for folder in (data, paired) if folder is not None):
        raise click.UsageError(f"--out {out} lies in the folder of the photographs, which it would become part of")
    for option, folder in (("--init", init), ("--teacher", teacher)):
        if folder is not None and not folder.is_dir():
            hint = "; a shipped model's lies in sdk/models" if option == "--init" else ""
            raise click.UsageError(f"{option} {folder}: no such folder{hint}")
    from .feature_nets import find_weights
    from .find_rate import find_rate
    from .loop import Settings, Trainer
    from .report import PAGE, write_report
    from .run_folder import hold

    settings = Settings(device=device, precision=precision, workers=workers, max_steps=max_steps)
    trainer = Trainer(recipe, out, weights=find_weights(weights), settings=settings)
    trainer.facts["command"] = shlex.join(["sr-train", *map(_without_folder, sys.argv[1:])])
    is_first = trainer.processes.is_first
    show = _show_count("reading pictures") if is_first else lambda done, total: None
    trainer.load_photographs(data, show, low_resolution=paired)
    if teacher is not None:
        trainer.learn_from_run(teacher)
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    say = click.echo if is_first else lambda text, err=False: None
    say(
        f"pictures: {len(trainer.train_set)} to train on, {len(trainer.validation_set)} to validate; "
        f"{recipe.model.name}: {count:,} parameters; {trainer.device}, {trainer.facts['precision']}"
        + (f", {trainer.processes.count} processes" if trainer.processes.count > 1 else "")
    )
    if is_first:
        _warn_of_little(trainer)
        click.get_current_context().with_resource(hold(out))
    if find_lr:
        if init is not None:
            trainer.start_from_run(init)
        plot = out / "find_lr.png"
        rate = find_rate(trainer, plot, report=_show_count("learning-rate finder: step"))
        key = "--set stages.0.phases.0.learning_rate"
        if rate:
            click.echo(f"suggested learning rate: {rate:.1e}, {key}={rate:.1e} takes it (plot: {plot})")
        else:
            given = recipe.stages[0].phases[0].learning_rate
            click.echo(
                f"no rate suggested: the loss hardly falls at any, as that of networks which begin with an "
                f"interpolation; the recipe's is {given:g}, {key}=... takes another (plot: {plot})"
            )
        return
    if trainer.resume():
        if trainer.finished:
            say(f"finished already, at step {trainer.done_steps}: nothing to do; the stages are in {out}/stages")
            if is_first and not (out / PAGE).is_file():
                write_report(out)
            return
        say(f"resumed {out} at step {trainer.done_steps}" + (", where --init is not needed" if init else ""))
    elif init is not None:
        trainer.start_from_run(init)
    elif recipe.name in NEEDS_INIT and teacher is None:
        say(f"warning: {recipe.name} goes on from {NEEDS_INIT[recipe.name]}: give --init RUN", err=True)
    trainer.begin()
    say(json.dumps(trainer.facts["recipe"]))
    stopped = _stop_on_signals()
    report, close = _reporters(trainer, tensorboard=tensorboard and is_first)
    try:
        is_complete = trainer.train(report=report, stop=lambda: bool(stopped))
    finally:
        close()
    if is_first:
        page = write_report(out)
        say(f"report: {page}")
    if is_complete:
        say(f"done: {', '.join(stage.name for stage in recipe.stages)} in {out / 'stages'}")
    elif max_steps and not stopped:
        say(f"stopped at step {trainer.done_steps}, as --max-steps asks; a larger one goes on from there")
    else:
        say(f"stopped at step {trainer.done_steps}; the same command goes on from there")


def _warn_of_little(trainer: Trainer) -> None:
    """Tell what a small folder leaves out, which nobody would miss before the run has ended."""
    recipe = trainer.recipe
    if recipe.validation_pictures and not len(trainer.validation_set):
        click.echo(
            "warning: too few pictures, or too similar ones, to set any aside (a fifth, at most): "
            "no validation, no panels, no best checkpoint",
            err=True,
        )
    steps = sum(map(sum, trainer.phase_lengths()))
    if not recipe.samples_per_epoch and steps < FEW_STEPS:
        click.echo(
            f"warning: {len(trainer.train_set)} pictures make {steps} steps in all, since an epoch takes one crop of "
            "each; --set samples_per_epoch=40000 takes so many",
            err=True,
        )


def _check_paired(task: str | None, overrides: Sequence[str]) -> None:
    """Refuse damages for pictures that are taken as they are."""
    from .tasks import DAMAGES, load_task

    is_damaging = task is not None and any(load_task(task)["degrade"][f"{damage}_probability"] for damage in DAMAGES)
    if is_damaging or any(override.startswith("degrade.") for override in overrides):
        raise click.UsageError("--paired pictures are taken as they are: no --task that damages, no --set degrade....")


def _reporters(trainer: Trainer, *, tensorboard: bool) -> tuple[Callable[[Progress], None], Callable[[], None]]:
    """Give what tells the news, to the terminal and perhaps to TensorBoard, and what ends that."""
    news = _News()
    if not tensorboard:
        return news.add, news.close
    from .event_log import EventLog

    events = EventLog(trainer.out / "events", done_steps=trainer.done_steps)

    def report(progress: Progress) -> None:
        news.add(progress)
        events.add(asdict(progress))
        if progress.validation is not None:
            events.add_panel(trainer.out / "panels" / f"{progress.done_steps:08d}.png")

    def close() -> None:
        events.close()
        news.close()

    return report, close


def _without_folder(argument: str) -> str:
    """Shorten a path that leads out of the working directory to its last part: commands are published in models."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    is_outside = Path(value).is_absolute() or value.startswith("..")
    return f"{option}{equals}{Path(value).name}" if is_outside else argument


def _stop_on_signals() -> list[int]:
    """Collect the first of the signals that end, so that the loop saves before; a second one ends at once."""
    from .loading import ENDS

    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets for SIGHUP
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


class _News:
    """Prints a line at once, every half minute (two seconds on a terminal), at every validation, and at the end."""

    def __init__(self) -> None:
        self._printed = float("-inf")
        self._first: tuple[float, int] | None = None
        self._waiting: Progress | None = None

    def add(self, progress: Progress) -> None:
        """Print a line, or keep it until there is a newer one."""
        now = time.monotonic()
        self._first = self._first or (now, progress.done_steps)
        self._waiting = progress
        if progress.validation is not None or now - self._printed >= (2 if sys.stderr.isatty() else 30):
            self.close()

    def close(self) -> None:
        """Print the newest line, if that has not been done."""
        progress, self._waiting = self._waiting, None
        if progress is None or self._first is None:
            return
        self._printed = time.monotonic()
        steps = progress.done_steps - self._first[1]
        speed = (self._printed - self._first[0]) / steps if steps else None
        left = f", {(progress.all_steps - progress.done_steps) * speed / 60:.1f} min left" if speed is not None else ""
        terms = " ".join(f"{name} {value:.5f}" for name, value in progress.terms.items())
        found = progress.validation
        validation = f", validation {found['psnr_y']:.3f} dB" if found is not None else ""
        with suppress(OSError):  # a run outlives its terminal, and whoever reads its news; the log holds them too
            click.echo(
                f"stage {progress.stage} {progress.phase} {progress.step}/{progress.steps} "
                f"({progress.done_steps}/{progress.all_steps}), rate {progress.learning_rate:.2e}, {terms}, "
                f"{progress.images_per_second:.3g} images/s{left}{validation}",
                err=True,
            )


if __name__ == "__main__":
    main()
