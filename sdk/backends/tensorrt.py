"""TensorRT on NVIDIA's GPUs: engines built once for the GPU at hand, kept on disk and run in lanes.

Each lane has an execution context and a stream of its own, so that the copies of one batch pass while another computes.
A shape that comes often is run as a CUDA graph.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import memory
from ..bundle import Stage
from ..errors import BackendError, BackendUnavailable, OptionError, OutOfMemory
from . import Backend, Request, Transfer, check_precision, check_request
from .cuda import Device, open_device
from .engine_cache import Key, cache_dir, engine_name, lock, read_engine, write_engine
from .forking import spared
from .gpu import GpuBackend, Lane
from .tensorrt_builder import (
    BuildOptions,
    Profile,
    build,
    check_types,
    is_strongly_typed,
    load,
    logger,
    shares_profiles,
)

__all__ = ["TensorRtBackend", "choose_profile", "engine_dir", "open_backend", "open_device", "open_reference"]
LOG = logging.getLogger(__name__)
TIMING_CACHE = "times"
LANES = 2  # one computes while the other copies
BATCHES = (8, 4, 2, 1)
ROOMY_SIDE = 1024  # windows are at least as large before batches grow: tiles of small ones are little but halo
MEMORY_SHARE = 8  # of the GPU's memory, one part for a lane's activations
COMPATIBLE_BYTES = 4 << 30  # memory of the GPU that an engine for many GPUs is made for, whatever they have
MAX_FAILED_CAPTURES = 3  # before all is computed without CUDA graphs
MAX_PATIENCE = 64  # runs of one shape that a lane waits for before another graph, where graphs do not last


def open_backend(request: Request, options: BuildOptions = BuildOptions()) -> TensorRtBackend:  # noqa: B008
    """Open a stage's engine for a GPU; one that is not on disk yet is built, which takes minutes.

    precision "auto" is fp16 where the bundle has it.
    Raises: BackendUnavailable if TensorRT, the GPU or the precision is not there; BackendError if no engine can be
    built; OutOfMemory.
    """
    check_request("tensorrt", request)
    if request.device == "cpu":
        raise BackendUnavailable("tensorrt has no CPU device: use device='cuda:N'")
    if "," in request.device:
        raise OptionError(f"device {request.device!r}: one GPU for an engine")
    trt = import_tensorrt()
    precision = _choose_precision(trt, request)
    index = 0 if request.device == "auto" else int(request.device.removeprefix("cuda:"))
    gpu = open_device(index)
    request = replace(request, device=f"cuda:{index}", precision=precision)
    share, smallest = gpu.facts().total_bytes, choose_profile(request.stage, 0)
    with gpu.current():
        while True:
            opening = _Opening(trt, gpu, request, share, options)
            try:
                return opening.open()
            except OutOfMemory as exc:  # others use the GPU too
                if options.hardware_compatible or opening.profile == smallest:
                    raise
                LOG.warning("trying again with an engine for smaller windows: %s", exc)
                while choose_profile(request.stage, share) == opening.profile:
                    share //= 4


def _choose_precision(trt: Any, request: Request) -> str:
    """Turn "auto" into fp16 where it can be had. Raises: BackendUnavailable for what cannot."""
    half = [graph for graph in request.stage.graphs if (graph.precision, graph.ends) == ("fp16", request.ends)]
    keeps_islands = is_strongly_typed(trt) or not any(graph.islands for graph in half)
    if request.precision == "auto":
        return "fp16" if half and keeps_islands else "fp32"
    if request.precision == "bf16":
        raise BackendUnavailable("tensorrt runs fp32, fp16 and int8 here, not bf16")
    if request.precision == "fp16" and not keeps_islands:
        raise BackendUnavailable(
            f"tensorrt {trt.__version__} would compute in half precision what this model needs in fp32: use TensorRT "
            "10 or later, or precision='fp32'"
        )
    return request.precision


def import_tensorrt() -> Any:
    """Import TensorRT. Raises: BackendUnavailable if it is missing or cannot be loaded."""
    try:
        import tensorrt
    except ModuleNotFoundError as exc:
        if exc.name != "tensorrt":
            raise BackendUnavailable(f"tensorrt cannot be loaded: {exc}") from exc
        raise BackendUnavailable("tensorrt is not installed: pip install 'sr-sdk[tensorrt]'") from exc
    except Exception as exc:  # of its loader of libraries: ImportError, OSError, RuntimeError
        raise BackendUnavailable(f"tensorrt cannot be loaded: {exc}") from exc
    return tensorrt


def engine_dir() -> Path:
    """Give the folder of engines: SR_ENGINE_DIR, else below the cache. Raises: OSError or RuntimeError."""
    folder = os.environ.get("SR_ENGINE_DIR")
    return Path(folder) if folder else cache_dir("engines")


def open_reference(request: Request, options: BuildOptions = BuildOptions()) -> Backend:  # noqa: B008
    """Open what an engine is held against: the ONNX graph in fp32 on the CPU, or else an engine of it."""
    request, options = replace(request, precision="fp32"), replace(options, rebuild=False)
    try:
        from .onnxruntime import open_backend as open_onnxruntime

        return open_onnxruntime(replace(request, device="cpu"))
    except BackendUnavailable:
        return open_backend(request, options)


def choose_profile(stage: Stage, total_bytes: int) -> Profile:
    """Choose how large windows and batches may be, from a GPU's memory.

    Drivers differ in how much of a GPU's memory they show; what they show is rounded down to a power of two, so that an
    engine outlives them.
    """
    total_bytes = 1 << total_bytes.bit_length() >> 1
    stride, halo = stage.stride, stage.context(error=1)
    real_bytes = int(stage.activation_bytes * memory.REAL_SHARE)
    comfortable = max(memory.DEVICE_COMFORTABLE_BYTES // real_bytes, (memory.COMFORTABLE_HALOS * halo) ** 2)
    pixels = min(comfortable, total_bytes // MEMORY_SHARE // real_bytes)
    smallest = 2 * halo + 2 * stride
    for batch in BATCHES:
        side = int((pixels / batch) ** 0.5) // stride * stride
        if side >= max(ROOMY_SIDE, smallest):
            return Profile(stride, batch, side)
    return Profile(stride, 1, max(smallest, side))


class _Opening:
    """Finds an engine on disk, or builds and checks one and keeps it."""

    def __init__(self, trt: Any, gpu: Device, request: Request, share: int, options: BuildOptions):
        self._trt, self._gpu, self._request, self._options = trt, gpu, request, options
        self._graph = request.stage.graph(precision=request.precision, ends=request.ends)
        own, common = (choose_profile(request.stage, size) for size in (share, COMPATIBLE_BYTES))
        self.profile = common if options.hardware_compatible else own
        self._candidates = [self._key(own, compatible=False)] * (not options.hardware_compatible)
        self._candidates.append(self._key(common, compatible=True))

    def open(self) -> TensorRtBackend:
        """Give the engine, from the disk where it is there."""
        key = self._candidates[0]
        path = self._path(key)
        if path is None:
            return self._build(None)[0]
        if not self._options.rebuild:
            for candidate in self._candidates:
                if found := self._from_disk(path.with_name(self._name(candidate)), candidate):
                    return found
        with self._lock(path):  # another process may be at it
            if not self._options.rebuild and (found := self._from_disk(path, key, level=logging.DEBUG)):
                return found
            backend, plan = self._build(path.with_name(self._timing_cache()))
            try:
                built = {"level": self._options.level, "workspace_mib": self._options.workspace_mib}
                write_engine(path, key, plan, built=built)
            except BackendError as exc:
                if self._options.must_keep:
                    raise
                LOG.warning("%s", exc)
            return backend

    def _path(self, key: Key) -> Path | None:
        """Name the engine's file; None, and a line in the log, if there is no place for it."""
        try:
            return (self._options.folder or engine_dir()) / self._name(key)
        except (OSError, RuntimeError) as exc:  # RuntimeError: a user without a home folder
            self._not_kept(exc)
            return None

    def _lock(self, path: Path) -> AbstractContextManager[Any]:
        """Lock an engine's file; where that cannot be, two processes may build the same."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # engines hold code: none of others'
            return lock(path)
        except OSError as exc:
            self._not_kept(exc)
            return nullcontext()

    def _not_kept(self, exc: Exception) -> None:
        told = f"engines are not kept: {exc}; set SR_ENGINE_DIR or SR_CACHE_DIR to a writable folder"
        if self._options.must_keep:
            raise BackendError(told) from exc
        LOG.warning("%s", told)

    def _timing_cache(self) -> str:
        """Name the file of measured times, which hold for one GPU and version."""
        facts = self._gpu.facts()
        text = f"{facts.name}-{facts.capability}-{self._trt.__version__}"
        return f"{re.sub('[^A-Za-z0-9.]+', '-', text)}.{TIMING_CACHE}"

    def _name(self, key: Key) -> str:
        return engine_name(self._request.stage.name, key)

    def _key(self, profile: Profile, *, compatible: bool) -> Key:
        facts = self._gpu.facts()
        return Key(
            onnx=self._graph.file.sha256,
            weights=self._request.stage.weights.sha256,
            library=f"tensorrt {self._trt.__version__}",
            gpu="any from Ampere on" if compatible else facts.name,
            capability="8.0 or more" if compatible else facts.capability,
            precision=self._request.precision,
            ends=self._request.ends,
            profile=profile.shapes(),
            flags=("hardware_compatible",) if compatible else (),
        )

    def _from_disk(self, path: Path, key: Key, *, level: int = logging.WARNING) -> TensorRtBackend | None:
        plan = read_engine(path, key, level=level)
        if plan is None:
            return None
        try:
            return self._from_plan(path, key, plan)
        except OutOfMemory as exc:
            if path.name == self._name(self._candidates[0]):
                raise
            LOG.warning("%s: not used (%s)", path, exc)  # an engine of many GPUs, too large for this one
            return None

    def _from_plan(self, path: Path, key: Key, plan: bytes) -> TensorRtBackend | None:
        engines = self._load(plan)
        if not engines:
            _, messages = logger(self._trt)
            LOG.warning("%s: TensorRT refuses it (%s); it is built anew", path, messages.clear())
            return None
        *_, (batch, side, *_) = key.profile
        return self._backend(engines, Profile(self._request.stage.stride, batch, side))

    def _load(self, plan: bytes) -> list[Any]:
        """Make an engine for each lane of a plan, the same where they can share it; none if TensorRT refuses it."""
        first = load(self._trt, plan)
        if first is None:
            return []
        more = [first if shares_profiles(self._trt) else load(self._trt, plan) for _ in range(LANES - 1)]
        return [first, *(engine for engine in more if engine is not None)]

    def _build(self, timing_cache: Path | None) -> tuple[TensorRtBackend, bytes]:
        """Build an engine and check it; give its plan too."""
        request, folder = self._request, self._request.folder
        LOG.warning(
            "building the TensorRT engine of stage %s, %s, for %s: takes minutes, once",
            request.stage.name, request.precision, self._gpu.facts().name,
        )  # fmt: skip
        float_graph = folder / request.stage.graph(precision="fp32", ends="float32").file.name
        plan = build(
            self._trt, folder / self._graph.file.name, self.profile,
            precision=request.precision, ends=request.ends, float_graph=float_graph, timing_cache=timing_cache,
            options=self._options,
        )  # fmt: skip
        engines = self._load(plan)
        if not engines:
            _, messages = logger(self._trt)
            raise messages.error("the engine that was just built is refused")
        check_types(self._trt, engines[0], request.precision)
        backend = self._backend(engines, self.profile)
        if request.precision != "fp32":
            with closing(open_reference(request, self._options)) as reference:
                psnr = check_precision(backend, reference, request.stage)
            LOG.info(
                "stage %s: %s is %.1f dB from fp32 on %s",
                request.stage.name, request.precision, psnr, reference.engine,
            )  # fmt: skip
        return backend, plan

    def _backend(self, engines: list[Any], profile: Profile) -> TensorRtBackend:
        request = self._request
        return TensorRtBackend(self._trt, self._gpu, engines, profile, scale=request.scale, precision=request.precision)


class _Lane(Lane):
    """context: TensorRT's, with its own activations. ready: the shape that it is set to. graph: of that, or None.

    runs: so many of that shape in a row. patience: so many are waited for before a graph is made.
    """

    def __init__(self, device: Device, context: Any):
        super().__init__(device)
        self.context = context
        self.ready: tuple[int, ...] | None = None
        self.graph: int | None = None
        self.runs, self.patience = 0, 1

    def forget(self) -> None:
        """See Lane. A graph that was soon of no use is followed by a later one."""
        if self.graph is not None:
            self._device.release_graph(self.graph)
            self.patience = min(2 * self.patience, MAX_PATIENCE) if self.runs < MAX_PATIENCE else 1
        self.ready = self.graph = None
        self.runs = 0

    def close(self) -> None:
        """See Lane."""
        super().close()
        self.context = None


class TensorRtBackend(GpuBackend[_Lane]):
    """One engine on one GPU. engines: it, or a copy, for each lane."""

    name = "tensorrt"
    is_checked = True

    def __init__(self, trt: Any, gpu: Device, engines: list[Any], profile: Profile, *, scale: int, precision: str):
        self.engine = f"tensorrt {trt.__version__}"
        self.batch = self.max_batch = profile.batch
        self.max_side = profile.side
        self._messages = logger(trt)[1]
        self._failed_captures = 0
        self._engines: list[Any] = [spared(engine) for engine in engines]
        engine = engines[0]
        modes = {engine.get_tensor_name(number): None for number in range(engine.num_io_tensors)}
        inputs = [name for name in modes if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in modes if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(f"tensorrt: an engine of {len(inputs)} inputs and {len(outputs)} outputs")
        self._input, self._output = inputs[0], outputs[0]
        lanes: list[_Lane] = []
        for engine in engines:
            self._messages.clear()
            context = engine.create_execution_context()
            self._messages.raise_held()
            if context is None:
                error = self._messages.error(f"no execution context for windows of up to {profile.side} px")
                if not lanes:
                    raise error
                LOG.warning("one lane only: %s", error)
                break
            lanes.append(_Lane(gpu, spared(context)))
        super().__init__(gpu, lanes, scale=scale, precision=precision)

    def close(self) -> None:
        """See Backend.close."""
        with self.gpu.current():
            super().close()
            self._engines = []

    def _run(self, lane: _Lane, shape: tuple[int, ...], dtype: np.dtype, fill: Transfer, take: Transfer) -> None:
        """See GpuBackend."""
        self._reserve(lane, shape, dtype)
        try:
            fill(self.gpu, lane.input.address, lane.stream)
            self._enqueue(lane, shape)
            take(self.gpu, lane.output.address, lane.stream)
        finally:  # what is under way reads and writes memory that its owner may free
            self.gpu.synchronize(lane.stream)

    def _enqueue(self, lane: _Lane, shape: tuple[int, ...]) -> None:
        """Put the computing of a batch into a lane's stream."""
        comes_again = self._recurring.comes(shape)
        if lane.ready != shape:
            # A graph must not be launched once the context that it was captured from has changed.
            lane.forget()
            self._prepare(lane, shape)
            self._compute(lane, shape)  # also what a capture needs to have been done before
            lane.ready = shape
            return
        lane.runs += 1
        if lane.graph is None and comes_again and self._captures and lane.runs >= lane.patience:
            self._capture(lane, shape)
        if lane.graph is None:
            self._compute(lane, shape)
        else:
            self.gpu.launch(lane.graph, lane.stream)

    def _capture(self, lane: _Lane, shape: tuple[int, ...]) -> None:
        """Make a CUDA graph of the computing; what cannot be captured is computed without."""
        try:
            lane.graph = self.gpu.capture(lane.stream, lambda: self._compute(lane, shape))
        except BackendError as exc:
            self._failed_captures += 1
            self._captures = self._failed_captures < MAX_FAILED_CAPTURES
            LOG.warning("%s: no CUDA graph of %s: %s", self.engine, shape, exc)

    def _prepare(self, lane: _Lane, shape: tuple[int, ...]) -> None:
        context = lane.context
        self._messages.clear()
        if not context.set_input_shape(self._input, shape):
            raise self._messages.error(
                f"a batch of shape {shape} is refused (up to {self.batch} of {self.max_side} px)"
            )
        for name, buffer in ((self._input, lane.input), (self._output, lane.output)):
            if not context.set_tensor_address(name, buffer.address):
                raise self._messages.error(f"the address of {name} is refused")

    def _compute(self, lane: _Lane, shape: tuple[int, ...]) -> None:
        self._messages.clear()
        with self.gpu.current():
            done = lane.context.execute_async_v3(lane.stream)
            self._messages.raise_held()
            if not done:
                lane.forget()
                raise self._messages.error(f"a batch of shape {shape} failed")
