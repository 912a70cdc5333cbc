"""CUDA without a GPU: both libraries, ONNX Runtime's provider and pictures on a GPU, on GPUs of host memory."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bundles
import fake_cuda
import numpy as np
import pytest

from sdk import BackendError, BackendUnavailable, ImageError, OptionError, OutOfMemory, Upscaler, device_arrays
from sdk.backends import cuda, onnxruntime_cuda
from sdk.backends.locks import SharedLock
from sdk.device_arrays import DeviceArray

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(params=["cuda-python", "pycuda"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cuda.Machine]:
    """Two GPUs, reached through either library; in the end nothing may have gone wrong or been left behind."""
    for kind in ("unet", "blur"):
        bundles.shared(kind)  # made with the real engine
    made = fake_cuda.Machine()
    fake_cuda.install(monkeypatch, made, request.param)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_cuda.onnxruntime(made, onnxruntime))
    yield made
    gc.collect()
    assert made.faults == []
    assert made.blocks == {}, "memory is left on the GPU"
    assert made.graphs == {}
    assert made.pinned == {}
    assert made.streams == {}


def photo(height: int, width: int, *, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image if dtype == np.uint8 else (image / 255).astype(dtype)


def on_gpu(kind: str = "unet", *, device: str = "cuda:0", **options: Any) -> Upscaler:
    return Upscaler(bundles.shared(kind), device=device, **{"precision": "fp32"} | options)


def expected(image: np.ndarray, kind: str = "unet", **options: Any) -> np.ndarray:
    """Enlarge on the CPU, with the real ONNX Runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", onnxruntime)
        with Upscaler(bundles.shared(kind), backend="onnxruntime", device="cpu") as opened:
            return opened.upscale(image, **options)


# Libraries


def test_memory_and_copies(machine: fake_cuda.Machine) -> None:
    device = cuda.open_device(1)
    free = device.free_bytes()
    buffer, other = cuda.Buffer(device, 24), cuda.Buffer(device, 100)
    assert device.free_bytes() == free - 124
    stream = device.new_stream()
    staged = device.page_locked(24)
    staged[:] = np.arange(24)
    device.upload(buffer.address, staged, stream)
    device.copy_rows(other.address + 5, 10, buffer.address + 1, 6, width=4, rows=4, stream=stream)
    result = np.zeros(40, np.uint8)
    device.download(result, other.address, stream)
    device.synchronize(stream)
    rows = np.arange(24, dtype=np.uint8).reshape(4, 6)[:, 1:5]
    assert (result.reshape(4, 10)[:, 5:9] == rows).all()
    address = other.address
    other.reserve(50)
    assert other.address == address, "what is large enough stays where it is"
    other.reserve(200)
    buffer.free()
    assert device.free_bytes() == free - 200
    assert device.index == 1
    del other
    assert device.free_bytes() == free


def test_device_synchronize_waits_for_every_stream(machine: fake_cuda.Machine) -> None:
    device = cuda.open_device(0)
    buffer, source = cuda.Buffer(device, 3), np.array([1, 2, 3], np.uint8)
    device.upload(buffer.address, source, device.new_stream())
    device.synchronize()
    assert fake_cuda.array_at(np.dtype(np.uint8), (3,), buffer.address).tolist() == [1, 2, 3]


def test_graphs_are_captured_and_launched(machine: fake_cuda.Machine) -> None:
    device = cuda.open_device(0)
    source, target = cuda.Buffer(device, 3), cuda.Buffer(device, 3)
    stream, result = device.new_stream(), np.zeros(3, np.uint8)

    def enqueue() -> None:
        device.copy_rows(target.address, 3, source.address, 3, width=3, rows=1, stream=stream)

    graph = device.capture(stream, enqueue)
    for value in (1, 2):
        device.upload(source.address, np.full(3, value, np.uint8), stream)
        device.launch(graph, stream)
        device.download(result, target.address, stream)
        device.synchronize(stream)
        assert result.tolist() == [value] * 3
    device.release_graph(graph)

    def fail() -> None:
        raise BackendError("inside")

    with pytest.raises(BackendError, match="inside"):
        device.capture(stream, fail)
    assert machine.captures == {} and machine.graphs == {}


