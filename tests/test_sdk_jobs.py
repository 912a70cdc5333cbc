"""Files through the three steps: which way a picture takes, what is refused first, what is counted."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bundles
import numpy as np
import pytest
from PIL import Image, ImageCms, JpegImagePlugin

from sdk import (
    ImageError,
    OptionError,
    OutOfMemory,
    OutputError,
    SRError,
    Stats,
    Upscaler,
    animation,
    compare,
    files,
    jobs,
    large,
    png,
    vips,
)
from sdk import stats as stats_module
from sdk.jobs import Job, Options, run_file, run_files

pytest.importorskip("onnxruntime")
needs_vips = pytest.mark.skipif(importlib.util.find_spec("pyvips") is None, reason="pyvips is not installed")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def upscaler() -> Iterator[Upscaler]:
    with Upscaler(bundles.shared("identity"), backend="onnxruntime", device="cpu") as opened:
        yield opened


def photo(height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(name: str, **options: Any) -> Path:
    Image.fromarray(photo()).save(name, **options)
    return Path(name)


def save_moving(name: str) -> Path:
    frames = [Image.fromarray(np.full((6, 8, 3), value, np.uint8)) for value in (0, 120, 250)]
    frames[0].save(name, save_all=True, append_images=frames[1:], duration=100, loop=0)
    return Path(name)


def notice(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """List the threads that call a function."""
    threads: list[str] = []
    function = getattr(module, name)

    def noticed(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, noticed)
    return threads


# Streamed or held in memory


@needs_vips
def test_of_streams_and_animations_one_is_under_way(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes what memory it takes alone; encoders are several, and there is one thread that computes."""
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    monkeypatch.setattr(jobs, "_cores", lambda: 8)
    streams, moving = notice(monkeypatch, large, "enlarge"), notice(monkeypatch, animation, "write")
    todo = []
    for number in range(4):
        todo.append(Job(save(f"{number}.png"), Path(f"{number}.tif")))
        todo.append(Job(save_moving(f"{number}.gif"), Path(f"{number}.webp"), Path(f"{number}.compare.png")))
    assert [error for _, error in run_files(upscaler, todo, Options())] == [None] * 8
    assert len(streams) == len(moving) == 4
    assert set(streams + moving) == {"sr-compute_0"}
    assert all(target.exists() for job in todo for target in job.targets)


@needs_vips
@pytest.mark.parametrize(
    "options,streamed",
    [
        ({}, True), ({"factor": 2}, True), ({"factor": 2.001}, True), ({"size": (48, 80)}, True),
        ({"size": (None, 80)}, True), ({"factor": 3}, False), ({"size": (48, 81)}, False),
    ],
)  # fmt: skip
def test_what_becomes_as_large_as_the_model_makes_it_is_streamed(
    upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], streamed: bool
) -> None:
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    calls = notice(monkeypatch, large, "enlarge")
    run_file(upscaler, Job(save("a.png"), Path("b.png")), Options(**options))
    assert bool(calls) == streamed
    if streamed:
        expected = photo().repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(files.read(Path("b.png"))[0], expected)


