"""A picture that arrives in bands of rows: keep the rows that the next window needs, and no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from . import pixels
from .errors import ImageError


class Window:
    """Reads rows of a picture padded to the stride grid, from top to bottom.

    rows: (any number, W) or (any number, W, C) arrays, together (size[0], size[1]); checked as they come, and copied
    before the next one is asked for, so that the source may fill one buffer again and again.
    """

    def __init__(self, rows: Iterable[np.ndarray], size: tuple[int, int], *, stride: int):
        self._size = size
        self._stride = stride
        self._bands = self._checked(rows)
        self._first = 0  # row number of the first one kept
        self._kept: deque[np.ndarray] = deque()  # the last rows read, and what is left of the last band

    def read(self, start: int, stop: int) -> np.ndarray:
        """Give a copy of rows `start` to `stop`, mirrored below the picture's end; rows before `start` are forgotten.

        Raises: ImageError if the source ends too early, or its bands differ in width, channels or dtype.
        """
        height = self._size[0]
        first = min(start, max(0, height - self._stride))  # mirroring reaches back less than a stride
        rows = self._gather(first, min(stop, height))
        if stop > height:
            rows = np.pad(rows, [(0, stop - height), *[(0, 0)] * (rows.ndim - 1)], mode="reflect")
        return rows[start - first :]

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
        next(self._bands, None)

    def _gather(self, first: int, stop: int) -> np.ndarray:
        """Copy rows into one array; keep it, forget what lies before them."""
        if not self._kept:
            self._kept.append(next(self._bands))
        rows = np.empty((stop - first, *self._kept[0].shape[1:]), self._kept[0].dtype)
        have = self._first
        while have < stop:
            band = self._kept.popleft() if self._kept else next(self._bands)
            wanted = band[max(0, first - have) : stop - have]
            end = min(stop, have + len(band))
            rows[end - len(wanted) - first : end - first] = wanted
            if have + len(band) > stop:
                self._kept.appendleft(band[stop - have :])
            have = end
        self._kept.appendleft(rows)
        self._first = first
        return rows

    def _checked(self, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Pass on the bands that have rows. Raises: ImageError unless they make up the picture."""
        have, form = 0, None
        for band in rows:
            if isinstance(band, np.ndarray) and band.shape[:1] == (0,):
                continue
            pixels.check_array(band)
            if band.shape[1] != self._size[1]:
                raise ImageError(f"a band of rows is {band.shape[1]} pixels wide, {self._size[1]} were announced")
            if have + len(band) > self._size[0]:
                raise ImageError(f"the picture has more than the {self._size[0]} rows that were announced")
            if form not in (None, (band.dtype, band.shape[1:])):
                raise ImageError("bands of one picture differ in dtype or channels")
            have, form = have + len(band), (band.dtype, band.shape[1:])
            yield band
        if have < self._size[0]:
            raise ImageError(f"the picture ends after {have} of {self._size[0]} rows")
