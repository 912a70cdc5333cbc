"""Upscaler: options, memory, many pictures, what it tells about itself."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image

from sdk import BackendError, ImageError, OptionError, OutOfMemory, SRError, Stats, Upscaler, memory, planes, runner
from sdk.backends import HostBackend
from sdk.bundle import Bundle

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))


def open_upscaler(kind: str = "blur", **options: object) -> Upscaler:
    return Upscaler(bundles.shared(kind), **({"backend": "onnxruntime", "device": "cpu"} | options))


def photo(height: int = 12, width: int = 15, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class FakeBackend(HostBackend):
    """Repeats pixels; `failures(shape)` may raise."""

    name, precision, engine = "fake", "fp32", "fake 1"

    def __init__(self, failures=lambda shape: None):
        self.failures = failures
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.shapes.append(batch.shape)
        self.failures(batch.shape)
        return batch.repeat(2, axis=1).repeat(2, axis=2)

    def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def with_backend(monkeypatch: pytest.MonkeyPatch):
    """Give `with_backend(fake, **options)`, an Upscaler of the strided network's geometry that runs a fake engine."""

    def make(fake: object, kind: str = "unet", **options: object) -> Upscaler:
        monkeypatch.setattr(runner, "open_backend", lambda name, request: fake)
        return Upscaler(bundles.shared(kind), **options)

    return make


def doubled(image: np.ndarray) -> np.ndarray:
    return image.repeat(2, axis=0).repeat(2, axis=1)


@pytest.mark.parametrize(
    "options",
    [
        {"seams": "none"}, {"seams": None}, {"batch": 0}, {"batch": -1}, {"batch": "two"}, {"batch": 1.5},
        {"batch": None},
        {"batch": True}, {"memory_mib": 0}, {"memory_mib": "much"}, {"stage": "1024"}, {"stage": 64}, {"stage": None},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(OptionError) as caught:
        open_upscaler(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tile", [0, -1, 1.5, "64", True, (8, 8)])
def test_tiles_out_of_range(tile: object) -> None:
    with open_upscaler() as opened, pytest.raises(OptionError, match="tile"):
        opened.upscale(photo(), tile=tile)


def test_tiles_beyond_the_picture_are_one_piece() -> None:
    with open_upscaler() as opened:
        opened.upscale(photo(), tile=10**9)
        assert opened.stats.tiles == 1


def test_stages_are_chosen_by_name() -> None:
    with open_upscaler(stage="main") as opened, open_upscaler() as automatic:
        assert opened.info["stage"] == automatic.info["stage"] == "main"


def test_info_says_what_runs() -> None:
    with open_upscaler("unet", batch=2) as opened:
        info = opened.info
        assert opened.scale == 2
    expected = {
        "model": "unet", "scale": 2, "stage": "main", "backend": "onnxruntime", "device": "cpu", "precision": "fp32",
        "seams": "exact", "halo": 40, "stride": 8, "batch": 2,
    }  # fmt: skip
    assert {key: info[key] for key in expected} == expected
    assert info["engine"].startswith("onnxruntime ") and info["one_piece_pixels"] > 0


def test_stats_count_pictures_tiles_and_pixels() -> None:
    with open_upscaler() as opened:
        assert opened.stats == Stats()
        opened.upscale(photo(12, 15))
        opened.upscale(photo(12, 15), tile=6)
        stats = opened.stats
        assert (stats.pictures, stats.pixels, stats.retries) == (2, 2 * 12 * 15, 0)
        assert stats.tiles == 1 + 2 * 3 and stats.seconds > 0
        with pytest.raises(ImageError):
            opened.upscale(photo().astype(np.float64))
        assert opened.stats == stats
    assert opened.stats == stats


def test_stats_of_eight_threads_add_up() -> None:
    with open_upscaler() as opened, ThreadPoolExecutor(8) as pool:
        list(pool.map(opened.upscale, [photo()] * 40))
        assert opened.stats.pictures == 40 and opened.stats.tiles == 40


@pytest.mark.parametrize("seams", ["exact", "fast"])
def test_eight_threads_do_not_mix_pictures(seams: str) -> None:
    images = [photo(60 + n % 3, 90, seed=n) for n in range(24)]
    with open_upscaler("unet", seams=seams) as opened:
        expected = [opened.upscale(image, tile=8) for image in images]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda image: opened.upscale(image, tile=8), images))
    for result, one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, one)


