"""INT8 graphs: what is quantised, on what it is calibrated, what is refused, and how they run."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import bundles
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from PIL import Image
from portability import PARSERS, problems
from torch import nn

from export import int8, parity
from export.bundle_writer import Options, export_network
from export.errors import ExportError
from export.to_onnx import IR_VERSION, OPSET
from sdk import BackendUnavailable, Bundle, Upscaler
from sdk.backends import Request, open_backend
from sdk.backends.folding import read_folded
from sdk.backends.onnxruntime import OnnxRuntimeBackend
from train.models import Network, build_model
from train.recipe import ModelConfig

STRIDE = 8
ENGINES = ("onnxruntime", "openvino")


def seeded_network() -> Network:
    """A network whose output depends on its whole receptive field; fresh ones end in zeros.

    The exporter leaves out the biases that are zero, of the halvings: OpenVINO must be right without them, too.
    """
    torch.manual_seed(0)
    config = ModelConfig("fast", (2,), {"channels": 16, "blocks": [1, 1, 1]})
    network = build_model(config, weights=None)
    nn.init.normal_(network.tail.weight, std=0.02)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and "down" not in name:
            nn.init.normal_(module.bias, std=0.01)
    return network


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "tiny-x2"
    options = Options(int8=parity.PICTURES)
    export_network(seeded_network(), out, options, stage="main", training_size=64, facts={})
    return Bundle.load(out)


@pytest.fixture(scope="module")
def graph(bundle) -> onnx.GraphProto:
    path = bundle.folder / bundle.stage().graph(precision="int8", ends="uint8").file.name
    return onnx.load(path, load_external_data=False).graph


# The graph


def test_all_convolutions_but_the_first_multiply_eight_bits(bundle, graph):
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    in_float = [node for node in convolutions if node.input[1] in tensors]
    assert [node.input[1] for node in in_float] == ["network.head.weight"]
    assert bundle.stage().graph(precision="int8", ends="uint8").islands == ("head",)
    for node in convolutions:
        assert len(node.input) == 2 or tensors[node.input[2]].data_type == TensorProto.FLOAT  # TensorRT takes no int32
        if node not in in_float:
            values, weights = (makers[name] for name in node.input[:2])
            assert values.op_type == weights.op_type == "DequantizeLinear"
            assert makers[values.input[0]].op_type == "QuantizeLinear"
            assert tensors[weights.input[0]].data_type == TensorProto.INT8
            scales = numpy_helper.to_array(tensors[weights.input[1]])
            assert scales.shape == (tensors[weights.input[0]].dims[0],)  # one for each output channel


def test_tensorrt_is_given_what_it_takes_and_computes_the_same(bundle, make_photo):
    """Floating-point weights behind pairs, which no old parser refuses."""
    path = bundle.folder / bundle.stage().graph(precision="int8", ends="uint8").file.name
    folded = read_folded(path)
    for parser in PARSERS:
        assert problems(onnx.load_from_string(folded), parser) == []
    picture = make_photo(STRIDE * 5, STRIDE * 3)[None]
    results = []
    for source in (folded, str(path)):
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        results += session.run(None, {session.get_inputs()[0].name: picture})
    assert np.abs(results[0].astype(int) - results[1]).max() <= 1


def test_zero_points_are_zero_and_signed(graph):
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in int8.QUANTISERS]
    assert pairs
    for node in pairs:
        zero = tensors[node.input[2]]
        assert zero.data_type == TensorProto.INT8 and not numpy_helper.to_array(zero).any()


def test_only_convolutions_read_eight_bits(graph):
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.op_type for node in graph.node if set(node.input) & rounded}
    assert readers == {"Conv"}


def test_the_file_stands_alone_between_eight_bit_ends(bundle, graph):
    path = bundle.folder / bundle.stage().graph(precision="int8", ends="uint8").file.name
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert model.ir_version == IR_VERSION and not model.metadata_props
    assert {tensor.data_location for tensor in graph.initializer} == {TensorProto.DEFAULT}
    ends = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert ends == [TensorProto.UINT8, TensorProto.UINT8]
    assert b"/tmp" not in path.read_bytes()


def test_every_engine_that_was_checked_has_a_row(bundle):
    rows = {row.engine.split()[0]: row.psnr_db for row in bundle.stage().parity if row.precision == "int8"}
    assert rows.keys() == set(ENGINES) and min(rows.values()) >= 38


# What is left in float


class Spiky(nn.Module):
    """A convolution of values of which one channel is huge and hardly counts: 8 bits keep nothing of the others."""

    def __init__(self, channels: int, peak: float):
        super().__init__()
        gain = torch.ones(channels)
        gain[0] = peak
        self.register_buffer("gain", gain.view(1, -1, 1, 1))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv.weight.data[:, 0] /= peak

    def forward(self, x):
        return self.conv(x * self.gain)


class SpikyNetwork(Network):
    scales = (2,)

    def __init__(self, peak: float):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.spiky = Spiky(16, peak)
        self.last = nn.Conv2d(16, 12, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def stride(self, scale: int) -> int:
        return STRIDE

    def forward(self, lr, scale):
        x = torch.relu(self.first(self.head(lr)))
        return self.shuffle(self.last(torch.relu(self.spiky(x)))) + 0.5


def quantised(network: Network, folder: Path, **options):
    """Export a network as fp32 with PyTorch's results as the yardstick; quantise its graph."""
    from export.bundle_writer import _deploy
    from export.to_onnx import WeightsFile, trace
    from export.verify import run_torch

    _deploy(network)
    weights = WeightsFile.write(folder / "n.weights", network)
    onnx.save(trace(network, scale=2, ends="uint8", weights=weights), folder / "n.onnx")

    def run(batch):
        return run_torch(network, batch, scale=2)

    pictures = [(name, picture) for name, picture in parity.read_pictures(None, largest=64)]
    references = [(name, picture, run(picture[None])[0]) for name, picture in pictures]
    yardstick = int8.Yardstick(run, references, scale=2, stride=STRIDE)
    windows = int8.read_calibration(parity.PICTURES, scale=2, stride=STRIDE)[:6]
    return int8.quantise(folder / "n.onnx", folder / "n.int8.onnx", windows=windows, yardstick=yardstick)


