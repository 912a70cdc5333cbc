"""Make the low-resolution, damaged picture of a photograph ("crappify"): draw the damages, then apply them."""

from __future__ import annotations

import io
import string
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .recipe import DegradeConfig

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Sizes and filters of the round before the ordinary one, from mild to what Real-ESRGAN takes (arXiv 2107.10833).
ROUND_FACTORS = (0.25, 1.5)
ROUND_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_SYMBOLS = string.ascii_letters + string.digits + "!?#%&*+=@"


@dataclass(frozen=True)
class Text:
    """A word: how much of it each pixel takes, (H, W) uint8, and its colour."""

    mask: np.ndarray
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Hole:
    """A rectangle of one colour; its right column and bottom row are part of it."""

    left: int
    top: int
    right: int
    bottom: int
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class SeededNoise:
    """Gaussian noise that is made where it is applied: standard deviation in code values, and seed."""

    sigma: float
    seed: int


@dataclass(frozen=True)
class Round:
    """What happens to a picture between two uses, in this order; None is left out.

    blur_sigma: pixels. size: (height, width) after the reduction. noise: (height, width, 3), or what to make it of.
    """

    blur_sigma: float | None
    size: tuple[int, int]
    resampling: Image.Resampling
    noise: np.ndarray | SeededNoise | None
    grey: bool
    jpeg_quality: int | None


@dataclass(frozen=True)
class Damages:
    """All that is done to one picture."""

    texts: tuple[Text, ...]
    holes: tuple[Hole, ...]
    rounds: tuple[Round, ...]


def degrade(hr: np.ndarray, *, scale: int, config: DegradeConfig, rng: np.random.Generator) -> np.ndarray:
    """Reduce a picture by `scale` and damage it at random.

    hr: (H, W, 3) uint8 RGB, H and W multiples of scale. Not modified.
    Returns: (H/scale, W/scale, 3) uint8 RGB, a new array.
    The order is that of a watermarked photograph that is reduced, then saved: text, holes and blur come before
    the reduction, noise, the loss of colour and JPEG after it. `config.crop_scale` is random_pair's part.
    """
    return apply_damages(hr, draw_damages(hr.shape[:2], scale=scale, config=config, rng=rng))


