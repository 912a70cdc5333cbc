"""Samples made on a device: the pixels that Pillow makes of the same draws, whatever the batch and the process."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, features

from train import device_data
from train.data import CropPairs, PairedPhotographs, Photographs, apply_cut, draw_cut
from train.degrade import ROUND_FILTERS, SeededNoise
from train.device_data import StoredPhotographs, device_batches, store
from train.device_degrade import Canvas, blur, resize
from train.device_jpeg import compress
from train.loading import Steps
from train.loop import Settings, Trainer
from train.recipe import DegradeConfig, StageConfig, recipe_from_dict

MakePhoto = Callable[..., np.ndarray]
CPU = torch.device("cpu")
STAGE = StageConfig(size=48, batch=4)
ALWAYS = {
    "clean": DegradeConfig(),
    "bilinear": DegradeConfig(resize="bilinear"),
    "crop_scale": DegradeConfig(crop_scale=(0.5, 1.0)),
    "blur": DegradeConfig(blur_probability=1.0, blur_sigma=(0.2, 4.0)),
    "noise": DegradeConfig(noise_probability=1.0),
    "grey": DegradeConfig(grey_probability=1.0),
    "jpeg": DegradeConfig(jpeg_probability=1.0, jpeg_quality=(1, 100)),
    "holes": DegradeConfig(holes_probability=1.0),
    "text": DegradeConfig(text_probability=1.0),
    "rounds": DegradeConfig(rounds=2),
}
SOMETIMES = DegradeConfig(
    crop_scale=(0.6, 1.0), rounds=2, blur_probability=0.6, noise_probability=0.6, grey_probability=0.3,
    jpeg_probability=0.6, holes_probability=0.6, text_probability=0.6,
)  # fmt: skip
# libjpeg-turbo's arithmetic is imitated to the last bit; what another library makes of JPEG is only near it.
EXACT_JPEG = bool(features.check_feature("libjpeg_turbo"))


_resize = Image.Image.resize


def columns_first(
    image: Image.Image, size: tuple[int, int], resample: int, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """Resize as Image.resize does, but columns first, always: Pillow 13 begins with the rows where that is faster."""
    left, top, right, bottom = box or (0, 0, *image.size)
    image = _resize(image, (size[0], image.height), resample, box=(left, 0, right, image.height))
    return _resize(image, size, resample, box=(0, top, size[0], bottom))


def photographs(make_photo: MakePhoto) -> Photographs:
    pictures = tuple(make_photo(60 + 13 * index, 97 - 9 * index, index) for index in range(5))
    return Photographs(tuple(Path(f"{index}.png") for index in range(5)), pictures)


def pairs(make_photo: MakePhoto) -> PairedPhotographs:
    single = photographs(make_photo)
    hr = tuple(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2] for picture in single.pictures)
    return PairedPhotographs(single.paths, hr, lr_pictures=tuple(255 - picture[::2, ::2] for picture in hr))


def crop_pairs(data: Photographs, config: DegradeConfig, *, scales: tuple[int, ...] = (2,)) -> CropPairs:
    return CropPairs(data, stage=STAGE, config=config, scales=scales, entropy=(1, 0, 0))


def canvas_of(pictures: list[np.ndarray]) -> Canvas:
    """Put pictures of several sizes, (H, W, 3) uint8, into one canvas that is full of something else."""
    sizes = tuple(picture.shape[:2] for picture in pictures)
    pixels = torch.full((len(pictures), 3, *(max(sides) for sides in zip(*sizes))), 77.0, dtype=torch.float64)
    for index, picture in enumerate(pictures):
        pixels[index, :, : picture.shape[0], : picture.shape[1]] = torch.from_numpy(picture).permute(2, 0, 1)
    return Canvas(pixels, sizes)


def pictures_of(canvas: Canvas) -> list[np.ndarray]:
    return [
        pixels[:, :height, :width].permute(1, 2, 0).numpy()
        for pixels, (height, width) in zip(canvas.pixels, canvas.sizes)
    ]


def uint8(batch: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) float in [0, 1] -> (N, H, W, 3) code values."""
    assert batch.dtype == torch.float32 and batch.min() >= 0 and batch.max() <= 1
    return (batch * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


# Each part against Pillow's


@pytest.mark.parametrize("resampling", ROUND_FILTERS)
@pytest.mark.parametrize("factor", [0.25, 0.37, 0.5, 1.0, 1.41])
def test_resize_is_pillows(resampling: Image.Resampling, factor: float, make_photo: MakePhoto) -> None:
    pictures = [make_photo(60 + 7 * index, 90 - 5 * index, index) for index in range(4)]
    sizes = [tuple(max(1, round(side * factor)) for side in picture.shape[:2]) for picture in pictures]
    boxes = [(1.3, 2.7, picture.shape[1] - 0.9, picture.shape[0] - 3.2) for picture in pictures]
    resized = pictures_of(resize(canvas_of(pictures), boxes, sizes, [resampling] * len(pictures)))
    for found, picture, (height, width), box in zip(resized, pictures, sizes, boxes):
        image = Image.fromarray(picture)
        assert np.array_equal(found, np.asarray(columns_first(image, (width, height), resampling, box)))
        # Code values between the two passes are rounded.
        assert np.abs(found - np.asarray(image.resize((width, height), resampling, box=box))).max() <= 1


def test_blur_is_pillows(make_photo: MakePhoto) -> None:
    sigmas = [0.0, 0.1, 0.3, 0.7, 1.6, 2.5, 5.0, 9.0]
    pictures = [make_photo(60 + 7 * index, 90 - 5 * index, index) for index in range(len(sigmas))]
    for found, picture, sigma in zip(pictures_of(blur(canvas_of(pictures), sigmas)), pictures, sigmas):
        assert np.array_equal(found, np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma))))