def test_what_a_gpu_is(machine: fake_cuda.Machine) -> None:
    device = cuda.open_device(1)
    assert device.facts() == cuda.Facts(fake_cuda.NAME, "9.0", machine.limit)
    with device.current():
        assert machine.current() == 1
    assert machine.current() == 0


def test_too_little_device_memory(machine: fake_cuda.Machine) -> None:
    device = cuda.open_device(0)
    buffer = cuda.Buffer(device, 10)
    with pytest.raises(OutOfMemory, match="cuda:0"):
        buffer.reserve(machine.limit + 1)
    assert (buffer.address, buffer.size) == (0, 0)
    buffer.reserve(20)
    assert machine.used(0) == 20


def test_a_gpu_that_is_not_there(machine: fake_cuda.Machine) -> None:
    with pytest.raises(BackendUnavailable, match="there is no GPU cuda:2: this machine has 2"):
        cuda.open_device(2)


def test_the_thread_keeps_its_current_device(machine: fake_cuda.Machine) -> None:
    """An application's own CUDA code, torch's say, goes on where it was."""
    device = cuda.open_device(1)
    with device.current():
        assert machine.stack() == [1]
        device.release(device.allocate(8))
        assert machine.stack() == [1]
    assert machine.stack() == []


def test_other_errors_name_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, fake_cuda.Machine())
    device = cuda.open_device(0)
    monkeypatch.setattr(sys.modules["stand_in"], "cudaMalloc", lambda size: (700, None))
    with pytest.raises(BackendError, match="cuda:0: cudaMalloc: error 700") as caught:
        device.allocate(8)
    assert not isinstance(caught.value, OutOfMemory)


def test_no_driver() -> None:
    runtime = fake_cuda.runtime(fake_cuda.Machine())
    runtime.cudaGetDeviceCount = lambda: (35, None)
    with pytest.raises(BackendUnavailable, match="error 35; check the NVIDIA driver"):
        cuda.CudaPythonDevice(runtime, 0)
    driver = fake_cuda.pycuda_driver(fake_cuda.Machine())

    def init() -> None:
        raise driver.Error("no CUDA-capable device")

    driver.init = init
    with pytest.raises(BackendUnavailable, match="no CUDA-capable device; check the NVIDIA driver"):
        cuda.PyCudaDevice(driver, 0)


def test_neither_library(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = [(name, "not_installed." + name, kind) for name, _, kind in cuda.LIBRARIES]
    monkeypatch.setattr(cuda, "LIBRARIES", libraries)
    with pytest.raises(BackendUnavailable, match=r"pip install 'sr-sdk\[gpu\]'"):
        cuda.open_device(0)


def test_a_broken_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "broken_cuda.py").write_text("import libraries_of_it")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cuda, "LIBRARIES", (("pycuda", "broken_cuda", cuda.PyCudaDevice),))
    with pytest.raises(BackendUnavailable, match="pycuda cannot be loaded: No module named 'libraries_of_it'"):
        cuda.open_device(0)


def test_the_stand_in_has_the_names_of_the_real_runtime() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    fake = fake_cuda.runtime(fake_cuda.Machine())
    missing = [name for name in vars(fake) if not hasattr(real, name)]
    missing += [name for name in vars(fake.cudaMemcpyKind) if not hasattr(real.cudaMemcpyKind, name)]
    missing += [name for name in fake_cuda.ERRORS if name != "cudaErrorOther" and not hasattr(real.cudaError_t, name)]
    assert missing == []


def test_cuda_python_without_a_driver_says_so() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailable, match=r"CUDA cannot be used: .*check the NVIDIA driver"):
        cuda.CudaPythonDevice(real, 0)


def test_pictures_on_the_gpu_beside_captures(machine: fake_cuda.Machine) -> None:
    """Nothing may be allocated or waited for while ONNX Runtime captures, whoever asks."""
    image = photo(24, 24)
    wanted = expected(image)
    with on_gpu() as upscaler, ThreadPoolExecutor(2) as pool:

        def on_host() -> None:
            for size in range(8, 72, 8):  # each is captured
                for _ in range(5):
                    upscaler.upscale(photo(size, 16))

        def on_device() -> None:
            for _ in range(30):
                picture = fake_cuda.Array(machine, image)
                result = upscaler.upscale(picture)
                assert isinstance(result, DeviceArray)
                np.testing.assert_array_equal(result.copy_to_host(), wanted)
                picture.free()

        for done in [pool.submit(on_host), pool.submit(on_device)]:
            done.result()
    assert any(how == "capture" for _, _, how in machine.runs)


