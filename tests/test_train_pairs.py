"""Pairs of pictures: every fault of two folders at once, and folders of pairs that are never half or foreign."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from train import pairs
from train.degrade import degrade
from train.errors import DataError, RecipeError, ResourceError
from train.pairs import MARKER, degrade_command, match_pairs, read_pairs, write_pairs
from train.recipe import DegradeConfig

MakePhoto = Callable[..., np.ndarray]
NOISE = DegradeConfig(noise_probability=1.0, jpeg_probability=0.5)


def save(picture: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return path


def reduced(picture: np.ndarray, scale: int) -> np.ndarray:
    size = (picture.shape[1] // scale, picture.shape[0] // scale)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture
def folders(tmp_path: Path, make_photo: MakePhoto) -> tuple[Path, Path]:
    """Four pairs at x2, one of them in a folder below."""
    for index, name in enumerate(["a", "b", "inside/c", "d.e"]):
        hr = make_photo(64, 80 + 2 * index, index)
        save(hr, tmp_path / "hr" / f"{name}.png")
        save(reduced(hr, 2), tmp_path / "lr" / f"{name}.{'bmp' if index % 2 else 'png'}")
    return tmp_path / "lr", tmp_path / "hr"


# Reading


def test_pairs_are_read_by_name(folders: tuple[Path, Path]) -> None:
    calls: list[tuple[int, int]] = []
    found = read_pairs(*folders, scales=(2,), smallest_side=64, progress=lambda *call: calls.append(call))
    assert [path.relative_to(folders[1]).as_posix() for path in found.paths] == [
        "a.png", "b.png", "d.e.png", "inside/c.png",
    ]  # fmt: skip
    for path, hr, lr in zip(found.paths, found.pictures, found.lr_pictures, strict=True):
        assert np.array_equal(hr, pixels(path)) and np.array_equal(lr, reduced(hr, 2))
    assert calls == [(done, 8) for done in range(1, 9)]


def test_names_with_the_scale_are_matched(tmp_path: Path, make_photo: MakePhoto) -> None:
    hr = make_photo(64, 64, 0)
    save(hr, tmp_path / "hr" / "0801.png")
    save(reduced(hr, 4), tmp_path / "lr" / "0801x4.png")
    assert len(read_pairs(tmp_path / "lr", tmp_path / "hr", scales=(4,), smallest_side=32)) == 1
    _, faults = match_pairs(tmp_path / "lr", tmp_path / "hr", scale=2)
    assert len(faults) == 2 and "0801x4.png (no partner in" in faults[0]
    save(reduced(hr, 4), tmp_path / "lr" / "0801.png")
    found, faults = match_pairs(tmp_path / "lr", tmp_path / "hr", scale=4)
    assert found == [(tmp_path / "lr" / "0801.png", tmp_path / "hr" / "0801.png")]
    assert faults == [f"{tmp_path / 'lr' / '0801x4.png'} (0801.png has the same partner)"]


def test_orientation_is_applied_to_both(tmp_path: Path, make_photo: MakePhoto) -> None:
    hr = make_photo(64, 80, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(np.rot90(hr), tmp_path / "hr" / "a.png", exif=exif)
    save(reduced(hr, 2), tmp_path / "lr" / "a.png")
    found = read_pairs(tmp_path / "lr", tmp_path / "hr", scales=(2,), smallest_side=64)
    assert np.array_equal(found.pictures[0], hr)


def test_every_fault_is_listed_at_once(folders: tuple[Path, Path], make_photo: MakePhoto) -> None:
    lr, hr = folders
    save(make_photo(32, 32, 9), lr / "lonely-lr.png")
    save(make_photo(32, 32, 9), hr / "lonely-hr.png")
    save(make_photo(32, 40, 9), lr / "a.jpg")
    for name, (small, large) in {
        "x4": ((32, 32), (128, 128)), "uneven": ((32, 32), (64, 66)), "odd": ((32, 32), (65, 65)),
        "tiny": ((20, 60), (40, 120)), "larger": ((64, 64), (32, 32)),
    }.items():  # fmt: skip
        save(make_photo(*small, 1), lr / f"{name}.png")
        save(make_photo(*large, 1), hr / f"{name}.png")
    for folder, other in ((lr, hr), (hr, lr)):
        (folder / f"broken-{folder.name}.png").write_bytes(b"")
        save(make_photo(64, 64, 2), other / f"broken-{folder.name}.png")
    with pytest.raises(DataError) as caught:
        read_pairs(lr, hr, scales=(2,), smallest_side=64)
    message = str(caught.value)
    assert message.startswith("10 pictures cannot be trained on as pairs: ") and "--set" not in message
    for expected in (
        f"{lr / 'lonely-lr.png'} (no partner in {hr})",
        f"{hr / 'lonely-hr.png'} (no partner in {lr})",
        f"{lr / 'a.png'} (a.jpg has the same name)",
        f"{hr / 'x4.png'} (LR 32x32, HR 128x128: not x2)",
        f"{hr / 'uneven.png'} (LR 32x32, HR 66x64: not x2)",
        f"{hr / 'odd.png'} (LR 32x32, HR 65x65: not x2)",
        f"{hr / 'larger.png'} (LR 64x64, HR 32x32: not x2)",
        f"{hr / 'tiny.png'} (120x40 pixels, smaller than 64)",
        f"{lr / 'broken-lr.png'} (not a picture)",
        f"{hr / 'broken-hr.png'} (not a picture)",
    ):
        assert expected in message


def test_another_scale_names_the_cure(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"4 pictures .*: all are x2: use --set model.scales=\[2\]; .*not x4"):
        read_pairs(*folders, scales=(4,), smallest_side=64)
    with pytest.raises(RecipeError, match=r"one scale, the recipe trains \[1, 2, 4\]"):
        read_pairs(*folders, scales=(1, 2, 4), smallest_side=64)


def test_folders_that_share_no_name_are_told(folders: tuple[Path, Path], tmp_path: Path, make_photo: MakePhoto) -> None:
    save(make_photo(32, 32, 0), tmp_path / "else" / "z.png")
    with pytest.raises(DataError, match="5 pictures cannot be trained on"):
        read_pairs(tmp_path / "else", folders[1], scales=(2,), smallest_side=64)
    with pytest.raises(DataError, match="gone: no such folder"):
        read_pairs(tmp_path / "gone", folders[1], scales=(2,), smallest_side=64)


# Writing


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_written_pairs_are_what_a_network_is_trained_on(photo_folder: Path, tmp_path: Path, scale: int) -> None:
    out = tmp_path / "out"
    assert write_pairs(photo_folder, out, config=DegradeConfig(), scale=scale, seed=1) == 6
    found = read_pairs(out / "lr", out / "hr", scales=(scale,), smallest_side=90)
    assert len(found) == 6
    for path, hr, lr in zip(found.paths, found.pictures, found.lr_pictures, strict=True):
        (source,) = (p for p in photo_folder.iterdir() if p.stem == path.stem)
        height, width = (side // scale * scale for side in pixels(source).shape[:2])
        assert np.array_equal(hr, pixels(source)[:height, :width])
        assert np.array_equal(lr, degrade(hr, scale=scale, config=DegradeConfig(), rng=np.random.default_rng()))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_pairs_depend_on_seed_and_name_alone(photo_folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("one", "two", "three", "few")]
    for out, seed in zip(outs, (1, 1, 2, 1)):
        if out.name == "few":
            (photo_folder / "photo0.png").unlink()
        write_pairs(photo_folder, out, config=NOISE, scale=2, seed=seed)
    one, two, three, few = map(contents, outs)
    assert one == two and set(one) == {MARKER, *(f"{part}/photo{i}.png" for part in ("lr", "hr") for i in range(6))}
    assert all((one[name] == three[name]) == name.startswith("hr/") for name in one)
    assert all(one[name] == data for name, data in few.items()) and len(few) == len(one) - 2


def test_an_interrupted_folder_is_completed(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    write_pairs(photo_folder, whole, config=NOISE, scale=2, seed=1)
    replace = os.replace
    for stop_at in (1, 3, 4, 6):
        renamed: list[object] = []

        def interrupt(source: Path, target: Path, stop_at: int = stop_at, renamed: list[object] = renamed) -> None:
            renamed.append(target)
            if len(renamed) == stop_at:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_pairs(photo_folder, out, config=NOISE, scale=2, seed=1)
        # Nothing half-written stays.
        assert contents(out).items() <= contents(whole).items()
    monkeypatch.setattr(os, "replace", replace)
    written = [path.relative_to(out / "lr") for path in (out / "lr").rglob("*.png")]
    whole_pairs = [out / part / path for path in written if (out / "hr" / path).exists() for part in ("lr", "hr")]
    stamps = {path: path.stat().st_mtime_ns for path in whole_pairs}
    assert 0 < len(stamps) < 12
    write_pairs(photo_folder, out, config=NOISE, scale=2, seed=1)
    assert contents(out) == contents(whole)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    degraded: list[object] = []
    monkeypatch.setattr(pairs, "degrade", lambda *a, **k: degraded.append(a))
    assert write_pairs(photo_folder, out, config=NOISE, scale=2, seed=1) == 6 and not degraded


def test_other_peoples_files_are_not_touched(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "hr").mkdir(parents=True)
    (out / "hr" / "photo0.png").write_text("mine")
    before = contents(out)
    with pytest.raises(DataError, match="out: holds other files, which are not overwritten; name a new folder"):
        write_pairs(photo_folder, out, config=NOISE, scale=2, seed=1)
    assert contents(out) == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(DataError, match="file: holds other files"):
        write_pairs(photo_folder, file, config=NOISE, scale=2, seed=1)
    assert file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert write_pairs(photo_folder, tmp_path / "empty", config=NOISE, scale=2, seed=1) == 6


def test_pairs_made_otherwise_are_not_mixed(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_pairs(photo_folder, out, config=NOISE, scale=2, seed=1)
    before = contents(out)
    for options, named in (
        ({"seed": 2}, "seed: 1 before, 2 now"),
        ({"scale": 4}, "scale: 2 before, 4 now"),
        ({"config": DegradeConfig(jpeg_probability=0.5)}, "degrade.noise_probability: 1.0 before, 0.0 now"),
    ):
        with pytest.raises(DataError, match=named):
            write_pairs(photo_folder, out, **({"config": NOISE, "scale": 2, "seed": 1} | options))
    assert contents(out) == before
    (out / MARKER).write_text("{")
    with pytest.raises(DataError, match=r"pairs.json: damaged"):
        write_pairs(photo_folder, out, config=NOISE, scale=2, seed=1)


def test_out_must_not_feed_the_next_run(photo_folder: Path) -> None:
    for out in (photo_folder, photo_folder / "out", photo_folder / ".." / "photos" / "x"):
        with pytest.raises(DataError, match="name a folder elsewhere"):
            write_pairs(photo_folder, out, config=NOISE, scale=2, seed=1)
    assert len(list(photo_folder.iterdir())) == 6


def test_names_that_meet_in_one_file_are_told_first(photo_folder: Path, tmp_path: Path) -> None:
    (photo_folder / "photo0.jpg").write_bytes((photo_folder / "photo1.jpg").read_bytes())
    with pytest.raises(DataError, match=r"photo0.png \(photo0.jpg has the same name\)"):
        write_pairs(photo_folder, tmp_path / "out", config=NOISE, scale=2, seed=1)
    assert not (tmp_path / "out").exists()


def test_what_has_no_pair_is_listed_and_the_others_are_written(
    photo_folder: Path, tmp_path: Path, make_photo: MakePhoto
) -> None:
    (photo_folder / "empty.png").write_bytes(b"")
    save(make_photo(1, 9, 0), photo_folder / "inside" / "line.png")
    with pytest.raises(DataError, match="2 pictures have no pair, remove them: ") as caught:
        write_pairs(photo_folder, tmp_path / "out", config=NOISE, scale=2, seed=1)
    assert "empty.png (not a picture)" in str(caught.value)
    assert "line.png (9x1 pixels, too small for x2)" in str(caught.value)
    assert len(contents(tmp_path / "out")) == 13


def test_a_full_disk_is_told(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image = Image.Image.save

    def fail(image: Image.Image, target: object, *arguments: object, **options: object) -> None:
        if isinstance(target, Path):
            raise OSError(28, "No space left on device")
        save_image(image, target, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(ResourceError, match=r"photo0.png: cannot be written .*No space left"):
        write_pairs(photo_folder, tmp_path / "out", config=NOISE, scale=2, seed=1)
    assert set(contents(tmp_path / "out")) == {MARKER}


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(degrade_command, [str(argument) for argument in arguments])


def test_the_command_takes_damages_and_scale_of_recipe_or_task(photo_folder: Path, tmp_path: Path) -> None:
    for options, scale, damaged in (
        ([], 2, False), (["--scale", 4], 4, False), (["--task", "x4"], 4, False), (["--task", "jpeg"], 1, True),
        (["--task", "real", "--seed", 3], 2, True), (["--recipe", "perceptual-unet", "--task", "x2"], 2, False),
    ):  # fmt: skip
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        result = run(photo_folder, out, *options)
        assert result.exit_code == 0, result.output
        assert f"6 pairs in {out}" in result.output
        found = read_pairs(out / "lr", out / "hr", scales=(scale,), smallest_side=64)
        assert json.loads((out / MARKER).read_text())["seed"] == (3 if "--seed" in options else 1)
        clean = [np.array_equal(lr, reduced(hr, scale)) for lr, hr in zip(found.lr_pictures, found.pictures)]
        assert not any(clean) if damaged else all(clean)


def test_the_command_tells_mistakes_in_one_line(photo_folder: Path, tmp_path: Path) -> None:
    for arguments, expected in (
        ([tmp_path / "gone", tmp_path / "out"], "gone: no such folder"),
        ([photo_folder, tmp_path / "out", "--task", "jpg"], "did you mean 'jpeg'?"),
        ([photo_folder, tmp_path / "out", "--recipe", "fst"], "unknown recipe 'fst'"),
        ([photo_folder, photo_folder], "name a folder elsewhere"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and "Traceback" not in result.output
        assert expected in result.output.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_half_a_pair_is_made_anew_as_a_whole(tmp_path: Path, make_photo: MakePhoto) -> None:
    """The picture may have been replaced in between: an LR picture beside another HR picture is no pair."""
    for number in range(2):
        save(make_photo(64, 64, number), tmp_path / "hr" / f"{number}.png")
    config = DegradeConfig()
    write_pairs(tmp_path / "hr", tmp_path / "out", config=config, scale=2, seed=1)
    save(make_photo(64, 64, 9), tmp_path / "hr" / "0.png")
    (tmp_path / "out" / "lr" / "0.png").unlink()
    (tmp_path / "out" / "hr" / "1.png").write_bytes(b"")
    write_pairs(tmp_path / "hr", tmp_path / "out", config=config, scale=2, seed=1)
    for number, seed in enumerate((9, 1)):
        hr = make_photo(64, 64, seed)
        assert np.array_equal(pixels(tmp_path / "out" / "hr" / f"{number}.png"), hr)
        assert np.array_equal(pixels(tmp_path / "out" / "lr" / f"{number}.png"), reduced(hr, 2))
