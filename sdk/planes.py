"""A picture as the network takes it: three channels of colour, and alpha as a picture of its own.

uint8, uint16 and float32 stay what they are; the network's own 0 to 1 is only around each run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

REACH = 32  # pixels around visible ones whose colour is filled at least; the grid that filling goes by
BLOCK = 16 * REACH  # pixels a side that are filled at once


@dataclass(frozen=True)
class Planes:
    """A picture's colour and alpha.

    colour: (H, W, 3). alpha: (H, W, 3) with equal channels, one number where it is the same everywhere (nothing to
    enlarge), or None.
    """

    colour: np.ndarray
    alpha: np.ndarray | np.generic | None


def split(image: np.ndarray) -> Planes:
    """Turn a checked array into planes.

    Colour under invisible pixels is replaced by that of visible ones nearby, so that it cannot bleed in.
    """
    if image.ndim == 2:
        image = image[:, :, None]
    if image.dtype == np.float32:
        image = np.clip(image, 0, 1)
    channels = image.shape[2]
    colour = image[:, :, : 3 if channels >= 3 else 1]
    alpha: np.ndarray | np.generic | None = None
    if channels in (2, 4):
        plane = image[:, :, -1]
        colour = bleed(colour, plane > 0)
        alpha = np.repeat(plane[:, :, None], 3, axis=2) if has_alpha(image) else plane[0, 0]
    if colour.shape[2] == 1:
        colour = np.repeat(colour, 3, axis=2)
    return Planes(np.ascontiguousarray(colour), alpha)


def has_alpha(image: np.ndarray) -> bool:
    """Tell whether a checked array has alpha that is to be enlarged: not the same everywhere."""
    if image.ndim == 2 or image.shape[2] in (1, 3):
        return False
    plane = image[:, :, -1]
    return bool(plane.min() != plane.max())


def join(planes: Planes, *, channels: int | None) -> np.ndarray:
    """Put enlarged planes back into the caller's form: 1 to 4 channels, or None for a (H, W) grey array."""
    colour = planes.colour
    if channels in (None, 1, 2):
        # The network's channels of a grey picture differ by a little: their mean is the result.
        colour = _mean(colour)
    if planes.alpha is not None:
        alpha = planes.alpha
        mean = _mean(alpha) if isinstance(alpha, np.ndarray) else np.full((*colour.shape[:2], 1), alpha)
        colour = np.concatenate((colour, mean), axis=2)
    return colour[:, :, 0] if channels is None else colour


def _mean(plane: np.ndarray) -> np.ndarray:
    """Give (H, W, 1), the mean of the channels in the same dtype."""
    mean = plane.mean(axis=2, keepdims=True, dtype=np.float32)
    return mean if plane.dtype == np.float32 else np.rint(mean).astype(plane.dtype)


def to_engine(batch: np.ndarray) -> np.ndarray:
    """Give what an engine takes: uint8, or float32 from 0 to 1."""
    return batch.astype(np.float32) / np.float32(65535) if batch.dtype == np.uint16 else batch


def from_engine(result: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Turn what an engine gives into the dtype of the picture."""
    if dtype != np.uint16:
        return result
    return np.rint(np.clip(result, 0, 1) * np.float32(65535)).astype(np.uint16)


def bound_alpha(enlarged: np.ndarray, alpha: np.ndarray, *, scale: int) -> np.ndarray:
    """Keep enlarged alpha between the least and the most of the 3x3 pixels around its source.

    A network does not map a constant to itself; so what is opaque or invisible stays exactly that.
    alpha: (H, W, C). enlarged and the result: (H*scale, W*scale, C).
    """
    height, width = alpha.shape[:2]
    padded = np.pad(alpha, ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    least, most = (_repeated(extreme.reduce(around), scale) for extreme in (np.minimum, np.maximum))
    return np.clip(enlarged, least, most)


def bleed(colour: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fill invisible pixels with the mean colour of the visible ones nearby; those far from any keep theirs.

    What a pixel gets depends only on its block of REACH x REACH pixels (counted from the upper left corner) and the
    eight around that.
    """
    if visible.all() or not visible.any():
        return colour
    result = colour.copy()
    height, width = visible.shape
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            first_row, first_column = max(0, top - REACH), max(0, left - REACH)
            around = np.s_[first_row : top + BLOCK + REACH, first_column : left + BLOCK + REACH]
            seen = visible[around]
            if seen.all() or not seen.any():
                continue
            filled = _fill(colour[around], seen)[top - first_row :, left - first_column :]
            block = np.s_[top : top + BLOCK, left : left + BLOCK]
            filled = filled[: result[block].shape[0], : result[block].shape[1]]
            result[block] = np.where(visible[block][:, :, None], colour[block], filled)
    return result


def _fill(colour: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Give each pixel the mean of the visible ones around it, on the finest level of 2x2 averages that has any."""
    height, width = visible.shape
    padding = ((0, -height % REACH), (0, -width % REACH), (0, 0))
    weight = np.pad(visible.astype(np.float32)[:, :, None], padding)
    total = np.pad(colour.astype(np.float32), padding) * weight
    levels = [(total, weight)]
    while 1 << len(levels) <= REACH:
        total, weight = (_halved(plane) for plane in levels[-1])
        levels.append((total, weight))
    total, weight = (_around(plane) for plane in levels.pop())
    filled, known = total / np.maximum(weight, 1), _repeated(weight > 0, REACH)
    for level in reversed(levels):
        total, weight = (_around(plane) for plane in level)
        filled = np.where(weight > 0, total / np.maximum(weight, 1), _repeated(filled, 2))
    filled, known = filled[:height, :width], known[:height, :width]
    if colour.dtype != np.float32:
        filled = np.rint(filled).astype(colour.dtype)
    return np.where(known, filled, colour)


def _repeated(plane: np.ndarray, times: int) -> np.ndarray:
    return plane.repeat(times, axis=0).repeat(times, axis=1)


def _halved(plane: np.ndarray) -> np.ndarray:
    """Add up blocks of 2x2."""
    rows = plane[::2] + plane[1::2]
    return rows[:, ::2] + rows[:, 1::2]


def _around(plane: np.ndarray) -> np.ndarray:
    """Add up each pixel and its eight neighbours."""
    padded = np.pad(plane, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