def test_copies_leave_no_streams_behind(machine: fake_cuda.Machine) -> None:
    array = DeviceArray(cuda.open_device(0), (4, 4, 3), np.dtype(np.uint8))
    array.copy_to_host()
    before = len(machine.streams)
    for _ in range(5):
        array.copy_to_host()
    assert len(machine.streams) == before


@pytest.mark.gpu
@pytest.mark.parametrize("name,module,kind", cuda.LIBRARIES)
def test_memory_and_copies_on_a_real_gpu(name: str, module: str, kind: Any) -> None:
    library = pytest.importorskip(module)
    try:
        device = kind(library, 0)
    except BackendUnavailable as exc:
        pytest.skip(str(exc))
    buffer, other, stream = cuda.Buffer(device, 24), cuda.Buffer(device, 100), device.new_stream()
    staged, result = device.page_locked(24), device.page_locked(40)
    staged[:] = np.arange(24)
    device.upload(buffer.address, staged, stream)
    device.copy_rows(other.address + 5, 10, buffer.address + 1, 6, width=4, rows=4, stream=stream)
    device.download(result, other.address, stream)
    device.synchronize(stream)
    device.synchronize()
    assert (result.reshape(4, 10)[:, 5:9] == np.arange(24).reshape(4, 6)[:, 1:5]).all()
    with pytest.raises(OutOfMemory):
        device.allocate(1 << 50)


# The provider


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pixels_are_those_of_the_cpu(machine: fake_cuda.Machine, dtype: type) -> None:
    with on_gpu() as opened:
        assert (opened.info["backend"], opened.info["device"]) == ("onnxruntime", "cuda:0")
        for height, width in [(1, 1), (7, 5), (40, 64), (90, 33), (40, 64)]:
            image = photo(height, width, dtype=np.uint8).astype(dtype)
            image = image / np.float32(255) if dtype == np.float32 else image
            assert (opened.upscale(image) == expected(image)).all()


def test_tiles_run_in_lanes(machine: fake_cuda.Machine) -> None:
    image = photo(150, 430)
    with on_gpu(batch=2) as opened:
        result = opened.upscale(image, tile=16)
        assert opened.stats.tiles > 20
    assert (result == expected(image, tile=16)).all()
    assert max(shape[0] for _, shape, _ in machine.runs) == 2


def test_nothing_is_printed_by_what_loads_libraries(
    machine: fake_cuda.Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpu().close()
    assert capsys.readouterr().out == ""


def test_shapes_that_recur_are_replayed_as_graphs(machine: fake_cuda.Machine) -> None:
    with on_gpu() as opened:
        images = [photo(32, 40, seed=seed) for seed in range(12)]
        for image in images:
            assert (opened.upscale(image) == expected(image)).all()
        kinds = [kind for _, _, kind in machine.runs]
        assert kinds[:3] == ["plain"] * 3 and set(kinds[3:]) == {"capture", "replay"}
        assert kinds.count("capture") == onnxruntime_cuda.LANES, "one for each lane's buffers"


def test_graphs_follow_buffers_that_move(machine: fake_cuda.Machine) -> None:
    small, large = photo(32, 40), photo(80, 96, seed=1)
    with on_gpu() as opened:
        opened.warmup((32, 40))
        for image in (small, small, small, large, small, small, large, small, small):
            assert (opened.upscale(image) == expected(image)).all()
    assert [kind for _, _, kind in machine.runs].count("capture") >= 2


def test_graphs_are_bounded(machine: fake_cuda.Machine) -> None:
    with on_gpu() as opened:
        for side in range(8, 8 + 4 * (onnxruntime_cuda.MAX_GRAPHS + 4), 4):
            opened.warmup((side, 16))
        image = photo(64, 16)
        assert (opened.upscale(image) == expected(image)).all()
    assert [kind for _, _, kind in machine.runs].count("capture") <= onnxruntime_cuda.MAX_GRAPHS


def test_eight_threads_share_two_lanes(machine: fake_cuda.Machine) -> None:
    images = [photo(16 + 8 * (seed % 4), 24 + 8 * (seed % 3), seed=seed) for seed in range(48)]
    wholes = [expected(image) for image in images]
    with on_gpu(batch=2) as opened, ThreadPoolExecutor(8) as pool:
        for result, whole in zip(pool.map(opened.upscale, images), wholes, strict=True):
            assert (result == whole).all()


def test_two_gpus_share_the_windows(machine: fake_cuda.Machine) -> None:
    image = photo(170, 430)
    with on_gpu(device="cuda:0,1", batch=2) as opened:
        assert opened.info["device"] == "cuda:0,1"
        result = opened.upscale(image, tile=16)
        deep = opened.upscale(image.astype(np.uint16), tile=16)
    assert (result == expected(image, tile=16)).all()
    assert (deep == expected(image.astype(np.uint16), tile=16)).all()
    counts = [sum(gpu == number for gpu, _, _ in machine.runs) for number in (0, 1)]
    assert min(counts) >= sum(counts) // 4, counts


def test_a_gpu_named_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="named twice"):
        Upscaler(bundles.shared("blur"), device="cuda:0,0")


