"""Turn trained networks into a bundle: trace, check, measure, describe."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn.utils import parametrize

from sdk.backends import Request, open_backend
from sdk.backends.onnxruntime import OnnxRuntimeBackend
from sdk.bundle import FORMAT, MANIFEST, VERSION, Bundle, Graph, Manifest, Parity, Stage, hash_file
from sdk.errors import BackendUnavailable
from train.checkpoint import TENSORS, stage_folder
from train.errors import TrainError
from train.models import Network
from train.models.decoder import SelfAttention
from train.recipe import Recipe
from train.run_folder import load_run
from train.stages import checkpoint_to_take, load_averaged, load_network

from . import int8, verify
from .cost import measure_cost
from .errors import ExportError
from .folders import new_folder, refuse_existing
from .parity import MAX_FLOAT_ERROR, MIN_PSNR_DB, Difference, check_parity, compare, on_grid, read_pictures
from .precision import find_islands, in_half, round_weights
from .to_onnx import OPSET, WeightsFile, quiet, trace

WHOLE_SIDE = 512  # LR pixels: for pictures that are never cut, where memory grows with the square of the pixels
ENGINES = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
INT8_ENGINES = (("onnxruntime", "int8"), ("openvino", "int8"))
NOTICE = (
    "This model invents detail that looks plausible but was not in the picture. "
    "Do not read evidence, identities, text or measurements from what it adds."
)

Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the exporting person decides.

    int8: folder of photographs to calibrate INT8 graphs on; None writes none.
    summary: what the model is for, in a line. figures: measured quality, embedded into the manifest as it is.
    incomplete: also export a stage that --max-steps cut short. stages: names of those to export, of a run; none: all.
    """

    scale: int | None = None
    fp16: bool = False
    int8: Path | None = None
    pictures: Path | None = None
    licence: str = ""
    summary: str = ""
    figures: dict[str, Any] | None = None
    incomplete: bool = False
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One stage to export. load: gives the network with its trained weights, to be folded in place, and its facts."""

    name: str
    training_size: int
    load: Callable[[], tuple[Network, dict[str, Any]]]


@dataclass(frozen=True)
class _Work:
    """A stage on its way into a bundle's folder.

    network: as deployed, in fp32. references: (name, picture, what PyTorch makes of it in fp32), uint8.
    """

    name: str
    network: Network
    references: list[tuple[str, np.ndarray, np.ndarray]]
    folder: Path
    scale: int
    options: Options
    report: Report

    @property
    def stride(self) -> int:
        return self.network.stride(self.scale)


@contextmanager
def _as_export_errors() -> Iterator[None]:
    try:
        yield
    except TrainError as exc:
        raise ExportError(str(exc)) from exc


def export_run(run: Path, out: Path, options: Options, *, report: Report = lambda line: None) -> Manifest:
    """Export every stage of a run that has weights into the folder `out`, which must not exist.

    run: or one of its checkpoints, whose averaged weights become the bundle's one stage.
    Raises: ExportError if a stage was cut short unasked, a graph differs from PyTorch, or `out` cannot be written.
    """
    refuse_existing(out)
    if (run / TENSORS).is_file():
        return _export_checkpoint(run, out, options, report=report)
    with _as_export_errors():
        recipe = load_run(run)
    scale = choose_scale(recipe.model.scales, options.scale)
    if unknown := set(options.stages) - {stage.name for stage in recipe.stages}:
        raise ExportError(f"{run}: has no stage {', '.join(sorted(unknown))}")
    sources = [
        Source(stage.name, stage.size, functools.partial(_load_stage, run, recipe, stage.name, options.incomplete))
        for stage in recipe.stages
        if stage_folder(run, stage.name).is_dir() and (not options.stages or stage.name in options.stages)
    ]
    if not sources:
        with _as_export_errors():
            raise ExportError(f"{run}: no finished stage yet{checkpoint_to_take(run)}")
    return _write_bundle(sources, out, options, scale=scale, report=report)


def _export_checkpoint(folder: Path, out: Path, options: Options, *, report: Report) -> Manifest:
    with _as_export_errors(), quiet("train.feature_nets"):  # its weights are random for a moment only
        network, stage, facts = load_averaged(folder)
    if set(options.stages) - {stage.name}:
        raise ExportError(f"{folder}: is of stage {stage.name}, not {', '.join(options.stages)}")
    scale = choose_scale(network.scales, options.scale)
    source = Source(stage.name, stage.size, lambda: (network, facts))
    return _write_bundle([source], out, options, scale=scale, report=report)


def export_network(
    network: Network,
    out: Path,
    options: Options,
    *,
    stage: str,
    training_size: int,
    facts: dict[str, Any],
    report: Report = lambda line: None,
) -> Manifest:
    """Export a network that comes from no run as the one stage of a bundle in the folder `out`.

    network: with its trained weights, folded or not; it is folded, and its weights are rounded, in place.
    training_size: of HR crops, 0 if it is not known. facts: free-form, kept in the manifest.
    Raises: ExportError if the name does not do for files, a graph differs from PyTorch, or `out` exists or cannot be
    written.
    """
    refuse_existing(out)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", stage):
        raise ExportError(f"stage {stage!r}: expected a name of letters, digits, . _ -")
    source = Source(stage, training_size, lambda: (network, facts))
    return _write_bundle([source], out, options, scale=choose_scale(network.scales, options.scale), report=report)


def choose_scale(scales: Sequence[int], scale: int | None) -> int:
    """Give the scale to export.

    Raises: ExportError if it is not one of the network's, or None and there are several.
    """
    if scale is None and len(scales) == 1:
        return scales[0]
    if scale is None or scale not in scales:
        raise ExportError(f"--scale: the network was trained for {', '.join(map(str, scales))}, not {scale}")
    return scale


def _write_bundle(sources: Sequence[Source], out: Path, options: Options, *, scale: int, report: Report) -> Manifest:
    """Export stages into a folder beside `out`, which gets its name when it is whole."""
    if options.int8 is not None:
        int8.find_photographs(options.int8)  # a wrong folder is told before anything is loaded
    with new_folder(out) as folder:
        stages: list[Stage] = []
        facts: dict[str, Any] = {}
        for source in sources:
            report(f"stage {source.name}: loading")
            network, facts = source.load()
            facts = facts | measure_cost(network, scale)
            stages.append(_export_stage(source, network, folder, options, scale=scale, report=report))
        told = {"summary": options.summary, "figures": options.figures}
        training = facts | {key: value for key, value in told.items() if value}
        manifest = Manifest(
            format=FORMAT, version=VERSION, name=out.name, scale=scale, channels=3,
            input_layout="NHWC", output_layout="NHWC", stages=tuple(stages), training=training,
            licence=options.licence or "not stated", notice=NOTICE,
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        Bundle.load(folder)  # what is written must be what can be read
    return manifest


def _load_stage(run: Path, recipe: Recipe, stage: str, incomplete: bool) -> tuple[Network, dict[str, Any]]:
    """Build a stage's network with its trained weights."""
    with _as_export_errors(), quiet("train.feature_nets"):  # its weights are random for a moment only
        network, facts = load_network(run, recipe, stage)
    if not (facts.get("complete", True) or incomplete):
        raise ExportError(f"{run}, stage {stage}: stopped by --max-steps; finish it, or export it with --incomplete")
    return network, facts


