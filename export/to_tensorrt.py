"""TensorRT engines of a bundle for the GPU at hand: built, checked against the ONNX graphs, put where they are wanted.

Needs numpy, pillow, onnx, and tensorrt with cuda-python or PyCUDA; no PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sdk.backends import Backend, Request
from sdk.backends.tensorrt import open_backend, open_reference
from sdk.backends.tensorrt_builder import BuildOptions
from sdk.bundle import Bundle, Graph, Stage

from . import parity
from .errors import ExportError

LARGEST_TILE = 256


@dataclass(frozen=True)
class Engine:
    """One that was built or found, and how it compares with the ONNX graph in fp32 on real tiles."""

    stage: str
    precision: str
    ends: str
    seconds: float
    parity: parity.Difference | None
    reference: str


def build_engines(
    bundle: Bundle,
    *,
    stages: Sequence[str] = (),
    device: str = "cuda:0",
    pictures: Path | None = None,
    options: BuildOptions = BuildOptions(),  # noqa: B008
    report: Callable[[str], None] = lambda line: None,
) -> list[Engine]:
    """Build the engines of a bundle's stages: of every graph with 8-bit ends in half or 8 bits, and the float graph.

    stages: their names, none is all. pictures: to compare on. Engines that are there already are only
    compared.
    Raises: BackendUnavailable without TensorRT or a GPU; BackendError if one cannot be built or kept; ExportError if
    one differs from its graph by more than its precision may.
    """
    engines = []
    options = replace(options, must_keep=True)
    cropped = parity.read_pictures(pictures, largest=LARGEST_TILE)
    for name in stages or [stage.name for stage in bundle.manifest.stages]:
        stage = bundle.stage(name)
        tiles = [(picture_name, parity.on_grid(picture, stage.stride)) for picture_name, picture in cropped]
        for graph in _wanted(stage):
            request = Request(bundle.folder, stage, bundle.manifest.scale, graph.ends, device, graph.precision)
            engines.append(_build(request, tiles, options, report))
    return engines


def _wanted(stage: Stage) -> list[Graph]:
    """Choose the graphs that are worth an engine: fp32 with 8-bit ends only where nothing smaller is there."""
    small = [graph for graph in stage.graphs if graph.precision != "fp32"]
    full = [graph for graph in stage.graphs if graph.precision == "fp32"]
    return [*small, *(graph for graph in full if graph.ends != "uint8" or not small)]


def _build(
    request: Request, tiles: Sequence[tuple[str, np.ndarray]], options: BuildOptions, report: Callable[[str], None]
) -> Engine:
    where = f"stage {request.stage.name}, {request.precision} with {request.ends} ends"
    told: list[float] = []

    def progress(phase: str, done: int, steps: int) -> None:
        if not told or time.monotonic() - told[-1] > 5:
            told.append(time.monotonic())
            report(f"{where}: {phase}, {done} of {steps}")

    start = time.monotonic()
    with closing(open_backend(request, replace(options, progress=progress))) as backend:
        seconds = time.monotonic() - start
        report(f"{where}: {backend.engine} on {backend.device}, ready after {seconds:.1f} s")
        with closing(open_reference(request, replace(options, rebuild=False))) as full:
            reference = f"{full.engine} on {full.device}"
            if request.ends == "float32":
                _check_float(backend, full, tiles, where=f"stage {request.stage.name} on {backend.engine}")
                worst = None
            else:
                pairs = [(name, tile, full.run(tile[None])[0]) for name, tile in tiles]
                worst = parity.check_parity(
                    backend.run,
                    pairs,
                    precision=request.precision,
                    where=f"stage {request.stage.name} on {backend.engine}",
                    of=reference,
                )
                report(f"{where}: {worst.psnr_db:.1f} dB, at most {worst.max_error} code values from {reference}")
    return Engine(request.stage.name, request.precision, request.ends, seconds, worst, reference)


def _check_float(backend: Backend, full: Backend, tiles: Sequence[tuple[str, np.ndarray]], *, where: str) -> None:
    """Hold an engine for 16-bit and float pictures against the graph. Raises: ExportError."""
    for name, tile in tiles:
        batch = tile[None].astype(np.float32) / np.float32(255)
        error = float(np.abs(backend.run(batch) - full.run(batch)).max())
        if not error <= parity.MAX_FLOAT_ERROR:
            raise ExportError(
                f"{where}: the float graph differs from {full.engine} by {error:.2g} of 1 on {name}, "
                f"at most {parity.MAX_FLOAT_ERROR:.2g} is allowed"
            )