def test_too_little_memory_halves_the_batch_then_the_window(machine: fake_cuda.Machine) -> None:
    image = photo(260, 420)
    whole = expected(image).astype(int)
    with on_gpu(batch=4) as opened:
        machine.fails = lambda shape: shape[0] * shape[1] * shape[2] > 9000
        result = opened.upscale(image, tile=64)
        assert abs(result - whole).max() <= 1
        assert opened.stats.retries >= 3
        retries = opened.stats.retries
        assert abs(opened.upscale(image) - whole).max() <= 1
        assert opened.stats.retries == retries


def test_too_little_memory_for_the_buffers(machine: fake_cuda.Machine) -> None:
    image = photo(260, 420)
    with on_gpu() as opened:
        machine.limit = 500_000
        assert abs(opened.upscale(image) - expected(image).astype(int)).max() <= 1
        assert opened.stats.retries >= 1


def test_the_window_comes_from_the_memory_of_the_gpu(machine: fake_cuda.Machine) -> None:
    machine.limit = 8 << 30
    with on_gpu(batch=1) as opened:
        large = opened.info["one_piece_pixels"]
    machine.limit = 16 << 20
    with on_gpu(batch=1) as opened:
        assert opened.info["one_piece_pixels"] < large / 8


def test_a_closed_backend(machine: fake_cuda.Machine) -> None:
    opened = on_gpu()
    opened.upscale(photo(8, 8))
    backend = opened._runner.backends["uint8"]
    opened.close()
    assert machine.blocks == {}
    with pytest.raises(BackendError, match="closed"):
        opened.upscale(photo(8, 8))
    with pytest.raises(BackendError, match="closed"):
        backend.run(photo(8, 8)[None])
    opened.close()


def test_closing_while_others_run(machine: fake_cuda.Machine) -> None:
    opened = on_gpu(batch=1)

    def enlarge(seed: int) -> bool:
        try:
            return opened.upscale(photo(40, 200, seed=seed), tile=16).shape == (80, 400, 3)
        except BackendError as exc:
            return "closed" in str(exc)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(enlarge, seed) for seed in range(12)]
        futures[0].result(30)
        opened.close()
        assert all(future.result(30) for future in futures)


def test_a_run_that_fails_is_an_error(machine: fake_cuda.Machine) -> None:
    with on_gpu() as opened:
        machine.fails = lambda shape: bool(1 / 0)
        with pytest.raises(BackendError, match="division"):
            opened.upscale(photo(8, 8))
        machine.fails = lambda shape: False
        assert (opened.upscale(photo(8, 8)) == expected(photo(8, 8))).all()


def test_a_provider_that_does_not_load_is_told(machine: fake_cuda.Machine) -> None:
    """What onnxruntime-gpu says where CUDA's libraries are missing."""

    def session(*arguments: object, **options: object) -> None:
        raise RuntimeError("This session contains graph nodes that are assigned to the default CPU EP, but fallback")

    sys.modules["onnxruntime"].InferenceSession = session
    with pytest.raises(BackendUnavailable, match="its CUDA provider could not be loaded"):
        on_gpu(backend="onnxruntime")