def test_the_convolution_that_eight_bits_spoil_stays_in_float_and_only_it(tmp_path):
    (tmp_path / "a").mkdir()
    islands, quality = quantised(SpikyNetwork(1.0), tmp_path / "a")
    assert islands == ("head",) and quality.is_enough
    islands, quality = quantised(SpikyNetwork(300.0), tmp_path)
    assert islands == ("head", "spiky.conv") and quality.is_enough


def test_a_network_that_eight_bits_spoil_all_over_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(int8.MIN_PSNR_DB, "int8", 90.0)
    with pytest.raises(ExportError, match=r"int8: .* dB.* with 2 of 4 convolutions in float.*--int8"):
        quantised(SpikyNetwork(1.0), tmp_path)
    assert not (tmp_path / "n.int8.onnx").exists()


class Depthwise(SpikyNetwork):
    """Its second convolution sees each channel alone, and all sixteen together."""

    def __init__(self):
        super().__init__(1.0)
        self.first = nn.Conv2d(16, 16, 3, padding=1, groups=16)


class OneLayer(Network):
    scales = (2,)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    def stride(self, scale: int) -> int:
        return STRIDE

    def forward(self, lr, scale):
        return nn.functional.pixel_shuffle(self.conv(lr), 2)


def test_depthwise_convolutions_do_not_pass_for_the_first(tmp_path):
    assert quantised(Depthwise(), tmp_path)[0] == ("head",)


def test_a_network_whose_only_convolution_reads_the_picture_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no convolutions to quantise"):
        quantised(OneLayer(), tmp_path)


def test_lost_psnr_is_a_gate_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "MAX_LOST_DB", -100.0)
    with pytest.raises(ExportError, match="dB of PSNR-Y lost"):
        quantised(SpikyNetwork(1.0), tmp_path)


@pytest.mark.parametrize("psnr,lost,enough", [(38.0, 0.2, True), (37.9, 0.0, False), (60.0, 0.21, False)])
def test_both_gates_must_be_passed(psnr, lost, enough):
    assert int8.Quality(psnr, lost).is_enough is enough


def test_nothing_is_written_if_the_gate_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(int8.MIN_PSNR_DB, "int8", 90.0)
    options = Options(int8=parity.PICTURES)
    with pytest.raises(ExportError, match="int8"):
        export_network(SpikyNetwork(1.0), tmp_path / "out", options, stage="main", training_size=64, facts={})
    assert list(tmp_path.iterdir()) == []


def test_a_trained_model_loses_little_and_shrinks(tmp_path):
    shipped = Bundle.load("fast-x2")
    source = shipped.folder / shipped.stage().graph(precision="fp32", ends="uint8").file.name
    backend = OnnxRuntimeBackend(onnxruntime, str(source), precision="fp32")
    pictures = parity.read_pictures(None, largest=128)
    references = [(name, picture, backend.run(picture[None])[0]) for name, picture in pictures]
    yardstick = int8.Yardstick(backend.run, references, scale=2, stride=STRIDE)
    windows = int8.read_calibration(parity.PICTURES, scale=2, stride=STRIDE)
    islands, quality = int8.quantise(source, tmp_path / "q.onnx", windows=windows, yardstick=yardstick)
    backend.close()
    assert islands == ("head",) and quality.psnr_db > 45 and quality.lost_db < 0.1
    # A byte for each weight where the fp16 file has two, and some 40 kB of names.
    assert (tmp_path / "q.onnx").stat().st_size < 0.55 * shipped.stage().weights.bytes


# Measures


