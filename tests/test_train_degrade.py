"""Damages: each does what its name says, samples of before stay what they were, and masks tell where."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter, features

from train.data import random_pair
from train.degrade import ROUND_FACTORS, degrade, degrade_with_mask
from train.recipe import DegradeConfig

MakePhoto = Callable[..., np.ndarray]
ALL = DegradeConfig(jpeg_probability=0.5, noise_probability=0.5, holes_probability=0.5, text_probability=0.5)
# Of the samples that were made before blur, grey, rounds and crop_scale existed: SHA-256 of their pixels, and of the
# generators' states after them.
FORMER = {
    "clean": ("7bca5750f8aa6ab4", "0e0109867bd09fe4"),
    "bilinear": ("f4b22589c688ca6b", "0e0109867bd09fe4"),
    "noise": ("1813bb15fba61ee7", "c73ba3cde12c2f09"),
    "holes": ("a3b1b4b8fd027cd9", "56f06e974a2b81d1"),
    "jpeg": ("c80ca72eaa3542a1", "7a3aef6b39993d78"),
    "text": ("e83f6c30ac8e09d1", "4756b8e21177dfeb"),
    "all": ("18e3d9028a0e1598", "15cbc34b58b2ad77"),
}
# What else decides the pixels: the libraries that the hashes were made with.
LIBRARIES = {"libjpeg_turbo": "3.2.0", "freetype2": "2.14.3"}
NEEDS = {"jpeg": {"libjpeg_turbo"}, "text": {"freetype2"}, "all": set(LIBRARIES)}


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


def plain_picture(seed: int) -> np.ndarray:
    """Soft light and texture, made by numpy alone: (96, 128, 3) uint8."""
    generator = rng(seed)
    y, x = np.mgrid[0:96, 0:128]
    light = 128 + 90 * np.sin(x[:, :, None] / generator.uniform(5, 30, 3) + y[:, :, None] / generator.uniform(5, 30, 3))
    return np.clip(np.rint(light + generator.normal(0, 6, (96, 128, 3))), 0, 255).astype(np.uint8)


def hash_samples(config: DegradeConfig) -> tuple[str, str]:
    """Hash what is made of six pictures at each scale, and where the random numbers stand after it."""
    pixels, states = hashlib.sha256(), hashlib.sha256()
    for scale in (1, 2, 4):
        for seed in range(6):
            picture, generator = plain_picture(seed), rng(seed, scale)
            for image in random_pair(picture, size=64, scale=scale, config=config, rng=generator):
                pixels.update(image.tobytes())
            pixels.update(degrade(picture, scale=scale, config=config, rng=generator).tobytes())
            states.update(generator.bytes(16))
    return pixels.hexdigest()[:16], states.hexdigest()[:16]


CONFIGS = {
    "clean": DegradeConfig(),
    "bilinear": DegradeConfig(resize="bilinear"),
    "noise": DegradeConfig(noise_probability=0.7),
    "holes": DegradeConfig(holes_probability=1.0),
    "jpeg": DegradeConfig(jpeg_probability=0.7),
    "text": DegradeConfig(text_probability=1.0),
    "all": ALL,
}


@pytest.mark.parametrize("name", FORMER)
def test_former_samples_draw_the_same_numbers(name: str) -> None:
    assert hash_samples(CONFIGS[name])[1] == FORMER[name][1]


@pytest.mark.parametrize("name", FORMER)
def test_former_samples_have_the_same_pixels(name: str) -> None:
    for library in NEEDS.get(name, ()):
        if features.version(library) != LIBRARIES[library]:
            pytest.skip(f"the hash is of {library} {LIBRARIES[library]}, here is {features.version(library)}")
    assert hash_samples(CONFIGS[name])[0] == FORMER[name][0]


@pytest.mark.parametrize("changes", [{"blur_sigma": (1.0, 9.0)}, {"rounds": 1}, {"crop_scale": (1.0, 1.0)}])
def test_what_is_switched_off_changes_nothing(changes: dict[str, object]) -> None:
    assert hash_samples(replace(ALL, **changes)) == hash_samples(ALL)


NEW = {
    "blur": DegradeConfig(blur_probability=1.0),
    "grey": DegradeConfig(grey_probability=1.0),
    "rounds": DegradeConfig(rounds=2),
    "real": DegradeConfig(rounds=2, blur_probability=0.8, noise_probability=0.8, jpeg_probability=0.9),
}


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("name", NEW)
def test_new_damages_change_the_picture_and_are_seeded(name: str, scale: int) -> None:
    hr = plain_picture(1)
    before = hr.copy()
    damaged = degrade(hr, scale=scale, config=NEW[name], rng=rng(1))
    assert damaged.shape == (96 // scale, 128 // scale, 3) and damaged.dtype == np.uint8
    assert not np.array_equal(damaged, degrade(hr, scale=scale, config=DegradeConfig(), rng=rng(1)))
    assert np.array_equal(damaged, degrade(hr, scale=scale, config=NEW[name], rng=rng(1)))
    assert np.array_equal(hr, before)
    if name != "grey":
        assert not np.array_equal(damaged, degrade(hr, scale=scale, config=NEW[name], rng=rng(2)))


@pytest.mark.parametrize("seed", range(25))
def test_any_damages_together_keep_size_type_and_determinism(seed: int) -> None:
    generator = rng(seed)
    shares = {f"{name}_probability": generator.uniform() for name in ("blur", "grey", "jpeg", "noise", "holes", "text")}
    config = DegradeConfig(rounds=int(generator.integers(1, 3)), **shares)
    scale = int(generator.choice([1, 2, 3, 4, 8]))
    height, width = (int(side) * scale for side in generator.integers(1, 24, 2))
    hr = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    lr, mask = degrade_with_mask(hr, scale=scale, config=config, rng=rng(seed, 1))
    assert lr.shape == (height // scale, width // scale, 3) and lr.dtype == np.uint8
    assert mask.shape == lr.shape[:2] and mask.dtype == bool
    assert np.array_equal(lr, degrade(hr, scale=scale, config=config, rng=rng(seed, 1)))
    lr[:] = 0  # a new array that may be written


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_blur_has_the_given_sigma_and_comes_before_the_reduction(sigma: float) -> None:
    config = DegradeConfig(blur_probability=1.0, blur_sigma=(sigma, sigma))
    edge = np.zeros((8, 64, 3), np.uint8)
    edge[:, 32:] = 255
    spread = np.diff(degrade(edge, scale=1, config=config, rng=rng())[4, :, 0].astype(float)) / 255
    places = np.arange(63) - 31
    measured = np.sqrt((spread * places**2).sum() - (spread * places).sum() ** 2)
    assert measured == pytest.approx(sigma, rel=0.03)  # Pillow's Gaussian is three boxes, on 8 bits
    hr = plain_picture(2)
    blurred = Image.fromarray(hr).filter(ImageFilter.GaussianBlur(sigma))
    expected = np.asarray(blurred.resize((64, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(degrade(hr, scale=2, config=config, rng=rng()), expected)


def test_grey_is_the_luma_whatever_else_there_is() -> None:
    hr = plain_picture(3)
    grey = degrade(hr, scale=1, config=NEW["grey"], rng=rng())
    luma = hr @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey - luma[:, :, None]).max() <= 0.51 and np.ptp(grey, axis=2).max() == 0
    for seed in range(8):
        config = replace(ALL, grey_probability=1.0, jpeg_probability=1.0, noise_probability=1.0, rounds=1 + seed % 2)
        assert np.ptp(degrade(hr, scale=2, config=config, rng=rng(seed)), axis=2).max() == 0


def test_the_first_round_goes_through_another_size() -> None:
    noise = rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    left = [degrade(noise, scale=1, config=NEW["rounds"], rng=rng(seed)).std() for seed in range(40)]
    # A quarter of the size leaves little of white noise; one and a half times leaves most of it.
    assert min(left) < 0.3 * noise.std() and max(left) > 0.7 * noise.std()
    assert ROUND_FACTORS == (0.25, 1.5)


def test_a_second_round_saves_as_jpeg_twice() -> None:
    hr = plain_picture(1)
    once, twice = (
        DegradeConfig(jpeg_probability=1.0, jpeg_quality=(20, 20), rounds=rounds) for rounds in (1, 2)
    )  # fmt: skip
    errors = [
        np.mean([np.abs(degrade(hr, scale=1, config=c, rng=rng(s)).astype(int) - hr).mean() for s in range(8)])
        for c in (once, twice)
    ]
    assert errors[1] > errors[0]


# Where the damage is


def flat(value: int) -> np.ndarray:
    return np.full((96, 128, 3), value, np.uint8)


@pytest.mark.parametrize("seed", range(10))
def test_the_mask_of_holes_is_where_nothing_of_the_picture_is_left(seed: int) -> None:
    config = DegradeConfig(holes_probability=1.0)
    black, mask = degrade_with_mask(flat(0), scale=1, config=config, rng=rng(seed))
    white = degrade(flat(255), scale=1, config=config, rng=rng(seed))
    assert mask.any() and np.array_equal(mask, (black == white).all(axis=2))


@pytest.mark.parametrize("seed", range(10))
def test_the_mask_of_text_is_where_the_picture_is_changed(seed: int) -> None:
    config = DegradeConfig(text_probability=1.0)
    changed = np.zeros((96, 128), bool)
    for value in (0, 255):
        damaged, mask = degrade_with_mask(flat(value), scale=1, config=config, rng=rng(seed))
        changed |= (damaged != value).any(axis=2)
    assert not (changed & ~mask).any()
    assert (mask & ~changed).sum() <= 0.02 * mask.sum()  # the faintest rims of letters are rounded away


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_away_from_the_mask_the_picture_is_the_clean_one(scale: int, resize: str) -> None:
    hr = plain_picture(5)
    clean = degrade(hr, scale=scale, config=DegradeConfig(resize=resize), rng=rng())
    config = DegradeConfig(resize=resize, holes_probability=0.8, text_probability=0.8)
    for seed in range(12):
        damaged, mask = degrade_with_mask(hr, scale=scale, config=config, rng=rng(seed))
        reach = 0 if scale == 1 else 2  # LR pixels that the filter spreads a pixel over
        near = np.zeros_like(mask)
        for down, right in np.ndindex(2 * reach + 1, 2 * reach + 1):
            padded = np.pad(mask, reach)
            near |= padded[down : down + mask.shape[0], right : right + mask.shape[1]]
        assert np.array_equal(damaged[~near], clean[~near])
        # Every block that holds a covered pixel is marked: the mask of the original size, reduced.
        full = degrade_with_mask(hr, scale=1, config=config, rng=rng(seed))[1]
        assert np.array_equal(mask, full.reshape(96 // scale, scale, 128 // scale, scale).max(axis=(1, 3)))


def test_the_mask_knows_holes_and_text_alone() -> None:
    config = DegradeConfig(jpeg_probability=1.0, noise_probability=1.0, blur_probability=1.0, grey_probability=1.0)
    assert not degrade_with_mask(flat(9), scale=2, config=config, rng=rng())[1].any()


# Sizes of photographs


@pytest.mark.parametrize("seed", range(30))
def test_a_crop_is_that_of_the_reduced_photograph(seed: int) -> None:
    picture = plain_picture(seed)
    factors = (0.55, 1.0)
    lr, hr = random_pair(picture, size=48, scale=2, config=DegradeConfig(crop_scale=factors), rng=rng(seed))
    assert hr.shape == (48, 48, 3) and lr.shape == (24, 24, 3)
    generator = rng(seed)
    factor = generator.uniform(*factors)
    height, width = round(96 * factor), round(128 * factor)
    top, left = int(generator.integers(0, height - 47)), int(generator.integers(0, width - 47))
    turns, flip = int(generator.integers(0, 4)), bool(generator.integers(0, 2))
    lr, hr = (np.rot90(image, -turns) for image in (lr, hr))
    lr, hr = (image[:, ::-1] if flip else image for image in (lr, hr))
    whole = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    # A part is resized with the same filter; its position in single precision may round a pixel the other way.
    assert np.abs(hr.astype(int) - whole[top : top + 48, left : left + 48]).max() <= 1
    reduced = np.asarray(Image.fromarray(hr).resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(lr[4:-4, 4:-4], reduced[4:-4, 4:-4])


def test_crops_of_reductions_lie_where_they_were_drawn_for_any_shape() -> None:
    for seed in range(400):
        generator = rng(seed, 7)
        size, scale = 4 * int(generator.integers(1, 13)), int(generator.choice([1, 2, 4]))
        height, width = (size + int(side) for side in generator.integers(0, 150, 2))
        # Noise of little contrast: Pillow cuts off what leaves 8 bits between its two passes, and their order depends
        # on the shape. Without that, two roundings are all that may differ.
        picture = generator.integers(90, 166, (height, width, 3), dtype=np.uint8)
        factors = tuple(sorted(generator.uniform(0.02, 1, 2)))
        config = DegradeConfig(crop_scale=factors)
        lr, hr = random_pair(picture, size=size, scale=scale, config=config, rng=rng(seed))
        assert hr.shape == (size, size, 3) and lr.shape == (size // scale, size // scale, 3)
        again = rng(seed)
        factor = max(again.uniform(*factors), size / min(height, width))
        height, width = max(size, round(height * factor)), max(size, round(width * factor))
        top, left = int(again.integers(0, height - size + 1)), int(again.integers(0, width - size + 1))
        turns, flip = int(again.integers(0, 4)), bool(again.integers(0, 2))
        whole = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
        cut = whole[top : top + size, left : left + size]
        cut = np.rot90(cut[:, ::-1] if flip else cut, turns)
        assert np.abs(hr.astype(int) - cut).max() <= 2, seed


@pytest.mark.parametrize("shape", [(48, 48), (48, 90), (50, 49), (60, 200)])
def test_a_small_photograph_is_reduced_as_far_as_a_crop_still_fits(shape: tuple[int, int]) -> None:
    picture = rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    config = DegradeConfig(crop_scale=(0.01, 0.02))
    for seed in range(5):
        lr, hr = random_pair(picture, size=48, scale=1, config=config, rng=rng(seed))
        assert hr.shape == lr.shape == (48, 48, 3)
        if min(shape) == 48:  # nothing fits but the picture as it is
            turned = {np.rot90(p, k).tobytes() for p in (picture[:, :48], picture[:, :48][:, ::-1]) for k in range(4)}
            assert shape != (48, 48) or hr.tobytes() in turned


@pytest.mark.parametrize("scale", [1, 2])
def test_a_crop_is_blurred_as_in_the_whole_picture(scale: int) -> None:
    picture = np.concatenate([plain_picture(0), plain_picture(1)])  # (192, 128, 3)
    config = DegradeConfig(blur_probability=1.0, blur_sigma=(3.0, 3.0))
    whole = degrade(picture, scale=scale, config=config, rng=rng())
    checked = 0
    for seed in range(100):
        lr, _ = random_pair(picture, size=48, scale=scale, config=config, rng=rng(seed))
        generator = rng(seed)
        top, left = int(generator.integers(0, 192 - 47)), int(generator.integers(0, 128 - 47))
        if top % scale or left % scale:
            continue
        generator.random(), generator.uniform()  # whether there is a blur, and its sigma
        turns, flip = int(generator.integers(0, 4)), bool(generator.integers(0, 2))
        expected = whole[top // scale : (top + 48) // scale, left // scale : (left + 48) // scale]
        assert np.array_equal(lr, np.rot90(expected[:, ::-1] if flip else expected, turns))
        checked += 1
    assert checked >= 8
