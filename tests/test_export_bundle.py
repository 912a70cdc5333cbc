"""Export of a run: graphs, weights, parity, halo, manifest."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from export import bundle_writer, parity, verify
from export.bundle_writer import Options, export_run
from export.cli import main
from export.errors import ExportError
from export.precision import round_weights
from export.to_onnx import IR_VERSION, OPSET, DeployGraph, WeightsFile, trace
from sdk import Bundle, BundleError, Upscaler
from train.checkpoint import Checkpoint, save_checkpoint, stage_folder
from train.models import build_model
from train.recipe import recipe_from_dict
from train.run_folder import write_run

RECIPE = {
    "name": "tiny",
    "model": {"name": "fast", "scales": [2], "options": {"channels": 8, "blocks": [1, 1, 1]}},
    "stages": [{"name": "32", "size": 32}, {"name": "64", "size": 64}],
}


def seeded_network(recipe, seed: int):
    """A network whose output depends on its whole receptive field: the zero tail would hide a missing halo."""
    torch.manual_seed(seed)
    network = build_model(recipe.model, weights="random")
    torch.nn.init.normal_(network.tail.weight, std=0.02)
    return network


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tiny"
    recipe = recipe_from_dict(RECIPE)
    write_run(folder, recipe, {})
    for seed, stage in enumerate(recipe.stages):
        state = {f"model.{key}": value for key, value in seeded_network(recipe, seed).state_dict().items()}
        facts = {"stage": stage.name, "steps": 7, "recipe": RECIPE, "commit": "abc1234"}
        save_checkpoint(stage_folder(folder, stage.name), Checkpoint(state, facts))
    return folder


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "tiny-x2"
    export_run(run, out, Options(fp16=True, licence="CC0-1.0"))
    return Bundle.load(out)


def graphs(bundle: Bundle):
    for stage in bundle.manifest.stages:
        for graph in stage.graphs:
            yield stage, graph, onnx.load(bundle.folder / graph.file.name, load_external_data=False)


def test_every_stage_has_every_graph_over_one_weights_file(bundle):
    assert [stage.name for stage in bundle.manifest.stages] == ["32", "64"]
    for stage in bundle.manifest.stages:
        kinds = {(graph.precision, graph.ends) for graph in stage.graphs}
        assert kinds == {("fp32", "uint8"), ("fp32", "float32"), ("fp16", "uint8")}
    for stage, _, model in graphs(bundle):
        external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        places = {entry.value for t in external for entry in t.external_data if entry.key == "location"}
        assert places == {stage.weights.name}
        assert {tensor.data_type for tensor in external} == {onnx.TensorProto.FLOAT16}


def test_opset_and_ir_version_suit_old_parsers(bundle):
    for _, _, model in graphs(bundle):
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert model.ir_version == IR_VERSION


def test_uint8_stands_only_at_the_ends_between_casts(bundle):
    for _, graph, model in graphs(bundle):
        if graph.ends != "uint8":
            continue
        first = [node for node in model.graph.node if "picture" in node.input]
        last = [node for node in model.graph.node if "result" in node.output]
        assert [node.op_type for node in first + last] == ["Cast", "Cast"]
        inner = [n for n in model.graph.node if n.op_type == "Cast" and n not in last]
        assert all(node.attribute[0].i != onnx.TensorProto.UINT8 for node in inner)


def test_the_fp16_graph_convolves_in_half_precision(bundle):
    for stage, graph, _ in graphs(bundle):
        if graph.precision != "fp16":
            continue
        model = onnx.shape_inference.infer_shapes(onnx.load(bundle.folder / graph.file.name))
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
        assert convolutions, stage.name
        assert {types[name] for node in convolutions for name in node.input} == {onnx.TensorProto.FLOAT16}


def test_graphs_carry_no_path_of_the_machine(bundle):
    for _, graph, _ in graphs(bundle):
        data = (bundle.folder / graph.file.name).read_bytes()
        assert str(Path(__file__).parent.parent).encode() not in data
        assert b"site-packages" not in data and b"/home" not in data and b"/root" not in data


def test_the_manifest_tells_where_the_model_comes_from(bundle):
    manifest = json.loads((bundle.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["training"]["commit"] == "abc1234" and manifest["training"]["recipe"]["name"] == "tiny"
    assert manifest["licence"] == "CC0-1.0" and "invents detail" in manifest["notice"]
    for stage in bundle.manifest.stages:
        checked = {row.precision for row in stage.parity}
        assert {"fp32", "fp16"} <= checked
        assert all(row.max_error <= 1 for row in stage.parity if row.precision == "fp32")
        assert all(row.psnr_db >= 50 for row in stage.parity if row.precision == "fp16")


def test_the_upscaler_gives_what_pytorch_gives(bundle):
    recipe = recipe_from_dict(RECIPE)
    picture = np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    for seed, stage in enumerate(recipe.stages):
        network = seeded_network(recipe, seed).eval()
        round_weights(network)
        expected = verify.run_torch(network, picture[None], scale=2)[0]
        with Upscaler(bundle.folder, stage=stage.name, backend="onnxruntime") as upscaler:
            assert parity.compare(upscaler.upscale(picture), expected).max_error <= 1


def test_a_sixteen_bit_picture_runs_the_float_graph(bundle):
    picture = np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    with Upscaler(bundle.folder, backend="onnxruntime") as upscaler:
        eight = upscaler.upscale(picture)
        sixteen = upscaler.upscale(picture.astype(np.uint16) * 257)
    assert np.abs(sixteen / 257 - eight).max() <= 1  # half a code value of rounding, and fp32 noise at its edge


def test_halo_measurement_finds_a_known_receptive_field():
    # A box of 2*9+1 pixels needs nine pixels of context: with a stride of 4 that is 12.
    def blur(batch: np.ndarray) -> np.ndarray:
        padded = np.pad(batch[0].astype(np.float64), ((9, 9), (9, 9), (0, 0)))
        height, width = batch.shape[1:3]
        total = sum(padded[r : r + height, c : c + width] for r in range(19) for c in range(19))
        return np.rint(total / 361).astype(np.uint8)[None]

    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    rows = verify.measure_halo(blur, [picture], stride=4, scale=1)
    exact = [row.context for row in rows if row.error <= 1]
    assert exact[0] == 12
    errors = [row.error for row in rows]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1


def test_halo_measurement_refuses_a_network_that_cannot_be_tiled():
    calls = itertools.count(1)

    def drifting(batch: np.ndarray) -> np.ndarray:  # never twice the same, so no context is enough
        return batch + np.uint8(next(calls) * 3 % 250)

    with pytest.raises(ExportError, match="cannot be tiled"):
        verify.measure_halo(drifting, [np.zeros((96, 96, 3), np.uint8)], stride=8, scale=1)


def test_parity_failure_names_stage_precision_picture_and_place():
    picture = np.zeros((8, 8, 3), np.uint8)
    wrong = picture.copy()
    wrong[2, 5] = 3
    with pytest.raises(ExportError, match=r"stage 64.*fp32.*cat\.png.*3 code values at \(2, 5\)"):
        parity.check_parity(
            lambda batch: wrong[None], [("cat.png", picture, picture)], precision="fp32", where="stage 64 on x"
        )
    with pytest.raises(ExportError, match=r"fp16.*at least 50"):
        parity.check_parity(
            lambda batch: wrong[None] + 9, [("cat.png", picture, picture)], precision="fp16", where="stage 64 on x"
        )


def test_a_graph_that_differs_from_pytorch_is_not_exported(run, tmp_path, monkeypatch):
    true_reference = verify.run_torch
    monkeypatch.setattr(
        bundle_writer.verify, "run_torch", lambda *a, **k: np.clip(true_reference(*a, **k), 0, 253) + np.uint8(2)
    )
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export_run(run, tmp_path / "out", Options())
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_half_precision_are_refused():
    network = seeded_network(recipe_from_dict(RECIPE), 0)
    network.head.weight.data[0] = 1e6
    with pytest.raises(ExportError, match=r"head\.weight holds values beyond fp16"):
        round_weights(network)


def test_activation_memory_of_a_known_graph():
    helper = onnx.helper
    x = helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1, "h", "w", 3])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [1, "h", "w", 3])
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=onnx.TensorProto.UINT8),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)])
    # Two float tensors of three channels live at the Relu: 2 * 3 * 4 bytes for each pixel.
    assert verify.activation_bytes(model, window=16) == 24


def test_the_perceptual_unet_traces_and_matches_pytorch(tmp_path):
    import onnxruntime

    recipe = recipe_from_dict({"model": {"name": "perceptual-unet", "scales": [2, 4]}})
    torch.manual_seed(0)
    network = build_model(recipe.model, weights="random").eval()
    with torch.no_grad():
        network.fold()
    round_weights(network)
    weights = WeightsFile.write(tmp_path / "w.weights", network)
    model = trace(network, scale=4, ends="uint8", weights=weights)
    onnx.save(model, tmp_path / "u.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "u.onnx"), providers=["CPUExecutionProvider"])
    batch = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    (result,) = session.run(None, {"picture": batch})
    assert parity.compare(result[0], verify.run_torch(network, batch, scale=4)[0]).max_error <= 1


def test_deploy_graph_rounds_and_clamps():
    class Identity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(1.2))

        def forward(self, x, scale):
            return x * self.gain

    graph = DeployGraph(Identity(), scale=1, ends="uint8")
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    expected = torch.clamp(values.double() * 1.2, max=255).add(0.5).floor().to(torch.uint8)
    with torch.no_grad():
        result = graph(values)
    # 1.2 is not a float32: values that land on a half may fall to either side.
    assert (result.int() - expected.int()).abs().max() <= 1
    assert (result == expected).float().mean() > 0.95 and int(result.max()) == 255


# Command line and bad input


def invoke(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_command_exports_a_run(run, tmp_path):
    code, output = invoke(run, "--out", tmp_path / "b")
    assert code == 0 and "stages 32, 64" in output
    assert Bundle.load(tmp_path / "b").manifest.scale == 2


def test_command_keeps_the_figures_of_the_model(run, tmp_path):
    means = {"psnr_y_db": 30.5}
    rows = [{"dataset": "Set5", "method": m, "means": means, "pictures": [1]} for m in ("b", "bicubic", "other")]
    (tmp_path / "q.json").write_text(json.dumps({"protocol": "p", "rows": rows}), encoding="utf-8")
    code, _ = invoke(run, "--out", tmp_path / "b", "--figures", tmp_path / "q.json")
    kept = Bundle.load(tmp_path / "b").manifest.training["figures"]
    assert code == 0 and [row["method"] for row in kept["rows"]] == ["b", "bicubic"]
    code, output = invoke(run, "--out", tmp_path / "c", "--figures", tmp_path / "q.json")
    assert code == 1 and "no figures of c" in output


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}'])
def test_command_refuses_figures_of_another_kind(run, tmp_path, text):
    (tmp_path / "q.json").write_text(text, encoding="utf-8")
    code, output = invoke(run, "--out", tmp_path / "b", "--figures", tmp_path / "q.json")
    assert code == 1 and "not a result of sr-bench quality" in output


def test_command_refuses_an_existing_output(run, tmp_path):
    code, output = invoke(run, "--out", tmp_path)
    assert code == 1 and "exists already" in output


def test_command_refuses_what_is_no_run(tmp_path):
    code, output = invoke(tmp_path, "--out", tmp_path / "b")
    assert code == 1 and "not a run" in output


def test_command_refuses_a_run_without_a_finished_stage(tmp_path):
    write_run(tmp_path / "run", recipe_from_dict(RECIPE), {})
    code, output = invoke(tmp_path / "run", "--out", tmp_path / "b")
    assert code == 1 and "no finished stage" in output


def test_command_refuses_a_scale_that_was_not_trained(run, tmp_path):
    code, output = invoke(run, "--out", tmp_path / "b", "--scale", 3)
    assert code == 1 and "trained for 2" in output


def test_command_refuses_a_folder_without_pictures(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, output = invoke(run, "--out", tmp_path / "b", "--pictures", tmp_path / "empty")
    assert code == 1 and "no pictures" in output
    assert not (tmp_path / "b").exists()


def test_command_refuses_damaged_weights(run, tmp_path):

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = stage_folder(copy, "64") / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, output = invoke(copy, "--out", tmp_path / "b")
    assert code == 1 and "not a readable checkpoint" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_command_reports_a_full_disk(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_writer.onnx, "save", full)
    code, output = invoke(run, "--out", tmp_path / "b")
    assert code == 1 and "No space left" in output
    assert list(tmp_path.iterdir()) == []


def test_missing_engines_are_told(run, tmp_path, monkeypatch):

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, output = invoke(run, "--out", tmp_path / "b")
    assert code == 1 and "sr-sdk[cpu]" in output


def test_stage_context_is_the_smallest_exact_row(bundle):
    stage = bundle.manifest.stages[-1]
    exact = stage.context(error=1)
    assert all(row.error > 1 for row in stage.halo if row.context < exact)
    rows = tuple(row for row in stage.halo if row.context < exact)
    with pytest.raises(BundleError, match="no measured halo"):
        replace(stage, halo=rows).context(error=1)
