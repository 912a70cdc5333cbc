"""sr-bench: what the SDK costs, and what it gives."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sdk import OptionError, SRError

from . import large as large_module
from . import latency as latency_module
from . import page as page_module
from . import quality as quality_module
from . import roofline as roofline_module
from . import runtime as runtime_module
from . import scaling as scaling_module
from . import serve as serve_module
from . import soak as soak_module
from . import tiling as tiling_module
from .contestants import Setup
from .cores import limit_threads
from .report import render
from .restoration import restoration_command
from .result import check_writable, write_json
from .train import train_command

SIDES = range(16, 8193)
DEFAULT_SIZES = ((256, 256), (512, 512))


class Size(click.ParamType):
    """HxW in pixels, as (height, width)."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value)
        if match is None or int(match[1]) not in SIDES or int(match[2]) not in SIDES:
            self.fail(f"{value!r} is not a size such as 256x256 (sides {SIDES[0]} to {SIDES[-1]})", param, ctx)
        return int(match[1]), int(match[2])


json_option = click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result here too.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure what the SDK costs and what it gives, beside plain interpolation."""


main.add_command(restoration_command)
main.add_command(train_command)


@main.command()
@click.option("--model", help="Bundle folder or shipped model. Default: the shipped one.")
@click.option("--size", "sizes", type=Size(), metavar="HxW", multiple=True, help="LR input. Default: 256x256, 512x512.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Timed runs of each contestant.")
@click.option("--threads", type=click.IntRange(1), help="Cores for every contestant. Default: all.")
@click.option("--picture", type=click.Path(path_type=Path), help="Cut the input from this file. Default: a drawn one.")
@click.option("--run", type=click.Path(path_type=Path), help="Run of sr-train whose weights PyTorch uses.")
@click.option("--stage", "stages", multiple=True, help="Resolution stage; may be repeated. Default: the last one.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Pictures at once. Default: 1.")
@click.option("--contestant", "contestants", multiple=True, help="Time this one beside bilinear; may be repeated.")
@json_option
def latency(
    json_path: Path | None,
    sizes: tuple[tuple[int, int], ...],
    contestants: tuple[str, ...],
    stages: tuple[str, ...],
    batches: tuple[int, ...],
    repeats: int,
    picture: Path | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Time the SDK on every engine against interpolation, plain engines and, where it is installed, PyTorch."""
    settings = latency_module.Settings(
        sizes=sizes or DEFAULT_SIZES, repeats=repeats, contestants=contestants, picture=picture, stages=stages,
        batches=batches or (1,), setup=Setup(threads=threads, **options),
    )  # fmt: skip

    def measure() -> dict[str, Any]:
        if threads is not None:
            limit_threads(threads)
        return latency_module.run_latency(settings, progress=_tell)

    _report(measure, json_path)


@main.command()
@click.argument("folders", metavar="DIR...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--model", "models", multiple=True, help="Bundle folder or shipped model; may be repeated.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--weights", help="Folder with the weights of LPIPS-like (SqueezeNet). Default: SR_WEIGHTS_DIR.")
@click.option("--sheet", type=click.Path(path_type=Path), help="A PNG file for patches of all methods, per scale.")
@json_option
def quality(json_path: Path | None, models: tuple[str, ...], **options: Any) -> None:
    """Score the SDK, bicubic and bilinear on the high-resolution pictures in each DIR."""
    settings = quality_module.Settings(models=models or (None,), **options)

    def track(paths: Any, label: str) -> Any:
        return click.progressbar(paths, label=label, file=sys.stderr)

    _report(lambda: quality_module.run_quality(settings, track=track), json_path)


@main.command()
@click.option("--model", help="Bundle folder or shipped model. Default: the shipped one.")
@click.option("--stage", "stages", multiple=True, help="Resolution stage; may be repeated. Default: all.")
@click.option("--size", "sizes", type=Size(), metavar="HxW", multiple=True, help="LR input. Default: 256x256, 512x512.")
@click.option("--repeats", type=click.IntRange(1), default=15, show_default=True, help="Timed runs of each engine.")
@json_option
def roofline(json_path: Path | None, sizes: tuple[tuple[int, int], ...], **options: Any) -> None:
    """Hold every engine's time against the processor's measured matrix and copy rates; takes the export extra."""
    settings = roofline_module.Settings(sizes=sizes or DEFAULT_SIZES, **options)
    _report(lambda: roofline_module.run_roofline(settings, progress=_tell), json_path)


@main.command()
@click.argument("parts", metavar="[PART]...", type=click.Choice(list(runtime_module.PARTS)), nargs=-1)
@click.option("--model", help="Bundle folder or shipped model. Default: the shipped one.")
@click.option("--repeats", type=click.IntRange(1), default=15, show_default=True, help="Timed runs of each contestant.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder to crop photographs from. Default: our own.")
@click.option("--photographs", type=click.IntRange(1), default=50, show_default=True, help="Files of `many`.")
@click.option("--small-pictures", type=click.IntRange(200), default=2000, show_default=True, help="Of `memory`.")
@json_option
def runtime(json_path: Path | None, **options: Any) -> None:
    """Measure the runtime against its bounds: overhead, tiled, many, memory, start; all PARTs by default."""
    settings = runtime_module.Settings(**options)
    _report(lambda: runtime_module.run_runtime(settings, progress=_tell), json_path)


