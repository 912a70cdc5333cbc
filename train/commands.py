"""What the commands of sr-train have in common: errors of ours end them with one line, not a traceback."""

from __future__ import annotations

import io
import sys
from typing import Any

import click

from .errors import TrainError

EXTRA = {"torch", "torchvision", "safetensors", "matplotlib", "tomli"}


class OneLineErrors(click.Command):
    """A command whose errors, and missing packages, are told in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal's encoding does not
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except TrainError as exc:
            raise click.ClickException(" ".join(str(exc).split())) from exc
        except (OSError, MemoryError) as exc:
            if isinstance(exc, BrokenPipeError):
                raise  # which click knows: the reader has gone
            raise click.ClickException(" ".join(str(exc).split()) or "memory ended") from exc
        except ModuleNotFoundError as exc:
            if exc.name not in EXTRA:
                raise
            raise click.ClickException(f"{exc.name} is not installed: pip install 'sr-sdk[train]'") from exc
