"""sr-export: a finished run in, a bundle for the SDK out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import click

from sdk.errors import SRError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle folder to make.")
@click.option("--fp16", is_flag=True, help="Also write graphs that compute in fp16, for GPUs.")
@click.option("--scale", type=int, help="Factor to export, for networks that serve several.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Real pictures to check and measure on.")
@click.option("--licence", default="", help="Licence of the weights, kept in the manifest.")
@click.option("--figures", type=click.Path(path_type=Path), help="JSON of sr-bench quality, kept in the manifest.")
@click.option("--incomplete", is_flag=True, help="Export a stage that --max-steps cut short, too.")
@click.option("--verbose", is_flag=True, help="Show each row of the halo measurement.")
def main(
    run: Path,
    out: Path,
    fp16: bool,
    scale: int | None,
    pictures: Path | None,
    licence: str,
    figures: Path | None,
    incomplete: bool,
    verbose: bool,
) -> None:
    """Export every finished resolution stage of RUN to ONNX, checked against PyTorch."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("export").setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        from .bundle_writer import Options, export_run
    except ModuleNotFoundError as exc:
        if exc.name not in ("torch", "onnx", "safetensors"):
            raise
        raise click.ClickException(f"{exc.name} is not installed: pip install 'sr-sdk[export,cpu]'") from exc
    table = read_figures(figures, out.name) if figures else None
    options = Options(scale=scale, fp16=fp16, pictures=pictures, licence=licence, figures=table, incomplete=incomplete)
    try:
        manifest = export_run(run, out, options, report=click.echo)
    except SRError as exc:
        raise click.ClickException(str(exc)) from exc
    size = sum(path.stat().st_size for path in out.iterdir())
    stages = ", ".join(stage.name for stage in manifest.stages)
    click.echo(f"{out}: {manifest.name} x{manifest.scale}, stages {stages}, {size / 1e6:.1f} MB")


def read_figures(path: Path, model: str) -> dict[str, Any]:
    """Take the protocol and the means of a model and of bicubic out of a result of sr-bench quality.

    Raises: click.ClickException if the file is no such result, or the model is not in it.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in result["rows"] if row["method"] in (model, "bicubic")]
        figures = [{key: row[key] for key in ("dataset", "method", "means")} for row in rows]
        summary = {"protocol": result["protocol"], "rows": figures}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise click.ClickException(f"{path}: not a result of sr-bench quality ({exc!r})") from exc
    if model not in {row["method"] for row in figures}:
        raise click.ClickException(f"{path}: holds no figures of {model}")
    return summary
