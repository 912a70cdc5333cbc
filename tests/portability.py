"""What keeps an ONNX graph from being read by TensorRT's parsers, and from being tiled.

The parsers' operators and types are in tests/data/onnx-operators.json, extracted from NVIDIA's tables; what those say
in words stands here.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

TABLES = json.loads((Path(__file__).parent / "data" / "onnx-operators.json").read_text(encoding="utf-8"))
PARSERS = tuple(TABLES)
IR_VERSION_MAX = 8
TYPES = {
    TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16", TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32", TensorProto.INT64: "INT64", TensorProto.BOOL: "BOOL", TensorProto.UINT8: "UINT8",
}  # fmt: skip
RESIZE: dict[str, set[str | int]] = {
    "mode": {"nearest", "linear"},
    "coordinate_transformation_mode": {
        "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners",
    },
    "nearest_mode": {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"},
    "keep_aspect_ratio_policy": {"stretch"},
    "antialias": {0},
    "exclude_outside": {0},
}  # fmt: skip
# Operator -> number of the input that must be a constant.
CONSTANT_INPUTS = {"Slice": 3, "Squeeze": 1, "Unsqueeze": 1, "Pad": 3, "CumSum": 1, "TopK": 1, "OneHot": 1}
# Their results depend on the whole picture, so that tiles do not fit together.
GLOBAL = {
    "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "InstanceNormalization", "GroupNormalization",
    "MeanVarianceNormalization", "LayerNormalization", "Softmax", "LogSoftmax", "Hardmax", "Flatten", "Gemm", "TopK",
    "CumSum", "NonZero", "LSTM", "GRU", "RNN",
}  # fmt: skip
CHANNELS = {1, -3}  # of NCHW


@dataclass(frozen=True)
class Graph:
    """A graph and what is known of its tensors: their element types, and the constants among them."""

    proto: onnx.GraphProto
    opset: int
    types: dict[str, int]
    constants: dict[str, TensorProto]


def problems(model: onnx.ModelProto, parser: str) -> list[str]:
    """List what is wrong with a graph, whose weights may be left in their file.

    parser: a version of TensorRT, one of PARSERS.
    """
    try:
        proto = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as exc:
        return [f"types cannot be inferred: {exc}"]
    values = [*proto.input, *proto.output, *proto.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in proto.initializer}
    made = {node.output[0]: node.attribute[0].t for node in proto.node if node.op_type == "Constant"}
    constants = {tensor.name: tensor for tensor in proto.initializer} | made
    opset = max((entry.version for entry in model.opset_import if not entry.domain), default=0)
    graph = Graph(proto, opset, types, constants)
    found = _versions(model, opset, parser) + _ends(graph)
    for node in proto.node:
        said = _operator(node, parser) + _types(node, graph, parser) + _words(node, graph)
        said += _zero_points(node, graph) + _reach(node, graph)
        found += [f"{node.op_type} {node.name or node.output[0]}: {text}" for text in said]
    return found


def _versions(model: onnx.ModelProto, opset: int, parser: str) -> list[str]:
    found = [f"operators of {entry.domain}" for entry in model.opset_import if entry.domain]
    if opset > TABLES[parser]["opset_max"]:
        found.append(f"opset {opset}: {parser} reads up to {TABLES[parser]['opset_max']}")
    if model.ir_version > IR_VERSION_MAX:
        found.append(f"IR version {model.ir_version}")
    return found


def _ends(graph: Graph) -> list[str]:
    """Look for 8 bits inside: Cast alone reads an input of them, and Cast makes an output of them."""
    inputs, outputs = ({value.name for value in ends} for ends in (graph.proto.input, graph.proto.output))
    readers = Counter(name for node in graph.proto.node for name in node.input)
    found = [f"the input {name} is read {readers[name]} times" for name in sorted(inputs) if readers[name] != 1]
    for node in graph.proto.node:
        for names, ends, does in ((node.input, inputs, "reads"), (node.output, outputs, "makes")):
            inside = [name for name in names if node.op_type != "Cast" or name not in ends]
            found += [f"{node.op_type} {does} {name} in uint8" for name in inside if _type(name, graph) == "UINT8"]
    return found


def _type(name: str, graph: Graph) -> str:
    """Name the type of a tensor; "" if it is not known."""
    kind = graph.types.get(name, 0)
    return TYPES.get(kind) or (TensorProto.DataType.Name(kind) if kind else "")


def _operator(node: NodeProto, parser: str) -> list[str]:
    found = ["it holds a graph"] if any(each.HasField("g") or each.graphs for each in node.attribute) else []
    return found if node.op_type in TABLES[parser]["operators"] else [*found, f"{parser} does not have it"]


def _types(node: NodeProto, graph: Graph, parser: str) -> list[str]:
    """Hold the tensors of the first input's type, which the tables are about, against the tables."""
    allowed = set(TABLES[parser]["operators"].get(node.op_type, TYPES.values()))
    if parser.startswith("8") and "INT32" in allowed:
        allowed.add("INT64")  # which these parsers narrow
    if node.op_type == "Cast":
        allowed.add("UINT8")  # 8.5's table leaves it out, its code takes it; where it may stand: _ends
    found = [f"{name} is of no known type" for name in (*node.input, *node.output) if name and not _type(name, graph)]
    for name in _of_first_type(node, graph):
        if _type(name, graph) not in {"", *allowed}:
            found.append(f"{parser} does not take {_type(name, graph)} ({name})")
    return found


