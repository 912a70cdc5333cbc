"""sr-upscale: picture and video files in, larger ones out."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import click

from . import cluster, files, jobs, video
from .errors import OptionError, SRError
from .inputs import make_folder, plan_jobs
from .jobs import Job
from .upscaler import SEAMS, Upscaler
from .version import __version__

# Signal -> what it did. The exit status is 128 and its number, as of a program that it ended.
ENDING = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("inputs", metavar="IN...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="A file for one input, else a folder (made if missing).")
@click.option("--model", help="A shipped model or a bundle folder.")
@click.option("--backend", default="auto", show_default=True, help="auto, tensorrt, onnxruntime or openvino.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:N or cuda:N,M (tiles shared out).")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, fp16, bf16 or int8.")
@click.option("--stage", default="auto", show_default=True, help="Resolution stage of the model.")
@click.option("--factor", type=float, help="Enlarge by this instead of the model's factor.")
@click.option("--width", type=click.IntRange(min=1), help="Width of the result in pixels.")
@click.option("--height", type=click.IntRange(min=1), help="Height of the result in pixels.")
@click.option("--seams", type=click.Choice(list(SEAMS)), default="exact", show_default=True)
@click.option("--tile", type=click.IntRange(min=1), help="Side of a tile in pixels of the input.")
@click.option("--memory", "memory_mib", type=click.IntRange(min=1), help="MiB for the engine's activations.")
@click.option(
    "--max-pixels",
    type=click.IntRange(min=0),
    default=files.MAX_PIXELS,
    show_default=True,
    help="Refuse larger pictures; 0: no limit.",
)
@click.option(
    "--format", "suffix", type=click.Choice(sorted({s[1:] for s in files.FORMATS})), help="Write this format."
)
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of JPEG, WebP and AVIF.")
@click.option(
    "--subsampling",
    type=click.Choice(files.SUBSAMPLINGS),
    default="4:4:4",
    show_default=True,
    help="Of the colour of JPEG and AVIF.",
)
@click.option("--lossless", is_flag=True, help="Of WebP.")
@click.option("--codec", default="auto", show_default=True, help="Of videos: auto, h264, hevc or vp9.")
@click.option("--crf", type=click.IntRange(0, 63), default=16, show_default=True, help="Quality of videos, 0 is best.")
@click.option("--compare", "compare_panel", is_flag=True, help="Also write NAME.compare.png: nearest, bilinear, ours.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--ray", "address", metavar="ADDRESS", help="Work on a Ray cluster: its address, auto, or local.")
@click.option("--ray-workers", type=click.IntRange(min=1), help="On the cluster; one for each GPU, or few cores.")
@click.option("--verbose", is_flag=True, help="Say what runs and how.")
@click.version_option(__version__)
def main(
    inputs: tuple[str, ...],
    output: str,
    suffix: str | None,
    compare_panel: bool,
    verbose: bool,
    factor: float | None,
    width: int | None,
    height: int | None,
    codec: str,
    crf: int,
    address: str | None,
    ray_workers: int | None,
    **options: Any,
) -> None:
    """Enlarge pictures and videos: files, globs, or folders (all pictures in them)."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    if address is None:
        _end_at_once_on_signals()
    engine = {key: options.pop(key) for key in ("model", "backend", "device", "precision", "stage", "seams")}
    engine["memory_mib"] = options.pop("memory_mib") or "auto"
    try:
        size = _size(width, height, factor)
        if address is not None:
            if compare_panel:
                raise OptionError("--compare is not made on a cluster: leave one of --compare and --ray out")
            if not address:
                raise OptionError("--ray is empty: the address of a Ray cluster, auto, or local")
            _interrupt_on_signals()
            how = jobs.Options(factor=factor, size=size, **options)
            _enlarge_on_cluster(address, inputs, output, suffix=suffix, engine=engine, options=how, workers=ray_workers)
            return
        if ray_workers is not None:
            raise OptionError("--ray-workers is for --ray")
        todo, folder = plan_jobs(inputs, output, suffix=suffix, panels=compare_panel)
        clips = [job for job in todo if video.is_video(job.source)]
        if clips and (size or factor):
            raise OptionError("--factor, --width and --height are for pictures; videos grow by the model's factor")
        upscaler = Upscaler(**engine)
        if folder:
            make_folder(folder)
    except SRError as exc:
        raise click.ClickException(_printable(exc)) from exc
    except _Interrupted as exc:
        click.echo(f"\n{ENDING[exc.number]}: finished files are kept", err=True)
        sys.exit(128 + exc.number)
    if verbose:
        click.echo(", ".join(f"{key} {value}" for key, value in upscaler.info.items()), err=True)
    how = jobs.Options(factor=factor, size=size, **options)
    failures: list[SRError] = []
    with upscaler:
        stills = [job for job in todo if job not in clips]
        if stills:
            failures += _enlarge_pictures(upscaler, stills, how)
        for job in clips:
            try:
                _enlarge_video(upscaler, job, overwrite=how.overwrite, max_pixels=how.max_pixels, codec=codec, crf=crf)
            except SRError as exc:
                failures.append(exc)
    for error in failures:
        click.echo(f"failed: {_printable(error)}", err=True)
    if failures:
        raise click.ClickException(f"{len(failures)} of {len(todo)} files failed")


