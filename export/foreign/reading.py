"""Read somebody else's ONNX file: its weights from nowhere but beside it, and nothing that tiles could not run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

from sdk.bundle import File, hash_file
from sdk.errors import BundleError
from sdk.onnx_locations import check_locations

from ..errors import ExportError

MAX_WEIGHTS_BYTES = 1 << 30  # of all tensors; protobuf, through which they go, ends at twice that
MAX_VALUE_BYTES = 1 << 30  # of one inner value, at a picture of INFERRED_SIZE
INFERRED_SIZE = (48, 96)
MAX_CHANNELS = 16  # more than that on an axis of fixed length is a side of a picture
CHANNEL_AXIS = {"NCHW": 1, "NHWC": 3}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
TYPES = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.INT8, TensorProto.INT16,
    TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip
WHOLE = "looks at the whole picture, so that tiles would differ from it"
CHANCE = "gives another result each time"
QUANTISED = "computes in integers: import the model as it was before quantisation"
SEQUENCE = "computes with lists: export the model with fixed numbers of splits"
REFUSED = {
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), WHOLE),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization", "LSTM", "GRU", "RNN"), WHOLE),
    **dict.fromkeys(("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"), CHANCE),
    **dict.fromkeys(("Bernoulli", "Multinomial"), CHANCE),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), QUANTISED),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"), QUANTISED),
    **dict.fromkeys(
        ("SplitToSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceInsert"), SEQUENCE
    ),
    **dict.fromkeys(("SequenceErase", "SequenceLength", "ConcatFromSequence"), SEQUENCE),
    **dict.fromkeys(("Optional", "OptionalGetElement", "OptionalHasElement"), SEQUENCE),
}


@dataclass(frozen=True)
class ForeignGraph:
    """An ONNX graph with one picture in and one out.

    model: with its weights inside and with free batch, height and width; otherwise as in the file.
    layouts: what its input may be, of "NCHW" and "NHWC". size: (height, width) that the file had fixed; 0 if free.
    precision: "fp32" or "fp16", of its arithmetic. files: the file itself, then those of its weights.
    """

    model: onnx.ModelProto
    layouts: tuple[str, ...]
    size: tuple[int, int]
    precision: str
    opset: int
    files: tuple[File, ...]


def read(path: Path) -> ForeignGraph:
    """Read a file, and the weights that lie beside it.

    Raises: ExportError if it is damaged, too large, refers to files elsewhere, or is not a network that takes one RGB
    picture and gives one, by operators that look at pixels nearby.
    """
    model, files = _load(path)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as exc:
        raise ExportError(f"{path}: not a valid ONNX model ({' '.join(str(exc).split())[:300]})") from exc
    source = _find_input(path, model)
    for kind in sorted({node.op_type for node in model.graph.node} & set(REFUSED)):
        raise ExportError(f"{path}: not taken, because its operator {kind} {REFUSED[kind]}")
    for node in model.graph.node:
        _check_node(path, node)
    shape = _shape(source)
    layouts = _layouts(path, shape)
    rows, columns = (2, 3) if layouts[0] == "NCHW" else (1, 2)
    freed = _free(model, layouts)
    _check_values(path, freed, layouts[0])
    size = (shape[rows], shape[columns])
    return ForeignGraph(freed, layouts, size, _precision(freed.graph), _opset(path, freed), tuple(files))


def _check_node(path: Path, node: onnx.NodeProto) -> None:
    """Refuse what engines do not survive, or have no numbers for."""
    if node.op_type == "Split" and "" in node.output:
        raise ExportError(f"{path}: a Split without a name for a part, on which engines crash: export it again")
    kinds = {attribute.i for attribute in node.attribute if node.op_type == "Cast" and attribute.name == "to"}
    for kind in kinds - TYPES:
        name = TensorProto.DataType.Name(kind).lower() if kind in TensorProto.DataType.values() else str(kind)
        raise ExportError(f"{path}: not taken, because it computes in {name}: export it in fp32")


def _load(path: Path) -> tuple[onnx.ModelProto, list[File]]:
    """Load a model with all its tensors inside, and describe the files that it came from."""
    try:
        beside = {entry.name for entry in path.parent.iterdir() if entry.is_file() and not entry.is_symlink()}
        check_locations(path, beside)
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
        locations = _check_tensors(path, model)
        onnx.load_external_data_for_model(model, str(path.parent))
        return model, [hash_file(path), *(hash_file(path.parent / name) for name in locations)]
    except BundleError as exc:
        raise ExportError(str(exc)) from exc
    except (DecodeError, ValueError, onnx.checker.ValidationError) as exc:
        raise ExportError(f"{path}: damaged ({' '.join(str(exc).split())[:300]}); fetch or export it again") from exc
    except OSError as exc:
        raise ExportError(f"{path}: cannot be read ({exc.strerror or exc})") from exc


def _check_tensors(path: Path, model: onnx.ModelProto) -> list[str]:
    """Require that each tensor has the data that its shape wants, no more and no less; list the files of weights."""
    locations: dict[str, None] = {}
    total = 0
    for tensor in _tensors(path, model):
        if tensor.data_type not in TYPES:
            raise ExportError(
                f"{path}: a tensor of data type {tensor.data_type}, which is not taken: import it as fp32"
            )
        if any(side < 0 for side in tensor.dims):
            raise ValueError("a tensor has a negative side")
        length = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += length
        if total > MAX_WEIGHTS_BYTES:
            raise ExportError(f"{path}: its tensors are larger than {MAX_WEIGHTS_BYTES} bytes")
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if int(entries.get("length", length)) != length:
                raise ValueError(f"a tensor of {length} bytes has {entries['length'][:20]} in its file")
            del tensor.external_data[:]
            for key, value in (("location", entries["location"]), ("offset", entries.get("offset", "0"))):
                tensor.external_data.add(key=key, value=value)
            tensor.external_data.add(key="length", value=str(length))  # without, the whole rest would be read
            locations[entries["location"]] = None
        elif tensor.HasField("raw_data"):
            if len(tensor.raw_data) != length:
                raise ValueError(f"a tensor of {length} bytes has {len(tensor.raw_data)}")
        else:
            numpy_helper.to_array(tensor)  # raises ValueError unless all its numbers are there
    return list(locations)


def _tensors(path: Path, model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Give every tensor of a graph without subgraphs."""
    if model.graph.sparse_initializer:
        raise ExportError(f"{path}: sparse weights are not taken: export it with dense ones")
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ExportError(f"{path}: sparse weights are not taken: export it with dense ones")
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _find_input(path: Path, model: onnx.ModelProto) -> ValueInfoProto:
    """Find the picture that goes in; one must come out, too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    for values, what in ((inputs, "inputs"), (list(model.graph.output), "results")):
        if len(values) != 1:
            raise ExportError(f"{path}: has {len(values)} {what}, expected one picture")
        kind = values[0].type.tensor_type
        if kind.elem_type not in FLOATS:
            name = TensorProto.DataType.Name(kind.elem_type).lower() if kind.elem_type else "unknown"
            raise ExportError(f"{path}: {what} of type {name}, expected float pictures: export the bare network")
        if kind.HasField("shape") and len(kind.shape.dim) != 4:
            raise ExportError(
                f"{path}: {what} of {len(kind.shape.dim)} dimensions, a picture has 4: not a super-resolution network"
            )
    if not inputs[0].type.tensor_type.HasField("shape"):
        raise ExportError(f"{path}: does not say which shape it takes: export it with input shapes")
    return inputs[0]


def _shape(value: ValueInfoProto) -> list[int]:
    """Give the fixed lengths of a value's axes, 0 where one is free."""
    return [max(0, dimension.dim_value) for dimension in value.type.tensor_type.shape.dim]


