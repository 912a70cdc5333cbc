"""What a caller is told while a picture is enlarged, and how it ends the work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image

from sdk import ImageError, Upscaler, jobs, large
from sdk.stats import Meter

pytest.importorskip("onnxruntime")


@pytest.fixture
def upscaler():
    with Upscaler(bundles.shared("blur"), backend="onnxruntime", device="cpu") as made:
        yield made


def photo(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


class Stop(Exception):
    """What a caller may raise to end the work."""


def stop_at(share: float):
    def progress(done: float) -> None:
        if done >= share:
            raise Stop(done)

    return progress


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("factor", [None, 3.0])
def test_progress_rises_from_nothing_to_all(upscaler, channels, factor):
    told = []
    upscaler.upscale(photo(40, 50, channels), tile=16, factor=factor, progress=told.append)
    assert told[0] == 0
    assert told[-1] == 1
    assert all(earlier < later for earlier, later in pairwise(told))
    assert len(told) > 8  # 12 windows at least


def test_constant_alpha_needs_no_windows_of_its_own(upscaler):
    image, told = photo(40, 50, 4), []
    image[:, :, 3] = 255
    upscaler.upscale(image, tile=16, progress=told.append)
    assert told[-1] == 1
    assert len(told) == 10  # nothing, and 9 windows


def test_progress_changes_no_pixel(upscaler):
    image = photo(40, 50)
    expected = upscaler.upscale(image, tile=16)
    np.testing.assert_array_equal(upscaler.upscale(image, tile=16, progress=lambda share: None), expected)


def test_what_progress_raises_ends_the_work(upscaler):
    with pytest.raises(Stop, match=r"0\.5"):
        upscaler.upscale(photo(32, 32), tile=16, progress=stop_at(0.5))
    assert upscaler.stats.pictures == 0
    assert upscaler.upscale(photo(32, 32)).shape == (64, 64, 3)


def test_a_stopped_file_leaves_nothing_behind(upscaler, tmp_path):
    Image.fromarray(photo(64, 64)).save(tmp_path / "in.png")
    with pytest.raises(Stop):
        upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.png", tile=16, progress=stop_at(0.2))
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_progress_of_an_animation_is_that_of_all_its_frames(upscaler, tmp_path):
    frames = [Image.fromarray(photo(20, 20)) for _ in range(5)]
    for number, frame in enumerate(frames):
        frame.putpixel((0, 0), (number, 0, 0))
    frames[0].save(tmp_path / "in.webp", save_all=True, append_images=frames[1:], lossless=True)
    told: list[float] = []
    upscaler.upscale_file(tmp_path / "in.webp", tmp_path / "out.png", progress=told.append)
    assert told == [0, 0.2, 0.4, 0.6, 0.8, 1]
    with pytest.raises(Stop):
        upscaler.upscale_file(tmp_path / "in.webp", tmp_path / "stopped.png", progress=stop_at(0.3))
    assert not (tmp_path / "stopped.png").exists()


def test_progress_of_a_streamed_picture(upscaler, tmp_path, monkeypatch):
    pytest.importorskip("pyvips")
    monkeypatch.setattr(large, "LARGE_BYTES", 1)
    Image.fromarray(photo(100, 64)).save(tmp_path / "in.png")
    told: list[float] = []
    upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.png", tile=32, progress=told.append)
    assert told[0] == 0
    assert told[-1] == 1
    assert sorted(told) == told
    with pytest.raises(Stop):
        upscaler.upscale_file(tmp_path / "in.png", tmp_path / "stopped.png", tile=32, progress=stop_at(0.5))
    assert not (tmp_path / "stopped.png").exists()


def test_progress_never_goes_back_nor_comes_twice_at_once():
    told, inside = [], []

    def progress(share: float) -> None:
        inside.append(share)
        assert len(inside) == 1
        told.append(share)
        inside.clear()

    meter = Meter(progress)
    meter.expect(4000)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: meter.add(tiles=1), range(4000)))
    assert told == sorted(set(told))
    assert told[-1] == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_result_beyond_the_limit_is_refused_before_the_work(upscaler, tmp_path, monkeypatch, streamed):
    if streamed:
        pytest.importorskip("pyvips")
        monkeypatch.setattr(large, "LARGE_BYTES", 1)
    source = Path(tmp_path / "in.png")
    Image.fromarray(photo(10, 20)).save(source)
    job = jobs.Job(source, tmp_path / "out.png")
    with pytest.raises(ImageError, match="would become 40 x 20 pixels, and results have at most 799 pixels"):
        jobs.run_file(upscaler, job, jobs.Options(max_result_pixels=799))
    assert not job.target.exists()
    assert upscaler.stats.tiles == 0
    jobs.run_file(upscaler, job, jobs.Options(max_result_pixels=800))
    assert job.target.exists()
