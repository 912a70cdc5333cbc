"""Bring a foreign graph to what bundles hold: opset 17, fp32 inside, no notes, names of its own."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from sdk.errors import BackendError

from ..errors import ExportError, printable
from ..to_onnx import IR_VERSION, OPSET
from .session import Session

PREFIX = "foreign/"
# What Resize does before opset 11, where there is no such attribute; and with the converter's Resize for Upsample.
OLD_RESIZE = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def convert(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model as it stands in a bundle, before picture ends are put around it.

    Raises: ExportError if its operators cannot be brought to the opset. That it computes the same is the caller's to
    check.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _remove_notes(copy)
    opset = copy.opset_import[0].version
    if opset < OPSET:
        copy = _raise_opset(copy)
    elif opset > OPSET:
        copy = _lower_opset(copy)
    _compute_in_single(copy.graph)
    _name_constants(copy.graph)
    copy = onnx.compose.add_prefix(copy, PREFIX)
    _remove_notes(copy)
    return copy


def _remove_notes(model: onnx.ModelProto) -> None:
    """Drop what no engine needs: texts, training, other domains, inferred shapes, tensors that nothing reads."""
    graph = model.graph
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    clean = helper.make_graph(graph.node, "network", graph.input, graph.output, tensors)
    for node in clean.node:
        node.doc_string = ""
        node.domain = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.doc_string = ""
    for part in (*clean.initializer, *clean.input, *clean.output):
        part.doc_string = ""
        del part.metadata_props[:]
    model.CopyFrom(helper.make_model(clean, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION))


def _raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert an older model."""
    opset = model.opset_import[0].version
    try:
        raised = onnx.version_converter.convert_version(model, OPSET)
    except (RuntimeError, onnx.version_converter.ConvertError) as exc:
        raise ExportError(
            f"opset {opset} cannot be brought to {OPSET} ({printable(str(exc))[:200]}): export the model with "
            f"opset_version={OPSET}"
        ) from exc
    for node in raised.graph.node:
        named = {attribute.name for attribute in node.attribute}
        if opset < 11 and node.op_type == "Resize":
            node.attribute.extend(helper.make_attribute(k, v) for k, v in OLD_RESIZE.items() if k not in named)
    return raised


def _lower_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a newer model: most of its operators have not changed, and a check tells; the converter does others."""
    opset = model.opset_import[0].version
    relabelled = onnx.ModelProto()
    relabelled.CopyFrom(model)
    relabelled.opset_import[0].version = OPSET
    try:
        onnx.checker.check_model(relabelled)
        Session(relabelled)
        return relabelled
    except (onnx.checker.ValidationError, BackendError):
        pass  # an operator that is younger than the opset, or was used otherwise in it
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except (RuntimeError, onnx.version_converter.ConvertError) as exc:
        raise ExportError(
            f"opset {opset} is above {OPSET} and cannot be brought to it ({printable(str(exc))[:200]}): export the "
            f"model with opset_version={OPSET}"
        ) from exc


def _compute_in_single(graph: onnx.GraphProto) -> None:
    """Turn every fp16 in a graph into fp32: weights, constants, casts and ends."""
    for tensor in graph.initializer:
        _to_single(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _to_single(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT


def _to_single(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))


def _name_constants(graph: onnx.GraphProto) -> None:
    """Make initializers of the tensors in Constant nodes, so that large ones can lie in the weights file."""
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
