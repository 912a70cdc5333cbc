"""Builds TensorRT engines from a bundle's graphs, with the API that the versions from 8.5 to 11 have.

What only some versions have is asked for by name. Half precision stands in the graph: where a network can be strongly
typed it is, elsewhere the FP16 flag allows it everywhere, and a look into the engine shows that it came about.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendError, BackendUnavailable, OptionError, OutOfMemory
from .engine_cache import write_whole
from .folding import read_folded

LOG = logging.getLogger(__name__)
WORKSPACE_MIB = 2048
OUT_OF_MEMORY = re.compile("out of memory|outofmemory|cudaErrorMemoryAllocation", re.IGNORECASE)
# How TensorRT writes types: "Row major linear FP16 format" in 8, "Half" in 10.
TYPES = {"fp16": re.compile(r"\b(fp16|half)\b", re.IGNORECASE), "int8": re.compile(r"\bint8\b", re.IGNORECASE)}

# (what TensorRT is at, done steps, all steps)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Profile:
    """Shapes that an engine takes: 1 to `batch` windows, whose sides are multiples of `stride` up to `side`."""

    stride: int
    batch: int
    side: int

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Give the smallest shape, the one that the engine is made fastest for, and the largest."""
        stride, side = self.stride, self.side
        return (1, stride, stride, 3), (1, side, side, 3), (self.batch, side, side, 3)


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built and kept.

    level: TensorRT's optimisation level, 0 to 5; None is its own default. hardware_compatible: the engine runs on every
    GPU from Ampere on. folder: of engines, and of the times that the builder measures; None is where the runtime looks.
    must_keep: an engine that cannot be written there is an error. rebuild: even if there is one.
    """

    workspace_mib: int = WORKSPACE_MIB
    level: int | None = None
    hardware_compatible: bool = False
    progress: Progress | None = None
    folder: Path | None = None
    must_keep: bool = False
    rebuild: bool = False


class Held:
    """What was raised in a function that TensorRT calls, Ctrl-C too: in C++ it would end the process."""

    raised: BaseException | None = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep what is raised inside."""
        try:
            yield
        except BaseException as exc:
            self.raised = exc

    def raise_held(self) -> None:
        """Raise what was kept, if anything was."""
        raised, self.raised = self.raised, None
        if raised is not None:
            raise raised


class Messages:
    """What TensorRT said last in each thread; its functions return nothing but None or False when they fail.

    What threads of its own say, which ask for nothing, is told to whoever has nothing else to tell.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._latest: deque[str] = deque(maxlen=4)

    @property
    def held(self) -> Held:
        """Give what was raised in this thread while TensorRT spoke."""
        if not hasattr(self._local, "held"):
            self._local.held = Held()
        held: Held = self._local.held
        return held

    def raise_held(self) -> None:
        """Raise what was held in this thread."""
        self.held.raise_held()

    def add(self, line: str) -> None:
        """Keep an error."""
        line = " ".join(line.split())[:300]
        self._lines().append(line)
        self._latest.append(line)

    def clear(self) -> str:
        """Forget what was said in this thread, and give it."""
        said = "; ".join(self._lines())
        self._lines().clear()
        self._latest.clear()
        return said

    def _lines(self) -> deque[str]:
        if not hasattr(self._local, "lines"):
            self._local.lines = deque(maxlen=8)
        lines: deque[str] = self._local.lines
        return lines

    def error(self, what: str) -> BackendError:
        """Make an error of what was said since the last one."""
        latest = "; ".join(self._latest)
        said = self.clear() or latest
        if OUT_OF_MEMORY.search(said):
            return OutOfMemory(f"tensorrt: {what}: out of memory")
        return BackendError(f"tensorrt: {what}: {said or 'it does not say why'}")


_logger_lock = threading.Lock()


def logger(trt: Any) -> tuple[Any, Messages]:
    """Give the process's one logger, which TensorRT keeps for ever, and what it hears."""
    with _logger_lock:
        return _make_logger(trt)


@functools.cache
def _make_logger(trt: Any) -> tuple[Any, Messages]:
    messages = Messages()
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            with messages.held.hold():
                if level in (severity.INTERNAL_ERROR, severity.ERROR):
                    messages.add(message)
                LOG.debug("TensorRT: %s", message)

    return Logger(), messages


