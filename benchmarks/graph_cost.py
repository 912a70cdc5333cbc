"""Count what a network in an ONNX graph must compute and move. Needs the `export` extra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdk.errors import BackendUnavailable, BundleError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product at one size: multiplications, and elements read, written and learned."""

    name: str
    operator: str
    multiplications: int
    inputs: int
    outputs: int
    weights: int

    @property
    def elements(self) -> int:
        """What it moves at least, if none of it lies in a cache."""
        return self.inputs + self.outputs + self.weights


def count_layers(path: Path, shape: Sequence[int]) -> list[Layer]:
    """Count the layers of a graph that multiply; shape: of its one input, all of it given.

    Raises: BackendUnavailable without onnx; BundleError for a graph whose shapes cannot be told.
    """
    try:
        import onnx
    except ImportError as exc:
        raise BackendUnavailable("onnx is not installed; install sr-sdk[export]") from exc
    model = onnx.load(path, load_external_data=False)
    sizes = infer_shapes(model, shape)
    learned = {tensor.name for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        if all(name in learned for name in node.input):  # weights that are cast
            learned.update(node.output)
        if node.op_type not in MULTIPLIERS:
            continue
        names = (*node.input[:2], node.output[0])
        if missing := [name for name in names if not sizes.get(name)]:
            raise BundleError(f"{path}: the shape of {missing[0]} cannot be told")
        read, second, written = (sizes[name] for name in names)
        inputs, outputs, others = (math.prod(each) for each in (read, written, second))
        weights = others if node.input[1] in learned else 0  # attention multiplies what it has read
        layers.append(
            Layer(
                node.name,
                node.op_type,
                multiplications=_multiplications(node, read, second, written),
                inputs=inputs + others - weights,
                outputs=outputs,
                weights=weights,
            )
        )
    return layers


MULTIPLIERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def _multiplications(node: onnx.NodeProto, read: Sequence[int], second: Sequence[int], written: Sequence[int]) -> int:
    if node.op_type == "Conv":  # weights (out, in / groups, ...): each result meets those of one output channel
        return math.prod(written) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weights (in, out / groups, ...): each input meets those of its channel
        return math.prod(read) * math.prod(second[1:])
    is_turned = any(each.name == "transA" and each.i for each in node.attribute)
    return math.prod(written) * read[0 if is_turned else -1]


def infer_shapes(model: onnx.ModelProto, shape: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
    """Give the shape of every tensor whose sides are all known, for one shape of the input."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for dimension, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dimension.dim_value = size
    for dimension in fixed.graph.output[0].type.tensor_type.shape.dim:
        dimension.Clear()
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    found: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dimensions: Any = value.type.tensor_type.shape.dim
        if all(each.HasField("dim_value") for each in dimensions):
            found[value.name] = tuple(each.dim_value for each in dimensions)
    return found
