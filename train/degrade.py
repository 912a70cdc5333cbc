"""Make the low-resolution, damaged picture of a photograph ("crappify")."""

from __future__ import annotations

import io
import string

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .recipe import DegradeConfig

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Sizes and filters of the round before the ordinary one, from mild to what Real-ESRGAN takes (arXiv 2107.10833).
ROUND_FACTORS = (0.25, 1.5)
ROUND_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_SYMBOLS = string.ascii_letters + string.digits + "!?#%&*+=@"


def degrade(hr: np.ndarray, *, scale: int, config: DegradeConfig, rng: np.random.Generator) -> np.ndarray:
    """Reduce a picture by `scale` and damage it at random.

    hr: (H, W, 3) uint8 RGB, H and W multiples of scale. Not modified.
    Returns: (H/scale, W/scale, 3) uint8 RGB, a new array.
    The order is that of a watermarked photograph that is reduced, then saved: text, holes and blur come before
    the reduction, noise, the loss of colour and JPEG after it. `config.crop_scale` is random_pair's part.
    """
    return degrade_with_mask(hr, scale=scale, config=config, rng=rng)[0]


def degrade_with_mask(
    hr: np.ndarray, *, scale: int, config: DegradeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Do what `degrade` does, and tell which pixels holes or text lie on.

    Returns: the picture as from `degrade`, and (H/scale, W/scale) bool: whether any of the scale x scale pixels
    that a pixel is made of was covered. Filters and a blur carry the damage some pixels further.
    """
    image = Image.fromarray(hr)
    size = (image.width // scale, image.height // scale)
    covered = np.zeros(hr.shape[:2], bool)
    if _happens(config.text_probability, rng):
        image = _with_text(image, covered, rng, int(rng.integers(config.texts[0], config.texts[1] + 1)))
    if _happens(config.holes_probability, rng):
        image = _with_holes(image, covered, rng, int(rng.integers(config.holes[0], config.holes[1] + 1)))
    if config.rounds > 1:
        image = _after_one_round(image, config, rng)
    image = _perhaps_blurred(image, config, rng)
    if image.size != size:
        image = image.resize(size, FILTERS[config.resize])
    image = _perhaps_noisy(image, config, rng)
    if _happens(config.grey_probability, rng):
        image = image.convert("L").convert("RGB")
    image = _perhaps_compressed(image, config, rng)
    # (H, W) -> (h, scale, w, scale) -> (h, w)
    mask = np.logical_or.reduce(covered.reshape(size[1], scale, size[0], scale), axis=(1, 3))
    return np.array(image), mask


def _happens(probability: float, rng: np.random.Generator) -> bool:
    """Draw whether a damage comes; one that never does draws nothing, so that it moves no other's numbers."""
    return bool(probability) and rng.random() < probability


def _after_one_round(image: Image.Image, config: DegradeConfig, rng: np.random.Generator) -> Image.Image:
    """Damage a picture as one application that has saved it before: the result is of another, random size."""
    image = _perhaps_blurred(image, config, rng)
    factor = rng.uniform(*ROUND_FACTORS)
    width, height = (max(1, round(side * factor)) for side in image.size)
    image = image.resize((width, height), ROUND_FILTERS[int(rng.integers(len(ROUND_FILTERS)))])
    return _perhaps_compressed(_perhaps_noisy(image, config, rng), config, rng)


def _perhaps_blurred(image: Image.Image, config: DegradeConfig, rng: np.random.Generator) -> Image.Image:
    if not _happens(config.blur_probability, rng):
        return image
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*config.blur_sigma)))


def _perhaps_noisy(image: Image.Image, config: DegradeConfig, rng: np.random.Generator) -> Image.Image:
    if not _happens(config.noise_probability, rng):
        return image
    sigma = rng.uniform(*config.noise_sigma)
    noisy = np.asarray(image, np.float32) + rng.normal(0, sigma, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _perhaps_compressed(image: Image.Image, config: DegradeConfig, rng: np.random.Generator) -> Image.Image:
    if not _happens(config.jpeg_probability, rng):
        return image
    buffer = io.BytesIO()
    quality = int(rng.integers(config.jpeg_quality[0], config.jpeg_quality[1] + 1))
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _random_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _with_holes(image: Image.Image, covered: np.ndarray, rng: np.random.Generator, count: int) -> Image.Image:
    """Punch rectangles of 2 to 10 % of the side, each filled with one colour; mark them in `covered`, (H, W) bool."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        width, height = (max(2, int(side * rng.uniform(0.02, 0.1))) for side in image.size)
        left = int(rng.integers(0, max(1, image.width - width)))
        top = int(rng.integers(0, max(1, image.height - height)))
        draw.rectangle((left, top, left + width, top + height), fill=_random_colour(rng))
        covered[top : top + height + 1, left : left + width + 1] = True
    return image


def _with_text(image: Image.Image, covered: np.ndarray, rng: np.random.Generator, count: int) -> Image.Image:
    """Overlay random words, each with its own size, colour and opacity; mark them in `covered`, (H, W) bool."""
    image = image.copy()
    for _ in range(count):
        word = "".join(rng.choice(list(_SYMBOLS), size=int(rng.integers(3, 12))))
        font = ImageFont.load_default(size=max(8, int(image.height * rng.uniform(0.06, 0.2))))
        mask = Image.new("L", image.size, 0)
        place = (int(rng.integers(0, image.width)) - image.width // 4, int(rng.integers(0, image.height)))
        ImageDraw.Draw(mask).text(place, word, fill=int(rng.integers(90, 256)), font=font)
        image.paste(Image.new("RGB", image.size, _random_colour(rng)), mask=mask)
        covered |= np.asarray(mask) > 0
    return image
