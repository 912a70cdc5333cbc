"""A model repository for Triton Inference Server: for each stage of a bundle a folder with config.pbtxt and the model.

    DIR/<bundle>-<stage>/config.pbtxt
    DIR/<bundle>-<stage>/1/model.onnx and its weights file, or 1/model.plan

The server runs windows and knows nothing of pictures, so a client does what the runtime does around an engine: heights
and widths of the input "picture" are multiples of the stride (mirrored at right and bottom, the result cropped);
what is larger than a window is cut on that grid, with the halo as context that is thrown away; sdk.tiling has all that.
Triton runs requests of one shape together: windows of one size fill batches. The numbers stand in the `parameters` of a
model's configuration, which a client gets from the server.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdk import memory
from sdk.backends.engine_cache import MAGIC, Key, parse_engine
from sdk.bundle import Bundle, File, Stage, hash_file
from sdk.errors import OptionError
from sdk.onnx_locations import check_locations
from sdk.version import __version__

from .errors import ExportError
from .folders import new_folder

INPUT, OUTPUT = "picture", "result"  # names in the deploy graph
# device -> bytes of activations that one batch may take, unless options ask for more.
BUDGET_BYTES = {"gpu": 2 << 30, "cpu": 512 << 20}
BATCHES = (8, 4, 2, 1)
ROOMY_HALOS = 4  # smaller windows would be little but halo: batches give way first
ROOMY_SIDE = 256
# device -> parameters of Triton's ONNX Runtime, in the form that all its versions read: sizes change, and memory is
# taken as asked for. TF32, which the SDK's own sessions do without, has no such parameter.
SESSION = {
    "gpu": {"cudnn_conv_algo_search": "1", "arena_extend_strategy": "1"},
    "cpu": {"enable_mem_pattern": "0"},
}
MAX_COUNT, MAX_SIDE, MAX_DELAY_US = 1024, 1 << 14, 60_000_000
DUTY = (
    "Heights and widths are multiples of sr_stride: mirror at the right and bottom, crop the result. Cut larger "
    "pictures into windows on that grid, best sr_window a side; at inner edges throw sr_halo pixels away. Windows of "
    "one size are batched."
)


@dataclass(frozen=True)
class Options:
    """How Triton is to run a bundle.

    stage: "all", "auto" for the last one trained, or a name. engine: a TensorRT plan, or an engine that the runtime
    keeps in its cache; of one stage. device: "gpu" or "cpu", which take the fp16 graph (where there is one) and the
    fp32 graph. max_batch: requests run together; window: side in LR pixels of the windows that the server is warmed up
    with; both are chosen from the model's memory and the halo if None. instances: on each GPU, or on the CPU.
    delay_us: how long a request waits for others, in microseconds.
    """

    stage: str = "all"
    engine: Path | None = None
    device: str = "gpu"
    max_batch: int | None = None
    window: int | None = None
    instances: int = 1
    delay_us: int = 1000


def write_repository(bundle: Bundle, folder: Path, options: Options) -> list[str]:
    """Write a model repository into `folder`, which must not exist; give the names of its models.

    Raises: OptionError for an option out of range or an unknown stage; ExportError if the engine is not of this stage,
    or the folder cannot be written; BundleError for a graph that needs other files than its stage's.
    """
    _check(options)
    stages = _choose_stages(bundle, options)
    names: list[str] = []
    with new_folder(folder) as temporary:
        for stage in stages:
            name = _model_name(bundle.manifest.name, stage.name, taken=names)
            version = temporary / name / "1"
            version.mkdir(parents=True)
            if options.engine:
                model = _add_plan(version, options.engine, stage, options)
            else:
                model = _add_onnx(version, bundle, stage, options)
            text = render(_config(name, bundle, stage, model, options))
            (temporary / name / "config.pbtxt").write_text(text, encoding="utf-8", newline="\n")
            names.append(name)
    return names


def _choose_stages(bundle: Bundle, options: Options) -> list[Stage]:
    """Choose what is served; an engine out of the cache says of which stage it is."""
    if options.stage != "all":
        return [bundle.stage(options.stage)]
    stages = list(bundle.manifest.stages)
    if options.engine and len(stages) > 1:
        key, _ = _read_engine(options.engine)
        own = [stage for stage in stages if key and key.onnx in {graph.file.sha256 for graph in stage.graphs}]
        if len(own) != 1:
            names = ", ".join(stage.name for stage in stages)
            raise ExportError(f"{options.engine}: does not say of which stage it is; name one of {names}")
        return own
    return stages


def _read_engine(path: Path) -> tuple[Key | None, bytes]:
    """Read a plan; of an engine out of the cache the key too.

    Raises: ExportError if it cannot be read or is damaged.
    """
    try:
        if path.exists() and not path.is_file():
            raise ExportError(f"{path}: not a file")
        data = path.read_bytes()
    except OSError as exc:
        raise ExportError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    if not data.startswith(MAGIC):
        return None, data
    try:
        return parse_engine(data)
    except ValueError as exc:
        raise ExportError(f"{path}: {exc}; let the runtime build it anew") from exc


@dataclass(frozen=True)
class _Model:
    """What a configuration says of the model file. parameters: besides those of every model."""

    platform: str
    backend: str
    file: File
    max_batch: int
    window: int
    parameters: dict[str, str]


def _check(options: Options) -> None:
    def require(condition: bool, name: str, value: object, expected: str) -> None:
        if not condition:
            raise OptionError(f"{name} {value!r}: {expected}")

    batch, window = options.max_batch, options.window
    require(options.device in BUDGET_BYTES, "device", options.device, f"one of {', '.join(BUDGET_BYTES)}")
    require(batch is None or 1 <= batch <= MAX_COUNT, "max_batch", batch, f"from 1 to {MAX_COUNT}")
    require(window is None or 1 <= window <= MAX_SIDE, "window", window, f"from 1 to {MAX_SIDE} pixels")
    require(1 <= options.instances <= MAX_COUNT, "instances", options.instances, f"from 1 to {MAX_COUNT}")
    require(0 <= options.delay_us <= MAX_DELAY_US, "delay_us", options.delay_us, f"from 0 to {MAX_DELAY_US}")
    require(not options.engine or options.device == "gpu", "device", options.device, "an engine needs gpu")


def _model_name(bundle: str, stage: str, *, taken: list[str]) -> str:
    """Name a model: a folder of Triton's, and a part of its URLs. Bundles may be called anything."""
    tame = re.sub("[^A-Za-z0-9_.-]+", "_", f"{bundle}-{stage}").strip("._-") or "model"
    while tame in taken:
        tame += "_"
    return tame


