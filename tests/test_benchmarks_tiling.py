from __future__ import annotations

import json

import bundles
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import peers, tiling
from benchmarks.cli import main
from benchmarks.pictures import draw_picture
from sdk import Upscaler

pytest.importorskip("openvino")


def run(*arguments: str, kind: str = "unet", expect: int = 0):
    command = ["tiling", "--model", str(bundles.shared(kind)), "--size", "96x128", "--tile", "32", "--repeats", "1"]
    result = CliRunner().invoke(main, [*command, *arguments])
    assert result.exit_code == expect, result.output
    return result


def test_tiles_of_each_way_are_held_against_the_whole(tmp_path):
    out = tmp_path / "tiling.json"
    shown = run("--json", str(out)).output
    result = json.loads(out.read_text())
    whole, own, exact, fast, padded = result["rows"]
    assert (whole["way"], whole["error"], whole["psnr_db"]) == ("whole", 0, None)
    assert own["error"] <= 1
    assert exact["error"] <= 1
    assert fast["error"] <= 4
    assert padded["way"] == "10 px around"
    assert padded["error"] > 1  # the network reaches farther
    assert padded["off_percent"] > 0
    assert "largest error" in shown


def test_a_network_that_reaches_no_farther_than_the_padding_has_no_seams(tmp_path):
    out = tmp_path / "tiling.json"
    run("--json", str(out), kind="blur")
    assert json.loads(out.read_text())["rows"][-1]["error"] == 0


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (10, 200)])
def test_tiles_are_put_together_in_their_places(size):
    lr = draw_picture(size)
    doubled = tiling.tile_padded(lr, run=lambda part: part.repeat(2, 0).repeat(2, 1), tile=32, scale=2)
    np.testing.assert_array_equal(doubled, lr.repeat(2, 0).repeat(2, 1))
    with Upscaler(bundles.shared("blur"), backend="onnxruntime", device="cpu") as upscaler:
        tiled = tiling.tile_padded(lr, run=upscaler.upscale, tile=32, scale=2)
        np.testing.assert_array_equal(tiled, upscaler.upscale(lr))


def test_a_peer_is_loaded_with_spandrel_and_cut(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("spandrel")
    from spandrel.architectures.Compact import Compact

    torch.manual_seed(0)
    network = Compact(num_feat=8, num_conv=4, upscale=2)
    torch.save({"params": network.state_dict()}, tmp_path / "peer.pth")
    out = tmp_path / "tiling.json"
    run("--peer", str(tmp_path / "peer.pth"), "--json", str(out))
    whole, padded = json.loads(out.read_text())["rows"][-2:]
    assert whole["network"] == padded["network"] == "peer.pth"
    assert padded["error"] <= 1  # six convolutions of 3x3 reach six pixels
    lr = draw_picture((16, 20))
    peer, scale = tiling.open_peer(tmp_path / "peer.pth")
    with torch.inference_mode():
        x = torch.from_numpy(lr).permute(2, 0, 1)[None] / 255
        expected = (network.eval()(x).clamp(0, 1) * 255).round().byte()[0].permute(1, 2, 0).numpy()
    assert scale == 2
    np.testing.assert_array_equal(peer(lr), expected)


def test_networks_are_trained_for_spandrel_and_for_export(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("spandrel")
    onnxruntime = pytest.importorskip("onnxruntime")
    Image.fromarray(draw_picture((70, 80))).save(tmp_path / "photograph.png")
    Image.fromarray(draw_picture((20, 80))).save(tmp_path / "small.png")
    done = CliRunner().invoke(peers.main, [str(tmp_path), str(tmp_path / "out"), "--steps", "40"])
    assert done.exit_code == 0, done.output
    assert "compact: step 40 of 40, loss 0." in done.output
    lr = draw_picture((16, 20))
    for name in peers.NETWORKS:
        peer, scale = tiling.open_peer(tmp_path / "out" / f"{name}-x2.safetensors")
        assert scale == 2
        session = onnxruntime.InferenceSession(tmp_path / "out" / f"{name}-x2.onnx", providers=["CPUExecutionProvider"])
        result = session.run(None, {"lr": lr.transpose(2, 0, 1)[None].astype(np.float32) / 255})[0][0]
        assert np.abs(result.clip(0, 1).transpose(1, 2, 0) * 255 - peer(lr)).max() <= 0.51


@pytest.mark.parametrize("data", [b"", b"rubbish"])
def test_what_is_no_peer_is_told(tmp_path, data):
    pytest.importorskip("spandrel")
    (tmp_path / "peer.pth").write_bytes(data)
    told = run("--peer", str(tmp_path / "peer.pth"), expect=1).output
    assert "spandrel cannot load it" in told
    assert "Traceback" not in told
