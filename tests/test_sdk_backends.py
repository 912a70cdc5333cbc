"""One conformance test for every engine that can be imported, and what each refuses."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import bundles
import numpy as np
import pytest

from sdk import BackendError, BackendUnavailable, Bundle, OptionError, OutOfMemory, Upscaler, backends
from sdk.backends import AUTO_ORDER, MODULES, Request, open_backend

ROOT = Path(__file__).parent.parent
ENGINES = sorted(MODULES)
ENDS = {"uint8": np.uint8, "float32": np.float32}


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def has(engine: str) -> bool:
    return importlib.util.find_spec(engine) is not None


def has_cuda() -> bool:
    return (
        has("onnxruntime")
        and "CUDAExecutionProvider" in importlib.import_module("onnxruntime").get_available_providers()
    )


def request(kind: str = "unet", *, ends: str = "uint8", device: str = "cpu", precision: str = "fp32") -> Request:
    bundle = Bundle.load(bundles.shared(kind))
    return Request(bundle.folder, bundle.stage(), bundle.manifest.scale, ends, device, precision)


def noise(shape: tuple[int, ...], ends: str = "uint8") -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.integers(0, 256, shape, np.uint8) if ends == "uint8" else rng.random(shape, np.float32)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


@pytest.mark.parametrize("ends", sorted(ENDS))
def test_shape_dtype_batch_and_determinism(engine: str, ends: str) -> None:
    backend = open_backend(engine, request(ends=ends))
    assert (backend.name, backend.device, backend.precision) == (engine, "cpu", "fp32")
    assert backend.engine.startswith(engine + " ") and backend.batch >= 1
    for shape in ((1, 8, 8, 3), (3, 24, 40, 3), (2, 40, 24, 3)):
        batch = noise(shape, ends)
        before = batch.copy()
        result = backend.run(batch)
        assert result.shape == (shape[0], 2 * shape[1], 2 * shape[2], 3) and result.dtype == ENDS[ends]
        np.testing.assert_array_equal(batch, before)
        np.testing.assert_array_equal(result, backend.run(batch))
        # 1e-5: the kernels of one engine may sum in another order for another batch.
        single = np.concatenate([backend.run(batch[n : n + 1]) for n in range(len(batch))])
        np.testing.assert_allclose(result, single, atol=1 if ends == "uint8" else 1e-5)
    backend.close()


def test_results_are_not_overwritten_by_the_next_run(engine: str) -> None:
    backend = open_backend(engine, request())
    first = backend.run(noise((1, 16, 16, 3)))
    kept = first.copy()
    backend.run(255 - noise((1, 16, 16, 3)))
    np.testing.assert_array_equal(first, kept)
    backend.close()


def test_read_only_and_strided_batches(engine: str) -> None:
    backend = open_backend(engine, request())
    batch = noise((2, 16, 24, 3))
    expected = backend.run(batch)
    locked = batch.copy()
    locked.flags.writeable = False
    np.testing.assert_array_equal(backend.run(locked), expected)
    np.testing.assert_array_equal(backend.run(np.asfortranarray(batch)), expected)
    np.testing.assert_array_equal(backend.run(np.repeat(batch, 2, axis=2)[:, :, ::2]), expected)
    backend.close()


def test_engines_agree_with_each_other() -> None:
    results = []
    for name in filter(has, ENGINES):
        backend = open_backend(name, request())
        results.append(backend.run(noise((1, 48, 64, 3))).astype(int))
        backend.close()
    for result in results:
        assert abs(result - results[0]).max() <= 1


def test_eight_threads_get_what_one_gets(engine: str) -> None:
    backend = open_backend(engine, request())
    # More shapes, all often, than OpenVINO keeps: compiled models are dropped while others run them.
    batches = [noise((1, 8 + 8 * (n % 5), 16, 3)) for n in range(50)]
    expected = [backend.run(batch) for batch in batches]

    def run(batch: np.ndarray) -> np.ndarray:
        backend.expect(batch.shape, runs=1000)
        return backend.run(batch)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, batches))
    for result, one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, one)
    backend.close()


def test_closed_engines_refuse(engine: str) -> None:
    backend = open_backend(engine, request())
    backend.run(noise((1, 8, 8, 3)))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(noise((1, 8, 8, 3)))


def test_closing_lets_running_calls_finish(engine: str) -> None:
    backend = open_backend(engine, request())
    batch = noise((1, 64, 64, 3))
    expected = backend.run(batch)

    def attempt(_: int) -> bool:
        try:
            np.testing.assert_array_equal(backend.run(batch), expected)
        except BackendError as exc:
            assert "closed" in str(exc)
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(attempt, n) for n in range(40)]
        assert futures[0].result()
        backend.close()
        outcomes = [future.result() for future in futures]
    assert outcomes[0]


def test_off_grid_batches_are_errors_of_ours(engine: str) -> None:
    backend = open_backend(engine, request())
    with pytest.raises(BackendError) as caught:
        backend.run(noise((1, 9, 13, 3)))
    assert "\n" not in str(caught.value)
    backend.close()


def test_a_corrupt_graph_is_an_error_of_ours(engine: str, tmp_path: Path) -> None:
    folder = bundles.copy("blur", tmp_path)
    bundle = Bundle.load(folder)
    for graph in bundle.stage().graphs:
        (folder / graph.file.name).write_bytes(b"\x08\x08rubbish")
    with pytest.raises(BackendError) as caught:
        open_backend(engine, replace(request("blur"), folder=folder)).run(noise((1, 8, 8, 3)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["std::bad_alloc", "Failed to allocate memory for requested buffer", "MemoryError"])
def test_out_of_memory_is_told_apart(engine: str, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    backend = open_backend(engine, request())

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError if words == "MemoryError" else RuntimeError(words)

    if engine == "onnxruntime":
        monkeypatch.setattr(backend, "_session", types.SimpleNamespace(run=fail))
    else:
        monkeypatch.setattr(backend, "_compile", fail)
        with pytest.raises(OutOfMemory, match="out of memory"):
            backend.expect((1, 8, 8, 3), runs=1000)
    with pytest.raises(OutOfMemory, match="out of memory"):
        backend.run(noise((1, 8, 8, 3)))


def test_other_failures_are_told_in_one_line(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_backend(engine, request())

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("broken\nin several\n  lines")

    monkeypatch.setattr(backend, "_session", types.SimpleNamespace(run=fail), raising=False)
    monkeypatch.setattr(backend, "_compile", fail, raising=False)
    with pytest.raises(BackendError, match="broken in several lines") as caught:
        backend.run(noise((1, 8, 8, 3)))
    assert not isinstance(caught.value, OutOfMemory)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "tensorflow"}, {"backend": ""}, {"backend": None}, {"backend": ["openvino"]}, {"device": "gpu"},
        {"device": "cuda"}, {"device": "cuda:"}, {"device": "cuda:-1"}, {"device": "cuda:x"}, {"device": "CPU"},
        {"device": None}, {"device": 0}, {"device": "cpu\n"}, {"precision": "fp8"}, {"precision": None},
        {"precision": "FP16"},
    ],
    ids=str,
)  # fmt: skip
def test_unknown_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError) as caught:
        Upscaler(bundles.shared("blur"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ENGINES)
def test_a_missing_engine_names_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    extra = {"tensorrt": "tensorrt"}.get(name, "cpu")
    with pytest.raises(BackendUnavailable, match=rf"sr-sdk\[{extra}\]"):
        open_backend(name, request(device="cuda:0" if name == "tensorrt" else "cpu"))


def test_no_engine_at_all_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENGINES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable) as caught:
        Upscaler(bundles.shared("blur"))
    assert all(name in str(caught.value) for name in ENGINES)


@pytest.mark.skipif(has_cuda(), reason="onnxruntime has CUDA here")
@pytest.mark.parametrize("backend", ["auto", *ENGINES])
def test_cuda_is_never_replaced_in_silence(backend: str) -> None:
    if backend != "auto":
        pytest.importorskip(backend)
    for device in ("cuda:0", "cuda:7"):
        with pytest.raises(BackendUnavailable, match=r"(?i)cuda"):
            Upscaler(bundles.shared("blur"), backend=backend, device=device)


@pytest.mark.parametrize("backend,precision", [("onnxruntime", "bf16"), ("openvino", "fp16")])
def test_precisions_are_never_replaced_in_silence(backend: str, precision: str) -> None:
    pytest.importorskip(backend)
    with pytest.raises(BackendUnavailable, match=precision):
        Upscaler(bundles.shared("blur"), backend=backend, precision=precision)


def test_fp16_is_refused_where_it_would_be_computed_in_fp32() -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(BackendUnavailable, match="fp16 on the CPU"):
        Upscaler(bundles.shared("unet"), backend="onnxruntime", device="cpu", precision="fp16")


def test_bf16_runs_only_where_the_bundle_trusts_it(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    stage = Bundle.load(bundles.shared("unet")).stage()
    folder = bundles.copy("unet", tmp_path)
    bundles.write_manifest(folder, type(stage)(**vars(stage) | {"parity": ()}))
    with Upscaler(folder, backend="openvino") as upscaler:
        assert upscaler.info["precision"] == "fp32"
    try:
        upscaler = Upscaler(bundles.shared("unet"), backend="openvino", precision="bf16")
    except BackendUnavailable:
        pytest.skip("this processor has no bf16")
    with upscaler, Upscaler(bundles.shared("unet"), backend="openvino") as automatic:
        assert upscaler.info["precision"] == automatic.info["precision"] == "bf16"
        result = upscaler.upscale(noise((32, 32, 3)))
    with Upscaler(bundles.shared("unet"), backend="openvino", precision="fp32") as full:
        error = result.astype(int) - full.upscale(noise((32, 32, 3)))
    assert 10 * np.log10(255**2 / max(np.mean(error**2), 1e-9)) > 40


@pytest.mark.skipif(has_cuda(), reason="onnxruntime has CUDA here")
def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    assert [name for name, device in AUTO_ORDER if device == "cpu"] == ["openvino", "onnxruntime"]
    if has("openvino"):
        assert open_backend("auto", request(device="auto", precision="auto")).name == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    backend = open_backend("auto", request(device="auto", precision="auto"))
    assert (backend.name, backend.device, backend.precision) == ("onnxruntime", "cpu", "fp32")


@pytest.mark.skipif(has_cuda(), reason="onnxruntime has CUDA here")
def test_auto_goes_on_when_an_engine_is_broken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxruntime")
    opened = backends._open

    def half_broken(name: str, wanted: Request) -> backends.Backend:
        if name == "openvino":
            raise BackendError("a library is broken")
        return opened(name, wanted)

    monkeypatch.setattr(backends, "_open", half_broken)
    with caplog.at_level(logging.WARNING):
        assert open_backend("auto", request(device="auto")).name == "onnxruntime"
    assert "a library is broken" in caplog.text


def test_cuda_without_an_fp16_graph_runs_fp32() -> None:
    """What "auto" means on a GPU when the bundle was exported without --fp16."""
    from sdk.backends import onnxruntime as module
    from sdk.backends import onnxruntime_cuda

    stage = Bundle.load(bundles.shared("blur")).stage()
    for graphs, expected in ((stage.graphs, "fp16"), (stage.graphs[:2], "fp32")):
        seen: list[str] = []

        class Session:
            def __init__(self, engine: object, gpu: object, graph: str, *, scale: int, precision: str, seen=seen):
                seen.append(precision)

        fake = types.SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "onnxruntime", fake)
            patch.setattr(onnxruntime_cuda, "open_device", lambda index: None)
            patch.setattr(onnxruntime_cuda, "OnnxRuntimeCudaBackend", Session)
            less = type(stage)(**vars(stage) | {"graphs": tuple(graphs)})
            module.open_backend(replace(request("blur", device="auto", precision="auto"), stage=less))
        assert seen == [expected]


def test_a_provider_that_falls_back_is_refused() -> None:
    from sdk.backends import onnxruntime as module
    from sdk.backends import onnxruntime_cuda

    class Session:
        def __init__(self, *arguments: object, **options: object):
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    fake = types.SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        InferenceSession=Session, SessionOptions=mock.Mock, __version__="1.0",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", fake)
        patch.setattr(onnxruntime_cuda, "open_device", lambda index: types.SimpleNamespace(index=index))
        with pytest.raises(BackendUnavailable, match="fell back"):
            module.open_backend(request(device="cuda:0"))


def test_openvino_keeps_compiled_models_where_it_is_told(engine_cache: Path) -> None:
    pytest.importorskip("openvino")
    backend = open_backend("openvino", request("blur"))
    backend.run(noise((1, 8, 8, 3)))
    assert any(engine_cache.rglob("*.blob"))
    backend.close()


def test_openvino_bounds_its_cache(engine_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from sdk.backends import openvino as module

    backend = open_backend("openvino", request("blur"))
    backend.expect((1, 8, 8, 3), runs=1000)
    (first,) = engine_cache.rglob("*.blob")
    monkeypatch.setattr(module, "CACHE_BYTES", int(first.stat().st_size * 2.5))
    os.utime(first, (0, 0))
    for width in (9, 10):
        backend.expect((1, 8, width, 3), runs=1000)
    assert len(list(engine_cache.rglob("*.blob"))) == 2 and not first.exists()
    assert backend.run(noise((1, 8, 8, 3))).shape == (1, 16, 16, 3)
    backend.close()


def test_openvino_compiles_for_what_comes_often_and_keeps_few() -> None:
    pytest.importorskip("openvino")
    from sdk.backends import openvino as module

    backend = open_backend("openvino", request("blur"))
    for width in range(8, 40):  # 32 sizes, each once
        backend.run(noise((1, 8, width, 3)))
    assert not backend._shapes
    for _ in range(module.OFTEN):
        assert (1, 9, 9, 3) not in backend._shapes
        backend.run(noise((1, 9, 9, 3)))
    assert list(backend._shapes) == [(1, 9, 9, 3)]
    backend.expect((1, 10, 10, 3), runs=module.OFTEN - 1)
    assert len(backend._shapes) == 1
    for side in range(11, 20):
        backend.expect((1, side, side, 3), runs=module.OFTEN)
        backend.run(noise((1, 9, 9, 3)))  # the one used last is dropped last
    assert len(backend._shapes) == module.KEPT_SHAPES and (1, 9, 9, 3) in backend._shapes
    backend.close()


def test_openvino_keeps_nothing_for_sizes_that_may_never_come_again() -> None:
    """Its own cache of prepared operations grows with every size; test_sdk_stress.py measures the memory."""
    pytest.importorskip("openvino")
    backend = open_backend("openvino", request("blur"))
    assert int(backend._config["CPU_RUNTIME_CACHE_CAPACITY"]) <= 16
    backend.close()


def test_onnxruntime_keeps_no_plan_of_memory_for_each_size() -> None:
    pytest.importorskip("onnxruntime")
    backend = open_backend("onnxruntime", request())
    assert not backend._session.get_session_options().enable_mem_pattern
    backend.close()


@pytest.mark.parametrize("ends", sorted(ENDS))
def test_what_is_expected_runs_as_what_is_not(engine: str, ends: str) -> None:
    backend, ready = open_backend(engine, request(ends=ends)), open_backend(engine, request(ends=ends))
    for shape in ((1, 16, 24, 3), (3, 24, 8, 3)):
        batch = noise(shape, ends)
        for runs in (1, 2, 1000):
            ready.expect(shape, runs=runs)
        np.testing.assert_array_equal(backend.run(batch), ready.run(batch))
        backend.expect(shape, runs=1000)
        np.testing.assert_array_equal(backend.run(batch), ready.run(batch))
    backend.close()
    ready.close()


def test_openvino_survives_damaged_compiled_models(engine_cache: Path) -> None:
    pytest.importorskip("openvino")
    batch = noise((1, 8, 8, 3))
    backend = open_backend("openvino", request("blur"))
    expected = backend.run(batch)
    backend.close()
    for length in (0, 100):
        for blob in engine_cache.rglob("*.blob"):
            blob.write_bytes(blob.read_bytes()[:length])
        again = open_backend("openvino", request("blur"))
        np.testing.assert_array_equal(again.run(batch), expected)
        again.close()


@pytest.mark.parametrize("place", ["a file in the way", "not writable", "no home"])
def test_openvino_runs_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    pytest.importorskip("openvino")
    if place == "a file in the way":
        (tmp_path / "file").touch()
        monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    elif place == "not writable":
        monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    else:
        monkeypatch.delenv("SR_CACHE_DIR")

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
    backend = open_backend("openvino", request("blur"))
    assert backend.run(noise((1, 8, 8, 3))).shape == (1, 16, 16, 3)
    assert "SR_CACHE_DIR" in caplog.text
    backend.close()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_wrong_thread_count_is_refused(engine: str, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SR_THREADS", value)
    with pytest.raises(OptionError, match="SR_THREADS"):
        open_backend(engine, request())


def test_the_thread_count_reaches_the_engine(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_THREADS", "1")
    backend = open_backend(engine, request())
    if engine == "openvino":
        assert backend._config["INFERENCE_NUM_THREADS"] == 1
    else:
        assert backend._session.get_session_options().intra_op_num_threads == 1
    backend.close()


@pytest.mark.skipif(not has("openvino"), reason="openvino is not installed")
def test_signals_are_safe_after_engines_come_and_go() -> None:
    # Each OpenVINO Core puts a signal stack in place and restores the one before when it goes: with several of them
    # the restored one may be freed memory, and the next signal ends the process.
    script = (
        "import gc, os, signal, sys\n"
        "from sdk import Upscaler\n"
        "signal.signal(signal.SIGUSR1, lambda *arguments: None)\n"
        "first = Upscaler(sys.argv[1], backend='openvino')\n"
        "second = Upscaler(sys.argv[1], backend='openvino')\n"
        "first.close()\n"
        "del first\n"
        "gc.collect()\n"
        "second.close()\n"
        "del second\n"
        "gc.collect()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(request().folder)], check=True, cwd=ROOT)
