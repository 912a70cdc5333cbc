"""sr-train check: every fault of a folder at once, copies with their partners, and a cache that is never trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from train import check
from train.check import Copy, check_data, inspect_folder, inspect_picture
from train.data import read_photographs, split_validation
from train.errors import DataError, ResourceError
from train.pictures import NEAR_BITS, copies_before, hold_out, read_picture

MakePhoto = Callable[..., np.ndarray]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pictures"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are really decoded."""
    names: list[str] = []
    inspect = check.inspect_picture

    def watch(path: Path) -> check.PictureFacts:
        names.append(path.name)
        return inspect(path)

    monkeypatch.setattr(check, "inspect_picture", watch)
    return names


def save(picture: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(check.check_command, [str(argument) for argument in arguments])


# What is found


def test_a_good_folder_has_nothing_to_tell(photo_folder: Path) -> None:
    report = check_data(photo_folder, smallest_side=96, validation_pictures=1)
    assert (report.pictures, report.train, report.validation) == (6, 5, 1)
    sizes = [(96, 128), (128, 96), (112, 112), (130, 101), (96, 160), (120, 97)]
    assert report.megapixels == pytest.approx(sum(h * w for h, w in sizes) / 1e6)
    assert not (report.unreadable or report.tiny or report.converted or report.duplicates or report.near_duplicates)
    assert not report.overlap and report.can_be_trained_on


def break_folder(folder: Path) -> dict[str, str]:
    """Add broken files, and give what is to be said about each."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    png = (folder / "photo0.png").read_bytes()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    jpeg = (folder / "photo1.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    Image.fromarray(np.zeros((100, 100), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.zeros((100, 100), np.float32)).save(folder / "float.tif")
    (folder / "inside").mkdir()
    (folder / "inside" / "zeros.webp").write_bytes(bytes(1000))
    return {
        "cut.jpg": "truncated", "cut.png": "", "deep.png": "I;16 pixels, only 8-bit pictures are read",
        "empty.png": "not a picture", "float.tif": "F pixels", "inside/zeros.webp": "not a picture",
        "text.jpg": "not a picture",
    }  # fmt: skip


def test_every_unreadable_file_is_listed_at_once(photo_folder: Path) -> None:
    expected = break_folder(photo_folder)
    report = check_data(photo_folder, smallest_side=96)
    assert [each.file for each in report.unreadable] == sorted(expected)
    for each in report.unreadable:
        assert each.what and expected[each.file] in each.what
    assert report.pictures == 13 and not report.can_be_trained_on
    # What is listed is what training refuses.
    with pytest.raises(DataError, match="7 unreadable pictures"):
        read_photographs(photo_folder, smallest_side=96)


def test_tiny_pictures_are_listed_and_not_counted(photo_folder: Path, make_photo: MakePhoto) -> None:
    save(make_photo(95, 300, 50), photo_folder / "flat.png")
    save(make_photo(20, 10, 51), photo_folder / "icon.png")
    report = check_data(photo_folder, smallest_side=96, validation_pictures=0)
    assert [(each.file, each.what) for each in report.tiny] == [
        ("flat.png", "300x95 pixels, smaller than 96"),
        ("icon.png", "10x20 pixels, smaller than 96"),
    ]
    assert (report.pictures, report.train) == (8, 6) and report.megapixels < 0.1 and report.can_be_trained_on
    assert not check_data(photo_folder, smallest_side=500).can_be_trained_on


def test_conversions_are_told(tmp_path: Path, make_photo: MakePhoto) -> None:
    photo = Image.fromarray(make_photo(64, 64, 0))
    folder = tmp_path / "photos"
    folder.mkdir()
    for mode in ("L", "P", "RGBA", "LA", "1"):
        photo.convert(mode).save(folder / f"{mode}.png")
    photo.convert("CMYK").save(folder / "CMYK.jpg")
    frames = [Image.fromarray(make_photo(64, 64, seed)) for seed in (1, 2)]
    photo.save(folder / "moving.webp", save_all=True, append_images=frames)
    photo.save(folder / "plain.png")
    imageio = pytest.importorskip("tifffile")
    imageio.imwrite(folder / "deep.tif", np.zeros((64, 64, 3), np.uint16), photometric="rgb")
    found = {each.file: each.what for each in check_data(folder, smallest_side=16).converted}
    modes = {f"{mode}.png": f"{mode} pixels become RGB" for mode in ("L", "P", "RGBA", "LA", "1")}
    assert found == modes | {
        "CMYK.jpg": "CMYK pixels become RGB",
        "moving.webp": "3 frames, the first is read",
        "deep.tif": "16 bits become 8",
    }


def test_sixteen_bit_png_colour_is_told(tmp_path: Path) -> None:
    pyvips = pytest.importorskip("pyvips")
    deep = np.random.default_rng(0).integers(0, 65536, (32, 32, 3), dtype=np.uint16)
    pyvips.Image.new_from_array(deep, interpretation="rgb16").write_to_file(str(tmp_path / "deep.png"))
    assert inspect_picture(tmp_path / "deep.png").converted == ("16 bits become 8",)


# Copies


def test_duplicates_are_found_by_pixels_after_orientation(tmp_path: Path, make_photo: MakePhoto) -> None:
    folder = tmp_path / "photos"
    picture = make_photo(80, 120, 0)
    save(picture, folder / "a.png")
    save(picture, folder / "b" / "again.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    save(np.rot90(picture), folder / "turned.png", exif=exif)
    save(make_photo(80, 120, 1), folder / "other.png")
    report = check_data(folder, smallest_side=16)
    assert report.duplicates == (Copy("b/again.bmp", "a.png"), Copy("turned.png", "a.png"))
    assert not report.near_duplicates


def test_equal_bytes_of_another_shape_are_no_duplicates(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    save(pixels, tmp_path / "p" / "a.png")
    save(pixels.reshape(60, 40, 3), tmp_path / "p" / "b.png")
    assert not check_data(tmp_path / "p", smallest_side=16).duplicates


def test_near_duplicates_name_the_nearest_before_them(tmp_path: Path, make_photo: MakePhoto) -> None:
    folder = tmp_path / "photos"
    for seed in range(8):
        save(make_photo(120, 160, seed), folder / f"{seed}.png")
    save(make_photo(120, 160, 3), folder / "x-recompressed.jpg", quality=50)
    small = Image.fromarray(make_photo(120, 160, 5)).resize((120, 90), Image.Resampling.BICUBIC)
    small.save(folder / "y-small.png")
    small.save(folder / "z-same.png")
    report = check_data(folder, smallest_side=16)
    assert [(each.file, each.partner) for each in report.near_duplicates] == [
        ("x-recompressed.jpg", "3.png"),
        ("y-small.png", "5.png"),
    ]
    assert all(0 <= each.bits <= NEAR_BITS for each in report.near_duplicates)
    assert report.duplicates == (Copy("z-same.png", "y-small.png"),)


@pytest.mark.parametrize("seed", range(6))
def test_copies_before_is_what_counting_bits_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 700))  # several blocks
    centres = [int(value) for value in rng.integers(0, 1 << 64, 40, dtype=np.uint64)]
    hashes = []
    for _ in range(count):
        flips = sum(1 << int(bit) for bit in rng.choice(64, int(rng.integers(0, 7)), replace=False))
        hashes.append(centres[int(rng.integers(40))] ^ flips)
    found = {index: (near.tolist(), bits.tolist()) for index, near, bits in copies_before(hashes)}
    for index, value in enumerate(hashes):
        bits = [(value ^ other).bit_count() for other in hashes[:index]]
        near = [place for place, differing in enumerate(bits) if differing <= NEAR_BITS]
        assert found.get(index, ([], [])) == (near, [bits[place] for place in near])


@pytest.mark.parametrize("seed", range(10))
def test_no_copy_is_held_out_of_a_pair(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = [int(value) for value in rng.integers(0, 1 << 64, 30, dtype=np.uint64)]
    hashes += [value ^ (1 << int(rng.integers(64))) for value in hashes[:10]]
    digests = [f"{value:016x}" for value in rng.integers(0, 1 << 64, 40, dtype=np.uint64)]
    for count in range(20):
        chosen = hold_out(digests, hashes, count)
        assert len(chosen) <= min(count, 8)
        assert all((index in chosen) == (index + 30 in chosen) for index in range(10))
        order = rng.permutation(40)
        again = hold_out([digests[i] for i in order], [hashes[i] for i in order], count)
        assert {int(order[index]) for index in again} == chosen  # not of the order of the files


def test_train_and_validation_do_not_overlap_and_are_those_of_training(tmp_path: Path, make_photo: MakePhoto) -> None:
    folder = tmp_path / "photos"
    for seed in range(20):
        save(make_photo(64, 80, seed), folder / f"{seed}.png")
        save(make_photo(64, 80, seed), folder / f"{seed}-copy.jpg", quality=70)
    report = check_data(folder, smallest_side=48, validation_pictures=5)
    train, validation = split_validation(read_photographs(folder, smallest_side=48), 5)
    assert (report.train, report.validation) == (len(train), len(validation)) == (36, 4)
    assert not report.overlap and len(report.near_duplicates) == 20


def test_an_overlap_that_a_split_leaves_is_told(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(np.asarray(Image.open(photo_folder / "photo0.png")), photo_folder / "again.png")
    monkeypatch.setattr(check, "hold_out", lambda digests, hashes, count: {0})
    report = check_data(photo_folder, smallest_side=96)
    assert report.overlap == (Copy("photo0.png", "again.png"),) and not report.can_be_trained_on


def test_pictures_of_a_test_set_are_found(photo_folder: Path, tmp_path: Path, make_photo: MakePhoto) -> None:
    tests = tmp_path / "tests"
    save(make_photo(130, 101, 3), tests / "known.png")  # photo3.jpg before it was compressed
    save(make_photo(90, 90, 77), tests / "unknown.png")
    (tests / "broken.png").write_bytes(b"")
    report = check_data(photo_folder, smallest_side=96, validation_pictures=0, against=[tests])
    (copy,) = report.overlap
    assert (copy.file, copy.partner) == ("photo3.jpg", str(tests / "known.png"))
    assert [each.file for each in report.unreadable] == [str(tests / "broken.png")]
    assert report.train == 6


# What is remembered


def test_unchanged_pictures_are_decoded_once(photo_folder: Path, cache: Path, decoded: list[str]) -> None:
    expected = break_folder(photo_folder)
    first = check_data(photo_folder, smallest_side=96)
    assert len(decoded) == 13
    assert check_data(photo_folder, smallest_side=96) == first and len(decoded) == 13
    (photo_folder / "empty.png").unlink()
    rewritten = photo_folder / "photo0.png"
    Image.open(photo_folder / "photo2.png").save(rewritten)
    touched = photo_folder / "photo2.png"
    os.utime(touched, ns=(1, touched.stat().st_mtime_ns + 1))
    report = check_data(photo_folder, smallest_side=96)
    assert decoded[13:] == ["photo0.png", "photo2.png"]
    assert len(report.unreadable) == len(expected) - 1
    assert report.duplicates == (Copy("photo2.png", "photo0.png"),)
    (stored,) = cache.iterdir()
    assert "empty.png" not in json.loads(stored.read_text())["pictures"]


def test_folders_do_not_share_what_is_remembered(tmp_path: Path, make_photo: MakePhoto, cache: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        save(make_photo(32, 32, seed), tmp_path / name / "a.bmp")  # equal names and sizes
        os.utime(tmp_path / name / "a.bmp", ns=(5, 5))
    facts = [inspect_folder(tmp_path / name)["a.bmp"] for name in ("one", "two")]
    assert facts[0].digest != facts[1].digest and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace(PIL.__version__, "0.0"),
        lambda text: text.replace('"pictures": {', '"pictures": {"a": 3, '),
        lambda text: text.replace('"digest": "', '"digest": "x'),
        lambda text: text.replace('"size": [', '"size": [-'),
        lambda text: text.replace('"size": [', '"size": [1,'),
        lambda text: text.replace('"perceptual_hash": ', '"perceptual_hash": 99999999999'),
        lambda text: text.replace('"stamp"', '"stump"'),
        lambda text: text.replace('"stamp": [', '"stamp": [1,'),
        lambda text: text.replace('"converted": []', '"converted": 7'),
        lambda text: "\0" + text,
    ],
)
def test_a_damaged_cache_is_ignored_and_replaced(
    damage: Callable[[str], str], photo_folder: Path, cache: Path, decoded: list[str]
) -> None:
    report = check_data(photo_folder, smallest_side=96)
    (stored,) = cache.iterdir()
    whole = stored.read_text()
    assert damage(whole) != whole
    stored.write_text(damage(whole))
    assert check_data(photo_folder, smallest_side=96) == report and len(decoded) == 12
    assert stored.read_text() == whole


def test_bytes_that_are_no_text_are_ignored(photo_folder: Path, cache: Path, decoded: list[str]) -> None:
    check_data(photo_folder, smallest_side=96)
    (stored,) = cache.iterdir()
    stored.write_bytes(b"\xff\xfe\x00")
    check_data(photo_folder, smallest_side=96)
    assert len(decoded) == 12


def test_without_a_place_for_the_cache_the_check_goes_on(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "file"))
    assert check_data(photo_folder, smallest_side=96).pictures == 6
    assert "not remembered" in caplog.text
    monkeypatch.delenv("SR_CACHE_DIR")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert check_data(photo_folder, smallest_side=96).pictures == 6


def test_faults_that_may_pass_are_not_remembered(
    photo_folder: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Image.open

    def fail(path: Path, **options: Any) -> Image.Image:
        if path.name == "photo0.png":
            raise PermissionError(13, "Permission denied")
        return opened(path, **options)

    monkeypatch.setattr(Image, "open", fail)
    assert [each.file for each in check_data(photo_folder, smallest_side=96).unreadable] == ["photo0.png"]
    monkeypatch.setattr(Image, "open", opened)
    assert not check_data(photo_folder, smallest_side=96).unreadable
    assert decoded[6:] == ["photo0.png"]


def test_what_was_found_before_an_interrupt_is_remembered(
    photo_folder: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_data(photo_folder, smallest_side=96, progress=stop)
    check_data(photo_folder, smallest_side=96)
    assert sorted(decoded) == sorted(path.name for path in photo_folder.iterdir())


def test_the_end_of_memory_is_no_fault_of_a_picture(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(check, "decode", fail)
    with pytest.raises(ResourceError, match=r"photo0.png: memory ended .* use fewer --processes"):
        check_data(photo_folder, smallest_side=96)


# Processes and the command


def test_processes_find_the_same(photo_folder: Path, cache: Path) -> None:
    break_folder(photo_folder)
    calls: list[tuple[int, int]] = []
    shared = check_data(photo_folder, smallest_side=96, processes=2, progress=lambda *call: calls.append(call))
    assert calls == [(done, 13) for done in range(14)]
    for stored in cache.iterdir():
        stored.unlink()
    assert check_data(photo_folder, smallest_side=96) == shared


def test_a_missing_folder_is_told_in_one_line(tmp_path: Path) -> None:
    result = run(tmp_path / "gone")
    assert result.exit_code == 1 and "gone: no such folder" in result.output and "Traceback" not in result.output
    result = run(tmp_path, "--recipe", "fasst")
    assert result.exit_code == 1 and "unknown recipe 'fasst'" in result.output


def test_folders_without_pictures_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("no picture")
    for name, expected in (
        ("empty", "empty: no pictures found (.bmp, "),
        ("notes", "notes: no pictures found (.bmp, "),
        ("notes/notes.txt", "notes.txt: a file, not a folder; give a folder of photographs"),
    ):
        result = run(tmp_path / name)
        assert result.exit_code == 1 and "Traceback" not in result.output
        assert result.output.splitlines()[-1].startswith("Error: ") and expected in result.output.splitlines()[-1]


def test_what_is_tiny_is_judged_by_the_recipe_with_its_overrides(photo_folder: Path) -> None:
    result = run(photo_folder, "--processes", 1)
    assert result.exit_code == 1 and "too small, left out: 6" in result.stdout  # of 192 pixels
    sizes = ["--set", "stages.0.size=96", "--set", "stages.1.size=112"]
    result = run(photo_folder, "--processes", 1, *sizes, "--set", "validation_pictures=0")
    assert result.exit_code == 0, result.output
    assert "too small, left out: 5" in result.stdout and "1 to train on, 0 to validate" in result.stdout
    for arguments, expected in (
        (["--set", "stages.0.sise=96"], "did you mean 'size'?"),
        (["--set", "stages.0.size=one"], "stages.0.size: expected int, got 'one'"),
        (["--task", "jpg"], "did you mean 'jpeg'?"),
    ):
        result = run(photo_folder, *arguments)
        assert result.exit_code == 1 and "Traceback" not in result.output
        assert expected in result.output.splitlines()[-1]
    assert run(photo_folder, "--task", "x4", *sizes).exit_code == 0


def test_the_command_prints_a_report_and_writes_it(photo_folder: Path, tmp_path: Path, make_photo: MakePhoto) -> None:
    for seed in range(9):
        save(make_photo(200, 230, seed), photo_folder / f"large{seed}.png")
    save(make_photo(200, 230, 4), photo_folder / "large4-again.jpg", quality=80)
    out = tmp_path / "report.json"
    result = run(photo_folder, "--processes", 1, "--json", out)
    assert result.exit_code == 0, result.output
    assert "16 pictures, 0.5 megapixels to use; 8 to train on, 2 to validate" in result.stdout
    assert "too small, left out: 6\n  photo0.png: 128x96 pixels, smaller than 192" in result.stdout
    assert "nearly equal: 1\n  large4.png = large4-again.jpg (" in result.stdout
    written = json.loads(out.read_text())
    assert (written["schema"], written["kind"], written["pictures"]) == (1, "check", 16)
    assert written["near_duplicates"][0]["partner"] == "large4-again.jpg" and len(written["tiny"]) == 6


def test_the_command_fails_for_unreadable_pictures(photo_folder: Path, tmp_path: Path) -> None:
    expected = break_folder(photo_folder)
    out = tmp_path / "report.json"
    result = run(photo_folder, "--json", out)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "cannot be read, and end a run: 7" in result.stdout
    assert all(name in result.stdout for name in expected)
    assert len(json.loads(out.read_text())["unreadable"]) == 7


def test_long_lists_are_cut_on_the_terminal_alone(photo_folder: Path, tmp_path: Path) -> None:
    for index in range(30):
        (photo_folder / f"broken{index:02}.png").write_bytes(b"")
    out = tmp_path / "report.json"
    result = run(photo_folder, "--json", out)
    assert "end a run: 30" in result.stdout and "and 10 more; --json FILE lists all" in result.stdout
    assert "broken19.png" in result.stdout and "broken20.png" not in result.stdout
    assert len(json.loads(out.read_text())["unreadable"]) == 30


def test_checking_needs_no_torch(photo_folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # importing it would raise
        f"from train.check import check_data; print(check_data(__import__('pathlib').Path({str(photo_folder)!r}), "
        "smallest_side=96).pictures)\nfrom train import pairs, tasks"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6"


def test_postscript_behind_a_wrong_suffix_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n")
    assert inspect_picture(tmp_path / "a.png").error == "not a picture"
    with pytest.raises(Exception, match="cannot identify"):
        read_picture(tmp_path / "a.png")
    assert not (tmp_path / "started").exists()
