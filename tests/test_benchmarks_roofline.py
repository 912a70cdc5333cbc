from __future__ import annotations

import json
import sys

import bundles
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from benchmarks import graph_cost, rates, roofline
from benchmarks.cli import main
from benchmarks.contestants import Contestant
from benchmarks.graph_cost import Layer, count_layers
from sdk import Bundle
from sdk.errors import BackendUnavailable, BundleError


def save_graph(path, nodes, weights, *, shape):
    """Save a graph of float tensors from "x" to "y"."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [helper.make_tensor(name, TensorProto.FLOAT, dims, [0.5] * size) for name, (dims, size) in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_layers_of_a_graph_counted_by_hand(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h1"], name="plain", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h1"], ["h2"]),
        helper.make_node("Conv", ["h2", "b"], ["h3"], name="grouped", group=2, strides=[2, 2], kernel_shape=[2, 2]),
        helper.make_node("ConvTranspose", ["h3", "c"], ["h4"], name="up", strides=[2, 2], kernel_shape=[2, 2]),
        helper.make_node("Cast", ["d"], ["d16"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["h4", "d16"], ["h5"], name="product"),
        helper.make_node("Transpose", ["h5"], ["h6"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["h6", "h5"], ["y"], name="attention"),
    ]
    weights = {
        "a": ([8, 3, 3, 3], 216), "b": ([4, 4, 2, 2], 64), "c": ([4, 5, 2, 2], 80), "d": ([6, 7], 42)
    }  # fmt: skip
    path = save_graph(tmp_path / "g.onnx", nodes, weights, shape=["n", 3, "h", "w"])
    assert count_layers(path, (2, 3, 4, 6)) == [
        Layer("plain", "Conv", 2 * 8 * 4 * 6 * 27, 2 * 3 * 24, 2 * 8 * 24, 216),
        Layer("grouped", "Conv", 2 * 4 * 2 * 3 * 16, 2 * 8 * 24, 2 * 4 * 6, 64),
        Layer("up", "ConvTranspose", 2 * 4 * 6 * 20, 2 * 4 * 6, 2 * 5 * 24, 80),
        Layer("product", "MatMul", 2 * 5 * 4 * 7 * 6, 2 * 5 * 24, 2 * 5 * 4 * 7, 42),
        Layer("attention", "MatMul", 2 * 5 * 7 * 7 * 4, 2 * 2 * 5 * 4 * 7, 2 * 5 * 7 * 7, 0),
    ]


def test_a_shape_that_cannot_be_told_is_an_error(tmp_path):
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"]),
        helper.make_node("Cast", ["where"], ["h"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["h", "a"], ["y"]),
    ]
    path = save_graph(tmp_path / "g.onnx", nodes, {"a": ([3, 3], 9)}, shape=["n", "m"])
    with pytest.raises(BundleError, match="the shape of h cannot be told"):
        count_layers(path, (4, 4))


def test_the_graph_has_the_cost_that_pytorch_counted():
    bundle = Bundle.load("fast-x2")
    graph = bundle.folder / bundle.stage().graph(precision="fp32", ends="uint8").file.name
    count = sum(layer.multiplications for layer in count_layers(graph, (1, 128, 128, 3)))
    assert count / 256**2 / 1000 == pytest.approx(bundle.manifest.training["kmac_per_pixel"], rel=0.01)


def test_a_row_set_by_hand():
    layers = [Layer("a", "Conv", 3_000_000, 1000, 3000, 1000), Layer("b", "Conv", 2_000_000, 3000, 500, 1500)]
    row = roofline.make_row(layers, [4.0, 2.0, 3.0], width=2, end_bytes=15_000, matrix=1e10, copy=1e8)
    assert (row["layers"], row["gigaoperations"]) == (2, 0.01)
    assert (row["end_mb"], row["layer_mb"]) == (0.02, 0.02) and row["intensity"] == 500
    assert (row["floor_ms"], row["bound"]) == (1.0, "compute")
    assert (row["median_ms"], row["min_ms"], row["max_ms"]) == (3, 2, 4)
    assert row["share_of_floor"] == 0.3333 and row["reached_gops"] == 3.3
    slow = roofline.make_row(layers, [4.0], width=4, end_bytes=15_000, matrix=1e10, copy=1e7)
    assert slow["bound"] == "ends" and slow["floor_ms"] == 2.5


@pytest.fixture
def known_rates(monkeypatch):
    monkeypatch.setattr(roofline, "_matrix_rate", lambda device, precision: {"fp32": 1e11, "bf16": 4e11}[precision])
    monkeypatch.setattr(roofline, "_copy_rate", lambda device: 1e10)


def test_command_measures_every_stage_and_engine(known_rates, tmp_path):
    out = tmp_path / "roofline.json"
    options = ["roofline", "--model", bundles.shared("blur"), "--size", "33x48", "--repeats", 2, "--json", out]
    result = CliRunner().invoke(main, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert (written["schema"], written["kind"], written["repeats"]) == (1, "roofline", 2)
    engines = {row["engine"] for row in written["rows"]}
    assert {"onnxruntime fp32", "openvino fp32"} <= engines and "tensorrt fp16 cuda:0" not in engines
    assert any(item["engine"] == "tensorrt fp16 cuda:0" for item in written["skipped"])
    for row in written["rows"]:
        assert row["size"] == [33, 48] and row["gigaoperations"] > 0
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"], rel=0.05, abs=1e-4)
    assert "share of floor" in result.stdout and "33x48" in result.stdout


def test_a_wrong_stage_and_missing_packages_are_one_line(monkeypatch):
    result = CliRunner().invoke(main, ["roofline", "--stage", "7"])
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and "7" in result.stderr
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendUnavailable, match=r"onnx is not installed; install sr-sdk\[export\]"):
        graph_cost.count_layers("a.onnx", (1, 8, 8, 3))


def test_rates_are_work_over_the_best_time(monkeypatch):
    seconds = {"works": []}

    def best(torch, device, work):
        work()
        seconds["works"].append(device)
        return 0.5

    monkeypatch.setattr(rates, "_best_s", best)
    monkeypatch.setattr(rates, "MATRIX_SIDES", {"cpu": 64})
    monkeypatch.setattr(rates, "COPY_MIB", 1)
    assert rates.matrix_rate("cpu", "fp32") == rates.matrix_rate("cpu", "bf16") == 2 * 64**3 / 0.5
    assert rates.copy_rate("cpu") == 2 * (1 << 20) / 0.5 and seconds["works"] == ["cpu"] * 3
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        rates.copy_rate("cuda:0")


def test_without_pytorch_it_is_told_before_anything_is_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(roofline, "take_turns", None)
    roofline._matrix_rate.cache_clear()
    result = CliRunner().invoke(main, ["roofline", "--model", str(bundles.shared("blur")), "--size", "16x16"])
    assert result.exit_code == 1 and "PyTorch is not installed" in result.stderr


def test_an_engine_on_a_gpu_that_pytorch_does_not_see_is_left_out(monkeypatch):
    def rate(device, precision):
        if device != "cpu":
            raise BackendUnavailable("PyTorch sees no CUDA device")
        return 1e11

    monkeypatch.setattr(roofline, "_matrix_rate", rate)
    here, there = Contestant("openvino", "cpu", "fp32"), Contestant("tensorrt", "cuda:0", "fp16")
    rated, unrated = roofline._with_rates({here: len, there: len})
    assert rated == {here: len}
    assert unrated == [{"contestant": "tensorrt fp16 cuda:0", "reason": "PyTorch sees no CUDA device"}]