def _precision(graph: onnx.GraphProto) -> str:
    """Tell whether a graph computes in fp16: at its ends, or after a cast."""
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    casts = (node.attribute for node in graph.node if node.op_type == "Cast")
    types |= {attribute.i for attributes in casts for attribute in attributes if attribute.name == "to"}
    return "fp16" if TensorProto.FLOAT16 in types else "fp32"


def _opset(path: Path, model: onnx.ModelProto) -> int:
    versions = {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    if len(versions) != 1:
        raise ExportError(f"{path}: has {len(versions)} versions of ONNX's operators, expected one")
    return versions.pop()


def _layouts(path: Path, shape: Sequence[int]) -> tuple[str, ...]:
    """Tell which layouts the declared shape of the input allows."""
    channels = {layout: shape[axis] for layout, axis in CHANNEL_AXIS.items()}
    if 3 in channels.values():
        return tuple(layout for layout, count in channels.items() if count == 3)
    few = [count for count in channels.values() if 0 < count <= MAX_CHANNELS]
    if 1 in few:
        raise ExportError(f"{path}: takes one channel, brightness alone; this SDK runs networks that take RGB pictures")
    if few:
        raise ExportError(f"{path}: takes {min(few)} channels, this SDK runs networks that take the 3 of RGB pictures")
    free = tuple(layout for layout, count in channels.items() if count == 0)
    if not free:
        raise ExportError(f"{path}: takes {' x '.join(map(str, shape))}: no axis has the 3 channels of RGB pictures")
    return free


def _free(model: onnx.ModelProto, layouts: Sequence[str]) -> onnx.ModelProto:
    """Copy a model without declared sizes of pictures, and of what lies inside; its weights are no inputs."""
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    graph = freed.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:], graph.value_info[:]
    graph.input.extend(inputs)
    freed.ir_version = max(freed.ir_version, 4)  # before, weights were inputs
    for value, prefix in ((graph.input[0], "in"), (graph.output[0], "out")):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            dimension.dim_param = f"{prefix}{axis}"
    if len(layouts) == 1:
        graph.input[0].type.tensor_type.shape.dim[CHANNEL_AXIS[layouts[0]]].dim_value = 3
    return freed


def _check_values(path: Path, model: onnx.ModelProto, layout: str) -> None:
    """Refuse a graph that makes huge values of a small picture, as far as shapes tell without running it."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    height, width = INFERRED_SIZE
    shape = (1, 3, height, width) if layout == "NCHW" else (1, height, width, 3)
    for dimension, length in zip(fixed.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dimension.dim_value = length
    try:
        fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except onnx.shape_inference.InferenceError as exc:
        raise ExportError(f"{path}: its shapes contradict each other ({' '.join(str(exc).split())[:300]})") from exc
    for value in (*fixed.graph.value_info, *fixed.graph.output):
        size = 4 * math.prod(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        if size > MAX_VALUE_BYTES:
            raise ExportError(
                f"{path}: makes {size:.1e} bytes of a picture of {height} x {width} pixels, {MAX_VALUE_BYTES:.1e} is "
                "the limit"
            )