# What stands in the version's folder


def _add_onnx(version: Path, bundle: Bundle, stage: Stage, options: Options) -> _Model:
    """Copy a stage's graph and the weights file that it names."""
    kinds = {graph.precision for graph in stage.graphs if graph.ends == "uint8"}
    precision = "fp16" if options.device == "gpu" and "fp16" in kinds else "fp32"
    graph = stage.graph(precision=precision, ends="uint8")
    model, weights = version / "model.onnx", version / stage.weights.name
    if weights == model:
        raise ExportError(f"stage {stage.name}: its weights file is called {weights.name}, like Triton's model file")
    for file, copy in ((graph.file, model), (stage.weights, weights)):
        shutil.copyfile(bundle.folder / file.name, copy)
        if hash_file(copy).sha256 != file.sha256:
            raise ExportError(f"{bundle.folder / file.name}: changed since the bundle was opened; copy it again")
    check_locations(model, {weights.name})
    max_batch, window = _choose_sizes(stage, options)
    parameters = {"sr_precision": precision} | SESSION[options.device]
    return _Model("onnxruntime_onnx", "onnxruntime", hash_file(model), max_batch, window, parameters)


def _add_plan(version: Path, engine: Path, stage: Stage, options: Options) -> _Model:
    """Write the plan of an engine. One of ours says what it was built for, and is held to it."""
    parameters: dict[str, str] = {}
    key, plan = _read_engine(engine)
    if key is not None:
        max_batch, window = _fit_profile(engine, key, stage, options)
        built_for = f"{key.library}, {key.gpu}, compute capability {key.capability}"
        parameters = {"sr_precision": key.precision, "sr_engine": built_for}
    elif options.max_batch and options.window:
        max_batch, window = _choose_sizes(stage, options)
    else:
        raise ExportError(
            f"{engine}: a plan does not say which sizes it takes: give max_batch and window, both inside its profile, "
            "or take an engine out of the runtime's cache"
        )
    (version / "model.plan").write_bytes(plan)
    return _Model("tensorrt_plan", "tensorrt", hash_file(version / "model.plan"), max_batch, window, parameters)


def _fit_profile(engine: Path, key: Key, stage: Stage, options: Options) -> tuple[int, int]:
    """Give (max_batch, window) inside an engine's profile."""
    graphs = {graph.file.sha256 for graph in stage.graphs if graph.ends == "uint8"}
    if key.onnx not in graphs or key.weights != stage.weights.sha256:
        raise ExportError(f"{engine}: built for something else than the 8-bit graphs of stage {stage.name}")
    _, best, largest = key.profile  # (N, h, w, 3) each
    most, longest = largest[0], min(largest[1:3])
    max_batch, window = options.max_batch or most, options.window or min(best[1:3])
    _check_grid(window, stage)
    if max_batch > most or window > longest:
        raise ExportError(
            f"{engine}: takes at most {most} windows of {longest} pixels a side, not {max_batch} of {window}"
        )
    return max_batch, window


