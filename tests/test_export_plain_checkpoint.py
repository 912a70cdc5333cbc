"""Plain state dicts: read without running anything, held against the architecture, exported."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export import plain_checkpoint
from export.bundle_writer import Options
from export.errors import ExportError
from export.parity import compare
from export.plain_checkpoint import export_checkpoint, read_state
from export.precision import round_weights
from export.verify import run_torch
from sdk import Bundle, Upscaler
from train.models import Network, build_model
from train.recipe import ModelConfig

SETTINGS = ("model.channels=8", "model.blocks=[1,1,1]")
OPTIONS = Options(scale=2)


def seeded_network(scale: int = 2) -> Network:
    torch.manual_seed(0)
    network = build_model(ModelConfig("fast", (scale,), {"channels": 8, "blocks": [1, 1, 1]}), weights=None).eval()
    torch.nn.init.normal_(network.tail.weight, std=0.02)
    return network


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return seeded_network().state_dict()


def refused(path: Path, **changes) -> str:
    """Give the message of a refused export, one line; nothing is left behind."""
    arguments = {"arch": "fast", "settings": SETTINGS, "options": OPTIONS} | changes
    out = path.parent / "bundle"
    with pytest.raises(ExportError) as caught:
        export_checkpoint(path, out, arguments.pop("options"), **arguments)
    assert not out.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_becomes_a_bundle(state, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    export_checkpoint(path, tmp_path / "b", replace(OPTIONS, licence="CC0-1.0"), arch="fast", settings=SETTINGS)
    manifest = Bundle.load(tmp_path / "b").manifest
    assert (
        manifest.scale == 2 and manifest.licence == "CC0-1.0" and [stage.name for stage in manifest.stages] == ["main"]
    )
    assert manifest.training["checkpoint"]["name"] == "model.safetensors"
    assert manifest.training["model"]["options"] == {"channels": 8, "blocks": [1, 1, 1]}
    network = seeded_network()
    round_weights(network)
    picture = np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    with Upscaler(tmp_path / "b", backend="onnxruntime") as upscaler:
        assert compare(upscaler.upscale(picture), run_torch(network, picture[None], scale=2)[0]).max_error <= 1


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize("nest", [None, "params", "params_ema", "state_dict"])
def test_pickles_of_tensors_are_read_also_nested(state, tmp_path, suffix, nest):
    path = tmp_path / f"model{suffix}"
    torch.save({nest: state, "epoch": 3} if nest else state, path)
    read = read_state(path)
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_averaged_weights_are_taken_before_the_last_ones(state, tmp_path):
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"params": other, "params_ema": state}, tmp_path / "m.pth")
    assert torch.equal(read_state(tmp_path / "m.pth")["head.weight"], state["head.weight"])


def test_names_of_dataparallel_are_stripped(state, tmp_path):
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "m.pth")
    assert read_state(tmp_path / "m.pth").keys() == state.keys()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "owned"))


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "inside"])
def test_a_malicious_pickle_is_refused_and_not_run(state, tmp_path, form):
    path, loot = tmp_path / "m.pth", tmp_path / "loot"
    trap = Trap(loot)
    if form == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        content = {"params": {**state, "x": trap}} if form == "inside" else trap
        torch.save(content, path, _use_new_zipfile_serialization=form != "old torch")
    assert "more than tensors" in refused(path)
    assert not loot.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert loot.exists()  # the trap works


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage" * 99, b"PK\x03\x04 cut short"], ids=ascii)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    assert str(path) in refused(path)


def test_a_truncated_file_is_refused(state, tmp_path):
    for suffix, save in ((".pth", torch.save), (".safetensors", save_file)):
        path = tmp_path / f"m{suffix}"
        save(state, path)
        path.write_bytes(path.read_bytes()[:-500])
        assert str(path) in refused(path)


@pytest.mark.parametrize("name", ["nothing.pth", "nothing.safetensors", "nothing", "model.onnx", "model.h5"])
def test_files_that_are_not_there_or_of_another_kind(tmp_path, name):
    assert name in refused(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"params": {}}, {"epoch": 3}, {"optimizer": {"lr": 1}, "params": [1]}, torch.zeros(3)],
    ids=str,
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "m.pth")
    assert "expected names and tensors" in refused(tmp_path / "m.pth")


def test_wrong_names_are_told_a_few_of_them(state, tmp_path):
    renamed = {name.replace("bottom", "middle"): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "m.safetensors")
    message = refused(tmp_path / "m.safetensors")
    assert "4 missing: bottom.0.conv1.bias" in message and "4 unknown: middle.0.conv1.bias" in message
    message = refused(tmp_path / "m.safetensors", settings=(*SETTINGS[:1], "model.blocks=[3,3,3]"))
    assert ", ..." in message and len(message) < 600


def test_wrong_shapes_are_told(state, tmp_path):
    state["tail.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "m.safetensors")
    assert "1 of another shape: tail.bias is (7,), not (48,)" in refused(tmp_path / "m.safetensors")
    assert "of another shape: head.weight is (8, " in refused(tmp_path / "m.safetensors", settings=SETTINGS[1:])


def test_weights_that_are_not_numbers_are_refused(state, tmp_path):
    state["tail.bias"] = torch.full((48,), float("nan"))
    save_file(state, tmp_path / "m.safetensors")
    assert "tail.bias" in refused(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"arch": "resnet"}, "one of fast"),
        ({"options": Options()}, "give --scale"),
        ({"options": Options(scale=3)}, "1, 2 or 4"),
        ({"settings": ("model.width=8",)}, "knows blocks, cell, channels"),
        ({"settings": ("channels=8",)}, "model.channels=48"),
        ({"settings": ("model.channels",)}, "key=value"),
        ({"settings": ("model.channels=wide",)}, "expected int, got 'wide'"),
        ({"settings": ("model.scales=[2,4]", "model.channels=8")}, "one scale"),
    ],
    ids=str,
)
def test_what_does_not_make_a_network_is_refused(state, tmp_path, changes, message):
    save_file(state, tmp_path / "m.safetensors")
    assert message in refused(tmp_path / "m.safetensors", **changes)


def test_settings_are_those_of_a_recipe(state, tmp_path):
    config = plain_checkpoint._configure("fast", 2, ("model.options.channels=8", "model.blocks=[1,2,3]"))
    assert config == ModelConfig("fast", (2,), {"channels": 8, "blocks": [1, 2, 3]})


def test_an_existing_output_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(tmp_path / "nothing.pth", tmp_path / "b", OPTIONS, arch="fast", settings=SETTINGS)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: (tensor * 100).to(torch.int8),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(state, tmp_path, change):
    name = next(name for name, tensor in state.items() if tensor.ndim == 4)
    torch.save(state | {name: change(state[name])}, tmp_path / "model.pth")
    assert "1 not dense floating-point numbers" in refused(tmp_path / "model.pth")


@pytest.mark.parametrize("setting", ["channels=-1", "blocks=[1,1]", "blocks=5", 'channels="x"', "channels=0"])
def test_sizes_that_no_network_has_are_refused(state, tmp_path, setting):
    save_file(state, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", settings=(f"model.{setting}",))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pth")
    assert "not a file" in refused(tmp_path / "model.pth")


def test_a_scale_that_enlarges_nothing_is_refused(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    assert "--scale, 1 or more" in refused(tmp_path / "model.safetensors", options=Options(scale=0))
