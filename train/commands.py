"""What the commands of sr-train have in common: errors that end them with one line, bars, how many cores there are."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from .errors import TrainError

EXTRA = {"torch", "torchvision", "safetensors", "matplotlib", "tomli"}


class OneLineErrors(click.Command):
    """A command whose errors, and missing packages, are told in one line; -h is its --help."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal's encoding does not
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except TrainError as exc:
            raise click.ClickException(" ".join(str(exc).split())) from exc
        except BrokenPipeError:
            raise  # which click knows: the reader has gone
        except (OSError, MemoryError) as exc:
            raise click.ClickException(" ".join(str(exc).split()) or "memory ended") from exc
        except ModuleNotFoundError as exc:
            if exc.name not in EXTRA:
                raise
            raise click.ClickException(f"{exc.name} is not installed: pip install 'sr-sdk[train]'") from exc


def silent(done: int, total: int) -> None:
    """Report no progress."""


def show_bar(bar: Any, done: int, total: int) -> None:
    """Set a bar of click to `done`, which may be less than before when another folder begins."""
    bar.length, bar.finished = total, False
    bar.update(done - bar.pos)


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
