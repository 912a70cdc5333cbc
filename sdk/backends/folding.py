"""ONNX graphs as TensorRT's parser takes them: with weights that are floating-point constants.

A bundle's graphs share one file of fp16 weights, which fp32 convolutions read through a Cast, and int8 graphs hold
8-bit weights. TensorRT 8 takes neither: computed weights only from a pair of Q and DQ
(https://github.com/onnx/onnx-tensorrt/issues/790), and no 8-bit constants
(https://github.com/microsoft/onnxruntime/issues/14229).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailable


def read_folded(path: Path) -> bytes:
    """Read a graph and its weights file as one serialised model for TensorRT.

    Raises: BackendUnavailable if onnx is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError as exc:
        raise BackendUnavailable("engines are built with onnx: pip install 'sr-sdk[tensorrt]'") from exc
    model = onnx.load(path)
    fold_casts(model)
    _pair_quantisers(model)
    data: bytes = model.SerializeToString()
    return data


def fold_casts(model: Any) -> None:
    """Turn fp16 weights with a Cast behind each into plain fp32 ones.

    model: an onnx.ModelProto with its weights inside, changed in place.
    """
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    halves = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    nodes, folded = [], {}
    for node in graph.node:
        is_cast = node.op_type == "Cast" and node.input[0] in halves
        if is_cast and node.attribute[0].i == TensorProto.FLOAT:
            folded[node.output[0]] = halves[node.input[0]]
        else:
            nodes.append(node)
    for name, half in folded.items():
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(half).astype(np.float32), name))
    _replace_nodes(graph, nodes, unused={half.name for half in folded.values()})


def _pair_quantisers(model: Any) -> None:
    """Turn 8-bit weights before a DequantizeLinear into fp32 ones before a QuantizeLinear that gives the same."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes, paired = [], set()
    for node in graph.node:
        weights = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weights is not None and weights.data_type == TensorProto.INT8:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            values, scale = (numpy_helper.to_array(tensors[name]) for name in node.input[:2])
            if scale.ndim:
                scale = scale.reshape([-1 if number == axis % values.ndim else 1 for number in range(values.ndim)])
            floats, bits = f"{weights.name}.float", f"{weights.name}.int8"
            if weights.name not in paired:
                paired.add(weights.name)
                graph.initializer.append(numpy_helper.from_array(values.astype(np.float32) * scale, floats))
                inputs = [floats, *node.input[1:]]
                nodes.append(helper.make_node("QuantizeLinear", inputs, [bits], name=bits, axis=axis))
            node.input[0] = bits
        nodes.append(node)
    _replace_nodes(graph, nodes, unused=paired)


def _replace_nodes(graph: Any, nodes: list[Any], *, unused: set[str]) -> None:
    """Give a graph other nodes, and take away those tensors that none of them reads."""
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in unused - read]:
        graph.initializer.remove(tensor)
