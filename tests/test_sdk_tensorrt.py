"""TensorRT without a GPU: engines are built, kept, checked and run, in the API of each version."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import fake_cuda
import fake_tensorrt
import numpy as np
import pytest

from sdk import BackendError, BackendUnavailable, Bundle, OptionError, OutOfMemory, Upscaler
from sdk.backends import Request, engine_cache, open_backend, tensorrt, tensorrt_builder
from sdk.backends.tensorrt import choose_profile, engine_dir
from sdk.backends.tensorrt_builder import BuildOptions, Profile
from sdk.device_arrays import DeviceArray

onnxruntime = pytest.importorskip("onnxruntime")
PAIRS = [(version, "cuda-python") for version in fake_tensorrt.VERSIONS] + [("10.16.1.11", "pycuda")]


class World:
    """A machine with two GPUs and a version of TensorRT."""

    def __init__(self, version: str, library: str, monkeypatch: pytest.MonkeyPatch):
        self.version = version
        self.machine = fake_cuda.Machine()
        self.behaviour = fake_tensorrt.Behaviour()
        fake_cuda.install(monkeypatch, self.machine, library)
        self.trt = fake_tensorrt.module(self.machine, version, onnxruntime, self.behaviour)
        monkeypatch.setitem(sys.modules, "tensorrt", self.trt)

    @property
    def builds(self) -> list[dict[str, Any]]:
        return self.behaviour.builds

    @property
    def is_old(self) -> bool:
        return self.version.startswith("8.")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for kind in ("unet", "blur", "identity"):
        bundles.shared(kind)
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SR_ENGINE_DIR", raising=False)
    return tmp_path / "cache" / "engines"


@pytest.fixture(params=PAIRS, ids="-".join)
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(*request.param, monkeypatch)
    yield made
    gc.collect()
    assert made.machine.faults == []
    assert made.machine.blocks == {}, "memory is left on the GPU"
    assert made.machine.graphs == {}, "CUDA graphs are left on the GPU"
    assert made.machine.pinned == {}


@pytest.fixture
def ten(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One version, for what does not differ between them."""
    made = World("10.16.1.11", "cuda-python", monkeypatch)
    yield made
    gc.collect()
    assert made.machine.faults == [] and made.machine.blocks == {} and made.machine.graphs == {}


