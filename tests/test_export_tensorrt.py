"""Engines of a bundle for the GPU at hand, on a stand-in; what TensorRT itself does is in test_sdk_tensorrt."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bundles
import fake_cuda
import fake_tensorrt
import numpy as np
import pytest

from export.errors import ExportError
from export.to_tensorrt import build_engines
from sdk import BackendError, BackendUnavailable, Bundle, OptionError, Upscaler
from sdk.backends import tensorrt
from sdk.backends.tensorrt_builder import BuildOptions, Profile

onnxruntime = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parent.parent


@pytest.fixture(params=fake_tensorrt.VERSIONS)
def behaviour(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[fake_tensorrt.Behaviour]:
    bundles.shared("unet")
    machine, made = fake_cuda.Machine(), fake_tensorrt.Behaviour()
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    fake_cuda.install(monkeypatch, machine)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module(machine, request.param, onnxruntime, made))
    monkeypatch.setattr(tensorrt, "choose_profile", lambda stage, total: Profile(stage.stride, 1, 256))
    yield made
    gc.collect()
    assert machine.faults == [] and machine.blocks == {}


def test_every_stage_gets_its_engines(
    behaviour: fake_tensorrt.Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, folder, told = Bundle.load(bundles.shared("unet")), tmp_path / "engines", []
    engines = build_engines(bundle, options=BuildOptions(folder=folder), report=told.append)
    assert [(engine.precision, engine.ends) for engine in engines] == [("fp16", "uint8"), ("fp32", "float32")]
    assert engines[0].parity is not None and engines[0].parity.psnr_db >= 50
    assert engines[0].reference == f"onnxruntime {onnxruntime.__version__} on cpu"
    assert any("dB, at most" in line for line in told) and any("ready after" in line for line in told)
    assert len(list(folder.glob("*.engine"))) == 2
    # The runtime finds them, and builds nothing.
    monkeypatch.setenv("SR_ENGINE_DIR", str(folder))
    built = len(behaviour.builds)
    with Upscaler(bundle.folder, backend="tensorrt") as upscaler:
        for dtype in (np.uint8, np.float32):
            upscaler.upscale(np.zeros((8, 8, 3), dtype))
    assert len(behaviour.builds) == built


def test_an_engine_that_is_wrong_fails_the_export(behaviour: fake_tensorrt.Behaviour, tmp_path: Path) -> None:
    bundle = Bundle.load(bundles.shared("unet"))
    build_engines(bundle, options=BuildOptions(folder=tmp_path))
    behaviour.wrong = True  # the engine of before, found on the disk
    with pytest.raises(ExportError, match=r"fp16: .*differs from onnxruntime .*at least 50.0 dB"):
        build_engines(bundle, options=BuildOptions(folder=tmp_path))


def test_a_float_engine_that_is_wrong_fails_the_export(
    behaviour: fake_tensorrt.Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tensorrt.TensorRtBackend.run

    def off(self: tensorrt.TensorRtBackend, batch: np.ndarray) -> np.ndarray:
        result = real(self, batch)
        return result if batch.dtype == np.uint8 else result + np.float32(0.002)

    monkeypatch.setattr(tensorrt.TensorRtBackend, "run", off)
    with pytest.raises(ExportError, match=r"the float graph differs from onnxruntime .* by 0.002 of 1 on astronaut"):
        build_engines(Bundle.load(bundles.shared("unet")), options=BuildOptions(folder=tmp_path))


def test_no_half_precision_fails_the_export(behaviour: fake_tensorrt.Behaviour) -> None:
    behaviour.loses_half = True
    with pytest.raises(BackendError, match="without one in fp16"):
        build_engines(Bundle.load(bundles.shared("unet")))


def test_a_place_that_cannot_be_written_fails_the_export(behaviour: fake_tensorrt.Behaviour, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackendError, match="engines are not kept"):
        build_engines(Bundle.load(bundles.shared("unet")), options=BuildOptions(folder=tmp_path / "file" / "in"))


def test_an_unknown_stage(behaviour: fake_tensorrt.Behaviour) -> None:
    with pytest.raises(OptionError, match="stage 'other'"):
        build_engines(Bundle.load(bundles.shared("unet")), stages=["other"])


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'sr-sdk\[tensorrt\]'"):
        build_engines(Bundle.load(bundles.shared("unet")))


def test_numpy_and_pillow_are_enough() -> None:
    blocked = ["torch", "onnx", "onnxruntime", "openvino", "click", "safetensors", "train"]
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport export.to_tensorrt"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
