"""sr-upscale: picture files in, larger picture files out."""

from __future__ import annotations

import glob
import logging
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

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
@click.option(
    "--format", "suffix", type=click.Choice(sorted({s[1:] for s in files.FORMATS})), help="Write this format."
)
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
    logging.captureWarnings(True)
    try:
        jobs, folder = plan_jobs(inputs, output, suffix=suffix, panels=compare_panel)
        upscaler = Upscaler(model, backend=backend, device=device, precision=precision, stage=stage, seams=seams)
        if folder:
            _make_folder(folder)
    except SRError as exc:
        raise click.ClickException(str(exc)) from exc
    if verbose:
        click.echo(", ".join(f"{key} {value}" for key, value in upscaler.info.items()), err=True)

    def decode(job: Job) -> tuple[np.ndarray, files.Metadata]:
        # All that can be refused is refused before the work; what is no picture is told first.
        for target in filter(os.path.lexists, job.targets):
            files.check_output(target, overwrite=overwrite)
        image, metadata = files.read(job.source)
        files.check_output(job.target, overwrite=overwrite)
        files.check_format(job.target, image, scale=upscaler.scale)
        return image, metadata

    def compute(decoded: tuple[np.ndarray, files.Metadata]) -> tuple[np.ndarray, np.ndarray, files.Metadata]:
        image, metadata = decoded
        return image, upscaler.upscale(image, tile), metadata

    def encode(job: Job, result: tuple[np.ndarray, np.ndarray, files.Metadata]) -> None:
        image, enlarged, metadata = result
        files.write(job.target, enlarged, metadata, quality=quality, overwrite=overwrite)
        if job.panel:
            panel = compare.panel(image, enlarged)
            files.write(job.panel, panel, files.Metadata(), quality=quality, overwrite=overwrite)

    failures: list[SRError] = []
    with (
        upscaler,
        closing(pipeline.overlap(jobs, decode=decode, compute=compute, encode=encode)) as results,
        click.progressbar(results, length=len(jobs), label="enlarging", file=sys.stderr) as bar,
    ):
        failures.extend(result for _, result in bar if isinstance(result, SRError))
    for error in failures:
        click.echo(f"failed: {error}", err=True)
    if failures:
        raise click.ClickException(f"{len(failures)} of {len(jobs)} pictures failed")


@dataclass(frozen=True)
class Job:
    """One picture to enlarge: from `source` to `target`, and a comparison to `panel`."""

    source: Path
    target: Path
    panel: Path | None = None

    @property
    def targets(self) -> list[Path]:
        """List the files that will be written."""
        return [self.target, self.panel] if self.panel else [self.target]


def plan_jobs(
    inputs: tuple[str, ...], output: str, *, suffix: str | None = None, panels: bool = False
) -> tuple[list[Job], Path | None]:
    """Pair every input picture with its output files, and give the output folder if one is needed.

    Raises: OutputError if an input matches nothing, or two results would become one file.
    """
    sources, several = _expand(inputs)
    folder = Path(output) if several or os.path.isdir(output) or output.endswith("/") else None
    jobs = []
    for source in sources:
        target = folder / source.name if folder else Path(output)
        if suffix:
            target = target.with_suffix(f".{suffix}")
        jobs.append(Job(source, target, target.with_name(f"{target.stem}.compare.png") if panels else None))
    taken: dict[Path, Path] = {}
    for job in jobs:
        for target in job.targets:
            if target in taken:
                raise OutputError(f"{taken[target]} and {job.source} would both become {target}")
            taken[target] = job.source
    return jobs, folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"{folder}: a folder is needed, and it cannot be made ({exc.strerror})") from exc


def _expand(inputs: tuple[str, ...]) -> tuple[list[Path], bool]:
    """List the files that the arguments mean, and tell whether they name more than one plain file."""
    sources: list[Path] = []
    several = len(inputs) > 1
    for text in inputs:
        path = Path(text)
        if os.path.isdir(path):
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in files.FORMATS and p.is_file())
            several = True
        elif os.path.exists(path):
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(text, recursive=True) if os.path.isfile(match))
            several = several or glob.has_magic(text)
        if not found:
            raise OutputError(f"{text}: no such file, or no pictures in it")
        sources.extend(found)
    return sources, several


if __name__ == "__main__":
    main()
