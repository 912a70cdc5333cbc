"""TensorRT without a GPU: exactly the API of one version, computing with ONNX Runtime in `fake_cuda`'s memory.

Every attribute that sdk touches must be in the extract of that version's API (tests/data), and settable where it is
set: what is not there raises AttributeError, so that `hasattr` tells the truth. What a GPU would punish goes into
`Machine.faults`.
"""

from __future__ import annotations

import json
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import onnx

DATA = Path(__file__).parent / "data"
VERSIONS = ("8.5.3.1", "10.16.1.11", "11.4.0.106")


def read_api(version: str) -> dict[str, Any]:
    """Read what a version's classes have."""
    return json.loads((DATA / f"tensorrt-{version}.json").read_text(encoding="utf-8"))


@dataclass
class Behaviour:
    """How TensorRT misbehaves, and what it was asked for."""

    refuses_uint8: bool = False  # the parser
    loses_half: bool = False  # the builder makes fp32 of everything
    wrong: bool = False  # engines compute nonsense
    no_driver: bool = False  # that this version works with
    other_times: bool = False  # the timing cache is another GPU's
    no_graphs: bool = False  # work that cannot be captured
    parse_error: str = ""
    build_error: str = ""
    fuses_all: bool = False  # the builder makes one layer of the network
    interrupted: str = ""  # what the builder says when Ctrl-C comes
    builds: list[dict[str, Any]] = field(default_factory=list)
    activation_bytes: int = 1000


