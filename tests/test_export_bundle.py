"""Export of a run: graphs, weights, parity, halo, manifest."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from export import bundle_writer, parity, verify
from export.bundle_writer import Options, export_network, export_run
from export.cli import main
from export.cost import measure_cost
from export.errors import ExportError
from export.precision import find_islands, in_half, round_weights
from export.to_onnx import IR_VERSION, OPSET, DeployGraph, WeightsFile, trace
from sdk import Bundle, BundleError, Upscaler
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, stage_folder
from train.models import Network, build_model
from train.recipe import load_recipe, recipe_from_dict
from train.run_folder import load_run, write_run

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


# fp16 with islands of fp32


class Loud(torch.nn.Module):
    """Two convolutions; what passes between them is `gain` times as large as what comes in and goes out."""

    def __init__(self, channels: int, gain: float):
        super().__init__()
        self.gain = gain
        self.conv1 = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv2(torch.relu(self.conv1(x)) * self.gain / self.gain)


class Offset(torch.nn.Module):
    """Adds what half precision has few digits beside, and takes it away again."""

    def forward(self, x, *, offset: float):
        return (x + offset) - offset


class Trunk(torch.nn.Sequential):
    """Residual parts that are called as one module."""

    def forward(self, x):
        for part in self:
            x = x + part(x)
        return x


class LoudNetwork(Network):
    """Gains and offset beyond fp16 where a test wants them; a trunk, or parts in a ModuleList, which is not called."""

    scales = (2,)

    def __init__(self, gains=(1.0, 1.0), offset=0.0, root_gain=1.0, trunk=False):
        super().__init__()
        torch.manual_seed(2)
        self.head = torch.nn.Conv2d(3, 8, 3, padding=1)
        parts = [Loud(8, gain) for gain in gains]
        self.body = Trunk(*parts) if trunk else torch.nn.ModuleList(parts)
        self.wide = torch.nn.Conv2d(8, 8, 7, padding=3)
        self.offset, self.by = Offset(), offset
        self.root_gain = root_gain
        self.tail = torch.nn.Conv2d(8, 12, 3, padding=1)
        self.shuffle = torch.nn.PixelShuffle(2)

    def stride(self, scale):
        return 4

    def forward(self, lr, scale):
        x = self.wide(self.head(lr)) * self.root_gain / self.root_gain
        x = self.body(x) if isinstance(self.body, Trunk) else Trunk(*self.body)(x)
        return self.shuffle(self.tail(self.offset(x, offset=self.by))) + 0.5


def quality_of(network):
    """Give the PSNR of a copy of the network against itself, on a small picture."""
    picture = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    reference = verify.run_torch(network, picture, scale=2)[0]
    return lambda candidate: parity.compare(verify.run_torch(candidate, picture, scale=2)[0], reference).psnr_db


@pytest.mark.parametrize(
    "faults,islands",
    [
        ({"gains": (1.0, 3e6)}, ("body.1",)),
        ({"gains": (3e6, 1.0)}, ("body.0",)),
        ({"gains": (3e6, 3e6)}, ("body.0", "body.1")),  # neither helps without the other
        ({"offset": 3e3}, ("offset",)),  # nothing overflows: digits are lost
        ({"offset": 3e3, "gains": (3e6, 1.0)}, ("body.0", "offset")),
        ({"gains": (1.0, 3e6), "trunk": True}, ("body.1",)),  # not all of the trunk
        ({"gains": (3e6, 1.0, 3e6), "trunk": True, "offset": 3e3}, ("body.0", "body.2", "offset")),
    ],
    ids=str,
)
def test_the_modules_that_need_fp32_are_found_and_only_they(faults, islands):
    network = LoudNetwork(**faults)
    quality = quality_of(network)
    assert quality_of(LoudNetwork())(in_half(LoudNetwork())) >= 50
    assert not quality(in_half(network)) >= 50
    assert sorted(find_islands(network, quality, limit=50)) == list(islands)
    assert quality(in_half(network, islands)) >= 50


def test_a_value_too_large_between_two_modules_makes_an_island_of_both():
    network = LoudNetwork()
    network.body[1].conv1.weight.data *= 2e6
    network.body[1].conv2.weight.data /= 2e6
    assert find_islands(network, quality_of(network), limit=50) == ("body.1",)


def test_many_small_costs_are_paid_where_they_are_largest():
    network = LoudNetwork(gains=(1.0, 1.0), offset=40.0)
    quality = quality_of(network)
    reached = quality(in_half(network))
    (island,) = find_islands(network, quality, limit=reached + 3)
    assert island == "offset"


def test_a_network_that_needs_fp32_itself_is_refused():
    network = LoudNetwork(root_gain=3e6)
    with pytest.raises(ExportError, match="the whole network would have to stay in fp32"):
        find_islands(network, quality_of(network), limit=50)


def test_islands_of_most_weights_are_refused():
    network = LoudNetwork(gains=(3e6,) * 6)
    with pytest.raises(ExportError, match=r"body\.0, .*would have to stay in fp32.*without --fp16"):
        find_islands(network, quality_of(network), limit=50)


def test_an_island_goes_into_the_graph_and_the_manifest(tmp_path):
    network, lines = LoudNetwork(gains=(1.0, 3e6)), []
    export_network(
        network, tmp_path / "b", Options(fp16=True), stage="main", training_size=32, facts={}, report=lines.append
    )
    bundle = Bundle.load(tmp_path / "b")
    stage = bundle.stage()
    assert [graph.islands for graph in stage.graphs] == [(), (), ("body.1",)]
    assert "fp32 inside the fp16 graph: body.1" in "\n".join(lines)
    assert min(row.psnr_db for row in stage.parity if row.precision == "fp16") >= 50
    path = bundle.folder / stage.graph(precision="fp16", ends="uint8").file.name
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    full = {
        node.input[1]
        for node in model.graph.node
        if node.op_type == "Conv" and types[node.output[0]] == onnx.TensorProto.FLOAT
    }
    assert full == {"network.body.1.conv1.weight", "network.body.1.conv2.weight"}


def test_a_network_without_need_has_no_islands(bundle):
    assert all(graph.islands == () for stage in bundle.manifest.stages for graph in stage.graphs)


class NormedNetwork(LoudNetwork):
    """With a weight norm and a batch norm, which can be folded away once."""

    def __init__(self):
        super().__init__()
        self.tail = torch.nn.utils.parametrizations.weight_norm(self.tail)
        self.wide = torch.nn.Sequential(self.wide, torch.nn.BatchNorm2d(8))
        self.wide[1].running_mean.fill_(0.1)

    def fold(self):
        super().fold()
        self.wide = torch.nn.utils.fuse_conv_bn_eval(*self.wide)


def test_a_network_of_no_run_is_exported(tmp_path):
    network = NormedNetwork().eval()
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    expected = verify.run_torch(network, picture[None], scale=2)[0]
    manifest = export_network(network, tmp_path / "b", Options(), stage="a", training_size=0, facts={"by": "hand"})
    parameters = sum(parameter.numel() for parameter in NormedNetwork().parameters())
    assert (manifest.training["by"], manifest.training["parameters"]) == ("hand", parameters)
    assert [stage.name for stage in manifest.stages] == ["a"]
    with Upscaler(tmp_path / "b", backend="onnxruntime") as upscaler:
        assert parity.compare(upscaler.upscale(picture), expected).max_error <= 1


def test_what_a_network_costs_is_counted_as_published():
    wide = build_model(load_recipe("fast-wide").model, weights="random")
    assert measure_cost(wide, 2) == {"parameters": 3_697_536, "kmac_per_pixel": 33.88}
    perceptual = build_model(load_recipe("perceptual-unet").model, weights="random")
    assert measure_cost(perceptual, 2) == {"parameters": 41_229_213, "kmac_per_pixel": 479.36}  # SEEDS A


def test_a_folded_network_is_not_folded_again():
    network = NormedNetwork()
    bundle_writer._deploy(network)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    bundle_writer._deploy(network)
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.parametrize("stage", ["", "../up", "a/b", ".hidden"])
def test_a_stage_whose_name_is_no_file_name_is_refused(tmp_path, stage):
    with pytest.raises(ExportError, match="letters, digits"):
        export_network(LoudNetwork(), tmp_path / "b", Options(), stage=stage, training_size=0, facts={})


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


def test_command_keeps_what_is_told_of_the_model(run, tmp_path):
    means = {"psnr_y_db": 30.5}
    rows = [{"dataset": "Set5", "method": m, "means": means, "pictures": [1]} for m in ("b", "bicubic", "other")]
    (tmp_path / "q.json").write_text(json.dumps({"protocol": "p", "rows": rows}), encoding="utf-8")
    code, _ = invoke(run, "--out", tmp_path / "b", "--figures", tmp_path / "q.json", "--summary", "Sharp.")
    training = Bundle.load(tmp_path / "b").manifest.training
    assert code == 0 and [row["method"] for row in training["figures"]["rows"]] == ["b", "bicubic"]
    assert training["summary"] == "Sharp."
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


def test_checkpoints_that_cannot_be_listed_are_one_line(tmp_path):
    write_run(tmp_path / "run", recipe_from_dict(RECIPE), {})
    (tmp_path / "run" / "checkpoints").write_text("")
    code, output = invoke(tmp_path / "run", "--out", tmp_path / "b")
    assert code == 1 and "checkpoints: cannot be read" in output


def test_a_checkpoint_is_exported(run, tmp_path):
    """What an interrupted run has: its averaged weights, of the stage that it was in."""
    recipe = load_run(run)
    stage = recipe.stages[0]
    weights = load_checkpoint(stage_folder(run, stage.name)).group("model")
    tensors = {f"ema.{key}": value for key, value in weights.items()}
    tensors |= {f"model.{key}": value + 1 for key, value in weights.items()}
    facts = {"recipe": asdict(recipe), "position": [0, 0, 7], "done_steps": 7}
    stopped = tmp_path / "stopped"
    write_run(stopped, recipe, {})
    save_checkpoint(stopped / "checkpoints" / "best", Checkpoint(tensors, facts))
    code, output = invoke(stopped, "--out", tmp_path / "a")
    assert code == 1 and f"no finished stage yet; take {stopped / 'checkpoints' / 'best'}" in output
    code, output = invoke(stopped / "checkpoints" / "best", "--out", tmp_path / "b")
    assert code == 0, output
    code, output = invoke(run, "--out", tmp_path / "c", "--stage", stage.name)
    assert code == 0, output
    made = [Bundle.load(tmp_path / name).manifest.stages[0] for name in ("b", "c")]
    assert made[0].name == made[1].name and made[0].weights.sha256 == made[1].weights.sha256
    code, output = invoke(stopped / "checkpoints" / "best", "--out", tmp_path / "d", "--stage", "999")
    assert code == 1 and f"is of stage {stage.name}, not 999" in output


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