def _enlarge_on_cluster(address: str, inputs: Sequence[str], output: str, *, suffix: str | None, **how: Any) -> None:
    """Enlarge on Ray. Raises: SRError; ClickException if some pictures failed; _Interrupted."""
    tasks = cluster.plan_tasks(inputs, output, suffix=suffix)
    found: Counter[str] = Counter()
    with (
        closing(cluster.enlarge(tasks, output, address=address, **how)) as outcomes,
        click.progressbar(outcomes, length=len(tasks), label="enlarging", file=sys.stderr) as bar,
    ):
        failures = []
        for outcome in bar:
            found[outcome.outcome] += 1
            if outcome.error:
                failures.append(outcome.error)
    for error in failures:
        click.echo(f"failed: {_printable(error)}", err=True)
    click.echo(
        f"{found['done']} done, {found['skipped']} were there; all in {cluster.MANIFEST} of the output", err=True
    )
    if failures:
        raise click.ClickException(f"{len(failures)} of {len(tasks)} files failed")


def _enlarge_pictures(upscaler: Upscaler, todo: Sequence[Job], how: jobs.Options) -> list[SRError]:
    with (
        closing(jobs.run_files(upscaler, todo, how)) as results,
        click.progressbar(results, length=len(todo), label="enlarging", file=sys.stderr) as bar,
    ):
        return [error for _, error in bar if error]


def _enlarge_video(upscaler: Upscaler, job: Job, **options: Any) -> None:
    with click.progressbar(length=1, label=_printable(job.source.name), file=sys.stderr, show_eta=False, show_pos=True,
                           item_show_func=lambda text: text) as bar:  # fmt: skip

        def show(progress: video.VideoProgress) -> None:
            bar.length = max(progress.total, progress.frames)
            eta = "" if progress.eta_s is None else f", {progress.eta_s:.0f} s left"
            bar.update(progress.frames - bar.pos, f"{progress.fps:.1f} frames/s{eta}")

        video.upscale_video(upscaler, job.source, job.target, progress=show, **options)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _printable(super().format(record))


def _printable(text: object) -> str:
    """Write what is not printable as an escape: names of files may hold it, up to orders to the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def _end_at_once_on_signals() -> None:
    """Let signals end the program while engines and encoders are at work in threads, which cannot be stopped."""
    if threading.current_thread() is not threading.main_thread():
        return

    def end(number: int, _: object) -> None:
        files.remove_unfinished()
        # No click.echo: the signal may have come in the middle of one.
        os.write(2, f"\n{ENDING[signal.Signals(number)]}: finished files are kept\n".encode())
        os._exit(128 + number)

    for number in ENDING:
        signal.signal(number, end)


class _Interrupted(BaseException):
    """A signal came. number: which."""

    def __init__(self, number: signal.Signals):
        super().__init__(number)
        self.number = number


def _interrupt_on_signals() -> None:
    """Let a signal unwind the program, so that what it has begun elsewhere is ended; the next one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        return

    def interrupt(number: int, _: object) -> None:
        _end_at_once_on_signals()
        raise _Interrupted(signal.Signals(number))

    for number in ENDING:
        signal.signal(number, interrupt)


def _size(width: int | None, height: int | None, factor: float | None) -> tuple[int | None, int | None] | None:
    if width is None and height is None:
        return None
    if factor is not None:
        raise OptionError("--factor cannot be combined with --width or --height")
    return height, width


if __name__ == "__main__":
    main()
