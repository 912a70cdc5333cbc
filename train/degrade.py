"""Make the low-resolution, damaged picture of a photograph ("crappify")."""

from __future__ import annotations

import io
import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .recipe import DegradeConfig

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_SYMBOLS = string.ascii_letters + string.digits + "!?#%&*+=@"


def degrade(hr: np.ndarray, *, scale: int, config: DegradeConfig, rng: np.random.Generator) -> np.ndarray:
    """Reduce a picture by `scale` and damage it at random.

    hr: (H, W, 3) uint8 RGB, H and W multiples of scale. Not modified.
    Returns: (H/scale, W/scale, 3) uint8 RGB, a new array.
    The order is that of a watermarked photograph that is reduced, then saved: text and holes come before
    the reduction, noise and JPEG after it.
    """
    image = Image.fromarray(hr)
    if config.text_probability and rng.random() < config.text_probability:
        image = _with_text(image, rng, int(rng.integers(config.texts[0], config.texts[1] + 1)))
    if config.holes_probability and rng.random() < config.holes_probability:
        image = _with_holes(image, rng, int(rng.integers(config.holes[0], config.holes[1] + 1)))
    if scale > 1:
        image = image.resize((image.width // scale, image.height // scale), FILTERS[config.resize])
    if config.noise_probability and rng.random() < config.noise_probability:
        sigma = rng.uniform(*config.noise_sigma)
        noisy = np.asarray(image, np.float32) + rng.normal(0, sigma, (image.height, image.width, 3))
        image = Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    if config.jpeg_probability and rng.random() < config.jpeg_probability:
        buffer = io.BytesIO()
        quality = int(rng.integers(config.jpeg_quality[0], config.jpeg_quality[1] + 1))
        image.save(buffer, "JPEG", quality=quality)
        image = Image.open(buffer).convert("RGB")
    return np.array(image)


def _random_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _with_holes(image: Image.Image, rng: np.random.Generator, count: int) -> Image.Image:
    """Punch rectangles of 2 to 10 % of the side, each filled with one colour."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        width, height = (max(2, int(side * rng.uniform(0.02, 0.1))) for side in image.size)
        left = int(rng.integers(0, max(1, image.width - width)))
        top = int(rng.integers(0, max(1, image.height - height)))
        draw.rectangle((left, top, left + width, top + height), fill=_random_colour(rng))
    return image


def _with_text(image: Image.Image, rng: np.random.Generator, count: int) -> Image.Image:
    """Overlay random words, each with its own size, colour and opacity."""
    image = image.copy()
    for _ in range(count):
        word = "".join(rng.choice(list(_SYMBOLS), size=int(rng.integers(3, 12))))
        font = ImageFont.load_default(size=max(8, int(image.height * rng.uniform(0.06, 0.2))))
        mask = Image.new("L", image.size, 0)
        place = (int(rng.integers(0, image.width)) - image.width // 4, int(rng.integers(0, image.height)))
        ImageDraw.Draw(mask).text(place, word, fill=int(rng.integers(90, 256)), font=font)
        image.paste(Image.new("RGB", image.size, _random_colour(rng)), mask=mask)
    return image