@needs_vips
def test_the_size_of_a_turned_picture_is_the_one_seen(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    calls = notice(monkeypatch, large, "enlarge")
    run_file(upscaler, Job(save("a.jpg", exif=exif), Path("b.png")), Options(size=(80, 48)))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "target,panel,options,words",
    [
        ("b.png", None, {"factor": 3}, "2 times as large it would be streamed"),
        ("b.png", "b.compare.png", {}, "without a comparison it would be streamed"),
        ("b.jpg", None, {"subsampling": "4:2:2"}, "with a subsampling of 4:4:4 or 4:2:0 it would be streamed"),
        ("b.png", None, {}, "pip install"),
    ],
)
def test_large_pictures_that_are_held_in_memory_are_told(
    upscaler: Upscaler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    target: str,
    panel: str | None,
    options: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr(vips, "is_installed", lambda: words != "pip install")
    monkeypatch.setattr(large, "enlarge", lambda *_: pytest.fail("streamed"))
    job = Job(save("a.png"), Path(target), Path(panel) if panel else None)
    with caplog.at_level(logging.WARNING):
        run_file(upscaler, job, Options(**options))
        assert not caplog.records, "nothing to be told of a small picture"
        monkeypatch.setattr(large, "LARGE_BYTES", 0)
        run_file(upscaler, job, Options(overwrite=True, **options))
    (record,) = caplog.records
    assert record.getMessage().startswith("a.png: needs much memory; ") and words in record.getMessage()
    assert all(path.exists() for path in job.targets)
    if "subsampling" in options:
        with Image.open(target) as result:
            assert JpegImagePlugin.get_sampling(result) == 1  # 4:2:2


# What is refused, and when


@pytest.mark.parametrize("options", [{}, {"size": (1, 20_000)}])
def test_a_result_beyond_its_format_is_refused_before_the_work(
    upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    Image.new("L", (400 if options else 8192, 1)).save("a.png")
    monkeypatch.setattr(upscaler, "upscale_metered", lambda *_, **__: pytest.fail("the work was done"))
    with pytest.raises(OutputError, match="WEBP holds at most 16383 pixels a side"):
        run_file(upscaler, Job(Path("a.png"), Path("b.webp")), Options(**options))


def test_a_comparison_without_memory_fails_its_own_job(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(compare, "panel", no_memory)
    save("a.png")
    todo = [Job(Path("a.png"), Path("b.png"), Path("b.compare.png")), Job(Path("a.png"), Path("c.png"))]
    errors = [error for _, error in run_files(upscaler, todo, Options())]
    assert isinstance(errors[0], OutOfMemory) and "b.compare.png" in str(errors[0]) and errors[1] is None
    assert Path("c.png").exists() and not Path("b.compare.png").exists()


@pytest.mark.parametrize("name,bytes_each", [("a.png", 3), ("a.gif", 4)])
@pytest.mark.parametrize(
    "options,pixels_of", [({}, (2, 2)), ({"factor": 5.0}, (5, 5)), ({"factor": 3.5}, (4, 4)), ({"factor": 0.5}, (1, 1))]
)
def test_a_result_beyond_the_memory_is_refused_before_the_work(
    upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, name: str, bytes_each: int, options: dict[str, Any],
    pixels_of: tuple[int, int],
) -> None:  # fmt: skip
    """The largest of the passes counts: 3.5 times as large is 4 times, and then made smaller."""
    height, width = (6, 8) if name == "a.gif" else (24, 40)
    save_moving(name) if name == "a.gif" else save(name)
    if options.get("factor") == 0.5:  # one pixel of the result for four of the picture
        height, width = height // 2, width // 2
    needed = height * width * pixels_of[0] * pixels_of[1] * bytes_each
    job, done = Job(Path(name), Path("b.webp")), upscaler.upscale_metered
    monkeypatch.setattr(upscaler, "upscale_metered", lambda *_, **__: pytest.fail("the work was done"))
    monkeypatch.setattr(jobs.memory, "free_bytes", lambda: needed - 1)
    with pytest.raises(ImageError, match=f"^{name}: .* MiB are free; ask for a smaller factor or size$"):
        run_file(upscaler, job, Options(**options))
    assert not Path("b.webp").exists()
    monkeypatch.setattr(upscaler, "upscale_metered", done)
    monkeypatch.setattr(jobs.memory, "free_bytes", lambda: needed)
    run_file(upscaler, job, Options(**options))


@pytest.mark.parametrize("name", ["a.png", "a.gif", "large.png"])
@pytest.mark.parametrize("error", [ImageError("the picture holds NaN"), OutOfMemory("no memory")], ids=repr)
def test_errors_tell_the_file(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, name: str, error: SRError) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    if name == "large.png":
        pytest.importorskip("pyvips")
        monkeypatch.setattr(large, "LARGE_BYTES", 0)
    save_moving(name) if name == "a.gif" else save(name)
    monkeypatch.setattr(upscaler._runner.backends["uint8"], "run", fail)
    with pytest.raises(type(error)) as caught:
        run_file(upscaler, Job(Path(name), Path("b.webp" if name == "a.gif" else "b.png")), Options())
    assert str(caught.value) == f"{name}: {error}"


def test_errors_that_tell_a_file_stay_as_they_are(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OutputError("b.webp: exists")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(animation, "write", fail)
    with pytest.raises(OutputError) as caught:
        run_file(upscaler, Job(save_moving("a.gif"), Path("b.webp")), Options())
    assert caught.value is error


@pytest.mark.parametrize("space,kept", [("RGB", True), ("GRAY", False)])
@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_a_panel_has_the_profile_of_its_picture(
    upscaler: Upscaler, caplog: pytest.LogCaptureFixture, name: str, space: str, kept: bool
) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:16] + space.encode().ljust(4) + profile[20:]
    picture = Image.fromarray(photo() if kept or name == "a.webp" else photo()[:, :, 0])
    others = {"save_all": True, "append_images": [Image.new("RGB", (40, 24))]} if name == "a.webp" else {}
    picture.save(name, icc_profile=profile, **others)
    run_file(upscaler, Job(Path(name), Path(f"b{name}"), Path("b.compare.png")), Options())
    with Image.open("b.compare.png") as panel:
        assert panel.info.get("icc_profile") == (profile if kept else None)
    assert "b.compare.png" not in caplog.text


# The options of Upscaler.upscale_file and upscale_files


def one(upscaler: Upscaler, source: str, target: str, **options: Any) -> None:
    upscaler.upscale_file(source, target, **options)


def many(upscaler: Upscaler, source: str, target: str, **options: Any) -> None:
    ((_, error),) = upscaler.upscale_files([(source, target)], **options)
    if error:
        raise error


@pytest.mark.parametrize("enlarge", [one, many])
def test_options_reach_the_files(upscaler: Upscaler, enlarge: Callable[..., None]) -> None:
    save("a.png")
    enlarge(upscaler, "a.png", "b.jpg", subsampling="4:2:0")
    with Image.open("b.jpg") as result:
        assert JpegImagePlugin.get_sampling(result) == 2  # 4:2:0
    enlarge(upscaler, "a.png", "b.webp", lossless=True)
    np.testing.assert_array_equal(files.read(Path("b.webp"))[0], photo().repeat(2, axis=0).repeat(2, axis=1))
    before = upscaler.stats.tiles
    enlarge(upscaler, "a.png", "b.png", tile=12)
    assert upscaler.stats.tiles - before == 2 * 4
    with pytest.raises(ImageError, match="too large"):
        enlarge(upscaler, "a.png", "c.png", max_pixels=24 * 40 - 1)
    enlarge(upscaler, "a.png", "c.png", max_pixels=24 * 40)
    enlarge(upscaler, "a.png", "d.png", max_pixels=None)
    with pytest.raises(OptionError, match="subsampling"):
        enlarge(upscaler, "a.png", "e.jpg", subsampling="4:1:1")


# What is counted


class Clock(SimpleNamespace):
    """Stands for the module `time`; goes on only when a function is called that takes its time."""

    def perf_counter(self) -> float:
        return self.now

    def slow(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        function = getattr(owner, name)

        def run(*arguments: Any, **options: Any) -> Any:
            self.now += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, run)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(now=0.0)
    monkeypatch.setattr(stats_module, "time", made)
    return made


def test_seconds_of_a_file_are_those_of_its_steps(
    upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    clock.slow(monkeypatch, files, "read", 1)
    clock.slow(monkeypatch, upscaler._runner.backends["uint8"], "run", 2)
    clock.slow(monkeypatch, files, "write", 4)
    steps = jobs.Steps(upscaler, Options())
    job = Job(save("a.png"), Path("b.png"))
    enlarge = steps.decode(job)
    clock.now += 1000  # while others are at work
    enlarged = enlarge()
    clock.now += 1000
    steps.encode(job, enlarged)
    stats = upscaler.stats
    assert (stats.decode_s, stats.run_s, stats.encode_s, stats.seconds) == (1, 2, 4, 7)
    assert (stats.pictures, stats.tiles, stats.pixels) == (1, 1, 24 * 40)


def test_an_animation_tells_its_parts(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    frames = animation.Animation.frames

    def decode(source: animation.Animation) -> Iterator[animation.Frame]:
        for frame in frames(source):
            clock.now += 1
            yield frame

    def encode(path: Path, frames: Iterable[animation.Frame], **_: Any) -> None:
        for _frame in frames:
            clock.now += 0.25

    monkeypatch.setattr(animation.Animation, "frames", decode)
    monkeypatch.setattr(animation, "write", encode)
    clock.slow(monkeypatch, animation, "read", 100)
    clock.slow(monkeypatch, upscaler._runner.backends["uint8"], "run", 10)
    run_file(upscaler, Job(save_moving("a.gif"), Path("b.webp")), Options())
    stats = upscaler.stats
    assert (stats.pictures, stats.pixels) == (1, 3 * 6 * 8)
    assert (stats.decode_s, stats.run_s, stats.encode_s, stats.seconds) == (103, 30, 0.75, 133.75)


@needs_vips
def test_a_streamed_file_tells_its_parts(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    decode, write = large._decode, png.write_stored

    def slow_decode(*arguments: Any) -> Iterator[np.ndarray]:
        for band in decode(*arguments):
            clock.now += 1
            yield band

    def slow_write(stream: Any, bands: Iterable[np.ndarray], *arguments: Any) -> None:
        def slowed() -> Iterator[np.ndarray]:
            for band in bands:
                clock.now += 0.25
                yield band

        write(stream, slowed(), *arguments)

    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    monkeypatch.setattr(large, "BAND_BYTES", 8 * 40 * 3)
    monkeypatch.setattr(large, "_decode", slow_decode)
    monkeypatch.setattr(png, "write_stored", slow_write)
    clock.slow(monkeypatch, upscaler._runner.backends["uint8"], "run", 10)
    told: list[Stats] = []
    monkeypatch.setattr(upscaler, "_on_picture", told.append)
    run_file(upscaler, Job(save("a.png"), Path("b.png")), Options())
    stats = upscaler.stats
    assert told == [stats] and (stats.pictures, stats.tiles, stats.pixels) == (1, 1, 24 * 40)
    assert (stats.decode_s, stats.run_s, stats.encode_s, stats.seconds) == (3, 10, 0.25, 13.25)


def test_many_tell_the_decoding_of_files(upscaler: Upscaler) -> None:
    save("a.png")
    results = list(upscaler.upscale_many([photo()]))
    assert upscaler.stats.decode_s == 0
    results += upscaler.upscale_many(["a.png", Path("a.png")])
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    stats = upscaler.stats
    assert stats.pictures == 3 and stats.decode_s > 0
    assert stats.decode_s + stats.run_s <= stats.seconds
