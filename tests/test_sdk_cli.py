"""sr-upscale, as a shell would call it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bundles
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sdk import SRError, Upscaler, files, large, vips
from sdk.cli import main
from sdk.inputs import plan_jobs

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import logging

    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    logging.captureWarnings(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def photo(height: int = 8, width: int = 10, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: str, **options: object) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo()).save(path, **options)
    return path


def run(*arguments: str, code: int = 0, kind: str = "identity", backend: str = "onnxruntime") -> Result:
    options = ["--model", str(bundles.shared(kind)), "--backend", backend]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert not list(Path().rglob("*.part"))
    return result


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_one_file() -> None:
    run(save("a.png"), "-o", "b.png")
    np.testing.assert_array_equal(np.asarray(Image.open("b.png")), photo().repeat(2, axis=0).repeat(2, axis=1))


def test_one_file_into_a_folder_that_is_made() -> None:
    run(save("a.png"), "-o", "new/deep/")
    assert names("new/deep") == ["a.png"]


def test_one_file_into_a_folder_that_is_there() -> None:
    Path("out").mkdir()
    run(save("a.png"), "-o", "out", "--format", "webp")
    assert names("out") == ["a.webp"]


def test_a_folder() -> None:
    save("in/a.png")
    save("in/b.JPG")
    Path("in/notes.txt").write_text("not a picture")
    Path("in/folder.png").mkdir()
    run("in", "-o", "out")
    assert names("out") == ["a.png", "b.JPG"]


def test_a_folder_gives_all_that_is_read_and_png_for_what_is_not_written() -> None:
    names_in = ["a.ppm", "b.jp2", "c.tga", "d.ico", "e.PGM", "f.jfif", "g.bmp"]
    for name in names_in:
        save(f"in/{name}", format={"PGM": "PPM", "jfif": "JPEG"}.get(name[2:]))
    run("in", "-o", "out")
    assert names("out") == ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "g.bmp"]
    run("in/a.ppm", "in/c.tga", "-o", "webp", "--format", "webp")
    assert names("webp") == ["a.webp", "c.webp"]


def test_a_folder_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(self))

    save("in/a.png")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", refused)
        result = run("in", "-o", "out", code=1)
    assert "in: the folder cannot be read (Permission denied)" in result.output and not Path("out").exists()


def test_a_glob() -> None:
    for name in ("a1.png", "a2.png", "b.png"):
        save(f"in/{name}")
    Path("in/a3.png").mkdir()
    run("in/a*.png", "-o", "out")
    assert names("out") == ["a1.png", "a2.png"]


def test_several_files_and_formats() -> None:
    run(save("a.png"), save("b.tif"), "-o", "out", "--format", "jpg", "--quality", "80")
    assert names("out") == ["a.jpg", "b.jpg"]


def test_metadata_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "A. Painter"
    run(save("a.jpg", exif=exif), "-o", "b.jpg")
    with Image.open("b.jpg") as result:
        assert result.size == (16, 20) and result.getexif()[0x013B] == "A. Painter"
        assert result.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    "inputs,options",
    [
        (["in/a.png", "in/a.jpg"], ["--format", "png"]),
        (["in/a.png", "other/a.png"], []),
        (["in/a.png", "in/a.png"], []),
        (["in/a.png", "in/a.jpg"], ["--compare"]),
        (["in/a.png", "in/a.compare.png"], ["--compare"]),
    ],
)
def test_two_results_of_one_name_are_refused_before_the_work(inputs: list[str], options: list[str]) -> None:
    for name in inputs:
        save(name)
    result = run(*inputs, "-o", "out", *options, code=1)
    assert "would both become" in result.output
    assert not Path("out").exists()


@pytest.mark.parametrize("system", ["windows", "darwin"])
def test_case_does_not_tell_names_apart_where_disks_ignore_it(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    inputs = save("in/a.JPG"), save("in/a.jpg")
    assert len(plan_jobs(inputs, "out")[0]) == 2
    if system == "darwin":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(os.path, "normcase", lambda path: str(path).lower())
    with pytest.raises(SRError, match="would both become"):
        plan_jobs(inputs, "out")


def test_a_folder_is_told_by_the_systems_own_separator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    save("a.png")
    assert plan_jobs(("a.png",), "out\\")[1] is None
    monkeypatch.setattr(os, "altsep", "\\")
    assert plan_jobs(("a.png",), "out\\")[1] == Path("out\\")
    assert plan_jobs(("a.png",), "out/")[1] == Path("out")


@pytest.mark.parametrize("name", ["missing.png", "none*.png", "empty", "null\0", "x" * 300])
def test_inputs_that_are_not_there(name: str) -> None:
    Path("empty").mkdir()
    result = run(name, "-o", "out", code=1)
    assert "no such file" in result.output and not Path("out").exists()


def test_one_bad_of_three_is_listed_and_the_others_done() -> None:
    save("in/a.png")
    Path("in/b.png").write_text("not a picture")
    save("in/c.png")
    result = run("in", "-o", "out", code=1)
    assert "failed: in/b.png" in result.output and "1 of 3" in result.output
    assert names("out") == ["a.png", "c.png"]


def test_all_kinds_of_failure_are_listed_one_a_line() -> None:
    save("in/ok.png")
    for name, data in (("empty.png", b""), ("cut.png", Path("in/ok.png").read_bytes()[:100])):
        Path("in", name).write_bytes(data)
    Image.fromarray(photo(4, 4, 4)).save("in/alpha.webp", lossless=True)
    result = run("in", "-o", "out", "--format", "jpg", code=1)
    lines = [line for line in result.output.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 3 and names("out") == ["ok.jpg"]


def test_names_cannot_give_orders_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as of a new process
    name = "in/a\n\x1b[31m.png"
    save("in/ok.png")
    Path(name).write_bytes(b"no picture")
    Image.new("CMYK", (4, 4)).save("in/c\x1b.tif")
    output = run("in", "-o", "out", code=1).output
    assert "\x1b" not in output
    assert r"failed: in/a\n\x1b[31m.png: not a picture" in output and r"in/c\x1b.tif: CMYK" in output


def test_existing_files_are_kept_unasked() -> None:
    save("a.png")
    Path("b.png").write_bytes(b"precious")
    assert "exists" in run("a.png", "-o", "b.png", code=1).output
    assert Path("b.png").read_bytes() == b"precious"
    run("a.png", "-o", "b.png", "--overwrite")
    assert files.read(Path("b.png"))[0].shape == (16, 20, 3)


def test_compare_writes_a_panel() -> None:
    run(save("a.png"), "-o", "b.png", "--compare")
    with Image.open("b.compare.png") as panel:
        assert panel.width == 3 * 20 and panel.height > 16


def test_an_existing_panel_is_kept_and_told_before_the_work() -> None:
    save("a.png")
    Path("b.compare.png").write_bytes(b"precious")
    run("a.png", "-o", "b.png", "--compare", code=1)
    assert Path("b.compare.png").read_bytes() == b"precious" and not Path("b.png").exists()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16", "F", "P", "1"])
def test_compare_takes_every_kind(mode: str) -> None:
    if mode == "I;16":
        Image.fromarray(photo()[:, :, 0].astype(np.uint16) * 257).save("a.tif")
    elif mode == "F":
        Image.fromarray(photo()[:, :, 0].astype(np.float32) / np.float32(255)).save("a.tif")
    else:
        Image.fromarray(photo()).convert(mode).save("a.tif")
    run("a.tif", "-o", "b.tif", "--compare")
    assert names(".") == ["a.tif", "b.compare.png", "b.tif"]


@pytest.mark.parametrize(
    "output,words", [("b.xyz", "unknown format"), ("missing/b.png", "does not exist"), ("b", "unknown format")]
)
def test_outputs_that_cannot_be_written_are_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, output: str, words: str
) -> None:
    save("a.png")
    monkeypatch.setattr(Upscaler, "upscale_metered", lambda *_, **__: pytest.fail("the work was done"))
    assert words in run("a.png", "-o", output, code=1).output


def test_a_file_where_a_folder_is_needed() -> None:
    save("in/a.png")
    Path("out").write_bytes(b"precious")
    assert "folder" in run("in", "-o", "out", code=1).output
    assert Path("out").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "options,words",
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--backend", "caffe"], "caffe"),
        (["--device", "tpu"], "tpu"),
        (["--precision", "fp8"], "fp8"),
        (["--stage", "9"], "9"),
    ],
)
def test_bad_options_make_no_folder(options: list[str], words: str) -> None:
    save("in/a.png")
    result = CliRunner().invoke(
        main, ["in", "-o", "out", "--model", str(bundles.shared("blur")), "--backend", "onnxruntime", *options]
    )
    assert result.exit_code == 1 and words in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("options", [["--tile", "0"], ["--quality", "0"], ["--seams", "none"], ["--format", "xyz"], []])
def test_usage_errors(options: list[str]) -> None:
    arguments = ["a.png", "-o", "b.png", *options] if options else []
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_help_and_version() -> None:
    for option, words in (("--help", "Enlarge pictures"), ("-h", "Enlarge pictures"), ("--version", "0.")):
        result = CliRunner().invoke(main, [option])
        assert result.exit_code == 0 and words in result.output


def test_verbose_says_what_runs() -> None:
    assert "backend onnxruntime" in run(save("a.png"), "-o", "b.png", "--verbose").output


def test_tiles() -> None:
    run(save("a.png"), "-o", "b.png", "--tile", "4", kind="blur")
    run("a.png", "-o", "c.png", kind="blur")
    np.testing.assert_array_equal(np.asarray(Image.open("b.png")), np.asarray(Image.open("c.png")))


def test_other_sizes() -> None:
    save("a.png")
    for options, size in (
        (["--factor", "3"], (30, 24)), (["--width", "15"], (15, 12)), (["--height", "40"], (50, 40)),
        (["--width", "7", "--height", "9"], (7, 9)),
    ):  # fmt: skip
        run("a.png", "-o", "b.png", "--overwrite", *options)
        with Image.open("b.png") as result:
            assert result.size == size, options
    assert "--factor" in run("a.png", "-o", "c.png", "--factor", "3", "--width", "9", code=1).output


def test_a_limit_of_pixels_and_its_switch() -> None:
    save("a.png")
    assert "too large" in run("a.png", "-o", "b.png", "--max-pixels", "79", code=1).output
    run("a.png", "-o", "b.png", "--max-pixels", "80")
    run("a.png", "-o", "c.png", "--max-pixels", "0")


def test_animations_stay_animated() -> None:
    frames = [Image.fromarray(np.full((6, 8, 3), value, np.uint8)) for value in (0, 120, 250)]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:], duration=[100, 200, 300], loop=0)
    run("a.gif", "-o", "b.webp", "--lossless", "--compare")
    with Image.open("b.webp") as result:
        assert result.n_frames == 3 and result.size == (16, 12)
    assert "holds no animation" in run("a.gif", "-o", "b.jpg", code=1).output


def test_large_pictures_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result, band by band: an upscaler that holds whole pictures is not asked."""
    Image.fromarray(photo(60, 40)).save("a.png")
    run("a.png", "-o", "whole.tif", kind="unet")
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    monkeypatch.setattr(Upscaler, "upscale_metered", lambda *_, **__: pytest.fail("held in memory"))
    run("a.png", "-o", "bands.tif", kind="unet")
    whole, streamed = (files.read(Path(name))[0] for name in ("whole.tif", "bands.tif"))
    np.testing.assert_array_equal(streamed, whole)


