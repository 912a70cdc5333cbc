"""Photographs to samples: seeded damage, exact margins, a data folder that is checked first."""

from __future__ import annotations

import hashlib
import io
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import (
    CropPairs,
    PairedPhotographs,
    Photographs,
    random_pair,
    read_photographs,
    split_validation,
)
from train.degrade import degrade
from train.errors import DataError
from train.loading import Steps, batches
from train.pictures import find_pictures, perceptual_hash
from train.recipe import DegradeConfig, StageConfig

MakePhoto = Callable[..., np.ndarray]
CLEAN = DegradeConfig()
DAMAGES = {
    "jpeg": DegradeConfig(jpeg_probability=1.0),
    "noise": DegradeConfig(noise_probability=1.0),
    "holes": DegradeConfig(holes_probability=1.0),
    "text": DegradeConfig(text_probability=1.0),
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_degrade_reduces_with_the_named_filter(scale: int, resize: str, make_photo: MakePhoto) -> None:
    hr = make_photo(64, 96, 0)
    before = hr.copy()
    lr = degrade(hr, scale=scale, config=DegradeConfig(resize=resize), rng=rng())
    assert lr.shape == (64 // scale, 96 // scale, 3) and lr.dtype == np.uint8
    method = Image.Resampling.BICUBIC if resize == "bicubic" else Image.Resampling.BILINEAR
    assert np.array_equal(lr, np.asarray(Image.fromarray(hr).resize((96 // scale, 64 // scale), method)))
    assert np.array_equal(hr, before)


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_changes_the_picture_and_is_seeded(name: str, make_photo: MakePhoto) -> None:
    hr = make_photo(96, 96, 1)
    clean = degrade(hr, scale=2, config=CLEAN, rng=rng())
    damaged = degrade(hr, scale=2, config=DAMAGES[name], rng=rng(1))
    assert damaged.shape == clean.shape and damaged.dtype == np.uint8
    assert not np.array_equal(damaged, clean)
    assert np.array_equal(damaged, degrade(hr, scale=2, config=DAMAGES[name], rng=rng(1)))
    assert not np.array_equal(damaged, degrade(hr, scale=2, config=DAMAGES[name], rng=rng(2)))


def test_jpeg_quality_is_the_given_one(make_photo: MakePhoto) -> None:
    hr = make_photo(96, 96, 1)
    errors = []
    for quality in (10, 40, 90):
        config = DegradeConfig(jpeg_probability=1.0, jpeg_quality=(quality, quality))
        errors.append(np.abs(degrade(hr, scale=1, config=config, rng=rng()).astype(int) - hr).mean())
    assert errors[0] > errors[1] > errors[2] > 0


def test_damages_come_with_their_probability(make_photo: MakePhoto) -> None:
    hr = make_photo(32, 32, 1)
    generator = rng(3)
    config = DegradeConfig(noise_probability=0.25)
    changed = sum(not np.array_equal(degrade(hr, scale=1, config=config, rng=generator), hr) for _ in range(400))
    assert 70 <= changed <= 130  # 100 +- 3.5 standard deviations


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_a_crop_is_reduced_as_in_the_whole_picture(scale: int, resize: str, make_photo: MakePhoto) -> None:
    picture = make_photo(160, 192, 2)
    config = DegradeConfig(resize=resize)
    whole = degrade(picture, scale=scale, config=config, rng=rng())
    # The picture's own corners too: there the margin ends where the picture does.
    seen = set()
    for seed in range(200):
        lr, hr = random_pair(picture, size=64, scale=scale, config=config, rng=rng(seed))
        generator = rng(seed)
        top, left = int(generator.integers(0, 160 - 64 + 1)), int(generator.integers(0, 192 - 64 + 1))
        if top % scale or left % scale:
            continue
        turns, flip = int(generator.integers(0, 4)), bool(generator.integers(0, 2))
        expected_hr = picture[top : top + 64, left : left + 64]
        expected_lr = whole[top // scale : (top + 64) // scale, left // scale : (left + 64) // scale]
        if flip:
            expected_lr, expected_hr = expected_lr[:, ::-1], expected_hr[:, ::-1]
        assert np.array_equal(hr, np.rot90(expected_hr, turns))
        assert np.array_equal(lr, np.rot90(expected_lr, turns))
        seen.add((turns, flip))
    assert len(seen) >= 6


def test_a_crop_may_be_the_whole_picture(make_photo: MakePhoto) -> None:
    lr, hr = random_pair(make_photo(64, 64, 0), size=64, scale=2, config=CLEAN, rng=rng())
    assert lr.shape == (32, 32, 3) and hr.shape == (64, 64, 3)


def photographs(make_photo: MakePhoto, count: int, *, side: int = 48) -> Photographs:
    pictures = tuple(make_photo(side, side + 8, seed) for seed in range(count))
    return Photographs(tuple(Path(f"{index}.png") for index in range(count)), pictures)


def crop_pairs(make_photo: MakePhoto, *, scales: tuple[int, ...] = (2,)) -> CropPairs:
    config = DegradeConfig(noise_probability=0.5, jpeg_probability=0.5)
    stage = StageConfig(size=32, batch=2)
    return CropPairs(photographs(make_photo, 5), stage=stage, config=config, scales=scales, entropy=(1, 0, 0))


def test_samples_depend_on_the_index_alone(make_photo: MakePhoto) -> None:
    dataset = crop_pairs(make_photo)
    first = [dataset[index] for index in range(8)]
    again = [dataset[index] for index in reversed(range(8))][::-1]
    for (lr, hr), (lr2, hr2) in zip(first, again, strict=True):
        assert torch.equal(lr, lr2) and torch.equal(hr, hr2)
        assert lr.shape == (3, 16, 16) and hr.shape == (3, 32, 32)
        assert lr.dtype == torch.float32 and float(hr.min()) >= 0 and float(hr.max()) <= 1
    assert not torch.equal(first[0][1], first[5][1])


def test_every_photograph_is_seen_once_in_an_epoch(make_photo: MakePhoto) -> None:
    pictures = tuple(np.full((32, 32, 3), 40 * index, np.uint8) for index in range(5))
    dataset = crop_pairs(make_photo)
    dataset.photographs = Photographs(dataset.photographs.paths, pictures)
    for epoch in range(3):
        seen = [round(float(dataset[5 * epoch + place][1].mean()) * 255 / 40) for place in range(5)]
        assert sorted(seen) == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 2])
def test_samples_do_not_depend_on_workers(workers: int, make_photo: MakePhoto) -> None:
    dataset = crop_pairs(make_photo)
    alone = list(batches(dataset, Steps(0, 5, batch=2), workers=0))
    shared = list(batches(dataset, Steps(0, 5, batch=2), workers=workers))
    resumed = list(batches(dataset, Steps(3, 5, batch=2), workers=workers))
    assert len(alone) == len(shared) == 5
    for (lr, hr), (lr2, hr2) in zip([*alone, *alone[3:]], [*shared, *resumed], strict=True):
        assert torch.equal(lr, lr2) and torch.equal(hr, hr2)


def test_a_batch_has_one_scale(make_photo: MakePhoto) -> None:
    dataset = crop_pairs(make_photo, scales=(1, 2, 4))
    sizes = {lr.shape[-1] for lr, _ in batches(dataset, Steps(0, 12, batch=2), workers=0)}
    assert sizes == {8, 16, 32}


def test_validation_pictures_are_apart_and_do_not_depend_on_order(make_photo: MakePhoto) -> None:
    everything = photographs(make_photo, 20, side=16)
    train, validation = split_validation(everything, 3)
    assert len(validation) == 3 and len(train) == 17
    assert not set(train.paths) & set(validation.paths)
    backwards = Photographs(everything.paths, everything.pictures[::-1])
    _, other = split_validation(backwards, 3)
    assert {picture.tobytes() for picture in other.pictures} == {p.tobytes() for p in validation.pictures}


def test_equal_pictures_fall_on_one_side_and_leave_some_to_train(make_photo: MakePhoto) -> None:
    picture = make_photo(16, 16, 0)
    copies = Photographs(tuple(Path(f"{index}.png") for index in range(10)), (picture,) * 10)
    train, validation = split_validation(copies, 2)
    assert (len(train), len(validation)) == (10, 0)


def test_validation_takes_a_fifth_at_most(make_photo: MakePhoto) -> None:
    assert len(split_validation(photographs(make_photo, 6, side=16), 16)[1]) == 1
    assert len(split_validation(photographs(make_photo, 4, side=16), 16)[1]) == 0


def test_pictures_are_read_from_subfolders_as_rgb(photo_folder: Path) -> None:
    (photo_folder / "more").mkdir()
    Image.new("L", (100, 100), 7).save(photo_folder / "more" / "grey.png")
    Image.new("RGBA", (100, 100), (1, 2, 3, 4)).save(photo_folder / "more" / "alpha.png")
    (photo_folder / "notes.txt").write_text("not a picture, and not named like one")
    (photo_folder / "folder.png").mkdir()
    calls: list[tuple[int, int]] = []
    found = read_photographs(photo_folder, smallest_side=96, progress=lambda *call: calls.append(call))
    assert len(found) == 8 and all(p.shape[2] == 3 and p.dtype == np.uint8 for p in found.pictures)
    assert calls == [(index + 1, 8) for index in range(8)]
    assert found.fingerprint() == read_photographs(photo_folder, smallest_side=96).fingerprint()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (120, 100)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_photographs(tmp_path, smallest_side=16).pictures[0].shape == (120, 100, 3)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such folder; give a folder of photographs"):
        find_pictures(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no pictures found \(.*\.jpg"):
        find_pictures(tmp_path)


def test_every_unreadable_picture_is_listed(photo_folder: Path) -> None:
    (photo_folder / "empty.png").write_bytes(b"")
    (photo_folder / "text.jpg").write_text("hello")
    whole = (photo_folder / "photo0.png").read_bytes()
    (photo_folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((100, 100), np.uint16)).save(photo_folder / "deep.png")
    with pytest.raises(DataError, match=r"4 unreadable pictures, remove them: .*") as caught:
        read_photographs(photo_folder, smallest_side=16)
    for name in ("empty.png (not a picture)", "text.jpg (not a picture)", "truncated.png (", "deep.png (I;16 pixels"):
        assert name in str(caught.value)


def test_a_decompression_bomb_is_listed(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (400, 400)).save(photo_folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(DataError, match=r"1 unreadable pictures, remove them: bomb.png \(.*decompression bomb"):
        read_photographs(photo_folder, smallest_side=16)


def test_small_pictures_are_left_out(photo_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read_photographs(photo_folder, smallest_side=112)) == 1
    assert "left out" in caplog.text
    with pytest.raises(DataError, match="every picture is smaller than 500 pixels, the largest training size"):
        read_photographs(photo_folder, smallest_side=500)


def test_the_fingerprint_is_of_pixels_and_order(make_photo: MakePhoto) -> None:
    some = photographs(make_photo, 3)
    other = some.pictures[0].copy()
    other[5, 7, 1] ^= 1
    assert some.fingerprint() == replace(some, paths=(Path("x"), *some.paths[1:])).fingerprint()
    assert some.fingerprint() == some.take([0, 1, 2]).fingerprint()
    different = [
        replace(some, pictures=(other, *some.pictures[1:])),
        replace(some, pictures=some.pictures[::-1]),
        replace(some, pictures=(some.pictures[0].reshape(56, 48, 3), *some.pictures[1:])),
        some.take([0, 1]),
        PairedPhotographs(some.paths, some.pictures, lr_pictures=some.pictures),
    ]
    assert len({each.fingerprint() for each in (some, *different)}) == 1 + len(different)


def test_pixels_are_hashed_once(make_photo: MakePhoto, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("train.data.pixel_digest", lambda picture: calls.append(1) or str(picture.sum()))
    some = photographs(make_photo, 10)
    split_validation(some, 2), some.fingerprint(), some.fingerprint(), split_validation(some, 2)
    assert len(calls) == 10


def split_before(everything: Photographs, count: int) -> tuple[list[int], list[int]]:
    """Split by equal pixels alone, as it was done before near-duplicates were looked for."""
    room = min(count, len(everything) // 5)
    digests = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in everything.pictures]
    held_out = set()
    for digest, copies in sorted(Counter(digests).items()):
        if copies <= room:
            held_out.add(digest)
            room -= copies
    sides: tuple[list[int], list[int]] = ([], [])
    for index, digest in enumerate(digests):
        sides[digest in held_out].append(index)
    return sides


@pytest.mark.parametrize("count", [0, 1, 3, 7, 16])
def test_a_split_without_near_duplicates_is_the_former_one(count: int, make_photo: MakePhoto) -> None:
    several = photographs(make_photo, 40)
    repeated = several.take([*range(40), 3, 3, 9, 17, 3])
    for everything in (several, repeated):
        train, validation = split_validation(everything, count)
        before = split_before(everything, count)
        assert [list(train.paths), list(validation.paths)] == [list(everything.take(s).paths) for s in before]


def test_near_duplicates_fall_on_one_side(make_photo: MakePhoto) -> None:
    originals = [make_photo(120, 160, seed) for seed in range(15)]
    everything: list[np.ndarray] = []
    for picture in originals:
        image = Image.fromarray(picture)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60)
        small = image.resize((120, 90), Image.Resampling.BICUBIC)
        everything += [picture, np.asarray(Image.open(buffer)), np.asarray(small)]
    paths = tuple(Path(f"{index}.png") for index in range(len(everything)))
    train, validation = split_validation(Photographs(paths, tuple(everything)), 9)
    sides = [{int(path.stem) // 3 for path in side.paths} for side in (train, validation)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 15
    assert len(validation) == 9  # three families of three


def test_a_chain_of_likenesses_stays_together(make_photo: MakePhoto, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each differs from the one before in 6 bits, the ends in 24: only the chain joins them.
    hashes = [0, 0b111111, 0b111111 << 6 | 0b111111, (1 << 18) - 1, (1 << 24) - 1]
    far = [int(value) for value in np.random.default_rng(0).integers(0, 1 << 63, 20)]
    some = photographs(make_photo, 25)
    by_pixels = dict(zip([picture.tobytes() for picture in some.pictures], [*hashes, *far]))
    monkeypatch.setattr("train.data.perceptual_hash", lambda picture: by_pixels[picture.tobytes()])
    for count in range(1, 6):
        train, validation = split_validation(some, count)
        assert len({path in train.paths for path in some.paths[:5]}) == 1
        assert len(train) + len(validation) == 25


def test_perceptual_hashes_survive_what_copies_go_through(make_photo: MakePhoto) -> None:
    for seed in range(10):
        picture = make_photo(200, 260, seed)
        reduced = np.asarray(Image.fromarray(picture).resize((130, 100), Image.Resampling.BICUBIC))
        darker = (picture * 0.9).astype(np.uint8)
        for copy in (reduced, darker):
            assert (perceptual_hash(picture) ^ perceptual_hash(copy)).bit_count() <= 8
        assert (perceptual_hash(picture) ^ perceptual_hash(make_photo(200, 260, seed + 10))).bit_count() > 8


# Pairs whose LR pictures are given


def paired(make_photo: MakePhoto, count: int, *, scale: int) -> PairedPhotographs:
    hr = tuple(make_photo(24 * scale, 32 * scale, seed) for seed in range(count))
    lr = tuple(np.asarray(Image.fromarray(p).resize((32, 24), Image.Resampling.BICUBIC)) for p in hr)
    return PairedPhotographs(tuple(Path(f"{index}.png") for index in range(count)), hr, lr_pictures=lr)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_paired_crops_are_of_one_place(scale: int, make_photo: MakePhoto) -> None:
    pairs = paired(make_photo, 1, scale=scale)
    border = 3  # LR pixels that the reduction's filter reaches beyond a crop
    size = 16 * scale
    places = set()
    for seed in range(60):
        lr, hr = pairs.cut(0, size=size, scale=scale, config=CLEAN, rng=rng(seed))
        assert lr.shape == (16, 16, 3) and hr.shape == (size, size, 3)
        generator = rng(seed)
        top, left = int(generator.integers(0, 9)), int(generator.integers(0, 17))
        turns, flip = int(generator.integers(0, 4)), bool(generator.integers(0, 2))
        lr, hr = (np.rot90(image, -turns) for image in (lr, hr))
        lr, hr = (image[:, ::-1] if flip else image for image in (lr, hr))
        for image, whole, factor in ((lr, pairs.lr_pictures[0], 1), (hr, pairs.pictures[0], scale)):
            cut = whole[top * factor : (top + 16) * factor, left * factor : (left + 16) * factor]
            assert np.array_equal(image, cut)
        reduced = np.asarray(Image.fromarray(hr).resize((16, 16), Image.Resampling.BICUBIC))
        assert np.array_equal(lr[border:-border, border:-border], reduced[border:-border, border:-border])
        places.add((top, left))
    assert {0, 8} <= {top for top, _ in places} and len(places) > 40


def test_a_paired_crop_may_be_the_whole_picture(make_photo: MakePhoto) -> None:
    hr = make_photo(64, 64, 0)
    pair = PairedPhotographs((Path("a.png"),), (hr,), lr_pictures=(hr[::2, ::2],))
    lr, cut = pair.cut(0, size=64, scale=2, config=CLEAN, rng=rng())
    assert lr.shape == (32, 32, 3) and sorted(cut.ravel()) == sorted(hr.ravel())


def test_pairs_are_samples_like_others(make_photo: MakePhoto) -> None:
    dataset = CropPairs(
        paired(make_photo, 5, scale=2), stage=StageConfig(size=32, batch=2), config=DAMAGES["noise"], scales=(2,),
        entropy=(1, 0, 0),
    )  # fmt: skip
    first = [dataset[index] for index in range(8)]
    for index in reversed(range(8)):
        assert all(torch.equal(a, b) for a, b in zip(first[index], dataset[index]))
    lr, hr = first[0]
    assert lr.shape == (3, 16, 16) and hr.shape == (3, 32, 32) and lr.dtype == hr.dtype == torch.float32
    reduced = torch.nn.functional.avg_pool2d(hr, 2)
    assert float((lr - reduced)[:, 3:-3, 3:-3].abs().max()) < 0.2  # given as it is: the noise of `config` is not added
    shared = list(batches(dataset, Steps(0, 4, batch=2), workers=1))
    for step, (lrs, hrs) in enumerate(shared):
        assert all(torch.equal(lrs[place], first[2 * step + place][0]) for place in range(2))
        assert all(torch.equal(hrs[place], first[2 * step + place][1]) for place in range(2))


def test_a_split_keeps_pairs_together(make_photo: MakePhoto) -> None:
    pairs = paired(make_photo, 20, scale=2)
    train, validation = split_validation(pairs, 3)
    assert isinstance(train, PairedPhotographs) and len(validation) == 3
    assert [path.name for path in validation.paths] == [
        path.name for path in split_validation(Photographs(pairs.paths, pairs.pictures), 3)[1].paths
    ]
    for side in (train, validation):
        for path, hr, lr in zip(side.paths, side.pictures, side.lr_pictures, strict=True):
            assert hr is pairs.pictures[int(path.stem)] and lr is pairs.lr_pictures[int(path.stem)]
    changed = replace(pairs, lr_pictures=pairs.lr_pictures[::-1])
    assert changed.fingerprint() != pairs.fingerprint() == pairs.take(range(20)).fingerprint()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_worker_outlives_one_sigterm_and_not_two() -> None:
    """The first comes to the whole process group, the second from a parent that is about to leave."""
    program = (
        "import os, signal\n"
        "from train.loading import _leave_signals_to_the_parent\n"
        "_leave_signals_to_the_parent(0)\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):\n"
        "    os.kill(os.getpid(), number)\n"
        "print('alive', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still alive', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert (result.stdout, result.returncode) == ("alive\n", -signal.SIGTERM)


def test_photographs_that_are_not_taken_are_told(photo_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photo_folder / "notes.txt").write_text("")
    assert len(find_pictures(photo_folder, tells_others=True)) == 6 and not caplog.records
    (photo_folder / "a.HEIC").write_bytes(b"")
    (photo_folder / "b.avif").write_bytes(b"")
    assert len(find_pictures(photo_folder)) == 6 and not caplog.records
    assert len(find_pictures(photo_folder, tells_others=True)) == 6
    assert "photos: 2 files are not taken (.avif, .heic)" in caplog.text
