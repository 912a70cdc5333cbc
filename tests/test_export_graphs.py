"""Graphs as shipped and as exported: valid, of the right shapes, alike on all engines, readable for TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bundles
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from portability import PARSERS, TABLES, problems

from export.precision import in_half, round_weights
from export.to_onnx import WeightsFile, trace
from sdk import Bundle
from sdk.backends.folding import read_folded
from train.models import build_model
from train.recipe import ModelConfig

MODELS = Path(__file__).parent.parent / "sdk" / "models"
SHIPPED = sorted(path.parent.name for path in MODELS.glob("*/manifest.json"))
SCALE = 2
EXPORTED = {
    "fast": ({"channels": 8, "blocks": [1, 1, 1]}, [("fp32", "uint8"), ("fp32", "float32"), ("fp16", "uint8")]),
    "perceptual-unet": ({}, [("fp16", "uint8")]),  # 41 M parameters: what else there is differs in casts only
}
MIN_PSNR_DB = 50  # of fp16: the architecture's gate
DTYPES = {"uint8": np.uint8, "float32": np.float32}


@dataclass(frozen=True)
class Graph:
    """One file. full: that of the same stage and ends in fp32, if it is there."""

    path: Path
    precision: str
    ends: str
    stride: int
    scale: int
    full: Path | None

    def load(self) -> ModelProto:
        return onnx.load(self.path, load_external_data=False)


def in_bundle(folder: Path) -> Iterator[Graph]:
    bundle = Bundle.load(folder)
    for stage in bundle.manifest.stages:
        paths = {(graph.precision, graph.ends): folder / graph.file.name for graph in stage.graphs}
        for (precision, ends), path in paths.items():
            yield Graph(path, precision, ends, stage.stride, bundle.manifest.scale, paths.get(("fp32", ends)))


def export(name: str, folder: Path) -> Iterator[Graph]:
    """Export a network as it is before training, its zero tail apart."""
    options, kinds = EXPORTED[name]
    torch.manual_seed(0)
    network = build_model(ModelConfig(name, (SCALE,), options), weights="random").eval()
    network.fold()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    round_weights(network)
    weights = WeightsFile.write(folder / "main.weights", network)
    full = folder / "main.fp32.uint8.onnx"
    for precision, ends in kinds:
        path = folder / f"main.{precision}.{ends}.onnx"
        deployed = in_half(network) if precision == "fp16" else network
        onnx.save(trace(deployed, scale=SCALE, ends=ends, weights=weights), path)
        has_full = ("fp32", ends) in kinds
        yield Graph(path, precision, ends, network.stride(SCALE), SCALE, full if has_full else None)


@pytest.fixture(scope="module", params=[*SHIPPED, *bundles.BUILDERS, *EXPORTED])
def graphs(request, tmp_path_factory) -> list[Graph]:
    """Give all graphs of a shipped bundle, of one of tests/bundles.py, or of a network that is exported now."""
    if request.param in EXPORTED:
        return list(export(request.param, tmp_path_factory.mktemp("graphs")))
    folder = bundles.shared(request.param) if request.param in bundles.BUILDERS else MODELS / request.param
    return list(in_bundle(folder))


def test_no_shipped_graph_is_left_out():
    assert SHIPPED
    looked_at = {graph.path for name in SHIPPED for graph in in_bundle(MODELS / name)}
    assert looked_at == {*MODELS.glob("**/*.onnx")}


def test_the_checker_accepts_them(graphs):
    for graph in graphs:
        onnx.checker.check_model(str(graph.path), full_check=True)


def sized(model: ModelProto, shape: tuple[int, ...]) -> ModelProto:
    """Copy a graph for pictures of one shape; what it says of its output's sides is forgotten."""
    model = ModelProto.FromString(model.SerializeToString())
    for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim, shape):
        dimension.dim_value = size
    del model.graph.value_info[:]
    for dimension in model.graph.output[0].type.tensor_type.shape.dim:
        dimension.Clear()
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def output_shape(model: ModelProto) -> tuple[int, ...]:
    return tuple(dimension.dim_value for dimension in model.graph.output[0].type.tensor_type.shape.dim)


def test_shapes_follow_from_the_picture(graphs):
    for graph in graphs:
        for batch, rows, columns in ((1, 1, 1), (1, 2, 5), (3, 4, 3), (8, 32, 32)):
            height, width = rows * graph.stride, columns * graph.stride
            expected = (batch, height * graph.scale, width * graph.scale, 3)
            assert output_shape(sized(graph.load(), (batch, height, width, 3))) == expected, graph.path