def test_jpeg_is_pillows(make_photo: MakePhoto) -> None:
    qualities = [0, 1, 5, 10, 30, 49, 50, 70, 90, 95, 100]
    pictures = [make_photo(60 + 7 * index, 90 - 5 * index, index) for index in range(len(qualities))]
    canvas = canvas_of(pictures)
    compressed = pictures_of(Canvas(compress(canvas.pixels, canvas.sizes, qualities), canvas.sizes))
    for found, picture, quality in zip(compressed, pictures, qualities):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            expected = np.asarray(image.convert("RGB"))
        if EXACT_JPEG:
            assert np.array_equal(found, expected), quality
        else:
            assert np.abs(found - expected).mean() < 1, quality


# Whole samples


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("name", [*ALWAYS, "sometimes"])
def test_samples_are_pillows_of_the_same_draws(
    name: str, scale: int, make_photo: MakePhoto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "resize", columns_first)
    config = ALWAYS.get(name, SOMETIMES)
    data = photographs(make_photo)
    generator = np.random.default_rng(scale)
    samples = [
        (index % 5, draw_cut(data.pictures[index % 5].shape[:2], size=48, scale=scale, config=config, rng=generator))
        for index in range(16)
    ]
    lr, hr = map(uint8, StoredPhotographs(data, CPU).make(samples))
    assert lr.shape == (16, 48 // scale, 48 // scale, 3) and hr.shape == (16, 48, 48, 3)
    for number, (index, cut) in enumerate(samples):
        expected_lr, expected_hr = apply_cut(data.pictures[index], cut)
        assert np.array_equal(hr[number], expected_hr)
        if cut.damages is not None and cut.damages.rounds[-1].jpeg_quality is not None and not EXACT_JPEG:
            continue
        assert np.array_equal(lr[number], expected_lr)


@pytest.mark.parametrize("scales", [(1,), (2,), (2, 4)])
def test_batches_without_noise_are_those_of_the_cpu(scales: tuple[int, ...], make_photo: MakePhoto) -> None:
    crops = crop_pairs(photographs(make_photo), ALWAYS["holes"], scales=scales)
    found = list(device_batches(StoredPhotographs(crops.photographs, CPU), crops, Steps(0, 5, batch=4), workers=0))
    assert len(found) == 5
    for step, (lr, hr) in enumerate(found):
        expected = [crops[step * 4 + place] for place in range(4)]
        assert torch.equal(lr, torch.stack([sample[0] for sample in expected]))
        assert torch.equal(hr, torch.stack([sample[1] for sample in expected]))


def test_pairs_are_those_of_the_cpu(make_photo: MakePhoto) -> None:
    crops = crop_pairs(pairs(make_photo), ALWAYS["noise"])
    for step, (lr, hr) in enumerate(
        device_batches(StoredPhotographs(crops.photographs, CPU), crops, Steps(0, 5, batch=4), workers=0)
    ):
        for place in range(4):
            expected = crops[step * 4 + place]
            assert torch.equal(lr[place], expected[0]) and torch.equal(hr[place], expected[1])


def test_noise_has_the_deviation_that_was_drawn(make_photo: MakePhoto) -> None:
    data = Photographs((Path("grey.png"),), (np.full((200, 200, 3), 128, np.uint8),))
    rng = np.random.default_rng(0)
    config = ALWAYS["noise"]
    cut = draw_cut((200, 200), size=128, scale=1, config=config, rng=rng, seeds_noise=True)
    assert cut.damages is not None
    noise = cut.damages.rounds[0].noise
    assert isinstance(noise, SeededNoise) and 2 <= noise.sigma <= 20
    lr, hr = StoredPhotographs(data, CPU).make([(0, cut)])
    assert torch.all(hr == 128 / 255)
    field = lr[0].double() * 255 - 128
    count = field.numel()
    assert float(field.mean()) == pytest.approx(0, abs=4 * noise.sigma / count**0.5)
    # The rounding adds a variance of 1/12; four standard deviations of a deviation over so many pixels.
    assert float(field.std()) == pytest.approx((noise.sigma**2 + 1 / 12) ** 0.5, rel=4 / (2 * count) ** 0.5)
    correlations = torch.corrcoef(field.reshape(3, -1)) - torch.eye(3)
    assert float(correlations.abs().max()) < 4 / (count / 3) ** 0.5, "each channel has its own"


# Where and when they are made


@pytest.mark.parametrize("paired", [False, True])
def test_a_resumed_run_and_several_processes_see_the_same_samples(paired: bool, make_photo: MakePhoto) -> None:
    crops = crop_pairs(pairs(make_photo) if paired else photographs(make_photo), SOMETIMES)
    stored = StoredPhotographs(crops.photographs, CPU)

    def make(steps: Steps, workers: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(device_batches(stored, crops, steps, workers=workers))

    whole = make(Steps(0, 6, batch=4))
    again = make(Steps(3, 6, batch=4), workers=1)
    parts = [make(Steps(0, 6, batch=4, rank=rank, count=2)) for rank in range(2)]
    for step, (lr, hr) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), lr)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), hr)
        if step >= 3:
            assert torch.equal(again[step - 3][0], lr) and torch.equal(again[step - 3][1], hr)
    assert not torch.equal(whole[0][0], whole[1][0])