def test_the_yardstick_sees_what_is_lost():
    photograph = parity.read_pictures(None, largest=64)[0][1]

    def enlarge(batch):
        return batch.repeat(2, axis=1).repeat(2, axis=2)

    noise = np.random.default_rng(0).integers(-9, 10, (1, 128, 128, 3))

    def noisy(batch):
        result = enlarge(batch)
        return np.clip(result + noise[:, : result.shape[1], : result.shape[2]], 0, 255).astype(np.uint8)

    yardstick = int8.Yardstick(enlarge, [("a", photograph, enlarge(photograph[None])[0])], scale=2, stride=8)
    same, worse = yardstick.measure(enlarge), yardstick.measure(noisy)
    assert same == int8.Quality(float("inf"), 0.0)
    assert 30 < worse.psnr_db < 35 and worse.lost_db > 0.1


# Calibration


def test_windows_are_reduced_pictures_on_the_grid(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(300, 530), (37, 41)]
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    windows = int8.read_calibration(tmp_path, scale=2, stride=8)
    shapes = {window.shape for window in windows}
    assert all(shape[0] == 1 and shape[1] % 8 == shape[2] % 8 == 0 and shape[3] == 3 for shape in shapes)
    assert (1, 128, 128, 3) in shapes and (1, 24, 24, 3) in shapes and max(max(shape) for shape in shapes) <= 128
    # Reduced noise is smoother than noise (variance 5461).
    assert max(float(window.var()) for window in windows) < 3500


def test_many_pictures_are_sampled_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "MAX_WINDOWS", 4)
    for value in range(10):
        Image.new("RGB", (32, 32), (value * 20,) * 3).save(tmp_path / f"{value}.png")
    windows = int8.read_calibration(tmp_path, scale=2, stride=8)
    assert [int(window[0, 0, 0, 0]) for window in windows] == [0, 60, 120, 180]


def test_sixteen_bit_photographs_calibrate_as_eight(tmp_path):
    Image.fromarray(np.full((32, 32), 100 * 257, np.uint16)).save(tmp_path / "grey.png")
    (window,) = int8.read_calibration(tmp_path, scale=2, stride=8)
    assert window.dtype == np.uint8 and window.min() == window.max() == 100


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_without_pictures_is_refused_at_once(tmp_path, kind):
    folder = tmp_path / "calibration"
    if kind == "empty":
        folder.mkdir()
        (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    if kind == "file":
        folder.write_text("no folder", encoding="utf-8")
    with pytest.raises(ExportError, match=r"calibration: (holds no pictures|is not a folder); --int8"):
        export_network(
            seeded_network(), tmp_path / "out", Options(int8=folder), stage="main", training_size=64, facts={}
        )
    assert not (tmp_path / "out").exists()


# At run time


@pytest.mark.parametrize("engine", ENGINES)
def test_int8_runs_where_it_is_asked_for(bundle, engine, make_photo):
    picture = make_photo(90, 110)
    with Upscaler(bundle.folder, backend=engine, device="cpu", precision="fp32") as upscaler:
        full = upscaler.upscale(picture)
    with Upscaler(bundle.folder, backend=engine, device="cpu", precision="int8") as upscaler:
        assert upscaler.info["precision"] == "int8"
        small = upscaler.upscale(picture)
        again = upscaler.upscale(picture)
    assert np.array_equal(small, again)
    assert not np.array_equal(small, full)
    assert parity.compare(small, full).psnr_db >= 38


@pytest.mark.parametrize("engine", ENGINES)
def test_float_pictures_stay_in_fp32(bundle, engine, make_photo):
    picture = make_photo(40, 56).astype(np.uint16) * 257
    results = []
    for precision in ("fp32", "int8"):
        with Upscaler(bundle.folder, backend=engine, device="cpu", precision=precision) as upscaler:
            results.append(upscaler.upscale(picture))
    assert np.array_equal(*results)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_int8_is_never_chosen_by_itself(bundle, engine):
    backend = open_backend(engine, Request(bundle.folder, bundle.stage(), 2, "uint8", "cpu", "auto"))
    assert backend.precision in ("fp32", "bf16")
    backend.close()


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_bundle_without_int8_says_how_it_is_made(engine):
    with pytest.raises(BackendUnavailable, match=r"no int8 graph.*--int8 CALIB_DIR"):
        Upscaler(bundles.shared("unet"), backend=engine, device="cpu", precision="int8")


@pytest.mark.parametrize("engine", ENGINES)
def test_float_ends_have_no_int8(bundle, engine):
    with pytest.raises(BackendUnavailable, match="no int8 graph with float32 ends"):
        open_backend(engine, Request(bundle.folder, bundle.stage(), 2, "float32", "cpu", "int8"))


def test_onnxruntime_tells_that_it_gains_nothing(bundle, caplog):
    request = Request(bundle.folder, bundle.stage(), 2, "uint8", "cpu", "int8")
    with caplog.at_level(logging.WARNING, logger="sdk.backends.onnxruntime"):
        open_backend("onnxruntime", request).close()
        assert "OpenVINO is faster" in caplog.text
        caplog.clear()
        open_backend("onnxruntime", dataclasses.replace(request, precision="fp32")).close()
        assert not caplog.text


def test_onnxruntime_has_no_int8_on_cuda(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BackendUnavailable, match="int8 on CUDA"):
        open_backend("onnxruntime", Request(bundle.folder, bundle.stage(), 2, "uint8", "cuda:0", "int8"))