def pictures(graph: Graph, make_photo) -> Iterator[np.ndarray]:
    """Give batches of two sizes for a graph's ends, a few strides wide."""
    side = max(graph.stride, 32)
    for batch, height, width in ((1, 2 * side, 2 * side), (2, side, 3 * side)):
        photos = np.stack([make_photo(height, width, seed) for seed in range(batch)])
        yield photos if graph.ends == "uint8" else photos.astype(np.float32) / 255


def code_values(result: np.ndarray) -> np.ndarray:
    """Give a result in code values of 8 bits, 0-255, in float."""
    return result.astype(np.float64) * (255 if result.dtype == np.float32 else 1)


def run_onnxruntime(path: Path, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return code_values(session.run(None, {session.get_inputs()[0].name: batch})[0])


def run_openvino(path: Path, batch: np.ndarray) -> np.ndarray:
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return code_values(model([batch])[0])


def test_onnxruntime_and_openvino_agree_within_a_code_value(graphs, make_photo):
    for graph in [graph for graph in graphs if graph.precision == "fp32"]:
        for batch in pictures(graph, make_photo):
            first, second = run_onnxruntime(graph.path, batch), run_openvino(graph.path, batch)
            assert first.shape == second.shape
            assert first.std() > 5  # a picture, and no grey
            assert abs(first - second).max() <= 1, graph.path


def run_in_half(path: Path, batch: np.ndarray) -> np.ndarray:
    """Run ONNX's own reference, which rounds to fp16 wherever the graph does; ONNX Runtime's CPU computes in fp32."""
    evaluator = ReferenceEvaluator(onnx.load(path))
    return code_values(evaluator.run(None, {evaluator.input_names[0]: batch})[0])


@pytest.mark.parametrize("run", [run_onnxruntime, run_in_half])
def test_half_precision_stays_near_full_precision(run, graphs, make_photo):
    for graph in [graph for graph in graphs if graph.precision == "fp16" and graph.full]:
        for seed, (height, width) in enumerate([(32, 32), (24, 48)]):
            batch = make_photo(height, width, seed)[None]
            error = run(graph.path, batch) - run_onnxruntime(graph.full, batch)
            assert np.mean(error**2) <= 255**2 / 10 ** (MIN_PSNR_DB / 10), graph.path


@pytest.mark.parametrize("parser", PARSERS)
def test_tensorrt_can_read_them(graphs, parser):
    """As they are given to it, with the weights' casts done: convolutions take no others."""
    for graph in graphs:
        assert problems(onnx.load_from_string(read_folded(graph.path)), parser) == [], graph.path
        if graph.precision == "fp32":
            assert any("are computed" in text for text in problems(graph.load(), parser)), graph.path


def test_graphs_given_to_tensorrt_compute_the_same(graphs, make_photo):
    for graph in graphs:
        if graph.precision == "fp32":
            session = onnxruntime.InferenceSession(read_folded(graph.path), providers=["CPUExecutionProvider"])
            picture = np.float32(make_photo(graph.stride, 2 * graph.stride)[None] / 255)
            batch = picture if graph.ends == "float32" else (picture * 255).astype(np.uint8)
            (result,) = session.run(None, {session.get_inputs()[0].name: batch})
            error = np.abs(code_values(result) - run_onnxruntime(graph.path, batch))
            assert error.max() <= 1, graph.path


def test_half_precision_stands_in_the_graph(graphs):
    for graph in [graph for graph in graphs if graph.precision == "fp16"]:
        model = onnx.shape_inference.infer_shapes(graph.load())
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        kinds = [types[node.output[0]] for node in model.graph.node if node.op_type == "Conv"]
        assert kinds.count(TensorProto.FLOAT16) > len(kinds) / 2, graph.path


def test_the_tables_are_those_of_the_parsers():
    assert set(PARSERS) == {"8.5", "8.6", "10.1"}
    assert [TABLES[parser]["opset_max"] for parser in ("8.5", "8.6", "10.1")] == [17, 17, 20]
    for parser in PARSERS:
        assert {"FP32", "FP16"} <= set(TABLES[parser]["operators"]["Conv"])
        assert "Bernoulli" not in TABLES[parser]["operators"]


NODES = {
    # what is wrong -> (nodes between the casts, from "x" to "y"; what is said; by which parsers)
    "operator": ([("Bernoulli", "x", "y", {})], "does not have it", PARSERS),
    "operator of newer parsers": (
        [("IsInf", "x", "b", {}), ("Cast", "b", "y", {"to": TensorProto.FLOAT})],
        "does not have it",
        ("8.5",),
    ),
    "type": (
        [("Cast", "x", "d", {"to": TensorProto.DOUBLE}), ("Relu", "d", "r", {}), ("Cast", "r", "y", {"to": 1})],
        "does not take DOUBLE",
        PARSERS,
    ),
    "type of one parser": (
        [("Cast", "x", "b", {"to": TensorProto.BFLOAT16}), ("Tanh", "b", "t", {}), ("Cast", "t", "y", {"to": 1})],
        "does not take BF16",
        ("8.5", "8.6"),
    ),
    "cubic": ([("Resize", ["x", "", "scales"], "y", {"mode": "cubic"})], "mode cubic", PARSERS),
    "crop": (
        [("Resize", ["x", "roi", "scales"], "y", {"coordinate_transformation_mode": "tf_crop_and_resize"})],
        "coordinate_transformation_mode tf_crop",
        PARSERS,
    ),
    "computed sizes": (
        [("Shape", "x", "size", {}), ("Resize", ["x", "", "", "size"], "y", {})],
        "size is computed",
        PARSERS,
    ),
    "uint8 inside": (
        [
            ("Cast", "x", "u", {"to": TensorProto.UINT8}),
            ("Transpose", "u", "v", {}),
            ("Cast", "v", "y", {"to": TensorProto.FLOAT}),
        ],
        "Transpose reads u in uint8",
        PARSERS,
    ),
    "quantised in uint8": (
        [("QuantizeLinear", ["x", "one"], "q", {}), ("DequantizeLinear", ["q", "one"], "y", {})],
        "QuantizeLinear makes q in uint8",
        PARSERS,
    ),
    "zero point": (
        [("QuantizeLinear", ["x", "one", "three"], "q", {}), ("DequantizeLinear", ["q", "one", "three"], "y", {})],
        "zero point three",
        PARSERS,
    ),
    "global pooling": ([("GlobalAveragePool", "x", "g", {}), ("Mul", ["x", "g"], "y", {})], "whole picture", PARSERS),
    "instance normalisation": (
        [("InstanceNormalization", ["x", "ones", "ones"], "y", {})],
        "whole picture",
        PARSERS,
    ),
    "mean over space": (
        [("ReduceMean", "x", "m", {"axes": [2, 3]}), ("Sub", ["x", "m"], "y", {})],
        "more than channels",
        PARSERS,
    ),
    "mean over everything": ([("ReduceMean", "x", "m", {}), ("Sub", ["x", "m"], "y", {})], "channels", PARSERS),
    "dilated pooling": (
        [("MaxPool", "x", "y", {"kernel_shape": [3, 3], "dilations": [2, 2], "pads": [2, 2, 2, 2]})],
        "dilations",
        PARSERS,
    ),
    "computed weights": (
        [("Cast", "half", "weights", {"to": TensorProto.FLOAT}), ("Conv", ["x", "weights"], "y", {})],
        "weights are computed",
        PARSERS,
    ),
    "8-bit weights": (
        [("DequantizeLinear", ["bytes", "one", "zero"], "weights", {}), ("Conv", ["x", "weights"], "y", {})],
        "bytes are computed",
        PARSERS,
    ),
    "computed axes": (
        [("Shape", "starts", "axes", {}), ("Slice", ["x", "starts", "ends", "axes"], "y", {})],
        "axes is computed",
        PARSERS,
    ),
}


def planted(nodes, *, opset: int = 17, ir_version: int = 8, ends: int = TensorProto.UINT8) -> ModelProto:
    """Make a graph between casts, from a picture to a picture."""
    made = [helper.make_node("Cast", ["picture"], ["first"], to=TensorProto.FLOAT)]
    made.append(helper.make_node("Transpose", ["first"], ["x"], perm=[0, 3, 1, 2]))
    for kind, inputs, output, given in nodes:
        made.append(helper.make_node(kind, [inputs] if isinstance(inputs, str) else inputs, [output], **given))
    made.append(helper.make_node("Transpose", ["y"], ["last"], perm=[0, 2, 3, 1]))
    made.append(helper.make_node("Cast", ["last"], ["result"], to=ends))
    arrays = {
        "scales": np.array([1, 1, 2, 2], np.float32), "roi": np.zeros(8, np.float32), "one": np.float32(1),
        "three": np.int8(3), "zero": np.int8(0), "ones": np.ones(3, np.float32), "starts": np.array([0]),
        "ends": np.array([1]), "channels": np.array([1]), "half": np.ones((3, 3, 1, 1), np.float16),
        "bytes": np.ones((3, 3, 1, 1), np.int8), "floats": np.ones((3, 3, 1, 1), np.float32),
    }  # fmt: skip
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    picture = helper.make_tensor_value_info("picture", ends, ["batch", "height", "width", 3])
    result = helper.make_tensor_value_info("result", ends, None)
    graph = helper.make_graph(made, "planted", [picture], [result], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


@pytest.mark.parametrize("name", NODES)
def test_what_a_parser_does_not_take_is_found(name):
    nodes, said, parsers = NODES[name]
    for parser in PARSERS:
        found = problems(planted(nodes), parser)
        assert any(said in text for text in found) == (parser in parsers), (parser, found)


@pytest.mark.parametrize("parser", PARSERS)
def test_what_the_parsers_take_passes(parser):
    nodes = [
        ("QuantizeLinear", ["x", "one", "zero"], "q", {}),
        ("DequantizeLinear", ["q", "one", "zero"], "d", {}),
        ("QuantizeLinear", ["floats", "one", "zero"], "b", {}),
        ("DequantizeLinear", ["b", "one", "zero"], "w", {}),
        ("Conv", ["d", "w"], "c", {}),
        ("Cast", "c", "h", {"to": TensorProto.FLOAT16}),
        ("Relu", "h", "r", {}),
        ("ReduceMean", "r", "m", {"axes": [1]}),
        ("Sub", ["r", "m"], "s", {}),
        ("Cast", "s", "f", {"to": TensorProto.FLOAT}),
        ("Slice", ["f", "starts", "ends", "channels"], "p", {}),
        ("Add", ["p", "f"], "a", {}),
        ("Resize", ["a", "", "scales"], "y", {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}),
    ]
    assert problems(planted(nodes), parser) == []


RELU = [("Relu", "x", "y", {})]


def test_versions_that_a_parser_does_not_know_are_found():
    assert problems(planted(RELU, opset=18), "8.6") == ["opset 18: 8.6 reads up to 17"]
    assert problems(planted(RELU, opset=18), "10.1") == []
    assert problems(planted(RELU, ir_version=9), "10.1") == ["IR version 9"]


def test_an_antialiased_resize_is_found():
    nodes = [("Resize", ["x", "", "scales"], "y", {"mode": "linear", "antialias": 1})]
    assert problems(planted(nodes, opset=18), "10.1") == ["Resize y: antialias 1"]


def test_a_transpose_of_the_picture_itself_is_found():
    model = planted(RELU)
    model.graph.node[0].CopyFrom(helper.make_node("Transpose", ["picture"], ["first"], perm=[0, 3, 1, 2]))
    model.graph.node[1].CopyFrom(helper.make_node("Cast", ["first"], ["x"], to=TensorProto.FLOAT))
    for parser in PARSERS:
        found = problems(model, parser)
        assert {"Transpose reads picture in uint8", "Cast reads first in uint8"} <= set(found)


def test_a_picture_that_is_read_twice_is_found():
    model = planted([("Shape", "picture", "size", {}), ("Relu", "x", "y", {})])
    found = problems(model, "10.1")
    assert {"the input picture is read 2 times", "Shape reads picture in uint8"} <= set(found)


def test_operators_and_types_of_others_are_found():
    model = planted([("Magic", "x", "y", {"domain": "org.example"})])
    model.opset_import.append(helper.make_opsetid("org.example", 1))
    found = problems(model, "10.1")
    assert {"operators of org.example", "Magic y: 10.1 does not have it"} <= set(found)
    assert "Relu z: y is of no known type" not in found
    assert "Magic y: y is of no known type" in found


def test_graphs_inside_graphs_are_found():
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "inner", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    model = planted([("If", "yes", "y", {"then_branch": inner, "else_branch": inner})])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    assert "If y: it holds a graph" in problems(model, "10.1")


def test_a_wrong_shape_would_be_found(graphs):
    """The inference is not of what the graph only says of itself."""
    model = graphs[0].load()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    side = 2 * graphs[0].stride
    assert output_shape(sized(model, (1, side, side, 3)))[1] == side * graphs[0].scale