def test_batches_do_not_change_the_picture() -> None:
    image = photo(100, 110)
    results = []
    for batch in (1, 2, 5, 64):
        with open_upscaler("unet", batch=batch) as opened:
            results.append(opened.upscale(image, tile=16).astype(int))
    for result in results:
        assert abs(result - results[0]).max() <= 1


def test_a_batch_shares_the_memory_of_one_window() -> None:
    with open_upscaler("unet", batch=1) as one, open_upscaler("unet", batch=4) as four:
        assert four.info["one_piece_pixels"] <= one.info["one_piece_pixels"]


def test_the_plan_is_fixed_when_the_upscaler_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_upscaler("unet") as opened:
        before = opened.info["one_piece_pixels"]
        monkeypatch.setattr(memory, "window_pixels", lambda *_, **__: 0)
        opened.upscale(photo(200, 200))
        assert opened.stats.tiles == 1 and opened.info["one_piece_pixels"] == before
    with open_upscaler("unet") as small:  # at least a window with its halo
        assert small.info["one_piece_pixels"] >= 88 * 88
        small.upscale(photo(200, 200))
        assert small.stats.tiles > 1


def test_closed_upscalers_refuse() -> None:
    opened = open_upscaler()
    with opened as same:
        assert same is opened
        opened.upscale(photo())
    opened.close()
    for call in (lambda: opened.upscale(photo()), opened.warmup, lambda: opened.upscale(photo().astype(np.uint16))):
        with pytest.raises(BackendError, match="closed"):
            call()
    assert opened.info["model"] == "blur" and opened.stats.pictures == 1


def test_closing_while_others_run_gives_pictures_or_errors() -> None:
    opened = open_upscaler("unet")
    image = photo(80, 90)
    expected = opened.upscale(image, tile=8)

    def attempt(_: int) -> bool:
        try:
            np.testing.assert_array_equal(opened.upscale(image, tile=8), expected)
        except BackendError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(attempt, n) for n in range(30)]
        futures[0].result()
        opened.close()
        assert not all(future.result() for future in futures)


def test_warmup_runs_without_counting() -> None:
    with open_upscaler("unet") as opened:
        opened.warmup()
        opened.warmup((33, 70))
        assert opened.stats.pictures == 0
        for size in ((0, 5), (-1, 5), (4.5, 3), (5,), "ab", 7):
            with pytest.raises(OptionError, match="warmup"):
                opened.warmup(size)


