"""ONNX Runtime: the CPU and CUDA execution providers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BackendError, BackendUnavailable, OutOfMemory
from . import Request, thread_count
from .forking import spared

# ONNX Runtime has no exception type for it; these are the words of its allocators.
OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory", "CUDA failure 2")


def open_backend(request: Request) -> OnnxRuntimeBackend:
    """Open a session on the device asked for; "auto" is CUDA where ONNX Runtime has it.

    Raises: BackendUnavailable if ONNX Runtime, the provider or the precision is not there.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise BackendUnavailable("onnxruntime is not installed: pip install 'sr-sdk[cpu]' or 'sr-sdk[gpu]'") from exc
    on_cuda = request.device.startswith("cuda")
    if request.device == "auto":
        on_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if on_cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BackendUnavailable(
            "this onnxruntime has no CUDA provider: pip install 'sr-sdk[gpu]' in a fresh environment"
        )
    precision = request.precision
    if precision == "auto":
        has_fp16 = any((graph.precision, graph.ends) == ("fp16", request.ends) for graph in request.stage.graphs)
        precision = "fp16" if on_cuda and has_fp16 else "fp32"
    if precision == "bf16" or (precision == "fp16" and not on_cuda):  # its CPU provider computes fp16 graphs in fp32
        raise BackendUnavailable(f"onnxruntime does not compute in {precision} on {'CUDA' if on_cuda else 'the CPU'}")
    graph = request.folder / request.stage.graph(precision=precision, ends=request.ends).file.name
    device = request.device if request.device.startswith("cuda:") else "cuda:0" if on_cuda else "cpu"
    return OnnxRuntimeBackend(onnxruntime, str(graph), device=device, precision=precision)


class OnnxRuntimeBackend:
    """One inference session; `run` is thread-safe because a session is."""

    name = "onnxruntime"

    def __init__(self, onnxruntime: Any, graph: str, *, device: str, precision: str):
        self.device = device
        self.precision = precision
        self.engine = f"onnxruntime {onnxruntime.__version__}"
        self.batch = 8 if device != "cpu" else 1
        provider: Any = "CPUExecutionProvider"
        if device != "cpu":
            # TF32 keeps 10 bits: fp32 is the path of 16-bit pictures. The search is for sizes that change.
            options_of_cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
            provider = ("CUDAExecutionProvider", {"device_id": device.partition(":")[2], **options_of_cuda})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count() or 0  # 0: one for each core, whatever the process may use
        options.enable_mem_pattern = False  # twice the memory, and a plan kept for every size of picture
        options.log_severity_level = 4  # errors arrive as exceptions; a fallback is checked for below
        try:
            self._session: Any = spared(onnxruntime.InferenceSession(graph, options, providers=[provider]))
        except Exception as exc:  # ONNX Runtime raises its own classes straight below Exception
            raise _translate(exc, f"{graph} cannot be loaded") from exc
        wanted = provider if isinstance(provider, str) else provider[0]
        if self._session.get_providers()[0] != wanted:
            raise BackendUnavailable(
                f"onnxruntime cannot use {device} (it fell back to {self._session.get_providers()[0]}); "
                "check the driver and the CUDA libraries, or use device='cpu'"
            )
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See Backend.run."""
        session = self._session  # close() in another thread lets this run finish
        if session is None:
            raise BackendError("this backend is closed")
        try:
            (output,) = session.run(None, {self._input: batch})
        except Exception as exc:
            raise _translate(exc, f"a batch of shape {batch.shape} failed") from exc
        return np.asarray(output)

    def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
        """See Backend.expect: one session runs every shape alike."""

    def close(self) -> None:
        """See Backend.close."""
        self._session = None


def _translate(exc: Exception, what: str) -> BackendError:
    text = str(exc)
    if isinstance(exc, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return OutOfMemory(f"onnxruntime: {what}: out of memory")
    return BackendError(f"onnxruntime: {what}: {' '.join(text.split())}")