def test_auto_takes_the_cpu_where_cuda_cannot_be_used(
    machine: fake_cuda.Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """onnxruntime-gpu on a machine without a GPU."""
    machine.gpus = 0
    sys.modules["onnxruntime"].InferenceSession = onnxruntime.InferenceSession
    with Upscaler(bundles.shared("blur"), backend="onnxruntime") as opened:
        assert opened.info["device"] == "cpu"
    assert "runs on the CPU: there is no GPU cuda:0" in caplog.text
    with pytest.raises(BackendUnavailable, match="there is no GPU"):
        Upscaler(bundles.shared("blur"), backend="onnxruntime", device="cuda:0")


def test_an_fp16_engine_is_checked_once(machine: fake_cuda.Machine) -> None:
    with on_gpu("unet", device="cuda:0,1", precision="fp16") as opened:
        assert opened.info["precision"] == "fp16"
        checks = len(machine.runs)
        opened.upscale(photo(8, 8))
        assert checks == 4 and len(machine.runs) == 5, "fp16 and fp32 on each GPU"


def test_an_fp16_engine_that_makes_black_is_refused(
    machine: fake_cuda.Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = onnxruntime_cuda.OnnxRuntimeCudaBackend.run

    def overflowing(self: onnxruntime_cuda.OnnxRuntimeCudaBackend, batch: np.ndarray) -> np.ndarray:
        result = run(self, batch)
        if self.precision == "fp16":
            result[:, :, 2:10] = 0  # what a cast makes of NaN
        return result

    monkeypatch.setattr(onnxruntime_cuda.OnnxRuntimeCudaBackend, "run", overflowing)
    for options in ({"backend": "onnxruntime", "precision": "auto"}, {"precision": "fp16"}):
        with pytest.raises(BackendError, match=r"wrong in fp16 .* use precision='fp32'"):
            on_gpu("unet", **options)
    with on_gpu("unet", device="auto", precision="auto") as opened:
        assert opened.info["device"] == "cpu" and "wrong in fp16" in caplog.text


# Pictures on a GPU


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("pad", [0, 20])
def test_a_picture_on_a_gpu_stays_there(machine: fake_cuda.Machine, dtype: type, pad: int) -> None:
    with on_gpu(batch=2) as opened:
        for height, width, tile in [(1, 1, None), (7, 5, None), (64, 40, None), (150, 201, 16), (90, 33, 40)]:
            image = photo(height, width, dtype=dtype)
            array = fake_cuda.Array(machine, image, pad=pad)
            result = opened.upscale(array, tile)
            assert isinstance(result, DeviceArray) and result.shape == (2 * height, 2 * width, 3)
            assert machine.copied["up"] == machine.copied["down"] == 0
            host = result.copy_to_host()
            assert host.dtype == dtype and (host == expected(image, tile=tile)).all()
            machine.copied["down"] = 0
            array.free()
            del result
        assert opened.stats.pictures == 5 and opened.stats.tiles > 5


def test_a_picture_that_is_still_being_made_is_waited_for(machine: fake_cuda.Machine) -> None:
    image = photo(16, 16)
    array = fake_cuda.Array(machine, np.zeros_like(image))
    device = cuda.open_device(0)
    device.upload(array.address, image, device.new_stream())  # as another library's work
    with on_gpu() as opened:
        assert (opened.upscale(array).copy_to_host() == expected(image)).all()
    array.free()


def test_a_result_speaks_the_array_interface(machine: fake_cuda.Machine) -> None:
    image = photo(12, 10)
    array = fake_cuda.Array(machine, image, gpu=1)
    with on_gpu(device="cuda:0,1") as opened:
        result = opened.upscale(array)
        twice = opened.upscale(result)
    interface = result.__cuda_array_interface__
    assert interface["shape"] == (24, 20, 3) and interface["typestr"] == "|u1" and interface["version"] == 3
    assert result.__dlpack_device__() == (2, 1)
    seen = fake_cuda.array_at(np.dtype(np.uint8), interface["shape"], interface["data"][0])
    assert (seen == expected(image)).all()
    assert (twice.copy_to_host() == expected(expected(image))).all()
    assert {gpu for gpu, _, _ in machine.runs} == {1}
    array.free()


def test_too_little_memory_for_a_picture_on_a_gpu(machine: fake_cuda.Machine) -> None:
    image = photo(260, 420)
    array = fake_cuda.Array(machine, image)
    with on_gpu(batch=4) as opened:
        machine.fails = lambda shape: shape[0] * shape[1] * shape[2] > 9000
        result = opened.upscale(array, tile=64)
        assert abs(result.copy_to_host() - expected(image).astype(int)).max() <= 1
        assert opened.stats.retries >= 2
        machine.fails = lambda shape: True
        with pytest.raises(OutOfMemory):
            opened.upscale(array)
    array.free()


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (8, 8)}, {"shape": (8, 8, 4)}, {"shape": (0, 8, 3)}, {"typestr": "<u2"}, {"typestr": ">f4"},
        {"typestr": "<f8"}, {"strides": (1, 8, 64)}, {"strides": (12, 3, 1)}, {"strides": (-24, 3, 1)},
    ],
)  # fmt: skip
def test_other_arrays_on_a_gpu_are_refused(machine: fake_cuda.Machine, changes: dict[str, Any]) -> None:
    array = fake_cuda.Array(machine, photo(8, 8), **changes)
    with on_gpu("blur") as opened, pytest.raises(ImageError, match="on a GPU has to"):
        opened.upscale(array)
    array.free()