def build(
    trt: Any,
    graph: Path,
    profile: Profile,
    *,
    precision: str,
    ends: str,
    float_graph: Path,
    timing_cache: Path | None,
    options: BuildOptions,
) -> bytes:
    """Build the plan of an engine for the thread's current GPU; minutes.

    graph: with its weights file beside it. float_graph: the one with float ends in fp32, from which an engine with
    8-bit ends is made where the parser refuses these. timing_cache: file of measured times, which makes the next build
    faster.
    Raises: BackendError with TensorRT's words; OutOfMemory; OptionError for what this version cannot do.
    """
    log, messages = logger(trt)
    messages.clear()
    held = Held()  # of the progress, which other threads than this may tell
    builder = _make(trt.Builder, log, messages)
    config = builder.create_builder_config()
    attachable = ends == "uint8" and precision != "int8"  # whose values the float graph does not hold
    network = _parse(trt, builder, graph, float_graph=float_graph if attachable else None)
    if not is_strongly_typed(trt):
        _allow(trt, config, precision)
    _configure(trt, config, options, held)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(network.get_input(0).name, *profile.shapes())
    if config.add_optimization_profile(shapes) < 0:
        raise messages.error(f"shapes {profile.shapes()} are refused")
    cache = _read_timing_cache(trt, config, timing_cache)
    if not config.set_timing_cache(cache, False):
        LOG.warning("%s: times of another GPU or version, measured anew", timing_cache)
        config.set_timing_cache(config.create_timing_cache(b""), False)
    plan = builder.build_serialized_network(network, config)
    for each in (held, messages):
        each.raise_held()
    if plan is None:
        raise messages.error(f"{graph.name}: no engine could be built")
    times = config.get_timing_cache()
    if timing_cache and times is not None:
        _write_timing_cache(timing_cache, bytes(times.serialize()))
    return bytes(plan)


def _make(kind: Any, log: Any, messages: Messages) -> Any:
    """Make one of TensorRT's two objects that need a driver; pybind11 tells of none with a TypeError."""
    try:
        return kind(log)
    except TypeError as exc:
        raise BackendUnavailable(
            f"tensorrt cannot be used: {messages.clear() or exc}; check the NVIDIA driver"
        ) from exc


