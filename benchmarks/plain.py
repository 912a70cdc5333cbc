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


def open_onnxruntime(bundle: Bundle, *, stage: str = "auto", device: str = "cpu", precision: str = "fp32") -> Infer:
    """Make (h, w, 3) or (N, h, w, 3) uint8 -> the same, enlarged, of an InferenceSession with default options.

    Pictures are run whole, padded to the network's grid.
    Raises: BackendUnavailable without ONNX Runtime, or the device; BundleError without a graph of that precision.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise BackendUnavailable("onnxruntime is not installed") from exc
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise BackendUnavailable("this onnxruntime has no CUDA provider")
        if hasattr(onnxruntime, "preload_dlls"):  # since 1.21: CUDA and cuDNN from NVIDIA's wheels
            onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.removeprefix("cuda:"))}))
    session = onnxruntime.InferenceSession(_graph(bundle, stage, precision), providers=providers)
    if len(session.get_providers()) < len(providers):  # it would run on the CPU, and say so in its log only
        raise BackendUnavailable("this onnxruntime's CUDA provider cannot be loaded")
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

    @functools.cache  # what is tiled with its edges cut off has nine shapes
    def compiled(shape: tuple[int, ...]) -> Infer:
        return compile_openvino(graph, shape, precision=precision)

    # Copied, as the next call writes over it.
    return _whole(bundle, stage, lambda batch: compiled(batch.shape)(batch).copy())


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


def _graph(bundle: Bundle, stage: str, precision: str = "fp32") -> Path:
    return bundle.folder / bundle.stage(stage).graph(precision=precision, ends="uint8").file.name


def _whole(bundle: Bundle, stage: str, run: Infer) -> Infer:
    """Pad pictures to the grid at right and bottom, run them, and cut the results."""
    stride, scale = bundle.stage(stage).stride, bundle.manifest.scale

    def upscale(lr: np.ndarray) -> np.ndarray:
        batch = lr[None] if lr.ndim == 3 else lr
        height, width = batch.shape[1:3]
        if height % stride or width % stride:
            batch = np.pad(batch, ((0, 0), (0, -height % stride), (0, -width % stride), (0, 0)), mode="edge")
        result = np.ascontiguousarray(run(batch)[:, : height * scale, : width * scale])
        return result[0] if lr.ndim == 3 else result

    return upscale