def test_pictures_on_a_gpu_need_an_engine_there(machine: fake_cuda.Machine) -> None:
    array = fake_cuda.Array(machine, photo(8, 8), gpu=1)
    with on_gpu("blur") as opened, pytest.raises(BackendUnavailable, match="on cuda:1, the engine on cuda:0"):
        opened.upscale(array)
    with on_gpu("blur", device="cuda:0,1") as opened:
        nameless = types.SimpleNamespace(__cuda_array_interface__=array.__cuda_array_interface__)
        with pytest.raises(BackendUnavailable, match="does not name"):
            opened.upscale(nameless)
    with on_gpu("blur") as opened, pytest.raises(OptionError, match="factor"):
        opened.upscale(array, factor=3)
    with on_gpu("blur", seams="fast") as opened, pytest.raises(OptionError, match="seams"):
        opened.upscale(array)
    sys.modules["onnxruntime"] = onnxruntime
    with on_gpu("blur", device="cpu") as opened, pytest.raises(BackendUnavailable, match="the engine on the CPU"):
        opened.upscale(array)
    array.free()


def test_runs_of_rows_and_columns() -> None:
    assert device_arrays._runs(np.array([4, 5, 6])) == [(0, 4, 3)]
    assert device_arrays._runs(np.array([0, 1, 2, 1, 0])) == [(0, 0, 3), (3, 1, 1), (4, 0, 1)]
    assert device_arrays._runs(np.array([0, 0, 0])) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]


# Locks


def test_a_shared_lock_is_held_alone_or_together() -> None:
    lock, inside, seen = SharedLock(), [0, 0], []
    both = threading.Barrier(2, timeout=10)

    def share() -> None:
        with lock.shared():
            both.wait()  # two at once, or it breaks
            inside[0] += 1
            seen.append(tuple(inside))
            inside[0] -= 1

    def alone() -> None:
        with lock.alone():
            inside[1] += 1
            seen.append(tuple(inside))
            inside[1] -= 1

    threads = [threading.Thread(target=target) for target in (share, share, alone, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 4 and (1, 1) not in seen and (0, 2) not in seen


def test_importing_the_runtime_loads_no_cuda_library() -> None:
    assert importlib.import_module("sdk.backends.cuda").LIBRARIES[0][1] == "pycuda.driver"


@pytest.mark.gpu
def test_pixels_on_a_real_gpu() -> None:
    """Plain runs, captured and replayed graphs, tiles in lanes, and a picture that stays on the GPU."""
    try:
        opened = Upscaler("fast-x2", backend="onnxruntime", device="cuda:0", precision="fp32", batch=2)
    except BackendUnavailable as exc:
        pytest.skip(str(exc))
    with opened, Upscaler("fast-x2", backend="onnxruntime", device="cpu") as on_cpu:
        for seed in range(8):
            image = photo(96, 120, seed=seed)
            assert abs(opened.upscale(image) - on_cpu.upscale(image).astype(int)).max() <= 1
        image = photo(600, 700)
        whole = on_cpu.upscale(image).astype(int)
        assert abs(opened.upscale(image, tile=128) - whole).max() <= 1
        device = opened._runner.backends["uint8"].on_device(0).gpu
        array = DeviceArray(device, image.shape, image.dtype)
        device.upload(array.address, image, device.new_stream())
        assert abs(opened.upscale(array, tile=128).copy_to_host() - whole).max() <= 1