def is_strongly_typed(trt: Any) -> bool:
    """Tell whether this version computes every layer in the type that stands in the graph."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def _parse(trt: Any, builder: Any, graph: Path, *, float_graph: Path | None) -> Any:
    """Read a graph into a network. float_graph: read instead if it is 8-bit ends alone that are refused."""
    log, _ = logger(trt)
    creation = trt.NetworkDefinitionCreationFlag
    flags = 0
    if hasattr(creation, "STRONGLY_TYPED"):
        flags |= 1 << int(creation.STRONGLY_TYPED)
    if hasattr(creation, "EXPLICIT_BATCH"):
        flags |= 1 << int(creation.EXPLICIT_BATCH)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if parser.parse(read_folded(graph), str(graph)):
        return network
    said = _parser_errors(trt, parser)
    if float_graph is None or is_strongly_typed(trt) or "uint8" not in said.lower():
        raise BackendError(f"tensorrt {trt.__version__} cannot read {graph.name}: {said}")
    LOG.info("tensorrt %s: 8-bit ends are attached by hand", trt.__version__)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(read_folded(float_graph), str(float_graph)):
        raise BackendError(f"tensorrt {trt.__version__} cannot read {float_graph.name}: {_parser_errors(trt, parser)}")
    _attach_uint8_ends(trt, network)
    return network


def _parser_errors(trt: Any, parser: Any) -> str:
    _, messages = logger(trt)
    messages.clear()  # which hold the same
    return " ".join("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)).split())[:600]


def _attach_uint8_ends(trt: Any, network: Any) -> None:
    """Give a network of float pictures 0 to 1 an 8-bit input and output, 0 to 255."""

    def constant(value: float) -> Any:
        return network.add_constant((1, 1, 1, 1), trt.Weights(np.full(1, value, np.float32))).get_output(0)

    def combine(first: Any, second: Any, operation: Any) -> Any:
        return network.add_elementwise(first, second, operation).get_output(0)

    def convert(tensor: Any, kind: Any) -> Any:
        if hasattr(network, "add_cast"):
            return network.add_cast(tensor, kind).get_output(0)
        layer = network.add_identity(tensor)
        layer.set_output_type(0, kind)
        return layer.get_output(0)

    layers = [network.get_layer(index) for index in range(network.num_layers)]
    before = network.get_input(0)
    name, shape = before.name, before.shape
    before.name = f"{name}.float"
    picture = network.add_input(name, trt.DataType.UINT8, shape)
    scaled = combine(convert(picture, trt.DataType.FLOAT), constant(1 / 255), trt.ElementWiseOperation.PROD)
    for layer in layers:
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            if tensor is not None and tensor.name == before.name:
                layer.set_input(index, scaled)
    network.remove_tensor(before)
    result = network.get_output(0)
    name = result.name
    network.unmark_output(result)
    result.name = f"{name}.float"
    rounded = combine(
        combine(result, constant(255), trt.ElementWiseOperation.PROD), constant(0.5), trt.ElementWiseOperation.SUM
    )
    output = convert(rounded, trt.DataType.UINT8)  # which truncates
    output.name = name
    network.mark_output(output)


def _allow(trt: Any, config: Any, precision: str) -> None:
    """Allow a network that is not strongly typed what its graph asks for."""
    if precision == "fp16" and hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    elif precision == "int8" and hasattr(trt.BuilderFlag, "INT8"):
        config.set_flag(trt.BuilderFlag.INT8)
    elif precision != "fp32":
        raise BackendError(f"tensorrt {trt.__version__} has neither strong typing nor a flag for {precision}")


def _configure(trt: Any, config: Any, options: BuildOptions, held: Held) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)  # keeps 10 bits: fp32 is the path of 16-bit pictures
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the engine tells its types
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    # Without cuBLAS and cuDNN, which TensorRT 10 leaves away too: an engine that needs them needs 1.5 GB more.
    sources = trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS
    config.set_tactic_sources(sum(1 << int(source) for source in sources))
    if hasattr(trt.PreviewFeature, "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"):
        config.set_preview_feature(trt.PreviewFeature.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805, True)
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):  # 8.6; see shares_profiles
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if options.level is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise OptionError(f"tensorrt {trt.__version__} has no optimisation levels")
        config.builder_optimization_level = options.level
    if options.hardware_compatible:
        if not hasattr(config, "hardware_compatibility_level"):
            raise OptionError(f"tensorrt {trt.__version__} builds for the GPU at hand only")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, options.progress, held)


def _monitor(trt: Any, progress: Progress | None, held: Held) -> Any:
    """Make TensorRT's progress monitor: of its outermost phases. It also ends a build that Ctrl-C interrupts."""
    _, messages = logger(trt)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with held.hold():
                if not parent_phase:
                    self._phases[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            with held.hold():
                if progress and phase_name in self._phases:
                    progress(phase_name, step + 1, self._phases[phase_name])
            return not (held.raised or messages.held.raised)

        def phase_finish(self, phase_name: str) -> None:
            with held.hold():
                self._phases.pop(phase_name, None)

    return Monitor()


def _read_timing_cache(trt: Any, config: Any, path: Path | None) -> Any:
    data = b""
    if path:
        try:
            data = path.read_bytes() if path.is_file() or not path.exists() else b""
        except FileNotFoundError:
            pass
        except OSError as exc:
            LOG.warning("%s: measured times are not used (%s)", path, exc.strerror or exc)
    cache = config.create_timing_cache(data)
    if cache is None and data:
        LOG.warning("%s: damaged, measured anew", path)
        cache = config.create_timing_cache(b"")
    return cache


def _write_timing_cache(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as exc:
        LOG.warning("%s: measured times are not kept (%s)", path, exc.strerror or exc)


def load(trt: Any, plan: bytes) -> Any:
    """Make an engine of a plan; None if TensorRT refuses it. It belongs to the thread's current GPU.

    Raises: BackendUnavailable if TensorRT does not work with the driver.
    """
    log, messages = logger(trt)
    messages.clear()
    engine = _make(trt.Runtime, log, messages).deserialize_cuda_engine(plan)
    messages.raise_held()
    return engine


def shares_profiles(trt: Any) -> bool:
    """Tell whether several contexts of an engine may use its one profile, as they may from 8.6 on."""
    return hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806") or hasattr(trt, "IProgressMonitor")


def check_types(trt: Any, engine: Any, precision: str) -> None:
    """Look into an engine for the precision that it was built for.

    Layers that the optimiser of newer versions has made one show their ends only: nothing is said about those.
    Raises: BackendError if no convolution, or where none has that name no layer, computes in it.
    """
    if precision not in TYPES:
        return
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text)["Layers"]
        convolutions = [layer for layer in layers if "conv" in _kind(layer)]
        found = [layer for layer in convolutions or layers if _has_type(layer, TYPES[precision])]
        is_opaque = any("myelin" in _kind(layer) or "foreign" in _kind(layer) for layer in layers)
    except (ValueError, KeyError, TypeError) as exc:
        raise BackendError(f"tensorrt {trt.__version__} does not tell the types of its layers ({exc!r})") from exc
    if not found and not is_opaque:
        raise BackendError(
            f"tensorrt {trt.__version__} built an engine of {len(layers)} layers without one in {precision}; "
            "export again, or use precision='fp32'"
        )
    LOG.info("tensorrt: %d of %d layers in %s", len(found), len(convolutions or layers), precision)


def _kind(layer: Any) -> str:
    """Give what a layer is, in small letters; versions differ in where they say it."""
    facts = (layer.get("LayerType"), layer.get("ParameterType"), layer.get("Name")) if isinstance(layer, dict) else ()
    return " ".join(str(fact) for fact in facts).lower()


def _has_type(layer: dict[str, Any], pattern: re.Pattern[str]) -> bool:
    """Tell whether a tensor of a layer, whatever its name, is of a type."""
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])] if isinstance(layer, dict) else []
    return any(
        isinstance(value, str) and key != "Name" and pattern.search(value)
        for tensor in tensors
        for key, value in tensor.items()
    )
