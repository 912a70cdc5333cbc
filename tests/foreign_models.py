"""Super-resolution networks as other people export them, small: one residual block over an enlarged picture.

The block answers to texture and not to plain colour, but for a knee above white, as training leaves it: pictures in
another range than the network's come out darker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper

CHANNELS = 12
KNEE = 1.2  # of white
PERMUTED = {"NCHW": (0, 3, 1, 2), "NHWC": (0, 1, 2, 3)}
BACK = {"NCHW": (0, 2, 3, 1), "NHWC": (0, 1, 2, 3)}


@dataclass
class Nodes:
    """Collects a graph; `add` gives the name of a node's result."""

    half: bool = False
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"n{len(self.nodes)}", **attributes))
        return output

    def tensor(self, values: Any, dtype: type = np.float32) -> str:
        dtype = np.float16 if self.half and dtype is np.float32 else dtype
        name = f"w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name


@dataclass(frozen=True)
class Foreign:
    """How a network is made.

    white: 1 or 255. downsampling: of the block's input, by SpaceToDepth. knee: strength of the darkening above white.
    size: (height, width) and batch that the file claims, 0 is free. upsampling: the operator of the enlarged picture.
    tail: adds nodes behind. bgr: the picture's blue and red are told apart, blue first.
    """

    scale: int = 2
    layout: str = "NCHW"
    white: int = 1
    downsampling: int = 1
    knee: float = 0.2
    size: tuple[int, int] = (0, 0)
    batch: int = 0
    opset: int = 17
    half: bool = False
    upsampling: str = "Resize"
    tail: Callable[[Nodes, str], str] | None = None

    def write(self, path: Path) -> Path:
        """Write the network."""
        graph = Nodes(half=self.half)
        x = graph.add("Transpose", "in put", perm=[0, 3, 1, 2]) if self.layout == "NHWC" else "in put"
        if self.white != 1:
            x = graph.add("Mul", x, graph.tensor(1 / self.white))
        y = graph.add("Add", self._enlarge(graph, x), self._block(graph, x))
        if self.tail:
            y = self.tail(graph, y)
        if self.white != 1:
            y = graph.add("Mul", y, graph.tensor(self.white))
        graph.add("Transpose" if self.layout == "NHWC" else "Identity", y, output="out put", **self._back())
        return write_graph(
            path,
            graph,
            shape_in=self._shape("h", "w", 1),
            shape_out=self._shape("H", "W", self.scale),
            opset=self.opset,
        )

    def _back(self) -> dict[str, Any]:
        return {"perm": [0, 2, 3, 1]} if self.layout == "NHWC" else {}

    def _shape(self, height: str, width: str, scale: int) -> list[str | int]:
        rows, columns = (side * scale or name for side, name in zip(self.size, (height, width)))
        batch = self.batch or "n"
        return [batch, 3, rows, columns] if self.layout == "NCHW" else [batch, rows, columns, 3]

    def _enlarge(self, graph: Nodes, x: str) -> str:
        """Enlarge the picture itself; bilinear as of opset 9 is that of no later default."""
        scales = np.array([1, 1, self.scale, self.scale], np.float32)
        graph.tensors.append(numpy_helper.from_array(scales, "scales"))
        if self.upsampling == "Upsample":
            return graph.add("Upsample", x, "scales", mode="linear")
        roi = "" if self.opset >= 13 else graph.tensor([])
        attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return graph.add("Resize", x, roi, "scales", **attributes)

    def _block(self, graph: Nodes, x: str) -> str:
        rng = np.random.default_rng(5)
        factor = self.downsampling
        inputs, outputs = 3 * factor**2, 3 * (self.scale * factor) ** 2
        if factor > 1:
            x = graph.add("SpaceToDepth", x, blocksize=factor)
        first = rng.normal(0, 0.6 / np.sqrt(9 * inputs), (CHANNELS, inputs, 3, 3))
        first -= first.mean(axis=(1, 2, 3), keepdims=True)
        first[0] = 0
        first[0, :, 1, 1] = 1 / inputs
        bias = rng.normal(0, 0.02, CHANNELS)
        bias[0] = -KNEE
        slopes = rng.uniform(0.1, 0.3, (CHANNELS, 1, 1))
        slopes[0] = 0
        second = rng.normal(0, 0.8 / np.sqrt(9 * CHANNELS), (outputs, CHANNELS, 3, 3))
        second[:, 0] = 0
        second[:, 0, 1, 1] = -self.knee
        y = graph.add("Conv", x, graph.tensor(first), graph.tensor(bias), pads=[1] * 4)
        y = graph.add("PRelu", y, graph.tensor(slopes))
        y = graph.add("Conv", y, graph.tensor(second), pads=[1] * 4)
        if self.scale * factor == 1:
            return y
        mode = {"mode": "CRD"} if self.opset >= 11 else {}
        return graph.add("DepthToSpace", y, blocksize=self.scale * factor, **mode)


def write_graph(
    path: Path,
    graph: Nodes,
    *,
    shape_in: Sequence[str | int],
    shape_out: Sequence[str | int],
    opset: int = 17,
    more_inputs: Sequence[str] = (),
    more_outputs: Sequence[str] = (),
) -> Path:
    """Write any graph from "in put" to "out put"."""
    kind = TensorProto.FLOAT16 if graph.half else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, kind, shape_in) for name in ("in put", *more_inputs)]
    outputs = [helper.make_tensor_value_info(name, kind, shape_out) for name in ("out put", *more_outputs)]
    body = helper.make_graph(graph.nodes, "g", inputs, outputs, graph.tensors, doc_string="/home/somebody")
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 19 else 10)
    model.producer_name = "somebody"
    model.metadata_props.add(key="author", value="somebody")
    onnx.save(onnx.shape_inference.infer_shapes(model), path)  # exporters leave inner shapes, fixed ones too
    return path


def run_directly(path: Path, picture: np.ndarray, foreign: Foreign, *, bgr: bool = False) -> np.ndarray:
    """Run a file as its author would: (h, w, 3) uint8 -> (h*scale, w*scale, 3) uint8."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    order = slice(None, None, -1 if bgr else 1)
    x = (picture[None, ..., order] / 255 * foreign.white).astype(np.float16 if foreign.half else np.float32)
    (y,) = session.run(None, {"in put": np.ascontiguousarray(x.transpose(PERMUTED[foreign.layout]))})
    y = y.astype(np.float64).transpose(BACK[foreign.layout])[0, ..., order] / foreign.white
    return np.floor(np.clip(y, 0, 1) * 255 + 0.5).astype(np.uint8)
