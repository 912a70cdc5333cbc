"""sr-export: a finished run in, a bundle for the SDK out; and what serves one: TensorRT engines, Triton's files."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from sdk.bundle import Bundle
from sdk.errors import BackendUnavailable, OptionError, SRError

from .errors import printable

path_type = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="[RUN|CHECKPOINT|BUNDLE]", required=False)
@click.option("--out", type=path_type, help="Bundle folder to make.")
@click.option("--fp16", is_flag=True, help="Also write graphs that compute in fp16, and engines where there is a GPU.")
@click.option("--int8", type=path_type, metavar="DIR", help="Also write int8 graphs, calibrated with pictures.")
@click.option("--scale", type=int, help="Factor to export, for networks that serve several.")
@click.option("--stage", "stages", multiple=True, metavar="NAME", help="Export this stage of RUN; may be repeated.")
@click.option("--pictures", type=path_type, help="Real pictures to check and measure on.")
@click.option("--licence", default="", help="Licence of the weights, kept in the manifest.")
@click.option("--summary", default="", help="What the model is for, in a line that users are shown (sr-serve).")
@click.option("--figures", type=path_type, help="JSON of sr-bench quality, kept in the manifest.")
@click.option("--incomplete", is_flag=True, help="Export a stage that --max-steps cut short, too.")
@click.option("--arch", metavar="NAME", help="Network of a plain CHECKPOINT (.safetensors, .pth).")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of that network, as model.channels=48.")
@click.option("--onnx", type=path_type, metavar="FILE", help="Take somebody else's super-resolution ONNX instead.")
@click.option("--bgr", is_flag=True, help="The network of --onnx takes and gives blue first.")
@click.option("--value-range", type=click.Choice(["1", "255"]), help="What white is to --onnx, if nothing tells.")
@click.option("--tensorrt", is_flag=True, help="No TensorRT engine is an error. Without --out: engines of a BUNDLE.")
@click.option("--engine-dir", type=path_type, help="Put engines there (SR_ENGINE_DIR at run time). As --tensorrt.")
@click.option("--device", default="cuda:0", show_default=True, help="GPU that engines are built for.")
@click.option("--level", type=click.IntRange(0, 5), help="TensorRT's optimisation level.")
@click.option("--hardware-compatible", is_flag=True, help="Engines for every GPU from Ampere on, some slower.")
@click.option("--triton", type=path_type, metavar="DIR", help="Triton model repository to make, also of a BUNDLE.")
@click.option("--triton-engine", type=path_type, help="TensorRT plan, or engine out of the cache, to serve.")
@click.option("--triton-batch", type=click.IntRange(1), help="Requests that are run together. Default: by memory.")
@click.option("--triton-window", type=click.IntRange(1), metavar="PIXELS", help="Side of windows to warm up with.")
@click.option("--triton-device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True)
@click.option("--verbose", is_flag=True, help="Show each row of the halo measurement.")
@click.pass_context
def main(
    context: click.Context,
    source: str | None,
    out: Path | None,
    tensorrt: bool,
    engine_dir: Path | None,
    device: str,
    level: int | None,
    hardware_compatible: bool,
    triton: Path | None,
    triton_engine: Path | None,
    triton_device: str,
    triton_batch: int | None,
    triton_window: int | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Export every finished resolution stage of RUN to ONNX, checked against PyTorch."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("export").setLevel(logging.INFO if verbose else logging.WARNING)
    tensorrt = tensorrt or engine_dir is not None
    if (source is None) == (options["onnx"] is None):
        raise click.UsageError("one source is needed: RUN, CHECKPOINT, BUNDLE or --onnx FILE")
    if out is None and (options["onnx"] or not (tensorrt or triton)):
        raise click.UsageError("--out is needed (or --tensorrt or --triton, of a BUNDLE)")
    builds = tensorrt or bool(out and (options["fp16"] or options["int8"]))
    refuse(context, MAKING, unless=out is not None, needs="--out")
    refuse(context, BUILDING, unless=builds, needs="--tensorrt, --engine-dir, --fp16 or --int8")
    refuse(context, SERVING, unless=triton is not None, needs="--triton")
    if triton and triton.exists():  # before all that takes minutes
        raise click.UsageError(f"--triton {triton}: exists already; choose another name or remove it")
    with told(), ended_by_signals():
        stages = options["stages"]
        if out is not None:
            write_bundle(source, out, **options)
        bundle = Bundle.load(out or source)
        if builds:
            engines = {"level": level, "hardware_compatible": hardware_compatible, "folder": engine_dir}
            write_engines(bundle, device, options["pictures"], stages=stages, required=tensorrt, **engines)
        if triton is not None:
            from .triton import Options, write_repository

            if len(stages) > 1:
                raise OptionError("--triton serves one --stage, or all")
            serving = Options(
                stage=stages[0] if stages else "all", engine=triton_engine, device=triton_device,
                max_batch=triton_batch, window=triton_window,
            )  # fmt: skip
            click.echo(f"{triton}: Triton models {', '.join(write_repository(bundle, triton, serving))}")


# Parameters that only one of the command's three works has a use for.
MAKING = (
    "fp16", "int8", "scale", "licence", "summary", "figures", "incomplete", "arch", "settings", "bgr", "value_range"
)  # fmt: skip
BUILDING = ("device", "level", "hardware_compatible")
SERVING = ("triton_engine", "triton_device", "triton_batch", "triton_window")


def refuse(context: click.Context, names: Iterable[str], *, unless: bool, needs: str) -> None:
    """Refuse options that were given and would not be used."""
    for parameter in context.command.params:
        is_given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if is_given and parameter.name in names and not unless:
            raise click.UsageError(f"{parameter.opts[0]} needs {needs}")


@contextmanager
def told() -> Iterator[None]:
    """Turn errors of ours, and missing packages, into one line."""
    try:
        yield
    except SRError as exc:
        raise click.ClickException(printable(str(exc))) from exc
    except ModuleNotFoundError as exc:
        if exc.name not in ("torch", "onnx", "safetensors"):
            raise
        raise click.ClickException(f"{exc.name} is not installed: pip install 'sr-sdk[export,cpu]'") from exc


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that unfinished folders go."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_bundle(
    source: str | None,
    out: Path,
    *,
    arch: str | None,
    settings: tuple[str, ...],
    onnx: Path | None,
    bgr: bool,
    value_range: str | None,
    figures: Path | None,
    **options: Any,
) -> None:
    """Make a bundle of whatever the source is, and say what came of it. Raises: SRError."""
    if onnx is not None:
        from .foreign import import_onnx

        refused = [f"--{name}" for name in ("fp16", "int8", "incomplete") if options.pop(name)]
        others = {"--stage": options.pop("stages"), "--arch": arch, "--set": settings, "--figures": figures}
        refused += [name for name, value in others.items() if value]
        if refused:
            raise OptionError(f"{', '.join(refused)}: not for --onnx, whose graph is taken as it is")
        white = int(value_range) if value_range else None
        manifest = import_onnx(onnx, out, bgr=bgr, value_range=white, report=click.echo, **options)
    elif bgr or value_range:
        raise OptionError("--bgr and --value-range are for --onnx")
    else:
        from .bundle_writer import Options, export_run
        from .plain_checkpoint import SUFFIXES, export_checkpoint

        table = read_figures(figures, out.name) if figures else None
        made = Options(figures=table, **options)
        if arch is None and Path(str(source)).suffix in SUFFIXES:
            raise OptionError(f"{source}: of a plain checkpoint --arch must name the network")
        if arch:
            manifest = export_checkpoint(Path(str(source)), out, made, arch=arch, settings=settings, report=click.echo)
        else:
            manifest = export_run(Path(str(source)), out, made, report=click.echo)
    size = sum(path.stat().st_size for path in out.iterdir())
    stages = ", ".join(stage.name for stage in manifest.stages)
    click.echo(f"{out}: {manifest.name} x{manifest.scale}, stages {stages}, {size / 1e6:.1f} MB")


def write_engines(
    bundle: Bundle, device: str, pictures: Path | None, *, stages: Sequence[str], required: bool, **options: Any
) -> None:
    """Build TensorRT engines; where that cannot be, say so in a line, or raise BackendUnavailable if required."""
    from sdk.backends.tensorrt_builder import BuildOptions

    from .to_tensorrt import build_engines

    building = BuildOptions(rebuild=options["level"] is not None, **options)
    try:
        build_engines(bundle, stages=stages, device=device, pictures=pictures, options=building, report=click.echo)
    except BackendUnavailable as exc:
        if required:
            raise
        click.echo(f"no TensorRT engines: {exc}")


def read_figures(path: Path, model: str) -> dict[str, Any]:
    """Take the protocol and the means of a model and of bicubic out of a result of sr-bench quality.

    Raises: click.ClickException if the file is no such result, or the model is not in it.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in result["rows"] if row["method"] in (model, "bicubic")]
        figures = [{key: row[key] for key in ("dataset", "method", "means")} for row in rows]
        summary = {"protocol": result["protocol"], "rows": figures}
        json.dumps(summary, allow_nan=False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise click.ClickException(f"{path}: not a result of sr-bench quality ({exc!r})") from exc
    if model not in {row["method"] for row in figures}:
        raise click.ClickException(f"{path}: holds no figures of {model}")
    return summary
