"""From the network's factor to any other size: how often it is applied, and one antialiased resize."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .errors import OptionError

MAX_FACTOR = 64.0
FLOAT_STEP = 1 / 65535  # of a float picture, a code value: 16 bits are as fine as any file's alpha
FILTER = Image.Resampling.LANCZOS  # widened by the factor when it shrinks, as Pillow does


def target_size(
    size: tuple[int, int], *, scale: int, factor: float | None, size_wanted: tuple[int | None, int | None] | None
) -> tuple[int, int]:
    """Work out the size of the result from what was asked for; without either, `scale` times.

    size: (height, width) of the picture. size_wanted: (height, width), one of which may be None.
    Raises: OptionError if both are given, or one is out of range.
    """
    height, width = size
    if factor is None and size_wanted is None:
        return height * scale, width * scale
    if factor is not None and size_wanted is not None:
        raise OptionError("factor and size: give one of them")
    if factor is not None:
        if not (isinstance(factor, numbers.Real) and 0 < factor <= MAX_FACTOR):
            raise OptionError(f"factor {factor!r}: a number above 0, at most {MAX_FACTOR:g}")
        return max(1, round(height * factor)), max(1, round(width * factor))
    new_height, new_width = _sides(size_wanted)
    if any(new is not None and new > MAX_FACTOR * old for new, old in ((new_height, height), (new_width, width))):
        raise OptionError(f"size {size_wanted!r}: more than {MAX_FACTOR:g} times {height} x {width}")
    if new_height is None:
        assert new_width is not None
        new_height = max(1, round(height * new_width / width))
    if new_width is None:
        new_width = max(1, round(width * new_height / height))
    return new_height, new_width


def _sides(size_wanted: object) -> tuple[int | None, int | None]:
    """Take (height, width), whole numbers from 1, one of which may be None. Raises: OptionError."""
    try:
        if isinstance(size_wanted, Sequence):
            height, width = (None if side is None else operator.index(side) for side in size_wanted)
            if (height is None or height >= 1) and (width is None or width >= 1) and (height, width) != (None, None):
                return height, width
    except (TypeError, ValueError):  # not whole numbers, not two
        pass
    raise OptionError(f"size {size_wanted!r}: (height, width), whole numbers from 1, one of them may be None")


def count_passes(size: tuple[int, int], wanted: tuple[int, int], *, scale: int) -> int:
    """Count how often the network is applied: the power of `scale` nearest to the wanted factor, at least once.

    A picture that shall not grow is not enlarged first; a x1 model is applied once.
    """
    factor = max(new / old for new, old in zip(wanted, size, strict=True))
    if scale == 1:
        return 1
    if factor <= 1:
        return 0
    return max(1, round(math.log(factor, scale)))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize with antialiasing: (H, W) or (H, W, C) uint8, uint16 or float32 -> the same of `size`, contiguous.

    Colour is weighted by alpha (the last of 2 or 4 channels), so that invisible pixels do not show at edges; where the
    result is invisible itself, colour goes its own way and is kept.
    """
    if image.shape[:2] == size:
        return np.ascontiguousarray(image)
    if image.ndim == 2:
        return resize(image[:, :, None], size)[:, :, 0]
    channels = image.shape[2]
    highest, step = (1.0, FLOAT_STEP) if image.dtype == np.float32 else (float(np.iinfo(image.dtype).max), 1.0)
    result = np.empty((*size, channels), image.dtype)
    alpha = _plane(image, -1) if channels in (2, 4) else None
    if alpha is not None and alpha.min() == alpha.max():  # equal weights change nothing
        alpha = None
    opacity = None if alpha is None else _resize_plane(alpha, size)
    for channel in range(channels):  # one after the other: in float32 they take a lot of memory
        plane = _plane(image, channel)
        resized = _resize_plane(plane, size)
        if alpha is not None and opacity is not None and channel < channels - 1:
            plane *= alpha
            np.divide(_resize_plane(plane, size), opacity, out=resized, where=opacity >= step / 2)
        np.clip(resized, 0, highest, out=resized)
        result[:, :, channel] = resized if image.dtype == np.float32 else np.rint(resized, out=resized)
    return result


def _plane(image: np.ndarray, channel: int) -> np.ndarray:
    return image[:, :, channel].astype(np.float32, order="C")


def _resize_plane(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(plane).resize((size[1], size[0]), FILTER))  # a copy, which may be changed
