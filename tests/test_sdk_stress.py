"""What the runtime promises under stress: threads, failures, too little memory, signals, forks, long runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image

from sdk import (
    BackendError,
    BackendUnavailable,
    Bundle,
    ImageError,
    OutOfMemory,
    OutputError,
    SRError,
    Upscaler,
    pipeline,
)
from sdk.backends import Request, open_backend

pytest.importorskip("onnxruntime")
ENGINES = ["onnxruntime", "openvino"]
# Engine, precision of 8-bit pictures, dtype of the pictures.
WAYS = [
    ("onnxruntime", "fp32", "uint8"), ("onnxruntime", "fp32", "float32"),
    ("openvino", "fp32", "uint8"), ("openvino", "bf16", "uint8"), ("openvino", "fp32", "float32"),
]  # fmt: skip
SIZES = [(8, 8), (16, 24), (40, 17), (33, 64), (64, 33), (1, 5), (72, 72)]
ONE_PIECE = 1 << 20  # a tile beyond every picture here
TEMPORARY = re.compile(r"\.sr-[0-9a-f]{16}\.part")
PATIENCE_S = 60  # for another process that should long be done; nothing is timed


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))


def open_upscaler(backend: str = "onnxruntime", *, precision: str = "fp32", **options: object) -> Upscaler:
    pytest.importorskip(backend)
    try:
        return Upscaler(bundles.shared("unet"), backend=backend, device="cpu", precision=precision, **options)
    except BackendUnavailable as exc:
        pytest.skip(str(exc))


def photo(height: int, width: int, *, seed: int = 0, dtype: str = "uint8") -> np.ndarray:
    image = np.random.default_rng((seed, height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image if dtype == "uint8" else image.astype(np.float32) / np.float32(255)


def fifty(dtype: str) -> list[np.ndarray]:
    return [photo(*SIZES[index % len(SIZES)], seed=index, dtype=dtype) for index in range(50)]


def assert_equal(results: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for result, one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, one)


# Threads


@pytest.mark.parametrize("tile", [None, 8], ids=["one piece", "tiled"])
@pytest.mark.parametrize("backend,precision,dtype", WAYS)
def test_eight_threads_of_fifty_pictures_get_what_one_gets(
    backend: str, precision: str, dtype: str, tile: int | None
) -> None:
    images = fifty(dtype)
    if tile:  # windows of 88 pixels: these are cut
        images = [photo(*size, seed=n, dtype=dtype) for n, size in enumerate([(96, 90), (90, 104), (20, 130)] * 2)]
    with open_upscaler(backend, precision=precision) as opened:
        expected = [opened.upscale(image, tile=tile) for image in images]

    # A fresh engine, so that all eight meet each size for the first time together.
    with open_upscaler(backend, precision=precision) as opened, ThreadPoolExecutor(8) as pool:

        def all_of_them(first: int) -> list[np.ndarray]:
            order = [(first + index) % len(images) for index in range(len(images))]
            found = {index: opened.upscale(images[index], tile=tile) for index in order}
            return [found[index] for index in range(len(images))]

        for results in pool.map(all_of_them, range(0, 64, 8)):
            assert_equal(results, expected)
        assert opened.stats.pictures == 8 * len(images) and opened.stats.retries == 0


@pytest.mark.parametrize("backend,precision,dtype", WAYS)
def test_batches_from_eight_threads_are_what_one_gets(backend: str, precision: str, dtype: str) -> None:
    clips = [[photo(*size, seed=n, dtype=dtype) for n in range(5)] for size in SIZES]
    with open_upscaler(backend, precision=precision, batch=2) as opened:
        expected = [opened.upscale_batch(frames) for frames in clips]
    with open_upscaler(backend, precision=precision, batch=2) as opened, ThreadPoolExecutor(8) as pool:
        for results, ones in zip(pool.map(opened.upscale_batch, clips * 4), expected * 4, strict=True):
            assert_equal(results, ones)


@pytest.mark.parametrize("precision,dtype", [way[1:] for way in WAYS if way[0] == "openvino"])
@pytest.mark.parametrize("model", ["unet", "fast-x2"])
def test_openvino_gives_the_same_pixels_compiled_for_a_size_and_for_any(model: str, precision: str, dtype: str) -> None:
    """A picture may be the first of its size or the hundredth, which runs another compiled model."""
    pytest.importorskip("openvino")
    bundle = Bundle.load(bundles.shared(model) if model == "unet" else model)
    request = Request(bundle.folder, bundle.stage(), bundle.manifest.scale, dtype, "cpu", precision)
    try:
        any_size, one_size = open_backend("openvino", request), open_backend("openvino", request)
    except BackendUnavailable as exc:
        pytest.skip(str(exc))
    for count, height, width in [(1, 8, 8), (1, 16, 24), (3, 16, 24), (1, 64, 136), (1, 200, 72), (2, 40, 40)]:
        batch = np.stack([photo(height, width, seed=n, dtype=dtype) for n in range(count)])
        one_size.expect(batch.shape, runs=1000)
        assert batch.shape in one_size._shapes and batch.shape not in any_size._shapes
        np.testing.assert_array_equal(any_size.run(batch), one_size.run(batch))
    any_size.close()
    one_size.close()


@pytest.mark.parametrize("backend", ENGINES)
def test_upscale_many_in_several_threads(backend: str) -> None:
    images = fifty("uint8")
    with open_upscaler(backend) as opened:
        expected = [opened.upscale(image) for image in images]
        with ThreadPoolExecutor(4) as pool:
            for results in pool.map(lambda _: list(opened.upscale_many(iter(images))), range(4)):
                assert_equal(results, expected)


def test_upscale_files_in_several_threads(tmp_path: Path) -> None:
    sources = []
    for index, image in enumerate(fifty("uint8")[:12]):
        sources.append(tmp_path / f"{index:02d}.png")
        Image.fromarray(image).save(sources[-1])
    with open_upscaler() as opened, ThreadPoolExecutor(4) as pool:

        def into(name: str) -> list[SRError | None]:
            (tmp_path / name).mkdir()
            pairs = [(source, tmp_path / name / source.name) for source in sources]
            return [error for _, error in opened.upscale_files(pairs)]

        for errors in pool.map(into, ["a", "b", "c", "d"]):
            assert errors == [None] * len(sources)
        assert opened.stats.pictures == 4 * len(sources)
        for source in sources:
            expected = opened.upscale(np.asarray(Image.open(source)))
            for name in "abcd":
                np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name / source.name)), expected)


def test_of_threads_that_want_one_name_one_gets_it(tmp_path: Path) -> None:
    for index in range(8):
        Image.fromarray(photo(16, 24, seed=index)).save(tmp_path / f"{index}.png")
    with open_upscaler() as opened, ThreadPoolExecutor(8) as pool:

        def attempt(index: int) -> int | None:
            try:
                opened.upscale_file(tmp_path / f"{index}.png", tmp_path / "out.png")
            except OutputError as exc:
                assert "exists already" in str(exc)
                return None
            return index

        (winner,) = [index for index in pool.map(attempt, range(8)) if index is not None]
        expected = opened.upscale(photo(16, 24, seed=winner))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected)
    assert not list(tmp_path.glob(".sr-*"))


# The pipeline


@pytest.mark.parametrize("busy", ["compute", "encode"])
def test_steps_run_beside_each_other(busy: str) -> None:
    """The first item waits in a step until a later one has gone through the steps before it."""
    ahead = threading.Event()
    before = {"compute": "decode", "encode": "compute"}[busy]

    def step(name: str) -> Callable[..., int]:
        def run(*arguments: int) -> int:
            number = arguments[-1]
            if name == before and number == 1:
                ahead.set()
            if name == busy and number == 0:
                assert ahead.wait(PATIENCE_S), f"the next {before} waited for this {busy}"
            return number

        return run

    results = pipeline.overlap(range(3), decode=step("decode"), compute=step("compute"), encode=step("encode"))
    assert [item for item, _ in results] == [0, 1, 2]


def test_windows_run_in_batches() -> None:
    with open_upscaler(batch=4) as opened:
        seen = []
        backend = opened._runner.backends["uint8"]
        run = backend.run
        backend.run = lambda batch: seen.append(len(batch)) or run(batch)
        opened.upscale(photo(100, 400), tile=8)
    assert max(seen) == 4 and seen.count(4) > len(seen) // 2


# Out of memory, put into a real engine


def limit_memory(opened: Upscaler, fails: Callable[[tuple[int, ...]], bool]) -> list[tuple[int, ...]]:
    """Let the engine run out of memory for batches of some shapes; give the list of shapes that it is asked for."""
    backend = opened._runner.backends["uint8"]
    run, shapes = backend.run, []

    def limited(batch: np.ndarray) -> np.ndarray:
        shapes.append(batch.shape)
        if fails(batch.shape):
            raise OutOfMemory("injected")
        return run(batch)

    backend.run = limited
    return shapes


def larger_than(pixels: int) -> Callable[[tuple[int, ...]], bool]:
    return lambda shape: shape[0] * shape[1] * shape[2] > pixels


def bands(opened: Upscaler, image: np.ndarray, **options: object) -> np.ndarray:
    rows = (image[top : top + 50] for top in range(0, len(image), 50))
    return np.concatenate(list(opened.upscale_bands(rows, image.shape[:2], **options)))


def batch_of_one(opened: Upscaler, image: np.ndarray) -> np.ndarray:
    return opened.upscale_batch([image])[0]


@pytest.mark.parametrize("backend", ENGINES)
def test_too_little_memory_halves_the_batch_then_the_tile(backend: str) -> None:
    image = photo(260, 420)
    with open_upscaler(backend, batch=4) as opened:
        whole = opened.upscale(image, tile=ONE_PIECE).astype(int)
        shapes = limit_memory(opened, larger_than(9000))  # the smallest window has 88 x 88
        result = opened.upscale(image, tile=64)  # windows of 144 x 144
        assert [shape[0] for shape in shapes[:3]] == [4, 2, 1]
        assert opened.stats.retries >= 3 and opened.stats.pictures == 2
        assert shapes[-1][1] * shapes[-1][2] <= 9000
        assert abs(result - whole).max() <= 1
        retries = opened.stats.retries
        assert abs(opened.upscale(image) - whole).max() <= 1
        assert opened.stats.retries == retries, "the second picture failed first"


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("upscale", [Upscaler.upscale, batch_of_one, bands])
@pytest.mark.parametrize("pixels", [50_000, 8000])
def test_a_window_that_does_not_fit_is_cut(backend: str, upscale: Callable[..., np.ndarray], pixels: int) -> None:
    image = photo(260, 420)
    with open_upscaler(backend) as opened:
        whole = opened.upscale(image).astype(int)
        assert opened.stats.tiles == 1
        limit_memory(opened, larger_than(pixels))
        assert abs(upscale(opened, image) - whole).max() <= 1
        assert opened.stats.retries >= 1 and opened.stats.pictures == 2


@pytest.mark.parametrize("upscale", [Upscaler.upscale, batch_of_one, bands])
@pytest.mark.parametrize("failing", [[0], [0, 1], [2], [1, 3]])
def test_memory_that_is_short_for_a_while(upscale: Callable[..., np.ndarray], failing: list[int]) -> None:
    image = photo(400, 420)
    with open_upscaler(memory_mib=20) as opened:
        whole = opened.upscale(image, tile=ONE_PIECE).astype(int)
        shapes: list[tuple[int, ...]] = []
        shapes = limit_memory(opened, lambda _: len(shapes) - 1 in failing)
        assert abs(upscale(opened, image) - whole).max() <= 1
        assert opened.stats.retries == len(failing) and opened.stats.pictures == 2


@pytest.mark.parametrize("upscale", [Upscaler.upscale, batch_of_one, bands])
def test_an_engine_without_memory_to_prepare_itself(upscale: Callable[..., np.ndarray]) -> None:
    image = photo(400, 420)
    with open_upscaler(memory_mib=20) as opened:
        whole = opened.upscale(image, tile=ONE_PIECE).astype(int)
        backend = opened._runner.backends["uint8"]

        def expect(shape: tuple[int, ...], *, runs: int) -> None:
            if larger_than(20_000)(shape):
                raise OutOfMemory("injected")

        backend.expect = expect
        assert abs(upscale(opened, image) - whole).max() <= 1
        assert opened.stats.retries >= 1 and opened.stats.pictures == 2


@pytest.mark.parametrize("upscale", [Upscaler.upscale, bands])
def test_a_tile_that_did_not_fit_is_not_tried_again(upscale: Callable[..., np.ndarray]) -> None:
    image = photo(300, 420)
    with open_upscaler() as opened:
        limit_memory(opened, larger_than(20_000))
        upscale(opened, image, tile=100)
        retries = opened.stats.retries
        assert retries >= 1
        upscale(opened, image, tile=100)
        assert opened.stats.retries == retries, "the same tile failed again"


def test_eight_threads_out_of_memory_get_their_own_pictures() -> None:
    images = [photo(200 + 3 * n, 310, seed=n) for n in range(8)]
    with open_upscaler(batch=4) as opened, ThreadPoolExecutor(8) as pool:
        wholes = [opened.upscale(image, tile=ONE_PIECE).astype(int) for image in images]
        limit_memory(opened, larger_than(20_000))
        for result, whole in zip(pool.map(opened.upscale, images), wholes, strict=True):
            assert abs(result - whole).max() <= 1


@pytest.mark.parametrize("upscale", [Upscaler.upscale, batch_of_one, bands])
def test_python_out_of_memory_is_an_error_of_ours(
    upscale: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    with open_upscaler(memory_mib=20) as opened:
        monkeypatch.setattr("sdk.tiling.place", no_memory)
        with pytest.raises(OutOfMemory):
            upscale(opened, photo(400, 420))
        monkeypatch.undo()
        assert opened.upscale(photo(8, 8)).shape == (16, 16, 3)


# Failures are errors, never wrong pictures


def break_engine(opened: Upscaler, *, after: int) -> None:
    """Let the engine fail once, after a number of good runs."""
    backend = opened._runner.backends["uint8"]
    run, left = backend.run, iter(range(after))

    def broken(batch: np.ndarray) -> np.ndarray:
        if next(left, None) is None:
            backend.run = run
            raise BackendError("injected")
        return run(batch)

    backend.run = broken


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failed_tile_fails_the_picture_and_no_other(backend: str, after: int) -> None:
    image, other = photo(200, 300), photo(200, 300, seed=1)
    with open_upscaler(backend) as opened:
        expected = opened.upscale(other, tile=16)
        break_engine(opened, after=after)
        with pytest.raises(BackendError, match="injected"):
            opened.upscale(image, tile=16)
        np.testing.assert_array_equal(opened.upscale(other, tile=16), expected)
        assert opened.stats.pictures == 2


@pytest.mark.parametrize("upscale", [Upscaler.upscale, batch_of_one, bands])
def test_nan_is_an_error_that_names_the_stage_and_the_way_out(upscale: Callable[..., np.ndarray]) -> None:
    image = photo(40, 50, dtype="float32")
    with open_upscaler() as opened:
        opened.upscale(image)
        backend = opened._runner.backends["float32"]
        run = backend.run

        def one_nan(batch: np.ndarray) -> np.ndarray:
            result = run(batch)
            result[0, 0, 0, 0] = np.nan
            return result

        backend.run = one_nan
        with pytest.raises(BackendError, match=r"NaN.*fp32") as caught:
            upscale(opened, image)
        assert "'main'" in str(caught.value) or "stage main" in str(caught.value)


def test_a_failed_strip_ends_the_bands() -> None:
    with open_upscaler() as opened:
        break_engine(opened, after=4)
        with pytest.raises(BackendError, match="injected"):
            bands(opened, photo(300, 200), tile=16)
        assert opened.stats.pictures == 0


def test_a_failed_frame_fails_the_batch() -> None:
    with open_upscaler() as opened:
        break_engine(opened, after=2)
        with pytest.raises(BackendError, match="injected"):
            opened.upscale_batch([photo(16, 16, seed=n) for n in range(5)])
        assert opened.stats.pictures == 0


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4"])
def test_a_failed_frame_leaves_no_file(suffix: str, tmp_path: Path) -> None:
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    frames = [photo(16, 24, seed=n) for n in range(6)]
    if suffix == ".mp4":
        save_clip(source, frames)
    else:
        stills = [Image.fromarray(frame) for frame in frames]
        stills[0].save(source, save_all=True, append_images=stills[1:], duration=40)
    with open_upscaler() as opened:
        break_engine(opened, after=3)
        with pytest.raises(BackendError, match="injected"):
            if suffix == ".mp4":
                from sdk import video

                video.upscale_video(opened, source, target)
            else:
                opened.upscale_file(source, target)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == [source.name]


def save_clip(path: Path, frames: list[np.ndarray]) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def test_of_many_the_failed_one_is_an_error_and_the_others_are_right(tmp_path: Path) -> None:
    images = [photo(16, 24, seed=n) for n in range(8)]
    with open_upscaler() as opened:
        expected = [opened.upscale(image) for image in images]
        break_engine(opened, after=3)
        results = list(opened.upscale_many(images))
        assert isinstance(results.pop(3), BackendError)
        assert_equal(results, expected[:3] + expected[4:])
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{index}.png")
        break_engine(opened, after=3)
        pairs = [(tmp_path / f"{index}.png", tmp_path / f"{index}.out.png") for index in range(8)]
        errors = [error for _, error in opened.upscale_files(pairs)]
    assert [type(error) for error in errors] == [type(None)] * 3 + [BackendError] + [type(None)] * 4
    for index, (_, target) in enumerate(pairs):
        assert target.exists() == (index != 3)
        if index != 3:
            np.testing.assert_array_equal(np.asarray(Image.open(target)), expected[index])


def test_a_source_that_changes_its_mind_about_rows_is_refused() -> None:
    with open_upscaler() as opened, pytest.raises(ImageError):
        list(opened.upscale_bands([photo(10, 20), photo(10, 21)], (20, 20)))


# Processes that are killed or interrupted

CLI = """
import os, signal, sys, time
from PIL import Image
from sdk import cli
from sdk.backends import onnxruntime

