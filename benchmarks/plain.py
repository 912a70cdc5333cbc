"""An engine used as its own documentation shows, without the SDK: what one would write instead of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdk import Bundle
from sdk.backends.openvino import HINTS
from sdk.errors import BackendUnavailable

Infer = Callable[[np.ndarray], np.ndarray]


def open_onnxruntime(bundle: Bundle, *, stage: str = "auto") -> Infer:
    """Make (h, w, 3) or (N, h, w, 3) uint8 -> the same, enlarged, of an InferenceSession with default options, in fp32.

    Pictures are run whole, padded to the network's grid.
    Raises: BackendUnavailable without ONNX Runtime.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise BackendUnavailable("onnxruntime is not installed") from exc
    session = onnxruntime.InferenceSession(_graph(bundle, stage), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return _whole(bundle, stage, lambda batch: session.run(None, {name: batch})[0])


def open_openvino(bundle: Bundle, *, precision: str, stage: str = "auto") -> Infer:
    """Make the same of a model that OpenVINO compiles for each shape that it meets, tuned for latency.

    Raises: BackendUnavailable without OpenVINO, or a processor that computes in that precision.
    """
    core = _core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BackendUnavailable("this processor does not compute in bf16")
    graph = _graph(bundle, stage)

    @functools.lru_cache(maxsize=4)
    def compiled(shape: tuple[int, ...]) -> Infer:
        return compile_openvino(graph, shape, precision=precision)

    return _whole(bundle, stage, lambda batch: compiled(batch.shape)(batch))


def compile_openvino(graph: str | Path, shape: tuple[int, ...], *, precision: str) -> Infer:
    """Compile a graph for one shape; one request, no copy of input or output, which the next call overwrites."""
    core = _core()
    model = core.read_model(graph)
    model.reshape(list(shape))
    config = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return lambda batch: request.infer([batch], share_inputs=True, share_outputs=True)[0]


@functools.cache
def _core() -> Any:
    """Make one Core that lives as long as the process, for the reason that sdk/backends/openvino.py tells."""
    try:
        import openvino
    except ImportError as exc:
        raise BackendUnavailable("openvino is not installed") from exc
    return openvino.Core()


def _graph(bundle: Bundle, stage: str) -> Path:
    return bundle.folder / bundle.stage(stage).graph(precision="fp32", ends="uint8").file.name


def _whole(bundle: Bundle, stage: str, run: Infer) -> Infer:
    """Pad pictures to the grid at right and bottom, run them, and cut the results."""
    stride, scale = bundle.stage(stage).stride, bundle.manifest.scale

    def upscale(lr: np.ndarray) -> np.ndarray:
        batch = lr[None] if lr.ndim == 3 else lr
        height, width = batch.shape[1:3]
        padded = np.pad(batch, ((0, 0), (0, -height % stride), (0, -width % stride), (0, 0)), mode="edge")
        result = run(padded)[:, : height * scale, : width * scale].copy()  # OpenVINO writes over its own
        return result[0] if lr.ndim == 3 else result

    return upscale