def test_out_of_memory_halves_the_batch_then_the_window_and_remembers(
    with_backend, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine with room for 12,000 pixels at once."""

    def failures(shape: tuple[int, ...]) -> None:
        if shape[0] * shape[1] * shape[2] > 12_000:
            raise OutOfMemory("no room")

    fake = FakeBackend(failures)
    opened = with_backend(fake, batch=4)
    image = photo(300, 510)
    np.testing.assert_array_equal(opened.upscale(image, tile=100), doubled(image))
    tried = [shape[:3] for shape in fake.shapes]
    assert tried[:3] == [(4, 184, 184), (2, 184, 184), (1, 184, 184)]
    assert tried[-1][1] * tried[-1][2] <= 12_000
    retries = opened.stats.retries
    assert retries >= 3 and "out of memory" in caplog.text
    assert opened.info["batch"] == 1 and opened.info["one_piece_pixels"] <= 184 * 184
    fake.shapes.clear()
    np.testing.assert_array_equal(opened.upscale(image), doubled(image))
    assert opened.stats.retries == retries, "the next picture failed first"


def test_out_of_memory_in_the_middle_of_a_picture_starts_it_again(with_backend) -> None:
    calls = itertools.count()

    def failures(shape: tuple[int, ...]) -> None:
        if next(calls) == 3:
            raise OutOfMemory("no room")

    opened = with_backend(FakeBackend(failures))
    image = photo(300, 310)
    np.testing.assert_array_equal(opened.upscale(image, tile=60), doubled(image))
    assert opened.stats.retries == 1 and opened.stats.pictures == 1


@pytest.mark.parametrize("size", [(300, 310), (1, 1), (8, 5000), (5000, 3)])
def test_out_of_memory_for_good_ends_in_its_error(with_backend, size: tuple[int, int]) -> None:
    def failures(shape: tuple[int, ...]) -> None:
        raise OutOfMemory("no room at all")

    fake = FakeBackend(failures)
    opened = with_backend(fake, batch=8)
    with pytest.raises(OutOfMemory, match="no room at all"):
        opened.upscale(photo(*size))
    assert 1 <= len(fake.shapes) < 40
    assert opened.stats.pictures == 0


def test_a_canvas_beyond_memory_is_an_error_of_ours(with_backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    opened, image = with_backend(FakeBackend()), photo(200, 200)
    monkeypatch.setattr(runner.np, "empty", no_memory)
    with pytest.raises(OutOfMemory, match="does not fit"):
        opened.upscale(image, tile=8)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda result: result[:, :-1],
        lambda result: result[:, :, :, :1],
        lambda result: result[:1].repeat(2, axis=0),
        lambda result: result.astype(np.float32),
        lambda result: result.astype(np.int8),
        lambda result: result.transpose(0, 3, 1, 2),
    ],
)
def test_a_wrong_result_is_an_error_never_a_picture(with_backend, wrong) -> None:
    fake = FakeBackend()
    right = fake.run
    fake.run = lambda batch: wrong(right(batch))
    with pytest.raises(BackendError, match="returned"):
        with_backend(fake).upscale(photo())


def test_nan_from_an_engine_is_an_error(with_backend) -> None:
    fake = FakeBackend()
    fake.run = lambda batch: np.full((1, batch.shape[1] * 2, batch.shape[2] * 2, 3), np.nan, np.float32)
    with pytest.raises(BackendError, match="NaN"):
        with_backend(fake).upscale(photo().astype(np.float32) / np.float32(255))


def test_a_failing_tile_fails_the_picture(with_backend) -> None:
    calls = itertools.count()

    def failures(shape: tuple[int, ...]) -> None:
        if next(calls) == 2:
            raise BackendError("tile three failed")

    with pytest.raises(BackendError, match="tile three failed"):
        with_backend(FakeBackend(failures)).upscale(photo(300, 300), tile=60)


def test_the_float_engine_is_opened_when_needed_in_fp32() -> None:
    with open_upscaler("unet") as opened:
        assert list(opened._runner.backends) == ["uint8"]
        opened._runner.backends["uint8"].precision = "fp16"  # as on a GPU
        opened.upscale(photo().astype(np.uint16) * 257)
        assert opened._runner.backends["float32"].precision == "fp32"
        assert opened.info["precision"] == "fp16"


def test_eight_bit_and_float_agree() -> None:
    with open_upscaler("unet") as opened:
        image = photo(40, 44)
        eight = opened.upscale(image).astype(float)
        full = opened.upscale(image.astype(np.float32) / np.float32(255)) * 255
    assert abs(eight - full).max() <= 0.51  # rounding


def test_upscale_many_is_in_order_and_yields_errors(tmp_path: Path) -> None:
    Image.fromarray(photo(seed=3)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    items = [
        photo(seed=1), Image.fromarray(photo(seed=2)), tmp_path / "good.png", str(tmp_path / "good.png"),
        tmp_path / "bad.png", photo().astype(np.float64), None, 7, photo(seed=4),
    ]  # fmt: skip
    with open_upscaler("identity") as opened:
        results = list(opened.upscale_many(items))
    assert len(results) == len(items)
    np.testing.assert_array_equal(results[0], doubled(photo(seed=1)))
    assert isinstance(results[1], Image.Image)
    np.testing.assert_array_equal(np.asarray(results[1]), doubled(photo(seed=2)))
    for result in results[2:4]:
        np.testing.assert_array_equal(result, doubled(photo(seed=3)))
    assert all(isinstance(result, ImageError) for result in results[4:8])
    np.testing.assert_array_equal(results[8], doubled(photo(seed=4)))


def test_upscale_many_is_lazy() -> None:
    taken = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            taken.append(1)
            yield photo()

    with open_upscaler() as opened:
        results = opened.upscale_many(endless())
        assert not taken
        for count in range(1, 6):
            next(results)
            assert len(taken) <= count + 8
        results.close()


def test_upscale_many_ends_its_threads_when_the_consumer_stops() -> None:
    before = threading.active_count()
    with open_upscaler() as opened:
        for _ in range(5):
            for _ in opened.upscale_many(photo() for _ in range(50)):
                break
            list(opened.upscale_many([photo()] * 3))
            opened.upscale_many([photo()])  # never started
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_upscale_many_with_a_source_that_fails() -> None:
    def source() -> Iterator[np.ndarray]:
        yield photo()
        raise ZeroDivisionError

    with open_upscaler() as opened, pytest.raises(ZeroDivisionError):
        list(opened.upscale_many(source()))


def test_upscale_many_of_nothing() -> None:
    with open_upscaler() as opened:
        assert list(opened.upscale_many([])) == []


def test_upscale_many_after_close_yields_errors() -> None:
    opened = open_upscaler()
    opened.close()
    (result,) = opened.upscale_many([photo()])
    assert isinstance(result, BackendError)


def test_upscale_file(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "in.png")
    with open_upscaler("identity") as opened:
        assert opened.upscale_file(str(tmp_path / "in.png"), tmp_path / "out.png") is None
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), doubled(photo()))


def test_a_failing_engine_leaves_no_file(tmp_path: Path, with_backend) -> None:
    def failures(shape: tuple[int, ...]) -> None:
        raise BackendError("broken")

    Image.fromarray(photo()).save(tmp_path / "in.png")
    with pytest.raises(SRError):
        with_backend(FakeBackend(failures)).upscale_file(tmp_path / "in.png", tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_batch_of_frames_is_what_each_gives_alone(count: int, dtype: type) -> None:
    frames = [photo(40, 44, seed=n).astype(dtype) * (1 if dtype == np.uint8 else 257) for n in range(count)]
    with open_upscaler("unet", batch=4) as opened:
        together = opened.upscale_batch(frames)
        assert opened.stats.pictures == count and opened.stats.tiles == count
        assert opened.stats.pixels == count * 40 * 44
        for frame, result in zip(frames, together, strict=True):
            assert result.dtype == dtype
            np.testing.assert_allclose(result.astype(int), opened.upscale(frame), atol=1 if dtype == np.uint8 else 257)
        assert opened.upscale_batch([]) == []
        with pytest.raises(ImageError, match="differ"):
            opened.upscale_batch([photo(8, 8), photo(8, 9)])


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("seams", ["exact", "fast"])
def test_bands_give_the_same_picture(channels: int | None, dtype: type, seams: str) -> None:
    rng = np.random.default_rng(5)
    image = rng.random((301, 150, channels or 1), np.float32)
    if channels in (2, 4):
        image[:, :, -1] = 0.2 + 0.8 * image[:, :, -1]  # nothing invisible
    if dtype != np.float32:
        image = (image * np.iinfo(dtype).max).astype(dtype)
    image = image[:, :, 0] if channels is None else image
    with open_upscaler("unet", seams=seams) as opened:
        whole = opened.upscale(image, tile=40)
        cuts = [0, 1, 1, 90, 130, 300, 301]  # also an empty band
        rows = [image[top:bottom] for top, bottom in itertools.pairwise(cuts)]
        result = np.concatenate(list(opened.upscale_bands((band for band in rows if len(band)), (301, 150), tile=40)))
        assert opened.stats.pictures == 2
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize(
    "heights,size,message",
    [([10, 10], (30, 12), "ends after 20 of 30"), ([20, 20], (30, 12), "more than the 30"), ([30], (30, 13), "12 pix")],
)
def test_bands_that_do_not_make_up_the_picture(heights: list[int], size: tuple[int, int], message: str) -> None:
    with open_upscaler() as opened, pytest.raises(ImageError, match=message):
        list(opened.upscale_bands((photo(height, 12) for height in heights), size))
    with open_upscaler() as opened, pytest.raises(ImageError, match="differ"):
        list(opened.upscale_bands([photo(10, 12), photo(10, 12)[:, :, 0]], (20, 12)))
    for wrong in ((0, 12), (20,), "ab", None):
        with open_upscaler() as opened, pytest.raises(OptionError, match="size"):
            list(opened.upscale_bands([photo(10, 12)], wrong))


def test_other_factors_and_sizes() -> None:
    image = photo(20, 30)
    with open_upscaler("identity") as opened:
        sizes = {
            (("factor", 4),): (80, 120), (("factor", 3.0),): (60, 90), (("factor", 1.3),): (26, 39),
            (("factor", 0.5),): (10, 15), (("size", (41, None)),): (41, 62), (("size", (None, 7)),): (5, 7),
            (("size", (50, 33)),): (50, 33), (("factor", 8),): (160, 240),
        }  # fmt: skip
        for arguments, size in sizes.items():
            assert opened.upscale(image, **dict(arguments)).shape == (*size, 3), arguments
        np.testing.assert_array_equal(opened.upscale(image, factor=4), doubled(doubled(image)))
        assert opened.upscale(Image.fromarray(image), factor=2.5).size == (75, 50)
        for wrong in (
            {"factor": 0}, {"factor": -1}, {"factor": float("nan")}, {"factor": 1e9}, {"factor": "2"}, {"size": (0, 5)},
            {"size": (None, None)}, {"size": (5.5, 5)}, {"size": (5,)}, {"factor": 2, "size": (5, 5)},
            {"size": (100_000, None)},
        ):  # fmt: skip
            with pytest.raises(OptionError):
                opened.upscale(image, **wrong)


def test_the_network_runs_as_often_as_comes_nearest() -> None:
    with open_upscaler("identity") as opened:
        for factor, tiles in ((0.7, 0), (1.1, 1), (2.0, 1), (2.7, 1), (3.0, 2), (5.6, 2), (6.0, 3), (8.0, 3)):
            before = opened.stats.tiles
            opened.upscale(photo(), factor=factor)
            assert opened.stats.tiles - before == tiles, factor


def test_resizing_keeps_16_bits_and_hides_invisible_colour() -> None:
    ramp = np.linspace(0, 65535, 8192).astype(np.uint16)[None].repeat(4, axis=0)
    with open_upscaler("identity") as opened:
        assert len(np.unique(opened.upscale(ramp, factor=1.5))) >= 4096
        sprite = np.zeros((16, 16, 4), np.uint8)
        sprite[:, 8:] = (200, 100, 50, 255)  # beside black that nobody sees
        result = opened.upscale(sprite, factor=3)
    seen = result[result[:, :, 3] > 8]
    assert abs(seen[:, :3].astype(int) - (200, 100, 50)).max() <= 8


def test_numpy_numbers_are_numbers() -> None:
    with open_upscaler(batch=np.int64(2)) as opened:
        assert opened.info["batch"] == 2
        assert opened.upscale(photo(8, 8), factor=np.float32(1.5)).shape == (12, 12, 3)
        opened.upscale(photo(40, 40), tile=np.int32(8))


def test_stats_tell_the_parts_and_each_picture() -> None:
    told: list[Stats] = []
    with open_upscaler("unet", on_picture=told.append) as opened:
        opened.upscale(photo(150, 150), tile=16)
        opened.upscale(photo(9, 9))
        total = opened.stats
    assert [stats.pictures for stats in told] == [1, 1] and told[0] + told[1] == total
    assert told[1].tiles == 1 and told[0].tiles > 1
    assert 0 < total.run_s < total.seconds and total.gather_s > 0 and total.place_s > 0
    assert total.decode_s == total.encode_s == 0


def test_files_tell_decoding_and_encoding(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "in.png")
    with open_upscaler() as opened:
        opened.upscale_file(tmp_path / "in.png", tmp_path / "out.png")
        assert opened.stats.pictures == 1 and opened.stats.decode_s > 0 and opened.stats.encode_s > 0


def test_upscale_files_goes_on_after_errors(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    pairs = [(tmp_path / f"{name}.png", tmp_path / f"{name}2.png") for name in ("good", "bad", "missing")]
    with open_upscaler("identity") as opened:
        results = list(opened.upscale_files([*pairs, (str(tmp_path / "good.png"), tmp_path / "last.png")]))
    assert [type(error) for _, error in results] == [type(None), ImageError, ImageError, type(None)]
    for name in ("good2.png", "last.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), doubled(photo()))


def test_one_path_is_not_many() -> None:
    with open_upscaler() as opened, pytest.raises(OptionError, match=r"\['photo.jpg'\]"):
        opened.upscale_many("photo.jpg")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_the_child_is_told(tmp_path: Path) -> None:
    code = f"""
import os, sys
import numpy as np
from sdk import BackendError, Upscaler
upscaler = Upscaler({str(bundles.shared("blur"))!r}, backend="onnxruntime")
image = np.zeros((8, 8, 3), np.uint8)
upscaler.upscale(image)
child = os.fork()
if child == 0:
    try:
        upscaler.upscale(image)
    except BackendError as exc:
        os._exit(7 if "fork" in str(exc) else 8)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
upscaler.upscale(image)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_bundle_without_an_exact_halo_is_refused(tmp_path: Path) -> None:
    folder = bundles.copy("unet", tmp_path)
    stage = Bundle.load(folder).stage()
    *rows, last = stage.halo[:-2]
    bundles.write_manifest(folder, replace(stage, halo=(*rows, replace(last, error=2.0))))
    with pytest.raises(SRError, match="no measured halo"):
        Upscaler(folder)
    with Upscaler(folder, backend="onnxruntime", seams="fast") as opened:
        assert opened.info["halo"] == last.context == 32
    bundles.write_manifest(folder, replace(stage, halo=(*rows, last)))
    with pytest.raises(SRError, match=r"no measured halo reaches 2.0 code values \(best 3.0\)"):
        Upscaler(folder, seams="fast")


@pytest.mark.parametrize("dtype,most", [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_opaque_and_invisible_stay_exactly_that(dtype: type, most: int) -> None:
    """A network does not map a constant to itself; and bands of constant alpha must not differ from the others."""
    rng = np.random.default_rng(0)
    image = (rng.random((120, 100, 4)) * most).astype(dtype)
    image[:60, :, 3] = most
    image[60:90, :50, 3] = 0
    image[60:90, 50:, 3] = most
    image[90:, :, 3] = (np.linspace(0, 1, 100) * most).astype(dtype)
    with Upscaler("fast-x2", backend="onnxruntime", device="cpu") as opened:
        result = opened.upscale(image)
        rows = (image[top : top + 37] for top in range(0, 120, 37))
        streamed = np.concatenate(list(opened.upscale_bands(rows, image.shape[:2])))
    assert (result[:118, :, 3] == most).all()
    assert (result[122:178, :98, 3] == 0).all() and (result[122:178, 102:, 3] == most).all()
    assert (streamed[..., 3] == result[..., 3]).all()


def test_bound_alpha() -> None:
    alpha = np.array([[0, 0, 0, 100, 100]], np.uint8)[:, :, None]
    enlarged = np.array([[3, 3, 3, 3, 3, 3, 97, 130, 90, 101]], np.uint8).repeat(2, axis=0)[:, :, None]
    bounded = planes.bound_alpha(enlarged, alpha, scale=2)[:, :, 0]
    assert bounded.tolist() == [[0, 0, 0, 0, 3, 3, 97, 100, 100, 100]] * 2


# Networks that look at the whole picture: their bundles have no halo.


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A bundle whose pictures must not be cut."""
    folder = tmp_path / "unet"
    shutil.copytree(bundles.shared("unet"), folder)
    stage = Bundle.load(folder).stage()
    bundles.write_manifest(folder, replace(stage, halo=()))
    return folder


@pytest.mark.parametrize("seams", ["exact", "fast"])
def test_a_network_that_looks_at_the_whole_picture_runs_it_in_one_piece(whole: Path, seams: str) -> None:
    image = photo(45, 333)
    with open_upscaler("unet") as tiled, Upscaler(whole, backend="onnxruntime", seams=seams) as opened:
        np.testing.assert_array_equal(opened.upscale(image), tiled.upscale(image, tile=10**6))
        np.testing.assert_array_equal(opened.upscale(image, tile=333), opened.upscale(image))
        opened.warmup((40, 40))
        assert opened.stats.tiles == opened.stats.pictures == 3 and opened.info["halo"] == 0
        with pytest.raises(OptionError, match=r"looks at the whole picture, .* 333x45 pixels cannot be cut .* of 332"):
            opened.upscale(image, tile=332)


def test_a_whole_picture_beyond_memory_is_refused_and_never_cut(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Upscaler(whole, backend="onnxruntime", memory_mib=4) as opened:
        room = opened.info["one_piece_pixels"]
        assert opened.upscale(photo(64, 64)).shape == (128, 128, 3)
        side = int(room**0.5) + 8
        with pytest.raises(OutOfMemory, match=rf"in one piece, and {room} pixels do: take a smaller picture"):
            opened.upscale(photo(side, side))

    def failures(shape: tuple[int, ...]) -> None:
        raise OutOfMemory("no room")

    fake = FakeBackend(failures)
    monkeypatch.setattr(runner, "open_backend", lambda name, request: fake)
    with pytest.raises(OutOfMemory, match="no room"):
        Upscaler(whole).upscale(photo(64, 64))
    assert fake.shapes == [(1, 64, 64, 3)]