def _of_first_type(node: NodeProto, graph: Graph) -> list[str]:
    """Name the tensors of a node whose types are its first input's; both of a Cast."""
    if node.op_type == "Cast" or not onnx.defs.has(node.op_type, graph.opset, node.domain):
        return [*node.input, *node.output]
    schema = onnx.defs.get_schema(node.op_type, graph.opset, node.domain)
    first = (schema.inputs or schema.outputs)[0].type_str
    pairs = []
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        # The last one of an operator like Concat stands for all that follow.
        pairs += [(name, formals[min(number, len(formals) - 1)]) for number, name in enumerate(names) if name]
    return [name for name, formal in pairs if formal.type_str == first]


def _attributes(node: NodeProto) -> dict[str, Any]:
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _words(node: NodeProto, graph: Graph) -> list[str]:
    """Hold a node against what the tables say in words."""
    given, found = _attributes(node), []
    if node.op_type == "Resize":
        found += [f"{name} {given[name]}" for name in RESIZE if name in given and given[name] not in RESIZE[name]]
        found += [f"{name} is computed" for name in node.input[1:] if name and name not in graph.constants]
        found += ["axes"] if "axes" in given else []
    if node.op_type in ("MaxPool", "AveragePool", "LpPool"):
        found += ["dilations"] if set(given.get("dilations", [1])) != {1} else []
        found += ["a second output"] if len(node.output) > 1 else []
        found += [f"kernel {given['kernel_shape']}"] if len(given["kernel_shape"]) not in (2, 3) else []
    if node.op_type in ("Conv", "ConvTranspose"):
        found += _weights(node.input[1], graph)
    number = CONSTANT_INPUTS.get(node.op_type, len(node.input))
    for name in node.input[number : number + 1]:
        found += [f"{name} is computed"] if name not in {"", *graph.constants} else []
    return found


def _weights(name: str, graph: Graph) -> list[str]:
    """Look for weights that are neither constants nor, behind a pair of Q and DQ, floating-point ones."""
    if name in graph.constants:
        return []
    makers = {node.output[0]: node for node in graph.proto.node}
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        node = makers.get(name)
        if node is None or node.op_type != kind:  # also an 8-bit constant behind DequantizeLinear alone
            return [f"weights {name} are computed"]
        name = node.input[0]
    return [] if name in graph.constants else [f"weights {name} are computed"]


def _zero_points(node: NodeProto, graph: Graph) -> list[str]:
    """Look for zero points other than 0 in INT8; without one QuantizeLinear makes uint8, which _ends finds."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return []
    found = []
    for name in filter(None, node.input[2:]):
        zero = graph.constants.get(name)
        is_here = zero is not None and zero.data_location != TensorProto.EXTERNAL
        if not is_here or zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any():
            found.append(f"the zero point {name} is not 0 in INT8")
    return found


def _reach(node: NodeProto, graph: Graph) -> list[str]:
    """Look for what reaches over the whole picture."""
    if node.op_type in GLOBAL:
        return ["its result depends on the whole picture"]
    if not node.op_type.startswith(("Reduce", "Arg")):
        return []
    given = _attributes(node)
    axes = given.get("axes", [given["axis"]] if "axis" in given else [])
    for name in node.input[1:]:
        axes = numpy_helper.to_array(graph.constants[name]).tolist() if name in graph.constants else []
    return [] if axes and set(axes) <= CHANNELS else ["it reduces more than channels"]
