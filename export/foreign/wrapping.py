"""Put a bundle's picture ends around a foreign network, and its weights into one file for all graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sdk import tiling

from .. import verify
from ..to_onnx import ALIGNMENT, IR_VERSION, OPSET, WeightsFile
from .probing import Findings
from .reading import CHANNEL_AXIS
from .session import run_values

ENDS = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
MIN_SHARED_BYTES = 4 << 10  # smaller tensors stay in the graphs: sizes and scales, which engines read early
MEASURED_SIDE = 16  # of the picture whose activations are counted


def wrap(network: onnx.ModelProto, findings: Findings, *, ends: str, bgr: bool) -> onnx.ModelProto:
    """Make the deploy graph of a converted network, as export.to_onnx.DeployGraph is for ours.

    ends "uint8": (N, h, w, 3) uint8 0-255 in and out; "float32": the same layout in [0, 1], clamped. bgr: the network
    takes and gives blue first.
    """
    source, result = network.graph.input[0].name, network.graph.output[0].name
    chain = _Chain()
    x = "picture"
    if ends == "uint8":
        x = chain.node("Cast", x, to=TensorProto.FLOAT)
    if findings.input_layout == "NCHW":
        x = chain.node("Transpose", x, perm=[0, 3, 1, 2])
    if bgr:
        x = chain.reverse_channels(x, CHANNEL_AXIS[findings.input_layout])
    white_in = 255 if ends == "uint8" else 1
    if findings.white != white_in:
        x = chain.node("Mul", x, chain.constant(findings.white / white_in))
    chain.node("Identity", x, output=source)
    before, chain.nodes = chain.nodes, []

    y = chain.node("Clip", result, chain.constant(0), chain.constant(findings.white))
    if findings.white != white_in:
        y = chain.node("Mul", y, chain.constant(white_in / findings.white))
    if ends == "uint8":
        # The cast truncates, so half a code value is added; clamping first keeps it inside 0-255.
        y = chain.node("Floor", chain.node("Add", y, chain.constant(0.5)))
    if bgr:
        y = chain.reverse_channels(y, CHANNEL_AXIS[findings.output_layout])
    if findings.output_layout == "NCHW":
        y = chain.node("Transpose", y, perm=[0, 2, 3, 1])
    if ends == "uint8":
        chain.node("Cast", y, to=TensorProto.UINT8, output="result")
    else:
        chain.node("Identity", y, output="result")

    graph = helper.make_graph(
        [*before, *network.graph.node, *chain.nodes],
        "picture",
        [helper.make_tensor_value_info("picture", ENDS[ends], ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("result", ENDS[ends], ["batch", "height_out", "width_out", 3])],
        [*network.graph.initializer, *chain.constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


class _Chain:
    """Collects the nodes around a network; methods give the name of their result."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._count = 0

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        self._count += 1
        name = f"ends/{kind}.{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output or name], name=name, **attributes))
        return output or name

    def constant(self, value: float) -> str:
        return self._add(np.float32(value))

    def reverse_channels(self, x: str, axis: int) -> str:
        return self.node("Gather", x, self._add(np.array([2, 1, 0])), axis=axis)

    def _add(self, values: np.ndarray | np.float32) -> str:
        name = f"ends/constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name


def write_weights(path: Path, network: onnx.ModelProto) -> WeightsFile:
    """Write the large tensors of a network as they are: in fp32, so that nothing of it is lost."""
    places = {}
    with open(path, "wb") as file:
        for tensor in network.graph.initializer:
            data = numpy_helper.to_array(tensor).tobytes()
            if len(data) > MIN_SHARED_BYTES:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                places[tensor.name] = (file.tell(), len(data))
                file.write(data)
    return WeightsFile(path.name, places)


def share_weights(model: onnx.ModelProto, weights: WeightsFile) -> None:
    """Point a graph's large tensors at the weights file."""
    for tensor in model.graph.initializer:
        if tensor.name not in weights.places:
            continue
        offset, length = weights.places[tensor.name]
        shell = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        shell.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights.name), ("offset", offset), ("length", length)):
            shell.external_data.add(key=key, value=str(value))
        tensor.CopyFrom(shell)


def count_activation_bytes(model: onnx.ModelProto, *, stride: int) -> int:
    """Count the peak memory of live activations for each LR pixel, as verify.activation_bytes does.

    The shapes are those of a run: graphs that compute sizes while they run leave them open to inference.
    """
    side = tiling.round_up(MEASURED_SIDE, stride)
    names = [name for node in model.graph.node for name in node.output]
    values = run_values(model, names, np.zeros((1, side, side, 3), np.uint8))
    known = onnx.ModelProto()
    known.CopyFrom(model)
    known.graph.value_info.extend(
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in values.items()
        if name != "result"
    )
    return verify.activation_bytes(known, window=side)