def test_photographs_are_stored_on_a_gpu_they_fit_into(make_photo: MakePhoto, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pairs(make_photo)
    needed = sum(picture.nbytes for picture in data.pictures + data.lr_pictures)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(device_data, "StoredPhotographs", lambda photographs, device: (photographs, device))
    for free, fits in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 4 * needed))
        assert store(data, gpu) == ((data, gpu) if fits else None)
    assert store(data, CPU) is None


def test_a_trainer_takes_its_samples_from_there(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from_dict({
        "model": {"options": {"channels": 8, "blocks": [1, 1, 1]}},
        "samples_per_epoch": 8,
        "degrade": {"jpeg_probability": 0.5},
        "stages": [{"name": "32", "size": 32, "batch": 2, "phases": [{"epochs": 1.0}]}],
    })  # fmt: skip
    weights = []
    for name in ("cpu", "stored"):
        if name == "stored":
            monkeypatch.setattr("train.loop.store", lambda photographs, device: StoredPhotographs(photographs, CPU))
        settings = Settings(device="cpu", precision="fp32", workers=0)
        trainer = Trainer(recipe, tmp_path / name, weights=None, settings=settings)
        trainer.load_photographs(photo_folder, lambda done, total: None)
        assert (trainer.stored is not None) == (name == "stored")
        trainer.begin()
        assert trainer.train()
        weights.append(trainer.ema)
    if EXACT_JPEG:  # no noise: even the samples are the same
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value)