def photo(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def on_gpu(kind: str = "unet", *, device: str = "cuda:0", precision: str = "fp32", **options: Any) -> Upscaler:
    return Upscaler(bundles.shared(kind), backend="tensorrt", device=device, precision=precision, **options)


def expected(image: np.ndarray, kind: str = "unet", **options: Any) -> np.ndarray:
    with Upscaler(bundles.shared(kind), backend="onnxruntime", device="cpu") as opened:
        return opened.upscale(image, **options)


def request(kind: str = "unet", *, ends: str = "uint8", device: str = "cuda:0", precision: str = "fp32") -> Request:
    bundle = Bundle.load(bundles.shared(kind))
    return Request(bundle.folder, bundle.stage(), bundle.manifest.scale, ends, device, precision)


def to_host(result: DeviceArray) -> np.ndarray:
    interface = result.__cuda_array_interface__
    return fake_cuda.array_at(np.dtype(interface["typestr"]), interface["shape"], interface["data"][0]).copy()


# Pixels


def test_pixels_are_those_of_the_graph(world: World) -> None:
    with on_gpu() as upscaler:
        assert upscaler.info["engine"] == f"tensorrt {world.version}"
        for size in ((24, 40), (1, 1), (7, 90)):
            image = photo(*size)
            np.testing.assert_array_equal(upscaler.upscale(image), expected(image))


def test_sixteen_bits_go_through_an_engine_with_float_ends(world: World) -> None:
    image = (photo(20, 30).astype(np.uint16) * 257)[:, :, :3]
    with on_gpu() as upscaler:
        np.testing.assert_array_equal(upscaler.upscale(image), expected(image))
    assert [build["graph"] for build in world.builds] == ["main.fp32.uint8.onnx", "main.fp32.float32.onnx"]


def in_windows(monkeypatch: pytest.MonkeyPatch, *, batch: int = 2, side: int = 112) -> None:
    """Have engines built for small windows; the U-Net needs 88 at least."""
    monkeypatch.setattr(tensorrt, "choose_profile", lambda stage, total: Profile(stage.stride, batch, side))


def test_tiles_share_batches_and_graphs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    in_windows(monkeypatch)
    image = photo(120, 200)
    with on_gpu(batch=8) as upscaler:
        for _ in range(3):
            np.testing.assert_array_equal(upscaler.upscale(image, tile=32), expected(image, tile=32))
    kinds = {how for _, _, how in world.machine.runs}
    assert kinds == {"plain", "capture"}
    captured = {shape for _, shape, how in world.machine.runs if how == "capture"}
    assert {shape[0] for shape in captured} == {2}, "full batches only"


def test_graphs_of_batches_that_alternate_are_not_made_again_and_again(
    ten: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane has one graph: of pictures with a full batch and a remainder each, none lasts."""
    in_windows(monkeypatch)
    backend = open_backend("tensorrt", request())
    full, rest = photo(64, 24).reshape(2, 32, 24, 3), photo(32, 24)[None]
    for _ in range(100):
        for batch in (full, full, full, full, rest):
            backend.run(batch)
    backend.close()
    assert 1 <= sum(how == "capture" for _, _, how in ten.machine.runs) <= 10


def test_the_profile_outlives_a_driver() -> None:
    stage = Bundle.load(bundles.shared("unet")).stage()
    assert choose_profile(stage, 24 << 30) == choose_profile(stage, (23 << 30) + 12345)


def test_pictures_larger_than_the_profile_are_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    in_windows(monkeypatch)
    image = photo(230, 130)
    with on_gpu() as upscaler:
        np.testing.assert_array_equal(upscaler.upscale(image), expected(image))
        assert all(max(shape[1:3]) <= 112 for _, shape, _ in world.machine.runs)
        with pytest.raises(OptionError, match="tile 100: this engine takes at most"):
            upscaler.upscale(image, tile=100)


def test_threads_get_their_own_pixels(world: World) -> None:
    images = [photo(16 + 8 * (n % 3), 24, seed=n) for n in range(24)]
    wanted = [expected(image) for image in images]
    with on_gpu() as upscaler, ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(upscaler.upscale, images), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_two_gpus(world: World) -> None:
    image = photo(150, 150)
    with on_gpu(device="cuda:0,1", batch=1) as upscaler:
        np.testing.assert_array_equal(upscaler.upscale(image, tile=24), expected(image, tile=24))
    assert {gpu for gpu, _, _ in world.machine.runs} == {0, 1}


def test_pictures_on_the_gpu_stay_there(world: World) -> None:
    image = photo(24, 32)
    picture = fake_cuda.Array(world.machine, image)
    with on_gpu() as upscaler:
        up = world.machine.copied["up"]
        result = upscaler.upscale(picture)
        assert isinstance(result, DeviceArray) and world.machine.copied["up"] == up
        np.testing.assert_array_equal(to_host(result), expected(image))
        del result
    picture.free()


# Building


def test_half_precision_is_in_the_network(world: World) -> None:
    image = photo(24, 24)
    with on_gpu("unet", precision="auto") as upscaler:
        assert upscaler.info["precision"] == "fp16"
        assert abs(upscaler.upscale(image).astype(int) - expected(image)).max() <= 1
    (build,) = world.builds
    assert build["half"] and build["typed"] == (not world.is_old)
    assert ("FP16" in build["flags"]) == world.is_old
    assert "TF32" not in build["flags"]


def test_an_engine_without_half_precision_is_refused(world: World, cache: Path) -> None:
    world.behaviour.loses_half = True
    with pytest.raises(BackendError, match="without one in fp16"):
        on_gpu("unet", precision="fp16")
    assert not list(cache.glob("*.engine"))


def test_a_network_that_became_one_layer_says_nothing(world: World) -> None:
    world.behaviour.loses_half = world.behaviour.fuses_all = True
    on_gpu("unet", precision="fp16").close()


def test_an_engine_that_computes_nonsense_is_refused(world: World, cache: Path) -> None:
    world.behaviour.wrong = True
    with pytest.raises(BackendError, match="wrong in fp16"):
        on_gpu("unet", precision="fp16")
    assert not list(cache.glob("*.engine"))


def test_without_onnxruntime_a_second_engine_is_the_reference(ten: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with on_gpu("unet", precision="fp16"):
        assert [build["half"] for build in ten.builds] == [True, False]


def test_a_parser_that_refuses_8_bit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 8.5's might: the float graph is built, and the ends are attached."""
    world = World("8.5.3.1", "cuda-python", monkeypatch)
    world.behaviour.refuses_uint8 = True
    image = photo(24, 40)
    with on_gpu() as upscaler:
        np.testing.assert_array_equal(upscaler.upscale(image), expected(image))
    (build,) = world.builds
    assert build["graph"].endswith("fp32.float32.onnx") and build["layers"] > 1
    with on_gpu("unet", precision="fp16") as upscaler:
        assert abs(upscaler.upscale(image).astype(int) - expected(image)).max() <= 1
    assert world.builds[-1]["half"] and world.machine.faults == []
    with pytest.raises(BackendError, match="Unsupported type UINT8"):  # the float graph does not hold int8's values
        graph = Path(bundles.shared("unet")) / "main.fp32.uint8.onnx"
        tensorrt_builder.build(
            world.trt, graph, Profile(8, 1, 64), precision="int8", ends="uint8", float_graph=graph, timing_cache=None,
            options=BuildOptions(),
        )  # fmt: skip


def test_islands_need_strong_typing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where half precision is a flag, the builder may use it for what the model needs in fp32 too."""
    asked = request(precision="fp16")
    graphs = tuple(replace(graph, islands=("head",) * (graph.precision == "fp16")) for graph in asked.stage.graphs)
    asked = replace(asked, stage=replace(asked.stage, graphs=graphs))
    if world.is_old:
        with pytest.raises(BackendUnavailable, match="use TensorRT 10 or later, or precision='fp32'"):
            open_backend("tensorrt", asked)
        backend = open_backend("tensorrt", replace(asked, precision="auto"))
        assert backend.precision == "fp32"
    else:
        backend = open_backend("tensorrt", asked)
    backend.close()


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS[1:])
def test_newer_parsers_that_refuse_8_bit_ends_say_so(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    world = World(version, "cuda-python", monkeypatch)
    world.behaviour.refuses_uint8 = True
    with pytest.raises(BackendError, match=r"cannot read .*Unsupported type UINT8"):
        on_gpu()


def test_an_unsupported_operator_is_told_with_tensorrts_words(world: World) -> None:
    world.behaviour.parse_error = "No importer registered for op: Frobnicate"
    with pytest.raises(BackendError, match=f"tensorrt {world.version} cannot read .*Frobnicate") as caught:
        on_gpu()
    assert str(caught.value).count("Frobnicate") == 1


def test_a_build_that_fails_is_told(world: World) -> None:
    world.behaviour.build_error = "Could not find any implementation for node conv"
    with pytest.raises(BackendError, match="Could not find any implementation"):
        on_gpu()


def test_a_build_without_memory(world: World) -> None:
    world.behaviour.build_error = "Cuda Runtime (out of memory)"
    with pytest.raises(OutOfMemory):
        on_gpu()


def test_builder_options(world: World) -> None:
    seen: list[tuple[str, int, int]] = []
    progress = lambda *step: seen.append(step)  # noqa: E731
    if world.is_old:
        for option in ({"level": 3}, {"hardware_compatible": True}):
            with pytest.raises(OptionError, match=r"tensorrt 8\.5"):
                tensorrt.open_backend(request(), BuildOptions(**option))
        tensorrt.open_backend(request(), BuildOptions(progress=progress)).close()
        assert seen == []
        return
    options = BuildOptions(level=3, hardware_compatible=True, workspace_mib=64, progress=progress)
    tensorrt.open_backend(request(), options).close()
    (build,) = world.builds
    assert build["level"] == 3 and build["asked"]["WORKSPACE"] == 64 << 20
    assert seen == [("Building", 1, 2), ("Building", 2, 2)]


def test_tactics_that_need_other_libraries_are_off(world: World) -> None:
    on_gpu().close()
    (build,) = world.builds
    tactics = world.trt.TacticSource
    wanted = 1 << int(tactics.EDGE_MASK_CONVOLUTIONS) | 1 << int(tactics.JIT_CONVOLUTIONS)
    assert build["asked"]["sources"] == wanted
    assert build["asked"].get("DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805") == (True if world.is_old else None)


def test_measured_times_are_kept(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = BuildOptions(folder=tmp_path)
    tensorrt.open_backend(request(), options).close()
    path = tmp_path / f"Stand-in-GPU-9.0-{world.version}.times"
    first = path.read_bytes()
    tensorrt.open_backend(request("blur"), options).close()
    assert world.builds[1]["times"] == first != path.read_bytes()
    path.write_bytes(b"damaged")
    tensorrt.open_backend(request("identity"), options).close()
    assert "damaged, measured anew" in caplog.text and path.read_bytes().startswith(b"times")


# Files


def test_an_engine_is_built_once(world: World, cache: Path) -> None:
    image = photo(10, 10)
    first = on_gpu()
    first.close()
    (path,) = cache.glob("*.engine")
    stamp = path.stat().st_mtime_ns
    with on_gpu() as upscaler:
        np.testing.assert_array_equal(upscaler.upscale(image), expected(image))
    assert len(world.builds) == 1 and path.stat().st_mtime_ns == stamp
    assert [path.suffix for path in cache.iterdir()].count(".part") == 0


def test_times_of_another_gpu_are_not_used(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = BuildOptions(folder=tmp_path, rebuild=True)
    tensorrt.open_backend(request(), options).close()
    world.behaviour.other_times = True
    tensorrt.open_backend(request(), options).close()
    assert world.builds[1]["times"] == b"" and "measured anew" in caplog.text


def test_a_driver_that_does_not_fit(world: World) -> None:
    world.behaviour.no_driver = True
    with pytest.raises(BackendUnavailable, match=r"CUDA initialization failure .* check the NVIDIA driver"):
        on_gpu()


@pytest.mark.parametrize("device", ["foo", "cuda:x", "cuda:0,0"])
def test_devices_that_make_no_sense(ten: World, device: str) -> None:
    with pytest.raises(OptionError, match="device"):
        tensorrt.open_backend(request(device=device))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("kind", ["pipe", "link", "deep"])
def test_what_is_no_engine_does_not_hold_the_program_up(
    ten: World, cache: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu().close()
    (path,) = cache.glob("*.engine")
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        text = b"[" * 60000
        path.write_bytes(engine_cache.MAGIC + len(text).to_bytes(4, "little") + text)
    on_gpu().close()
    assert len(ten.builds) == 2
    assert caplog.text.count("built anew") == 1


def test_files_that_cannot_be_locked(
    ten: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(stream: object) -> bool:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(engine_cache, "_try_lock", refuse)
    on_gpu().close()
    assert "No locks available" in caplog.text and len(ten.builds) == 1


def test_close_waits_for_runs(ten: World) -> None:
    backend = open_backend("tensorrt", request())
    entered, go = threading.Event(), threading.Event()

    def fill(device: Any, address: int, stream: int) -> None:
        entered.set()
        assert go.wait(10)

    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(backend.run_on_device, (1, 8, 8, 3), np.dtype(np.uint8), fill, lambda *_: None)
        assert entered.wait(10)
        closing = pool.submit(backend.close)
        time.sleep(0.1)
        assert not closing.done()
        go.set()
        run.result(10)
        closing.result(10)
    assert ten.machine.blocks == {}


def test_a_shape_beyond_the_profile(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    in_windows(monkeypatch)
    backend = open_backend("tensorrt", request())
    with pytest.raises(BackendError, match=r"\(1, 120, 120, 3\) is refused \(up to 2 of 112 px\)"):
        backend.run(photo(120, 120)[None])
    backend.run(photo(112, 112)[None])
    backend.close()


def test_an_engine_for_many_gpus_serves_any(ten: World, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ten.machine.limit = 64 << 30
    tensorrt.open_backend(request(), BuildOptions(hardware_compatible=True, level=5)).close()
    (path,) = cache.glob("*.engine")
    assert header(path)[0]["built"]["level"] == 5
    monkeypatch.setattr(fake_cuda, "NAME", "Another GPU")
    for limit in (141 << 30, 12 << 30, (8 << 30) - 1, 6 << 30, 4 << 30):
        ten.machine.limit = limit
        on_gpu().close()
    assert len(ten.builds) == 1
    tensorrt.open_backend(request(), BuildOptions(rebuild=True)).close()
    tensorrt.open_backend(request(), BuildOptions(rebuild=True)).close()
    assert len(ten.builds) == 3 and len(list(cache.glob("*.engine"))) == 2


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()[len(engine_cache.MAGIC) :]
    length = int.from_bytes(data[:4], "little")
    return json.loads(data[4 : 4 + length]), data[4 + length :]


def write(path: Path, values: dict[str, Any], plan: bytes) -> None:
    text = json.dumps(values).encode()
    path.write_bytes(engine_cache.MAGIC + len(text).to_bytes(4, "little") + text + plan)


@pytest.mark.parametrize("name", ["onnx", "weights", "library", "gpu", "capability", "precision", "profile", "flags"])
def test_an_engine_of_anything_else_is_built_anew(ten: World, cache: Path, name: str) -> None:
    on_gpu().close()
    (path,) = cache.glob("*.engine")
    values, plan = header(path)
    values["key"][name] = "another"
    write(path, values, plan)
    with on_gpu() as upscaler:
        upscaler.upscale(photo(8, 8))
    assert len(ten.builds) == 2 and header(path)[0]["key"][name] != "another"


def test_the_key_follows_the_gpu_and_the_version(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    World("10.16.1.11", "cuda-python", monkeypatch)
    on_gpu().close()
    World("11.4.0.106", "cuda-python", monkeypatch)
    on_gpu().close()
    monkeypatch.setattr(fake_cuda, "NAME", "Another GPU")
    on_gpu().close()
    assert len(list(cache.glob("*.engine"))) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "text", "header", "plan", "huge", "list", "folder"])
def test_a_damaged_engine_is_built_anew(ten: World, cache: Path, damage: str) -> None:
    on_gpu().close()
    (path,) = cache.glob("*.engine")
    data = path.read_bytes()
    if damage == "plan":  # whole by its header, and yet TensorRT refuses it
        write(path, header(path)[0] | {"sha256": hashlib.sha256(b"other").hexdigest()}, b"other")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        start = len(engine_cache.MAGIC)
        path.write_bytes({
            "empty": b"",
            "cut": data[:-5],
            "bit": data[:-1] + bytes([data[-1] ^ 1]),
            "text": b"not an engine",
            "header": data[: start + 4] + b"{" * 50 + data[start + 54 :],
            "huge": data[:start] + b"\xff\xff\xff\xff" + data[start + 4 :],
            "list": engine_cache.MAGIC + (2).to_bytes(4, "little") + b"[]",
        }[damage])  # fmt: skip
    with on_gpu() as upscaler:
        image = photo(9, 9)
        np.testing.assert_array_equal(upscaler.upscale(image), expected(image))
    assert len(ten.builds) == 2
    if damage != "folder":
        on_gpu().close()
        assert len(ten.builds) == 2, "the new one is kept"


def test_two_processes_build_once(ten: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here two threads, each with its own file handle: the lock is between handles."""
    begun = threading.Barrier(2)
    real = tensorrt.read_engine
    seen = threading.local()

    def meet(path: Path, key: Any, **options: Any) -> bytes | None:
        found = real(path, key, **options)
        if not hasattr(seen, "first"):
            seen.first = True
            begun.wait(5)  # both have seen that there is none
        return found

    monkeypatch.setattr(tensorrt, "read_engine", meet)
    with ThreadPoolExecutor(2) as pool:
        for backend in pool.map(lambda _: open_backend("tensorrt", request()), range(2)):
            backend.close()
    assert len(ten.builds) == 1


def test_an_interrupted_build_leaves_nothing(ten: World, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "build", interrupted)
        with pytest.raises(KeyboardInterrupt):
            on_gpu()
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    on_gpu().close()


def test_ctrl_c_ends_a_build(world: World, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be raised in any Python that TensorRT calls, where it must not leave that."""

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if world.is_old:  # no monitor, but a logger
            world.behaviour.interrupted = "some words"
            patch.setattr(tensorrt_builder.Messages, "add", interrupted)
        tensorrt.open_backend(request(), BuildOptions(progress=interrupted))
    assert not list(cache.glob("*.engine"))


def test_ctrl_c_in_a_run_is_not_lost(ten: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be raised in the logger, while TensorRT speaks."""

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    backend = open_backend("tensorrt", request())
    ten.machine.fails = lambda shape: True
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensorrt_builder.Messages, "add", interrupted)
        backend.run(photo(8, 8)[None])
    ten.machine.fails = lambda shape: False
    backend.run(photo(8, 8)[None])
    backend.close()
    tensorrt.open_backend(request(), BuildOptions(rebuild=True)).close()


def test_an_error_that_another_thread_tells_is_told(world: World) -> None:
    """TensorRT has threads of its own."""
    _, messages = tensorrt_builder.logger(world.trt)
    messages.clear()
    thread = threading.Thread(target=messages.add, args=("CUDA error: out of memory",))
    thread.start()
    thread.join()
    assert isinstance(messages.error("a build"), OutOfMemory)
    assert "it does not say why" in str(messages.error("a build")), "once"


def test_what_killed_builders_left_is_removed(ten: World, cache: Path) -> None:
    on_gpu().close()
    (path,) = cache.glob("*.engine")
    old, new = path.with_name(f".{path.name}.12345678.part"), path.with_name(f".{path.name}.abcdef12.part")
    for part in (old, new):
        part.write_bytes(b"half an engine")
    os.utime(old, (0, 0))
    path.unlink()
    on_gpu().close()
    assert path.exists() and not old.exists() and new.exists(), "the new one may be another process's"


def test_a_full_disk_costs_the_file_only(
    ten: World, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_cache.os, "fsync", full)
    image = photo(9, 9)
    with on_gpu() as upscaler:
        np.testing.assert_array_equal(upscaler.upscale(image), expected(image))
    assert "No space left on device" in caplog.text
    assert not list(cache.glob("*.engine")) and not list(cache.glob(".*"))
    with pytest.raises(BackendError, match="No space left on device"):
        tensorrt.open_backend(request(), BuildOptions(must_keep=True))


def test_a_folder_that_cannot_be_written(
    ten: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SR_ENGINE_DIR", str(tmp_path / "file" / "engines"))
    with on_gpu() as upscaler:
        upscaler.upscale(photo(8, 8))
    assert "engines are not kept" in caplog.text
    with pytest.raises(BackendError, match="engines are not kept"):
        tensorrt.open_backend(request(), BuildOptions(must_keep=True))


def test_the_folder_of_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert engine_dir() == cache
    monkeypatch.setenv("SR_ENGINE_DIR", str(tmp_path / "elsewhere"))
    assert engine_dir() == tmp_path / "elsewhere"


# Running out


def test_out_of_memory_halves_batches_then_windows(ten: World) -> None:
    ten.machine.fails = lambda shape: shape[0] * shape[1] * shape[2] > 100 * 100
    image = photo(150, 150)
    with on_gpu() as upscaler:
        result = upscaler.upscale(image)
        assert upscaler.stats.retries > 0
    assert abs(result.astype(int) - expected(image)).max() <= 1


def test_one_lane_where_memory_is_short(ten: World, caplog: pytest.LogCaptureFixture) -> None:
    ten.behaviour.activation_bytes = ten.machine.limit * 2 // 3
    image = photo(20, 20)
    with on_gpu() as upscaler:
        np.testing.assert_array_equal(upscaler.upscale(image), expected(image))
    assert "one lane only" in caplog.text
    tries = len(ten.builds)
    ten.behaviour.activation_bytes = ten.machine.limit * 2
    with pytest.raises(OutOfMemory):
        on_gpu()
    sides = [build["profile"][2][1] for build in ten.builds[tries:]]
    assert len(sides) > 1 and sides == sorted(sides, reverse=True) and sides[-1] == 96, "smaller ones are tried"
    profiles = [build["profile"] for build in ten.builds[tries:]]
    assert len(set(profiles)) == len(profiles), "none is built twice"


def test_other_pictures_go_on_while_an_engine_is_built(ten: World, monkeypatch: pytest.MonkeyPatch) -> None:
    building, go, real = threading.Event(), threading.Event(), tensorrt.build

    def slow(*arguments: Any, **options: Any) -> bytes:
        building.set()
        assert go.wait(10)
        return real(*arguments, **options)

    image = photo(16, 16)
    with on_gpu() as upscaler, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(tensorrt, "build", slow)
        deep = pool.submit(upscaler.upscale, image.astype(np.uint16))
        assert building.wait(10)
        np.testing.assert_array_equal(upscaler.upscale(image), expected(image))
        go.set()
        deep.result(10)


def test_work_that_cannot_be_captured_runs_without(
    ten: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_windows(monkeypatch)
    ten.behaviour.no_graphs = True
    image = photo(120, 200)
    with on_gpu(batch=2) as upscaler:
        for _ in range(2):
            np.testing.assert_array_equal(upscaler.upscale(image, tile=32), expected(image, tile=32))
    assert caplog.text.count("no CUDA graph of") == tensorrt.MAX_FAILED_CAPTURES


def test_two_that_close_at_once(ten: World) -> None:
    backend = open_backend("tensorrt", request())
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(backend.close) for _ in range(2)]:
            done.result(10)


def test_one_engine_is_for_one_gpu(ten: World) -> None:
    with pytest.raises(OptionError, match="one GPU for an engine"):
        tensorrt.open_backend(request(device="cuda:0,1"))


def test_closed(ten: World) -> None:
    backend = open_backend("tensorrt", request())
    backend.run(photo(16, 16)[None])
    backend.close()
    assert ten.machine.blocks == {}
    with pytest.raises(BackendError, match="closed"):
        backend.run(photo(16, 16)[None])


# What is not there


def test_the_cpu_and_bf16(ten: World) -> None:
    with pytest.raises(BackendUnavailable, match="no CPU device"):
        open_backend("tensorrt", request(device="cpu"))
    with pytest.raises(BackendUnavailable, match="bf16"):
        open_backend("tensorrt", request(precision="bf16"))


def test_a_gpu_that_is_not_there(ten: World) -> None:
    with pytest.raises(BackendUnavailable, match="there is no GPU cuda:7"):
        on_gpu(device="cuda:7")


def test_a_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text("raise OSError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendUnavailable, match=r"cannot be loaded: libnvinfer\.so\.10"):
        on_gpu()


def test_auto_takes_tensorrt_first(ten: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Upscaler(bundles.shared("unet")) as upscaler:
        assert (upscaler.info["device"], upscaler.info["precision"]) == ("cuda:0", "fp16")
    assert "building the TensorRT engine" in caplog.text and "takes minutes, once" in caplog.text


# Shapes


def test_windows_grow_with_memory_and_keep_their_halo() -> None:
    stage = Bundle.load("fast-x2").stage()
    large, small = choose_profile(stage, 80 << 30), choose_profile(stage, 512 << 20)
    assert (large.batch, large.side) == (4, 1112)
    assert small.side < large.side and small.side % stage.stride == 0
    assert small.side >= 2 * stage.context(error=1) + stage.stride
    assert choose_profile(stage, 1 << 20).batch == 1
    assert large.shapes() == ((1, 8, 8, 3), (1, 1112, 1112, 3), (4, 1112, 1112, 3))


def test_what_tensorrt_says_is_told_once() -> None:
    messages = tensorrt_builder.Messages()
    messages.add("first\n  line")
    assert str(messages.error("building")) == "tensorrt: building: first line"
    assert str(messages.error("building")) == "tensorrt: building: it does not say why"
