"""A picture that arrives in bands of rows: keep the rows that the next window needs, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from . import pixels, tiling
from .errors import ImageError


class Window:
    """Reads rows of a picture padded to the stride grid, from top to bottom.

    rows: (any number, W) or (any number, W, C) arrays, together (size[0], size[1]); checked as they come.
    """

    def __init__(self, rows: Iterable[np.ndarray], size: tuple[int, int], *, stride: int):
        self._source: Iterator[np.ndarray] = iter(rows)
        self._size = size
        self._stride = stride
        self._first = 0  # row number of the first one kept
        self._kept: list[np.ndarray] = []

    def read(self, start: int, stop: int) -> np.ndarray:
        """Give rows `start` to `stop`, mirrored below the picture's end; rows before `start` are forgotten.

        Raises: ImageError if the source ends too early, or its bands differ in width, channels or dtype.
        """
        height = self._size[0]
        # Mirroring reaches back less than a stride.
        first = min(start, max(0, height - self._stride))
        while self._first + self._count() < min(stop, height):
            self._take()
        rows = np.concatenate(self._kept) if len(self._kept) > 1 else self._kept[0]
        rows = rows[max(0, first - self._first) :]
        self._first = max(first, self._first)
        self._kept = [rows]
        if stop > height:
            padded = tiling.pad_to(rows if rows.ndim == 3 else rows[:, :, None], (stop - self._first, rows.shape[1]))
            rows = padded if rows.ndim == 3 else padded[:, :, 0]
        return rows[start - self._first : stop - self._first]

    @property
    def dtype(self) -> np.dtype:
        """Of the rows; known when some have been read."""
        return self._kept[0].dtype

    @property
    def channels(self) -> int | None:
        """Of the rows, None for (rows, W); known when some have been read."""
        return self._kept[0].shape[2] if self._kept[0].ndim == 3 else None

    def check_end(self) -> None:
        """Raises: ImageError if there are more rows than the size says."""
        for band in self._source:
            if len(band):
                raise ImageError(f"the picture has more than the {self._size[0]} rows that were announced")

    def _count(self) -> int:
        return sum(len(rows) for rows in self._kept)

    def _take(self) -> None:
        have = self._first + self._count()
        band = next(self._source, None)
        if band is None:
            raise ImageError(f"the picture ends after {have} of {self._size[0]} rows")
        pixels.check_array(band)
        if band.shape[1] != self._size[1]:
            raise ImageError(f"a band of rows is {band.shape[1]} pixels wide, {self._size[1]} were announced")
        if have + len(band) > self._size[0]:
            raise ImageError(f"the picture has more than the {self._size[0]} rows that were announced")
        if self._kept and (band.dtype != self._kept[0].dtype or band.shape[1:] != self._kept[0].shape[1:]):
            raise ImageError("bands of one picture differ in dtype or channels")
        self._kept.append(band)
