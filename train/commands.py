"""What the commands of sr-train have in common: errors of ours end them with one line, not a traceback."""

from __future__ import annotations

from typing import Any

import click

from .errors import TrainError

EXTRA = {"torch", "torchvision", "safetensors", "matplotlib", "tomli"}


class OneLineErrors(click.Command):
    """A command whose errors, and missing packages, are told in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrainError as exc:
            raise click.ClickException(" ".join(str(exc).split())) from exc
        except ModuleNotFoundError as exc:
            if exc.name not in EXTRA:
                raise
            raise click.ClickException(f"{exc.name} is not installed: pip install 'sr-sdk[train]'") from exc
