"""sr-upscale: picture files in, larger picture files out."""

from __future__ import annotations

import glob
import logging
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from . import compare, files, pipeline
from .errors import OutputError, SRError
from .upscaler import SEAMS, Upscaler
from .version import __version__


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("inputs", metavar="IN...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="A file for one picture, else a folder (made if missing).")
@click.option("--model", help="A shipped model or a bundle folder.")
@click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime or openvino.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, fp16 or bf16.")
@click.option("--stage", default="auto", show_default=True, help="Resolution stage of the model.")
@click.option("--seams", type=click.Choice(list(SEAMS)), default="exact", show_default=True)
@click.option("--tile", type=click.IntRange(min=1), help="Side of a tile in pixels of the input.")
@click.option("--format", "suffix", type=click.Choice(sorted({s[1:] for s in files.FORMATS})), help="Write this format.")
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of JPEG and WebP.")
@click.option("--compare", "compare_panel", is_flag=True, help="Also write NAME.compare.png: nearest, bilinear, ours.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--verbose", is_flag=True, help="Say what runs and how.")
@click.version_option(__version__)
def main(
    inputs: tuple[str, ...],
    output: str,
    model: str | None,
    backend: str,
    device: str,
    precision: str,
    stage: str,
    seams: str,
    tile: int | None,
    suffix: str | None,
    quality: int,
    compare_panel: bool,
    overwrite: bool,
    verbose: bool,
) -> None:
    """Enlarge pictures: files, folders (all pictures in them) or globs."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    try:
        jobs = plan_jobs(inputs, output, suffix=suffix)
        upscaler = Upscaler(model, backend=backend, device=device, precision=precision, stage=stage, seams=seams)
    except SRError as exc:
        raise click.ClickException(str(exc)) from exc
    if verbose:
        click.echo(", ".join(f"{key} {value}" for key, value in upscaler.info.items()), err=True)

    def decode(job: tuple[Path, Path]) -> Any:
        source, target = job
        if target.exists():  # refused before the work; everything else is told by the picture or by the writing
            files.check_output(target, overwrite=overwrite)
        return files.read(source)

    def compute(decoded: tuple[np.ndarray, files.Metadata]) -> Any:
        image, metadata = decoded
        return image, upscaler.upscale(image, tile), metadata

    def encode(job: tuple[Path, Path], result: tuple[np.ndarray, np.ndarray, files.Metadata]) -> None:
        image, enlarged, metadata = result
        files.write(job[1], enlarged, metadata, quality=quality, overwrite=overwrite)
        if compare_panel:
            panel = job[1].with_name(f"{job[1].stem}.compare.png")
            files.write(panel, compare.panel(image, enlarged), files.Metadata(), quality=quality, overwrite=overwrite)

    failures: list[tuple[Path, SRError]] = []
    results = pipeline.overlap(jobs, decode=decode, compute=compute, encode=encode)
    with upscaler, click.progressbar(results, length=len(jobs), label="enlarging", file=sys.stderr) as bar:
        for (source, _), result in bar:
            if isinstance(result, SRError):
                failures.append((source, result))
    for _, error in failures:
        click.echo(f"failed: {error}", err=True)
    if failures:
        raise click.ClickException(f"{len(failures)} of {len(jobs)} pictures failed")


def plan_jobs(inputs: tuple[str, ...], output: str, *, suffix: str | None) -> list[tuple[Path, Path]]:
    """Pair every input picture with its output file, making the output folder if one is needed.

    Raises: OutputError if an input matches nothing, or two inputs would become one file.
    """
    sources, several = _expand(inputs)
    target = Path(output)
    if not several and not target.is_dir() and not output.endswith("/"):
        return [(sources[0], target.with_suffix(f".{suffix}") if suffix else target)]
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"{target}: several pictures need a folder, and it cannot be made ({exc.strerror})") from exc
    jobs = [(source, target / (f"{source.stem}.{suffix}" if suffix else source.name)) for source in sources]
    taken: dict[Path, Path] = {}
    for source, destination in jobs:
        if destination in taken:
            raise OutputError(f"{taken[destination]} and {source} would both become {destination}")
        taken[destination] = source
    return jobs


def _expand(inputs: tuple[str, ...]) -> tuple[list[Path], bool]:
    """List the files that the arguments mean, and tell whether they name more than one plain file."""
    sources: list[Path] = []
    several = len(inputs) > 1
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in files.FORMATS)
            several = True
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(text, recursive=True))
            several = several or glob.has_magic(text)
        if not found:
            raise OutputError(f"{text}: no such file, or no pictures in it")
        sources.extend(found)
    return sources, several


if __name__ == "__main__":
    main()
