"""Turn a run into a bundle: trace, check, measure, describe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from sdk.backends import Request, open_backend
from sdk.backends.onnxruntime import OnnxRuntimeBackend
from sdk.bundle import FORMAT, MANIFEST, VERSION, Bundle, Graph, HaloRow, Manifest, Parity, Stage, hash_file
from sdk.errors import BackendUnavailable
from train.checkpoint import load_checkpoint, stage_folder
from train.errors import TrainError
from train.feature_nets import RANDOM_WEIGHTS
from train.models import Network, build_model
from train.recipe import Recipe, StageConfig
from train.run_folder import load_run

from . import verify
from .errors import ExportError
from .parity import check_parity, on_grid, read_pictures
from .precision import in_half, round_weights
from .to_onnx import OPSET, WeightsFile, quiet, trace

ENGINES = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
MAX_FLOAT_ERROR = 0.25 / 255
NOTICE = (
    "This model invents detail that looks plausible but was not in the picture. "
    "Do not read evidence, identities, text or measurements from what it adds."
)


@dataclass(frozen=True)
class Options:
    """What the exporting person decides.

    figures: measured quality, embedded into the manifest as it is.
    incomplete: also export a stage that --max-steps cut short.
    """

    scale: int | None = None
    fp16: bool = False
    pictures: Path | None = None
    licence: str = ""
    figures: dict[str, Any] | None = None
    incomplete: bool = False


def export_run(
    run: Path, out: Path, options: Options, *, report: Callable[[str], None] = lambda line: None
) -> Manifest:
    """Export every stage of a run that has weights into the folder `out`, which must not exist.

    Raises: ExportError if a stage was cut short unasked, a graph differs from PyTorch, or `out` cannot be written.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; choose another name or remove it")
    try:
        recipe = load_run(run)
    except TrainError as exc:
        raise ExportError(str(exc)) from exc
    scale = _choose_scale(recipe, options.scale)
    done = [stage for stage in recipe.stages if stage_folder(run, stage.name).is_dir()]
    if not done:
        raise ExportError(f"{run}: no finished stage yet; let sr-train complete one")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        stages: list[Stage] = []
        facts: dict[str, Any] = {}
        for config in done:
            stage, facts = _export_stage(run, recipe, config, scale, temporary, options, report)
            stages.append(stage)
        training = facts | ({"figures": options.figures} if options.figures else {})
        manifest = Manifest(
            format=FORMAT, version=VERSION, name=out.name, scale=scale, channels=3,
            input_layout="NHWC", output_layout="NHWC", stages=tuple(stages), training=training,
            licence=options.licence or "not stated", notice=NOTICE,
        )  # fmt: skip
        (temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        Bundle.load(temporary)  # what is written must be what can be read
        temporary.rename(out)
    except OSError as exc:
        raise ExportError(f"{out}: cannot be written ({exc.strerror or exc})") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _choose_scale(recipe: Recipe, scale: int | None) -> int:
    scales = recipe.model.scales
    if scale is None and len(scales) == 1:
        return scales[0]
    if scale not in scales:
        raise ExportError(f"--scale: the network was trained for {', '.join(map(str, scales))}, not {scale}")
    return scale


def _load_network(run: Path, recipe: Recipe, stage: str, *, incomplete: bool) -> tuple[Network, dict[str, Any]]:
    """Build the stage's network with its trained weights, folded and rounded as they are deployed."""
    try:
        checkpoint = load_checkpoint(stage_folder(run, stage))
        with quiet("train.feature_nets"):  # its weights are random for a moment only
            network = build_model(recipe.model, weights=RANDOM_WEIGHTS)
        network.load_state_dict(checkpoint.group("model"))
    except (TrainError, RuntimeError) as exc:
        raise ExportError(f"{run}, stage {stage}: {exc}") from exc
    if not (checkpoint.facts.get("complete", True) or incomplete):
        raise ExportError(f"{run}, stage {stage}: stopped by --max-steps; finish it, or export it with --incomplete")
    network.eval()
    with torch.no_grad():
        network.fold()
    round_weights(network)
    return network, checkpoint.facts


def _export_stage(
    run: Path,
    recipe: Recipe,
    config: StageConfig,
    scale: int,
    folder: Path,
    options: Options,
    report: Callable[[str], None],
) -> tuple[Stage, dict[str, Any]]:
    report(f"stage {config.name}: tracing")
    network, facts = _load_network(run, recipe, config.name, incomplete=options.incomplete)
    stride = network.stride(scale)
    weights = WeightsFile.write(folder / f"{config.name}.weights", network)
    kinds = [("fp32", "uint8"), ("fp32", "float32")] + ([("fp16", "uint8")] if options.fp16 else [])
    graphs, activations = [], 0
    for precision, ends in kinds:
        source = in_half(network) if precision == "fp16" else network
        model = trace(source, scale=scale, ends=ends, weights=weights)
        name = f"{config.name}.{precision}.{ends}.onnx"
        onnx.save(model, folder / name)
        onnx.checker.check_model(str(folder / name))
        graphs.append(Graph(hash_file(folder / name), precision, ends))
        if (precision, ends) == ("fp32", "uint8"):
            activations = verify.activation_bytes(model, window=8 * stride)
    draft = Stage(
        name=config.name, training_size=config.size, opset=OPSET, stride=stride, activation_bytes=activations,
        weights=hash_file(folder / weights.name), graphs=tuple(graphs), halo=(HaloRow(0, 0.0),), parity=(),
    )  # fmt: skip
    parity = _check_parity(network, draft, folder, scale, options, report)
    report(f"stage {config.name}: measuring the halo")
    backend = open_backend("onnxruntime", Request(folder, draft, scale, "uint8", "cpu", "fp32"))
    pictures = [picture for _, picture in read_pictures(options.pictures, largest=verify.MAX_SIDE)]
    halo = verify.measure_halo(backend.run, pictures, stride=stride, scale=scale)
    backend.close()
    stage = replace(draft, halo=halo, parity=parity)
    report(f"stage {config.name}: exact with {stage.context(error=1)} px of context")
    return stage, facts


def _check_parity(
    network: Network, stage: Stage, folder: Path, scale: int, options: Options, report: Callable[[str], None]
) -> tuple[Parity, ...]:
    """Check every graph against PyTorch fp32, on every engine that this machine's CPU has.

    A bf16 result below its bar is left out of the table, and the runtime stays with fp32.
    """
    references = []
    for name, picture in read_pictures(options.pictures, largest=256):
        padded = on_grid(picture, stage.stride)
        references.append((name, padded, verify.run_torch(network, padded[None], scale=scale)[0]))
    rows: list[Parity] = []

    def check(engine: str, precision: str, run: Callable[[np.ndarray], np.ndarray]) -> None:
        where = f"stage {stage.name} on {engine}"
        worst = check_parity(run, references, precision=precision, where=where)
        rows.append(Parity(engine, precision, round(min(worst.psnr_db, 999.0), 2), float(worst.max_error)))
        report(f"{where}, {precision}: {worst.psnr_db:.1f} dB, at most {worst.max_error} from PyTorch fp32")

    if options.fp16:
        # Engines on a CPU compute an fp16 graph in fp32; PyTorch really rounds every activation. The graph itself
        # is traced from this very network.
        half = in_half(network)
        check(f"torch {torch.__version__}", "fp16", lambda batch: verify.run_torch(half, batch, scale=scale))
        _check_half_graph(stage, folder, references)
    for engine, precision in ENGINES:
        try:
            backend = open_backend(engine, Request(folder, stage, scale, "uint8", "cpu", precision))
        except BackendUnavailable as exc:
            report(f"stage {stage.name}: {engine} {precision} not checked: {exc}")
            continue
        try:
            check(backend.engine, precision, backend.run)
        except ExportError as exc:
            if precision != "bf16":
                raise
            report(f"{exc}; bf16 will not be used")
        finally:
            backend.close()
        if precision == "fp32":
            _check_float_graph(network, stage, folder, engine, pictures=[item[1] for item in references], scale=scale)
    if not any(row.precision == "fp32" for row in rows):
        raise ExportError("no engine to check the export with: pip install 'sr-sdk[cpu]'")
    return tuple(rows)


def _check_half_graph(stage: Stage, folder: Path, references: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Run the fp16 graph where its arithmetic is fp32: shows that the graph is right, not how fp16 rounds."""
    try:
        import onnxruntime
    except ImportError:  # the export is refused further on if no other engine can check it
        return
    graph = folder / stage.graph(precision="fp16", ends="uint8").file.name
    with closing(OnnxRuntimeBackend(onnxruntime, str(graph), precision="fp16")) as backend:
        check_parity(backend.run, references, precision="fp16", where=f"stage {stage.name}, graph {graph.name}")


def _check_float_graph(
    network: Network, stage: Stage, folder: Path, engine: str, *, pictures: list[np.ndarray], scale: int
) -> None:
    """Hold the graph of 16-bit and float pictures against PyTorch: a quarter of an 8-bit code value."""
    with closing(open_backend(engine, Request(folder, stage, scale, "float32", "cpu", "fp32"))) as backend:
        for picture in pictures:
            batch = picture[None].astype(np.float32) / np.float32(255)
            error = float(np.abs(backend.run(batch) - verify.run_torch(network, batch, scale=scale)).max())
            if not error <= MAX_FLOAT_ERROR:
                raise ExportError(
                    f"stage {stage.name} on {engine}: the float graph differs from PyTorch by {error:.2g} of 1, "
                    f"at most {MAX_FLOAT_ERROR:.2g} is allowed"
                )
