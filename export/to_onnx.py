"""The deploy graph (picture in, picture out) and its tracing to ONNX with shared fp16 weights."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from train.models import Network

from .errors import ExportError

OPSET = 17
IR_VERSION = 8
ALIGNMENT = 64  # of the data in a weights file, in bytes
WEIGHT_PREFIX = "network."


class DeployGraph(nn.Module):
    """A network between picture ends, as an engine runs it.

    ends "uint8": (N, h, w, 3) uint8 0-255 in and out; "float32": the same layout in [0, 1], clamped.
    Casts stand at the very ends and layout changes in float between them, which is what TensorRT takes.
    """

    def __init__(self, network: Network, *, scale: int, ends: str):
        super().__init__()
        self.network = network
        self.scale = scale
        self.ends = ends

    def forward(self, picture: Tensor) -> Tensor:
        x = picture.to(torch.float32).permute(0, 3, 1, 2)  # (N, h, w, 3) -> (N, 3, h, w)
        if self.ends == "uint8":
            x = x * (1 / 255)
        dtype = next(self.network.parameters()).dtype
        y = self.network(x.to(dtype), self.scale).to(torch.float32)
        if self.ends == "uint8":
            # The cast truncates, so half a code value is added; clamping first keeps it inside 0-255.
            return torch.floor(torch.clamp(y, 0, 1) * 255 + 0.5).permute(0, 2, 3, 1).to(torch.uint8)
        return torch.clamp(y, 0, 1).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a stage as one file: name in the graph -> (offset, length) in bytes, fp16, little endian."""

    name: str
    places: dict[str, tuple[int, int]]

    @classmethod
    def write(cls, path: Path, network: nn.Module) -> WeightsFile:
        """Write every parameter of a network as a safetensors file, whose data ONNX graphs point into.

        The format is described at https://github.com/huggingface/safetensors: eight bytes of the header's length, the
        header (JSON), then the data without gaps; large tensors come first, which keeps them aligned.
        """
        named = sorted(network.named_parameters(), key=lambda item: (-item[1].numel(), item[0]))
        offset, table, places = 0, {}, {}
        for name, parameter in named:
            length = 2 * parameter.numel()
            table[name] = {"dtype": "F16", "shape": list(parameter.shape), "data_offsets": [offset, offset + length]}
            places[WEIGHT_PREFIX + name] = (offset, length)
            offset += length
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % ALIGNMENT)
        start = 8 + len(header)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _, parameter in named:
                file.write(parameter.detach().numpy().astype("<f2").tobytes())
        return cls(path.name, {name: (start + offset, length) for name, (offset, length) in places.items()})


def trace(network: Network, *, scale: int, ends: str, weights: WeightsFile) -> onnx.ModelProto:
    """Trace the deploy graph to opset 17 with dynamic batch, height and width, its weights in `weights`.

    Raises: ExportError if the exporter does not deliver the opset or the checker refuses the graph.
    """
    graph = DeployGraph(network, scale=scale, ends=ends).eval()
    stride = network.stride(scale)
    example = torch.zeros(2, 2 * stride, 3 * stride, 3, dtype=getattr(torch, ends))
    dim = torch.export.Dim
    shapes = {"picture": {0: dim("batch"), 1: stride * dim("rows"), 2: stride * dim("columns")}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # of the exporter's own internals
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["picture"],
            output_names=["result"],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    opset = model.opset_import[0].version
    if opset != OPSET:
        raise ExportError(f"the exporter wrote opset {opset} instead of {OPSET}; use a torch version that converts")
    model.ir_version = IR_VERSION
    _name_dimensions(model)
    _share_weights(model, weights)
    # What the exporter notes about its own source lines names the machine's folders.
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    return model


def _name_dimensions(model: onnx.ModelProto) -> None:
    """Name the free dimensions alike, whatever the exporter called them, and drop its inferred inner shapes."""
    for value, names in ((model.graph.input[0], ("batch", "height", "width")),):
        for dimension, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            dimension.dim_param = name
    names = ("batch", "height_out", "width_out")
    for dimension, name in zip(model.graph.output[0].type.tensor_type.shape.dim, names, strict=False):
        dimension.dim_param = name
    del model.graph.value_info[:]


def _share_weights(model: onnx.ModelProto, weights: WeightsFile) -> None:
    """Point initializers at the weights file; a graph that computes in fp32 casts each once, at load."""
    graph = model.graph
    casts = []
    for tensor in list(graph.initializer):
        if tensor.name not in weights.places:
            continue
        if tensor.data_type == TensorProto.FLOAT:
            full = tensor.name
            half = f"{full}.fp16"
            casts.append(helper.make_node("Cast", [half], [full], name=f"{full}.cast", to=TensorProto.FLOAT))
            tensor.name = half
        else:
            full = tensor.name
        offset, length = weights.places[full]
        expected = int(np.prod(tensor.dims)) * 2
        assert length == expected, f"{full}: {length} bytes in the file, {expected} in the graph"
        tensor.data_type = TensorProto.FLOAT16
        for field in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", weights.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and numpy_helper.to_array(tensor).size > 4096:
            raise ExportError(f"a tensor of the graph is not one of the network's weights: {tensor.name}")


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Hold back what loggers say below errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
