"""An ONNX model in memory, run by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx

from sdk.backends import thread_count
from sdk.backends.onnxruntime import translate
from sdk.errors import BackendError, BackendUnavailable, OutOfMemory

from ..errors import printable

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class Session:
    """Runs a graph with one input.

    optimised: whether nodes may be fused; without, every value can be asked for.
    Raises: BackendUnavailable without ONNX Runtime, BackendError if it does not take the graph.
    """

    def __init__(self, model: onnx.ModelProto, *, optimised: bool = True):
        try:
            import onnxruntime
        except ImportError as exc:
            raise BackendUnavailable("probing a model takes onnxruntime: pip install 'sr-sdk[cpu]'") from exc
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count() or 0
        options.enable_mem_pattern = False
        options.log_severity_level = 4  # errors arrive as exceptions
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as exc:  # ONNX Runtime raises its own classes straight below Exception
            raise _printable(translate(exc, "the graph cannot be loaded")) from exc
        (source,) = self._session.get_inputs()
        self._name, self._dtype = source.name, TYPES[source.type]

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Give the first result, fp16 as float32. Raises: OutOfMemory, or BackendError for any other failure."""
        result = self.run_all(batch)[0]
        return result.astype(np.float32) if result.dtype == np.float16 else result

    def run_all(self, batch: np.ndarray) -> Sequence[np.ndarray]:
        """Give all results. Raises: as run."""
        try:
            return self._session.run(None, {self._name: batch.astype(self._dtype, copy=False)})
        except Exception as exc:
            raise _printable(translate(exc, f"a batch of shape {batch.shape} failed")) from exc


def run_values(model: onnx.ModelProto, names: Iterable[str], batch: np.ndarray) -> dict[str, np.ndarray]:
    """Run a graph once and give the values of these names inside it. Raises: as Session."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    wanted = [name for name in names if name and name not in {value.name for value in model.graph.output}]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    results = Session(shown, optimised=False).run_all(batch)
    return dict(zip((value.name for value in shown.graph.output), results, strict=True))


def _printable(error: BackendError) -> BackendError:
    """Copy an error without what is not printable: names in a foreign file may hold orders to the terminal."""
    text = printable(str(error))
    return OutOfMemory(text) if isinstance(error, OutOfMemory) else BackendError(text)