@main.command()
@click.argument("axes", metavar="[AXIS]...", type=click.Choice(list(scaling_module.AXES)), nargs=-1)
@click.option("--model", help="Bundle folder or shipped model. Default: the shipped one.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True, help="Timed runs of each point.")
@json_option
def scaling(json_path: Path | None, **options: Any) -> None:
    """Time the SDK over pixels, tile, batch and threads, all AXES by default, and fit an exponent to each."""
    settings = scaling_module.Settings(**options)
    _report(lambda: scaling_module.run_scaling(settings, progress=_tell), json_path)


@main.command()
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True)
@click.option("--clients", type=click.IntRange(1, 256), default=4, show_default=True, help="Threads that ask.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of what they ask for.")
@click.option("--model", help="Bundle folder or shipped model. Default: the shipped one.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@json_option
def soak(json_path: Path | None, minutes: float, **options: Any) -> None:
    """Ask one Upscaler for mixed pictures from several threads; tells memory, drift, errors and wrong pixels."""
    if not math.isfinite(minutes):
        raise click.UsageError(f"--minutes {minutes}: give a number")
    settings = soak_module.Settings(seconds=60 * minutes, **options)
    _report(lambda: soak_module.run_soak(settings, progress=_tell), json_path)


@main.command()
@click.option("--clients", type=click.IntRange(1, 1000), default=50, show_default=True, help="That ask at once.")
@click.option("--photographs", type=click.IntRange(1), default=50, show_default=True, help="Of a round.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder to crop photographs from. Default: our own.")
@click.option("--model", help="Bundle folder or shipped model. Default: the shipped one.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@json_option
def serve(json_path: Path | None, **options: Any) -> None:
    """Hold sr-serve under many clients against upscale_file on the same photographs; takes the serve extra."""
    settings = serve_module.Settings(**options)
    _report(lambda: serve_module.run_serve(settings, progress=_tell), json_path)


@main.command()
@click.option("--model", "models", multiple=True, help="Bundle folder or shipped model; may be repeated.")
@click.option("--size", type=Size(), metavar="HxW", default=(768, 1024), help="LR input. Default: 768x1024.")
@click.option("--tile", type=click.IntRange(16), default=256, show_default=True, help="Side of a tile, LR pixels.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed runs of each way.")
@click.option("--picture", type=click.Path(path_type=Path), help="Make the input of this file. Default: a drawn one.")
@click.option(
    "--peer",
    "peers",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A checkpoint for spandrel (extra peers), cut their way; may be repeated.",
)
@json_option
def tiling(json_path: Path | None, models: tuple[str, ...], **options: Any) -> None:
    """Hold the SDK's tiles, and tiles with 10 px around them as other tools cut them, against the untiled result."""
    settings = tiling_module.Settings(models=models or (None,), **options)
    _report(lambda: tiling_module.run_tiling(settings, progress=_tell), json_path)


@main.command()
@click.option("--side", type=click.IntRange(16, 32000), default=20000, show_default=True, help="Of the LR square.")
@click.option("--format", "suffix", type=click.Choice(["png", "jpg", "tif"]), default="png", show_default=True)
@click.option("--model", help="Bundle folder or shipped model. Default: the shipped one.")
@json_option
def large(json_path: Path | None, side: int, suffix: str, model: str | None) -> None:
    """Enlarge a file that is streamed in bands; peak memory and time. Takes disk space: TMPDIR says where."""
    _report(lambda: large_module.run_large(model, side=side, suffix=suffix, progress=_tell), json_path)


@main.command()
@click.argument("files", metavar="JSON...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("report"), show_default=True, help="Folder.")
def report(files: tuple[Path, ...], out: Path) -> None:
    """Make one HTML page of results, which opens offline, and a PNG of each plot; takes the train extra."""
    try:
        named = [(path.stem, page_module.read_result(path)) for path in files]
        if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
            raise OptionError(f"{twice[0]}: two results of one name; rename one of the files")
        page, *pictures = page_module.write_page(named, out)
    except SRError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"{page}, and {len(pictures)} plots beside it")


def _tell(news: str) -> None:
    click.echo(news, err=True)


def _report(measure: Callable[[], dict[str, Any]], json_path: Path | None) -> None:
    """Measure, print the table and write the JSON; errors of the SDK become one line."""
    try:
        if json_path is not None:
            check_writable(json_path)
        result = measure()
        click.echo(render(result))
        if json_path is not None:
            write_json(result, json_path)
    except SRError as exc:
        raise click.ClickException(str(exc)) from exc