def test_large_pictures_without_libvips_are_done_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    save("a.png")
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    monkeypatch.setattr(vips, "is_installed", lambda: False)
    run("a.png", "-o", "b.png")
    assert files.read(Path("b.png"))[0].shape == (16, 20, 3)


def test_videos_and_pictures_together() -> None:
    import av

    save("a.png")
    with av.open("clip.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=32, height=16, pix_fmt="yuv420p")
        for value in range(5):
            plane = np.full((16, 32, 3), 40 * value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(plane, "rgb24")))
        container.mux(stream.encode())
    run("a.png", "clip.mkv", "-o", "out")
    with av.open("out/clip.mkv") as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 5 and (frames[0].width, frames[0].height) == (64, 32)
    result = run("clip.mkv", "-o", "b.mkv", "--factor", "3", code=1)
    assert "videos" in result.output and not Path("b.mkv").exists()


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save("a.png")
    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left" in run("a.png", "-o", "b.png", code=1).output
    assert names(".") == ["a.png"]


def test_python_warnings_do_not_reach_the_terminal_raw() -> None:
    """Pillow warns of odd EXIF: told through logging, and the picture is done or refused."""
    save("a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0")
    result = CliRunner().invoke(
        main, ["a.jpg", "-o", "b.jpg", "--model", str(bundles.shared("blur")), "--backend", "onnxruntime"]
    )
    assert "Traceback" not in result.output and result.exit_code in (0, 1)


STUCK = """
import sys, time
from PIL import Image
from sdk import cli

def half_saved(image, stream, *arguments, **options):
    stream.write(b"half of a picture")
    stream.flush()
    print("saving", flush=True)
    time.sleep(3600)

Image.Image.save = half_saved
cli.main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are of POSIX")
@pytest.mark.parametrize("number,status,word", [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_signals_leave_nothing_half_done(number: str, status: int, word: str) -> None:
    save("a.png")
    command = [sys.executable, "-c", STUCK, "a.png", "-o", "b.png", "--model", str(bundles.shared("blur"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "saving\n"
        assert list(Path().glob(".sr-*.part"))
        process.send_signal(getattr(signal, number))
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status and word in text and "Traceback" not in text
    assert names(".") in (["a.png"], ["a.png", "cache"])