def computed_weights(model: onnx.ModelProto) -> str:
    """Say what TensorRT does of weights that are neither constants nor floating-point ones behind a Q/DQ pair."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            return f"{node.name}: only activation types allowed as input to this layer."
        is_computed = node.op_type in ("Conv", "ConvTranspose") and node.input[1] not in constants
        if is_computed and makers[node.input[1]].op_type != "DequantizeLinear":
            return f"{node.name}: two inputs (data and weights) are allowed only in explicit-quantization mode."
    return ""


def module(machine: fake_cuda.Machine, version: str, onnxruntime: Any, behaviour: Behaviour) -> Any:
    """Make the stand-in for the module tensorrt."""
    api = read_api(version)
    major = int(version.split(".")[0])

    def names(kind: str) -> set[str]:
        entry = api["classes"][kind]
        own = {name for part in ("methods", "settable", "read_only", "nested") for name in entry.get(part, ())}
        return own.union(*(names(base) for base in entry.get("bases", []) if base in api["classes"]))

    class Strict:
        """Refuses every public name that the version's class lacks."""

        KIND = ""

        def __getattribute__(self, name: str) -> Any:
            kind = type(self).KIND
            if not name.startswith("_") and name.islower() and name not in names(kind):
                raise AttributeError(f"tensorrt {version}: {kind} has no {name}")
            return object.__getattribute__(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_") and name not in api["classes"][type(self).KIND].get("settable", ()):
                raise AttributeError(f"tensorrt {version}: {type(self).KIND}.{name} cannot be set")
            object.__setattr__(self, name, value)

    def enum(kind: str) -> Any:
        members = api["classes"][kind]["enum"]
        # Other numbers in every version.
        return type(kind, (), {name: Member(name, number + major) for number, name in enumerate(sorted(members))})

    class ILogger:
        def __init__(self) -> None:
            self._made = True

    ILogger.Severity = type(  # type: ignore[attr-defined]
        "Severity", (), {name: name for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")}
    )

    def say(log: Any, text: str) -> None:
        assert log._made, "the logger's own __init__ was not called"
        log.log("ERROR", text)

    class ITensor(Strict):
        KIND = "ITensor"

        def __init__(self, name: str, dtype: Any, shape: Any, compute: Any = None) -> None:
            object.__setattr__(self, "name", name)
            object.__setattr__(self, "dtype", dtype)
            object.__setattr__(self, "shape", shape)
            self._compute = compute  # input -> value

    class ILayer(Strict):
        KIND = "ILayer"

        def __init__(self, inputs: list[Any], output: Any = None) -> None:
            self._inputs, self._output = inputs, output
            object.__setattr__(self, "num_inputs", len(inputs))

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def set_input(self, index: int, tensor: Any) -> None:
            self._inputs[index] = tensor

        def get_output(self, index: int) -> Any:
            return self._output

        def set_output_type(self, index: int, kind: Any) -> None:
            object.__setattr__(self._output, "dtype", kind)

    class INetworkDefinition(Strict):
        KIND = "INetworkDefinition"

        def __init__(self, flags: int) -> None:
            creation = made.NetworkDefinitionCreationFlag
            known = {getattr(creation, name, None) for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH")} - {None}
            self._typed = hasattr(creation, "STRONGLY_TYPED") and bool(flags & 1 << int(creation.STRONGLY_TYPED))
            if flags & ~sum(1 << int(flag) for flag in known):
                machine.fault(f"unknown flags {flags}")
            if major < 10 and not flags & 1 << int(creation.EXPLICIT_BATCH):
                machine.fault("a network without EXPLICIT_BATCH")
            self._inputs: list[Any] = []
            self._outputs: list[Any] = []
            self._layers: list[Any] = []
            self._graph, self._half, self._int8 = "", False, False

        @property
        def num_layers(self) -> int:
            return len(self._layers)

        def get_layer(self, index: int) -> Any:
            return self._layers[index]

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def get_output(self, index: int) -> Any:
            return self._outputs[index]

        def add_input(self, name: str, dtype: Any, shape: Any) -> Any:
            self._inputs.append(ITensor(name, dtype, shape, lambda picture: picture))
            return self._inputs[-1]

        def remove_tensor(self, tensor: Any) -> None:
            if any(tensor in layer._inputs for layer in self._layers):
                machine.fault("a tensor is removed that a layer uses")
            self._inputs.remove(tensor)

        def unmark_output(self, tensor: Any) -> None:
            self._outputs.remove(tensor)

        def mark_output(self, tensor: Any) -> None:
            self._outputs.append(tensor)

        def _add(self, inputs: list[Any], dtype: Any, compute: Any) -> Any:
            self._layers.append(ILayer(inputs, ITensor("", dtype, None, compute)))
            return self._layers[-1]

        def add_constant(self, shape: Any, weights: Any) -> Any:
            assert np.prod(shape) == weights.size
            return self._add([], made.DataType.FLOAT, lambda picture: weights.reshape(shape))

        def add_elementwise(self, first: Any, second: Any, operation: Any) -> Any:
            run = {"PROD": np.multiply, "SUM": np.add}[operation.name]
            return self._add(
                [first, second], first.dtype, lambda picture: run(first._compute(picture), second._compute(picture))
            )

        def add_identity(self, tensor: Any) -> Any:
            layer = self._add([tensor], tensor.dtype, None)
            layer._output._compute = lambda picture: convert(tensor._compute(picture), layer._output.dtype)
            return layer

        def add_cast(self, tensor: Any, kind: Any) -> Any:
            return self._add([tensor], kind, lambda picture: convert(tensor._compute(picture), kind))

    def convert(value: Any, kind: Any) -> Any:
        return value.astype({"FLOAT": np.float32, "UINT8": np.uint8, "HALF": np.float16}[kind.name])

    class ParserError(Strict):
        KIND = "ParserError"

        def __init__(self, text: str) -> None:
            self._text = text

        def desc(self) -> str:
            return self._text

    class OnnxParser(Strict):
        KIND = "OnnxParser"

        def __init__(self, network: Any, log: Any) -> None:
            self._network, self._log, self._errors = network, log, []

        def parse(self, data: bytes, path: str) -> bool:
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            (given,), (result,) = session.get_inputs(), session.get_outputs()
            is_uint8 = "uint8" in given.type
            text = behaviour.parse_error or computed_weights(onnx.load_from_string(data))
            if behaviour.refuses_uint8 and is_uint8:
                text = "Unsupported type UINT8"
            if text:
                self._errors = [ParserError(text)]
                say(self._log, text)
                return False
            dtype = made.DataType.UINT8 if is_uint8 else made.DataType.FLOAT
            network = self._network
            network._graph = path
            network._half, network._int8 = ".fp16." in path, ".int8." in path
            picture = network.add_input(given.name, dtype, (-1, -1, -1, 3))

            def compute(value: Any) -> Any:
                source = core._inputs[0]._compute(value)
                (output,) = session.run(None, {given.name: np.ascontiguousarray(source)})
                return output

            core = ILayer([picture], ITensor(result.name, dtype, None, compute))
            network._layers.append(core)
            network._outputs.append(core._output)
            return True

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Any:
            return self._errors[index]

    class IOptimizationProfile(Strict):
        KIND = "IOptimizationProfile"

        def set_shape(self, name: str, smallest: Any, best: Any, largest: Any) -> None:
            self._shapes = {name: (smallest, best, largest)}

    class ITimingCache(Strict):
        KIND = "ITimingCache"

        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> Any:
            return HostMemory(
                f"times {version} ".encode() + self._data.removeprefix(f"times {version} ".encode()) + b"+"
            )

    class HostMemory(Strict):
        KIND = "IHostMemory"

        def __init__(self, data: bytes) -> None:
            self._data = data

        def __bytes__(self) -> bytes:
            return self._data

    class IBuilderConfig(Strict):
        KIND = "IBuilderConfig"

        def __init__(self) -> None:
            self._flags: set[str] = {"TF32"}
            self._profiles: list[Any] = []
            self._asked: dict[str, Any] = {}

        def set_flag(self, flag: Any) -> None:
            assert isinstance(flag, Member)
            self._flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag.name)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self._asked[pool.name] = size

        def set_tactic_sources(self, sources: int) -> bool:
            self._asked["sources"] = sources
            return True

        def set_preview_feature(self, feature: Any, on: bool) -> None:
            self._asked[feature.name] = on

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, data: bytes) -> Any:
            if data and not data.startswith(f"times {version} ".encode()):
                return None
            return ITimingCache(data)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if behaviour.other_times and cache._data:
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.__dict__.get("_cache")

        # What may be set without being asked for again.
        profiling_verbosity = builder_optimization_level = hardware_compatibility_level = progress_monitor = None

    class Builder(Strict):
        KIND = "Builder"

        def __init__(self, log: Any) -> None:
            needs_driver(log)
            self._log = log

        def create_network(self, flags: int = 0) -> Any:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            monitor = config.__dict__.get("progress_monitor")
            if monitor:
                monitor.phase_start("Building", None, 2)
                for step in range(2):
                    monitor.phase_start("Tactics", "Building", 5)
                    monitor.step_complete("Tactics", 0)
                    monitor.phase_finish("Tactics")
                    if monitor.step_complete("Building", step) is not True:
                        return None  # as newer versions end a build
                monitor.phase_finish("Building")
            if behaviour.interrupted:  # in whatever Python runs next, which may be the logger
                say(self._log, behaviour.interrupted)
            if behaviour.build_error:
                say(self._log, behaviour.build_error)
                return None
            (tensor,), (output,) = network._inputs, network._outputs
            profile = config._profiles[0]._shapes[tensor.name]
            flags = config._flags
            if network._typed and flags & {"FP16", "INT8"}:
                say(self._log, "precision flags do not go with a strongly typed network")
                return None
            allowed = network._typed or "FP16" in flags
            half = not behaviour.loses_half and allowed and (network._half or not network._typed)
            behaviour.builds.append({
                "gpu": machine.current(), "graph": Path(network._graph).name, "flags": flags, "half": half,
                "profile": profile, "typed": network._typed, "asked": config._asked,
                "times": config._cache._data if "_cache" in config.__dict__ else None,
                "level": config.__dict__.get("builder_optimization_level"),
                "layers": len(network._layers),
            })  # fmt: skip
            number = len(engines)
            engines.append((tensor, output, profile))
            plan = {"version": version, "engine": number, "half": half, "int8": network._int8, "gpu": machine.current()}
            return HostMemory(b"plan" + json.dumps(plan).encode())

    def needs_driver(log: Any) -> None:
        if behaviour.no_driver:
            say(log, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    engines: list[tuple[Any, Any, Any]] = []

    class Runtime(Strict):
        KIND = "Runtime"

        def __init__(self, log: Any) -> None:
            needs_driver(log)
            self._log = log

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            if not data.startswith(b"plan"):
                say(self._log, "magic tag does not match")
                return None
            plan = json.loads(data[4:])
            if plan["version"] != version or plan["engine"] >= len(engines):
                say(self._log, "the engine plan file is not compatible with this version")
                return None
            return ICudaEngine(self._log, plan)

    class ICudaEngine(Strict):
        KIND = "ICudaEngine"

        def __init__(self, log: Any, plan: dict[str, Any]) -> None:
            self._log, self._plan, self._gpu = log, plan, machine.current()
            self._tensors = engines[plan["engine"]][:2]

        @property
        def num_io_tensors(self) -> int:
            return 2

        def get_tensor_name(self, index: int) -> str:
            return self._tensors[index].name

        def get_tensor_mode(self, name: str) -> Any:
            return made.TensorIOMode.INPUT if name == self._tensors[0].name else made.TensorIOMode.OUTPUT

        def create_engine_inspector(self) -> Any:
            return EngineInspector(self)

        def create_execution_context(self) -> Any:
            if major < 10 and self.__dict__.get("_context"):
                machine.fault("a second context of a profile, before 8.6")
            count, height, width, _ = engines[self._plan["engine"]][2][2]
            try:
                memory = machine.allocate(self._gpu, behaviour.activation_bytes * (count * height * width > 0))
            except fake_cuda.Short:
                say(self._log, "Requested size was 1 bytes. OutOfMemory (no further information)")
                return None
            self._context = True
            return IExecutionContext(self, memory)

    class EngineInspector(Strict):
        KIND = "EngineInspector"

        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def get_engine_information(self, form: Any) -> str:
            assert form.name == "JSON"
            plan = self._engine._plan
            kind = "Half" if plan["half"] else "Int8" if plan["int8"] else "Float"
            if major < 10:
                kind = f"Row major linear {kind.replace('Half', 'FP16').replace('Float', 'FP32')} format"
            name = "network.half.weight"  # a name says nothing
            tensors = [{"Name": name, "Dimensions": [1, 3, 8, 8], "Format/Datatype": kind}]
            layers = [{"Name": "half", "LayerType": "Convolution", "Inputs": tensors, "Outputs": []}]
            if behaviour.fuses_all:
                layers = [{"Name": "{ForeignNode[conv...]}", "LayerType": "Myelin", "Inputs": [], "Outputs": []}]
            return json.dumps({"Layers": [*layers, "a layer that is only named"]})

    class IExecutionContext(Strict):
        KIND = "IExecutionContext"

        def __init__(self, engine: Any, memory: int) -> None:
            self._engine, self._memory = engine, memory
            self._addresses: dict[str, int] = {}
            self._shape: tuple[int, ...] | None = None
            self._busy = threading.Lock()
            self._version = 0  # of what a graph that is captured from it relies on

        def __del__(self) -> None:
            if machine.current() != self._engine._gpu:
                machine.fault("a context that is destroyed on another GPU")
            machine.free(self._memory)

        def set_input_shape(self, name: str, shape: Any) -> bool:
            tensor, _, (smallest, _, largest) = engines[self._engine._plan["engine"]]
            if name != tensor.name or not all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True)):
                say(self._engine._log, f"shape {shape} is outside of the profile")
                return False
            self._shape = tuple(shape)
            self._version += 1
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            self._version += 1
            return True

        def execute_async_v3(self, stream: int) -> bool:
            if not self._busy.acquire(blocking=False):
                machine.fault("two threads in one context")
                return False
            try:
                return self._execute(stream)
            finally:
                self._busy.release()

        def _execute(self, stream: int) -> bool:
            gpu, log = self._engine._gpu, self._engine._log
            if machine.current() != gpu or machine.streams[stream][0] != gpu:
                machine.fault("a run on another GPU than the engine's")
            if machine.fails(self._shape):
                say(log, "CUDA error: out of memory")
                return False
            is_captured = stream in machine.captures
            if is_captured and behaviour.no_graphs:
                say(log, "operation not permitted when stream is capturing")
                return False
            tensor, output, _ = engines[self._engine._plan["engine"]]
            shape, version = self._shape, self._version
            source, target = self._addresses[tensor.name], self._addresses[output.name]
            scale = 2
            result_shape = (shape[0], shape[1] * scale, shape[2] * scale, 3)
            dtypes = [np.dtype(np.uint8 if t.dtype.name == "UINT8" else np.float32) for t in (tensor, output)]
            sizes = [int(np.prod(s)) * d.itemsize for s, d in zip((shape, result_shape), dtypes)]
            machine.runs.append((gpu, shape, "capture" if is_captured else "plain"))

            def compute() -> None:
                if is_captured and version != self._version:
                    machine.fault("a graph of a context that has changed")
                if not all(machine.check(gpu, place, size) for place, size in zip((source, target), sizes)):
                    return
                batch = fake_cuda.array_at(dtypes[0], shape, source).copy()
                result = output._compute(batch)
                if behaviour.wrong:
                    result = np.zeros_like(result)
                fake_cuda.array_at(dtypes[1], result_shape, target)[...] = result

            ranges = ((source, source + sizes[0]), (target, target + sizes[1]))
            machine.push(stream, fake_cuda.Copy(compute, ranges))
            return True

    class IProgressMonitor:
        def __init__(self) -> None:
            pass

    made: Any = types.ModuleType("tensorrt")
    made.__version__ = version
    enums = ["NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType", "TacticSource", "PreviewFeature",
             "ProfilingVerbosity", "LayerInformationFormat", "TensorIOMode", "DataType", "ElementWiseOperation",
             "HardwareCompatibilityLevel"]  # fmt: skip
    for kind in enums:
        if kind in api["classes"]:
            setattr(made, kind, enum(kind))
    made.Weights = lambda array: array
    for kind in (ILogger, Builder, OnnxParser, Runtime, IProgressMonitor):
        if kind.__name__ in api["classes"]:
            setattr(made, kind.__name__, kind)
    return made


class Member:
    """Of an enum."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self._number = name, number

    def __int__(self) -> int:
        return self._number