def _deploy(network: Network) -> None:
    """Fold and round a network to what is deployed, in place; one that is folded already is only rounded."""
    network.eval()
    if any(parametrize.is_parametrized(module) or isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        with torch.no_grad():
            network.fold()
    round_weights(network)


def _export_stage(
    source: Source, network: Network, folder: Path, options: Options, *, scale: int, report: Report
) -> Stage:
    _deploy(network)
    references = []
    for name, picture in read_pictures(options.pictures, largest=256):
        padded = on_grid(picture, network.stride(scale))
        references.append((name, padded, verify.run_torch(network, padded[None], scale=scale)[0]))
    work = _Work(source.name, network, references, folder, scale, options, report)
    report(f"stage {work.name}: tracing")
    weights = WeightsFile.write(folder / f"{work.name}.safetensors", network)
    graphs = [_trace(work, network, weights, precision="fp32", ends=ends) for ends in ("uint8", "float32")]
    rows = []
    if options.fp16:
        half, islands, row = _halve(work)
        rows.append(row)
        graphs.append(_trace(work, half, weights, precision="fp16", ends="uint8", islands=islands))
    if options.int8 is not None:
        graphs.append(_quantise(work, options.int8, source=graphs[0]))
    model = onnx.load(folder / graphs[0].file.name, load_external_data=False)
    is_tileable = not any(isinstance(module, SelfAttention) for module in network.modules())
    window = (8 if is_tileable else -(-WHOLE_SIDE // work.stride)) * work.stride
    draft = Stage(
        name=work.name, training_size=source.training_size, opset=OPSET, stride=work.stride,
        activation_bytes=verify.activation_bytes(model, window=window),
        weights=hash_file(folder / weights.name), graphs=tuple(graphs), halo=(), parity=(),
    )  # fmt: skip
    rows += _check_engines(work, draft)
    if not is_tileable:
        report(f"stage {work.name}: looks at the whole picture, so that the SDK runs each in one piece")
        return replace(draft, parity=tuple(rows))
    report(f"stage {work.name}: measuring the halo")
    with closing(open_backend("onnxruntime", Request(folder, draft, scale, "uint8", "cpu", "fp32"))) as backend:
        pictures = [picture for _, picture in read_pictures(options.pictures, largest=verify.MAX_SIDE)]
        halo = verify.measure_halo(backend.run, pictures, stride=work.stride, scale=scale)
    stage = replace(draft, halo=halo, parity=tuple(rows))
    report(f"stage {work.name}: exact with {stage.context(error=1)} px of context")
    return stage


def _trace(
    work: _Work, network: Network, weights: WeightsFile, *, precision: str, ends: str, islands: tuple[str, ...] = ()
) -> Graph:
    path = work.folder / f"{work.name}.{precision}.{ends}.onnx"
    onnx.save(trace(network, scale=work.scale, ends=ends, weights=weights), path)
    onnx.checker.check_model(str(path))
    return Graph(hash_file(path), precision, ends, islands)


def _halve(work: _Work) -> tuple[Network, tuple[str, ...], Parity]:
    """Make the network that computes in fp16, with islands in fp32 where it must have them, and hold it against fp32.

    Engines on a CPU compute an fp16 graph in fp32; PyTorch really rounds every activation, and the graph is traced
    from this very network.
    """

    def run(network: Network) -> Callable[[np.ndarray], np.ndarray]:
        return functools.partial(verify.run_torch, network, scale=work.scale)

    def quality(network: Network) -> float:
        return min(compare(run(network)(picture[None])[0], result).psnr_db for _, picture, result in work.references)

    def check(network: Network) -> Difference:
        return check_parity(run(network), work.references, precision="fp16", where=f"stage {work.name} in PyTorch")

    islands: tuple[str, ...] = ()
    half = in_half(work.network)
    try:
        worst = check(half)
    except ExportError as exc:
        work.report(f"{exc}; looking for the modules that must stay in fp32")
        islands = find_islands(work.network, quality, limit=MIN_PSNR_DB["fp16"])
        work.report(f"stage {work.name}: in fp32 inside the fp16 graph: {', '.join(islands)}")
        half = in_half(work.network, islands)
        worst = check(half)
    return half, islands, _tell_parity(work, f"torch {torch.__version__}", "fp16", worst)


def _quantise(work: _Work, photographs: Path, *, source: Graph) -> Graph:
    """Write the INT8 graph of the stage's fp32 graph."""
    work.report(f"stage {work.name}: calibrating int8")
    run = functools.partial(verify.run_torch, work.network, scale=work.scale)
    target = work.folder / f"{work.name}.int8.uint8.onnx"
    islands, quality = int8.quantise(
        work.folder / source.file.name,
        target,
        windows=int8.read_calibration(photographs, scale=work.scale, stride=work.stride),
        yardstick=int8.Yardstick(run, work.references, scale=work.scale, stride=work.stride),
    )
    work.report(f"stage {work.name}: int8: {quality}; convolutions left in float: {', '.join(islands) or 'none'}")
    return Graph(hash_file(target), "int8", "uint8", islands)


def _check_engines(work: _Work, stage: Stage) -> list[Parity]:
    """Check every graph against PyTorch fp32, on every engine that this machine's CPU has.

    A bf16 result below its bar is left out of the table, and the runtime stays with fp32.
    """
    rows: list[Parity] = []
    if work.options.fp16:
        _check_half_graph(work, stage)
    for engine, precision in ENGINES + (INT8_ENGINES if work.options.int8 else ()):
        try:
            # The warning that ONNX Runtime is slow in int8 is for those who use it.
            with quiet("sdk.backends.onnxruntime"):
                backend = open_backend(engine, Request(work.folder, stage, work.scale, "uint8", "cpu", precision))
        except BackendUnavailable as exc:
            work.report(f"stage {stage.name}: {engine} {precision} not checked: {exc}")
            continue
        with closing(backend):
            try:
                where = f"stage {stage.name} on {backend.engine}"
                worst = check_parity(backend.run, work.references, precision=precision, where=where)
            except ExportError as exc:
                if precision != "bf16":
                    raise
                work.report(f"{exc}; bf16 will not be used")
                continue
            rows.append(_tell_parity(work, backend.engine, precision, worst))
        if precision == "fp32":
            _check_float_graph(work, stage, engine)
    if not any(row.precision == "fp32" for row in rows):
        raise ExportError("no engine to check the export with: pip install 'sr-sdk[cpu]'")
    return rows


def _tell_parity(work: _Work, engine: str, precision: str, worst: Difference) -> Parity:
    """Report a comparison, and give its row of the manifest."""
    where = f"stage {work.name} on {engine}, {precision}"
    work.report(f"{where}: {worst.psnr_db:.1f} dB, at most {worst.max_error} from PyTorch fp32")
    return Parity(engine, precision, round(min(worst.psnr_db, 999.0), 2), float(worst.max_error))


def _check_half_graph(work: _Work, stage: Stage) -> None:
    """Run the fp16 graph where its arithmetic is fp32: shows that the graph is right, not how fp16 rounds."""
    try:
        import onnxruntime
    except ImportError:  # the export is refused further on if no other engine can check it
        return
    graph = work.folder / stage.graph(precision="fp16", ends="uint8").file.name
    with closing(OnnxRuntimeBackend(onnxruntime, str(graph), precision="fp16")) as backend:
        check_parity(backend.run, work.references, precision="fp16", where=f"stage {stage.name}, graph {graph.name}")


def _check_float_graph(work: _Work, stage: Stage, engine: str) -> None:
    """Hold the graph of 16-bit and float pictures against PyTorch: a quarter of an 8-bit code value."""
    request = Request(work.folder, stage, work.scale, "float32", "cpu", "fp32")
    with closing(open_backend(engine, request)) as backend:
        for _, picture, _ in work.references:
            batch = picture[None].astype(np.float32) / np.float32(255)
            expected = verify.run_torch(work.network, batch, scale=work.scale)
            error = float(np.abs(backend.run(batch) - expected).max())
            if not error <= MAX_FLOAT_ERROR:
                raise ExportError(
                    f"stage {stage.name} on {engine}: the float graph differs from PyTorch by {error:.2g} of 1, "
                    f"at most {MAX_FLOAT_ERROR:.2g} is allowed"
                )