def degrade_with_mask(
    hr: np.ndarray, *, scale: int, config: DegradeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Do what `degrade` does, and tell which pixels holes or text lie on.

    Returns: the picture as from `degrade`, and (H/scale, W/scale) bool: whether any of the scale x scale pixels
    that a pixel is made of was covered. Filters and a blur carry the damage some pixels further.
    """
    damages = draw_damages(hr.shape[:2], scale=scale, config=config, rng=rng)
    covered = np.zeros(hr.shape[:2], bool)
    for text in damages.texts:
        covered |= text.mask > 0
    for hole in damages.holes:
        covered[hole.top : hole.bottom + 1, hole.left : hole.right + 1] = True
    height, width = (side // scale for side in hr.shape[:2])
    # (H, W) -> (h, scale, w, scale) -> (h, w)
    mask = np.logical_or.reduce(covered.reshape(height, scale, width, scale), axis=(1, 3))
    return apply_damages(hr, damages), mask


# Drawing


def draw_damages(
    shape: tuple[int, ...], *, scale: int, config: DegradeConfig, rng: np.random.Generator, seeds_noise: bool = False
) -> Damages:
    """Draw what is done to a picture of (height, width) when it is reduced by `scale`.

    seeds_noise: draw a seed in place of the noise, for a device that makes it; what is drawn after it is different too.
    """
    height, width = shape
    texts: tuple[Text, ...] = ()
    holes: tuple[Hole, ...] = ()
    rounds: tuple[Round, ...] = ()
    if _happens(config.text_probability, rng):
        count = int(rng.integers(config.texts[0], config.texts[1] + 1))
        texts = tuple(_draw_text(height, width, rng) for _ in range(count))
    if _happens(config.holes_probability, rng):
        count = int(rng.integers(config.holes[0], config.holes[1] + 1))
        holes = tuple(_draw_hole(height, width, rng) for _ in range(count))
    if config.rounds > 1:
        sigma = _draw_blur(config, rng)
        factor = rng.uniform(*ROUND_FACTORS)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        resampling = ROUND_FILTERS[int(rng.integers(len(ROUND_FILTERS)))]
        noise = _draw_noise(size, config, rng, seeds_noise)
        rounds = (Round(sigma, size, resampling, noise, False, _draw_quality(config, rng)),)
    sigma = _draw_blur(config, rng)
    size = height // scale, width // scale
    noise = _draw_noise(size, config, rng, seeds_noise)
    grey = _happens(config.grey_probability, rng)
    last = Round(sigma, size, FILTERS[config.resize], noise, grey, _draw_quality(config, rng))
    return Damages(texts, holes, (*rounds, last))


def is_clean(config: DegradeConfig) -> bool:
    """Tell whether pictures are reduced and nothing else."""
    names = ("blur", "grey", "jpeg", "noise", "holes", "text")
    return config.rounds == 1 and not any(getattr(config, f"{name}_probability") for name in names)


def _happens(probability: float, rng: np.random.Generator) -> bool:
    """Draw whether a damage comes; one that never does draws nothing, so that it moves no other's numbers."""
    return bool(probability) and rng.random() < probability


def _draw_blur(config: DegradeConfig, rng: np.random.Generator) -> float | None:
    return rng.uniform(*config.blur_sigma) if _happens(config.blur_probability, rng) else None


def _draw_noise(
    size: tuple[int, int], config: DegradeConfig, rng: np.random.Generator, seeds_noise: bool
) -> np.ndarray | SeededNoise | None:
    if not _happens(config.noise_probability, rng):
        return None
    sigma = rng.uniform(*config.noise_sigma)
    return SeededNoise(sigma, int(rng.integers(2**63))) if seeds_noise else rng.normal(0, sigma, (*size, 3))


def _draw_quality(config: DegradeConfig, rng: np.random.Generator) -> int | None:
    if not _happens(config.jpeg_probability, rng):
        return None
    return int(rng.integers(config.jpeg_quality[0], config.jpeg_quality[1] + 1))


def _draw_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _draw_hole(height: int, width: int, rng: np.random.Generator) -> Hole:
    """Draw a rectangle of 2 to 10 % of the sides."""
    across, down = (max(2, int(side * rng.uniform(0.02, 0.1))) for side in (width, height))
    left = int(rng.integers(0, max(1, width - across)))
    top = int(rng.integers(0, max(1, height - down)))
    return Hole(left, top, left + across, top + down, _draw_colour(rng))


def _draw_text(height: int, width: int, rng: np.random.Generator) -> Text:
    """Draw a word with its own size, place, opacity and colour."""
    word = "".join(rng.choice(list(_SYMBOLS), size=int(rng.integers(3, 12))))
    font = ImageFont.load_default(size=max(8, int(height * rng.uniform(0.06, 0.2))))
    mask = Image.new("L", (width, height), 0)
    place = (int(rng.integers(0, width)) - width // 4, int(rng.integers(0, height)))
    ImageDraw.Draw(mask).text(place, word, fill=int(rng.integers(90, 256)), font=font)
    return Text(np.asarray(mask), _draw_colour(rng))


# Applying


def apply_damages(hr: np.ndarray, damages: Damages) -> np.ndarray:
    """Do to a picture, (H, W, 3) uint8 RGB, what was drawn for its size: (h, w, 3) uint8 RGB, a new array."""
    image = Image.fromarray(hr)
    if damages.texts or damages.holes:
        image = image.copy()
    for text in damages.texts:
        image.paste(Image.new("RGB", image.size, text.colour), mask=Image.fromarray(text.mask))
    for hole in damages.holes:
        ImageDraw.Draw(image).rectangle((hole.left, hole.top, hole.right, hole.bottom), fill=hole.colour)
    for each in damages.rounds:
        image = _after_round(image, each)
    return np.array(image)


def _after_round(image: Image.Image, drawn: Round) -> Image.Image:
    if drawn.blur_sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(drawn.blur_sigma))
    if (image.height, image.width) != drawn.size:
        image = image.resize(drawn.size[::-1], drawn.resampling)
    if drawn.noise is not None:
        assert isinstance(drawn.noise, np.ndarray), "seeds are for devices"
        noisy = np.asarray(image, np.float32) + drawn.noise
        image = Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    if drawn.grey:
        image = image.convert("L").convert("RGB")
    if drawn.jpeg_quality is not None:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=drawn.jpeg_quality)
        image = Image.open(buffer).convert("RGB")
    return image