what, number, marker = sys.argv[1], int(sys.argv[2]), sys.argv[3]
calls = 0

def stop():
    open(marker, "w").close()
    if what.startswith("sleep"):
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL)

def at(function, *, after):
    def run(*arguments, **options):
        global calls
        calls += 1
        mine = calls == number
        if mine and not after:
            stop()
        result = function(*arguments, **options)
        if mine and after:
            stop()
        return result
    return run

def half_saved(image, stream, *arguments, **options):
    global calls
    calls += 1
    if calls == number:
        stream.write(b"\\x89PNG half of a picture")
        stream.flush()
        stop()
    return save(image, stream, *arguments, **options)

save = Image.Image.save
_, _, point = what.partition(" ")
if point == "engine":
    backend = onnxruntime.OnnxRuntimeBackend
    backend.run = at(backend.run, after=False)
elif point == "save":
    Image.Image.save = half_saved
elif point:
    when, name = point.split()
    setattr(os, name, at(getattr(os, name), after=when == "after"))
cli.main(sys.argv[4:])
"""


def start_cli(what: str, number: int, marker: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Run sr-upscale in a process that stops itself, or sleeps, at the n-th call of something."""
    options = ["--model", str(bundles.shared("unet")), "--backend", "onnxruntime"]
    command = [sys.executable, "-c", CLI, what, str(number), str(marker), *map(str, arguments), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the other process is stuck"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Give a folder of pictures, and the files that an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("stress")
    (folder / "in").mkdir()
    for index in range(10):
        suffix = (".png", ".jpg", ".webp", ".tif", ".bmp")[index % 5]
        Image.fromarray(photo(60 + index, 90, seed=index)).save(folder / "in" / f"{index:02d}{suffix}")
    process = start_cli("never", 0, folder / "marker", folder / "in", "-o", folder / "out")
    assert process.wait(PATIENCE_S) == 0, process.communicate()[1]
    process.communicate()
    return folder / "in", contents(folder / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def split_temporaries(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    found = contents(folder)
    temporary = [name for name in found if name.startswith(".")]
    assert all(TEMPORARY.fullmatch(name) for name in temporary), temporary
    return {name: data for name, data in found.items() if name not in temporary}, temporary


POINTS = [
    ("kill save", 1), ("kill save", 3), ("kill before fsync", 1), ("kill after fsync", 3), ("kill before link", 1),
    ("kill before link", 4), ("kill after link", 2), ("kill before unlink", 5), ("kill engine", 4),
]  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("what,number", POINTS)
def test_a_kill_leaves_whole_files_only(
    what: str, number: int, pictures: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, undisturbed = pictures
    process = start_cli(what, number, tmp_path / "marker", source, "-o", tmp_path / "out")
    assert process.wait(PATIENCE_S) == -signal.SIGKILL, process.communicate()[1]
    process.communicate()
    finished, _ = split_temporaries(tmp_path / "out")
    assert finished.items() <= undisturbed.items()
    assert len(finished) < len(undisturbed)
    again = start_cli("never", 0, tmp_path / "marker", source, "-o", tmp_path / "out", "--overwrite")
    assert again.wait(PATIENCE_S) == 0, again.communicate()[1]
    again.communicate()
    assert split_temporaries(tmp_path / "out")[0] == undisturbed


@pytest.mark.parametrize("what,number", [("kill save", 2), ("kill before replace", 2), ("kill after replace", 3)])
def test_a_kill_while_replacing_leaves_old_or_new_files(
    what: str, number: int, pictures: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, undisturbed = pictures
    (tmp_path / "out").mkdir()
    for name in undisturbed:
        (tmp_path / "out" / name).write_bytes(b"old")
    process = start_cli(what, number, tmp_path / "marker", source, "-o", tmp_path / "out", "--overwrite")
    assert process.wait(PATIENCE_S) == -signal.SIGKILL, process.communicate()[1]
    process.communicate()
    finished, _ = split_temporaries(tmp_path / "out")
    assert finished.keys() == undisturbed.keys()
    assert all(data in (b"old", undisturbed[name]) for name, data in finished.items())


@pytest.mark.parametrize("files_there", [1, 3, 6])
def test_a_kill_from_outside_leaves_whole_files_only(
    files_there: int, pictures: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, undisturbed = pictures
    out = tmp_path / "out"
    process = start_cli("never", 0, tmp_path / "marker", source, "-o", out)

    def enough() -> bool:
        return out.exists() and sum(not name.startswith(".") for name in os.listdir(out)) >= files_there

    wait_for(enough, process)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    finished, _ = split_temporaries(out)
    assert len(finished) >= files_there and finished.items() <= undisturbed.items()


def interrupt(process: subprocess.Popen[str], marker: Path) -> None:
    """Press Ctrl-C once the process sleeps in its engine or encoder; it must say so and end."""
    try:
        wait_for(marker.exists, process)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, text
    assert "interrupted" in text and "Traceback" not in text


@pytest.mark.skipif(os.name != "posix", reason="signals are of POSIX")
@pytest.mark.parametrize("what,number", [("sleep engine", 1), ("sleep engine", 5), ("sleep save", 3)])
def test_ctrl_c_ends_at_once_and_keeps_finished_files(
    what: str, number: int, pictures: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, undisturbed = pictures
    process = start_cli(what, number, tmp_path / "marker", source, "-o", tmp_path / "out")
    interrupt(process, tmp_path / "marker")
    finished, temporary = split_temporaries(tmp_path / "out")
    assert finished.items() <= undisturbed.items() and len(finished) < len(undisturbed)  # encoders go on meanwhile
    assert not temporary


@pytest.mark.skipif(os.name != "posix", reason="signals are of POSIX")
def test_ctrl_c_in_an_animation_leaves_nothing(tmp_path: Path) -> None:
    stills = [Image.fromarray(photo(16, 24, seed=n)) for n in range(6)]
    stills[0].save(tmp_path / "in.gif", save_all=True, append_images=stills[1:], duration=40)
    process = start_cli("sleep engine", 4, tmp_path / "marker", tmp_path / "in.gif", "-o", tmp_path / "out.gif")
    interrupt(process, tmp_path / "marker")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["in.gif", "marker"]


@pytest.mark.skipif(os.name != "posix", reason="signals are of POSIX")
def test_ctrl_c_in_a_video_leaves_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    save_clip(tmp_path / "clips" / "in.mp4", [photo(32, 48, seed=n) for n in range(30)])
    target = tmp_path / "clips" / "out.mp4"
    process = start_cli("sleep engine", 5, tmp_path / "marker", tmp_path / "clips" / "in.mp4", "-o", target)
    interrupt(process, tmp_path / "marker")
    assert not target.exists()
    assert not list((tmp_path / "clips").rglob("*.part"))


# Processes that fork

WORKERS = """
import hashlib, multiprocessing, os, sys
import numpy as np
from sdk import Upscaler

upscaler = None

def prepare(folder, backend):
    global upscaler
    upscaler = Upscaler(folder, backend=backend, precision="fp32")

def enlarge(seed):
    image = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    return hashlib.sha256(upscaler.upscale(image).tobytes()).hexdigest()

if __name__ == "__main__":
    method, when, *which = sys.argv[1:]
    if when != "unused":
        prepare(*which)
    if when == "used":
        expected = [enlarge(seed) for seed in range(12)]
    else:
        upscaler = None
    with multiprocessing.get_context(method).Pool(2, prepare, which) as pool:
        found = pool.map_async(enlarge, range(12)).get(30)
    if when != "used":
        prepare(*which)
        expected = [enlarge(seed) for seed in range(12)]
    assert found == expected, (found, expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "backend,method,when",
    [
        ("onnxruntime", "fork", "unused"),
        ("onnxruntime", "fork", "used"),
        ("onnxruntime", "fork", "closed"),
        ("onnxruntime", "spawn", "used"),
        ("openvino", "fork", "unused"),
        ("openvino", "spawn", "used"),
    ],
)
def test_an_upscaler_made_in_a_worker_process_works(method: str, when: str, backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, str(script), method, when, str(bundles.shared("unet")), backend],
        check=True, timeout=2 * PATIENCE_S, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip


FORKED = """
import os, signal, sys
import numpy as np
from sdk import BackendError, Upscaler

folder, backend, way = sys.argv[1:]
upscaler = Upscaler(folder, backend=backend)
image = np.zeros((16, 16, 3), np.uint8)
upscaler.upscale(image)
child = os.fork()
if child == 0:
    signal.alarm(10)  # a child that hangs dies by a signal
    if way == "closes":
        upscaler.close()
    elif way == "replaces" and backend == "onnxruntime":
        upscaler = Upscaler(folder, backend=backend)
        upscaler.upscale(image)
    elif way == "replaces":  # the engine's threads belong to the library, and are gone
        try:
            upscaler = Upscaler(folder, backend=backend)
            os._exit(1)
        except BackendError as exc:
            assert "fork" in str(exc)
    else:
        try:
            upscaler.upscale(image)
        except BackendError as exc:
            assert "fork" in str(exc)
    sys.exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
upscaler.upscale(image)
sys.exit(0 if code == 7 else f"the child ended with {code}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("way", ["upscales", "closes", "replaces"])
def test_a_forked_child_ends_as_others_do(way: str, backend: str) -> None:
    """A worker of gunicorn ends through sys.exit, which tears the inherited engine down."""
    pytest.importorskip(backend)
    command = [sys.executable, "-c", FORKED, str(bundles.shared("unet")), backend, way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


# Long runs

LONG_RUN = """
import os, sys
import numpy as np
from sdk import Upscaler

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

rng = np.random.default_rng(0)
with Upscaler(sys.argv[1], backend=sys.argv[2], precision="fp32") as upscaler:
    for number in range(300):
        height, width = rng.integers(8, 120, 2)
        upscaler.upscale(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if number == 100:
            before = resident_mib()
    print(resident_mib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
@pytest.mark.parametrize("backend", ENGINES)
def test_memory_does_not_grow_with_the_number_of_pictures(backend: str) -> None:
    pytest.importorskip(backend)
    command = [sys.executable, "-c", LONG_RUN, str(bundles.shared("unet")), backend]
    growths: list[float] = []
    while not growths or (min(growths) > 20 and len(growths) < 3):  # on a busy machine allocators spread more at times
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * PATIENCE_S)
        assert done.returncode == 0, done.stderr
        growths.append(float(done.stdout))
    assert min(growths) <= 20, f"MiB: {growths}"