def _choose_sizes(stage: Stage, options: Options) -> tuple[int, int]:
    """Give (max_batch, window): what is asked for, else what the activations leave room for, roomy windows first."""
    halo, stride = stage.context(error=1), stage.stride
    pixels = int(BUDGET_BYTES[options.device] / (stage.activation_bytes * memory.REAL_SHARE))
    wanted = options.window or max(ROOMY_SIDE, ROOMY_HALOS * halo)
    max_batch = options.max_batch or next((batch for batch in BATCHES if batch * wanted**2 <= pixels), 1)
    if options.window:
        _check_grid(options.window, stage)
        return max_batch, options.window
    side = min(math.isqrt(pixels // max_batch), MAX_SIDE) // stride * stride
    return max_batch, max(side, 2 * halo + 2 * stride)


def _check_grid(window: int, stage: Stage) -> None:
    if window % stage.stride:
        raise OptionError(f"window {window}: stage {stage.name} takes multiples of {stage.stride} pixels")


# The configuration: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto


class _Word(str):
    """Text that stands without quotes: the name of an enumeration's value."""


UINT8 = _Word("TYPE_UINT8")


def _config(name: str, bundle: Bundle, stage: Stage, model: _Model, options: Options) -> dict[str, Any]:
    """Fill a ModelConfig: field -> value; shapes without the batch, -1 for what is free."""
    side, batches = model.window, sorted({1, model.max_batch})
    config: dict[str, Any] = {
        "name": name,
        "platform": model.platform,
        "backend": model.backend,
        "default_model_filename": model.file.name,
        "max_batch_size": model.max_batch,
        "input": {"name": INPUT, "data_type": UINT8, "dims": (-1, -1, 3)},
        "output": {"name": OUTPUT, "data_type": UINT8, "dims": (-1, -1, 3)},
        "instance_group": {"count": options.instances, "kind": _Word(f"KIND_{options.device.upper()}")},
    }
    if model.max_batch > 1:
        config["dynamic_batching"] = {
            "preferred_batch_size": (model.max_batch,),
            "max_queue_delay_microseconds": options.delay_us,
        }
    config["model_warmup"] = [
        {
            "name": f"{batch} of {side}x{side}",
            "batch_size": batch,
            "inputs": _entry(INPUT, {"data_type": UINT8, "dims": (side, side, 3), "random_data": True}),
        }
        for batch in batches
    ]
    if model.backend == "tensorrt":
        graphs = [{"batch_size": batch, "input": _entry(INPUT, {"dim": (side, side, 3)})} for batch in batches]
        config["optimization"] = {"cuda": {"graphs": True, "graph_spec": graphs}}
    facts = _facts(bundle, stage, model) | model.parameters
    config["parameters"] = [_entry(key, {"string_value": value}) for key, value in facts.items()]
    return config


def _facts(bundle: Bundle, stage: Stage, model: _Model) -> dict[str, str]:
    """List what a client needs to know, and what a person may ask."""
    manifest = bundle.manifest
    return {
        "sr_bundle": manifest.name,
        "sr_stage": stage.name,
        "sr_scale": str(manifest.scale),
        "sr_stride": str(stage.stride),
        "sr_halo": str(stage.context(error=1)),
        "sr_window": str(model.window),
        "sr_duty": DUTY,
        "sr_model_sha256": model.file.sha256,
        "sr_weights_sha256": stage.weights.sha256,
        "sr_licence": manifest.licence,
        "sr_notice": manifest.notice,
        "sr_sdk": __version__,
    }


def _entry(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """Give an entry of a map."""
    return {"key": key, "value": value}


def render(message: Mapping[str, Any], indent: str = "") -> str:
    """Write a message in protobuf's text format (https://protobuf.dev/reference/protobuf/textformat-spec/).

    message: field -> str, _Word, int, bool, a tuple of ints, a message, or a list of messages.
    """
    lines = []
    for field, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{field} {{\n{render(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{field}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: str | int | tuple[int, ...]) -> str:
    if isinstance(value, _Word):
        return value
    if isinstance(value, str):
        return f'"{"".join(_escape(char) for char in value)}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _escape(char: str) -> str:
    """Write what ends a string, begins an escape or cannot be seen as octal bytes of UTF-8."""
    if char.isprintable() and char not in '"\\':
        return char
    return "".join(f"\\{byte:03o}" for byte in char.encode())
