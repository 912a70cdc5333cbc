"""A picture that comes and goes in bands of rows: hold the rows that the next windows need, and no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from . import pixels, planes, tiling
from .errors import ImageError
from .planes import Planes
from .runner import Runner
from .stats import Meter

ROWS = 64  # of a result that go out at once: putting planes together takes several copies of them


def enlarge(
    runner: Runner, rows: Iterable[np.ndarray], size: tuple[int, int], meter: Meter, *, tile: int | None = None
) -> Iterator[np.ndarray]:
    """Enlarge the rows of one picture; see Upscaler.upscale_bands."""
    window = Window(rows, size)
    first_rows = window.read(0, min(size[0], 1))
    plan = runner.plan(size, first_rows.dtype, tile)
    meter.expect(plan.count * (2 if window.channels in (2, 4) else 1))
    runner.expect(plan, first_rows.dtype, meter)
    constants: deque[np.generic | None] = deque()  # of each row of windows: its alpha if that is not enlarged
    buffer = np.empty(0, first_rows.dtype)

    def padded() -> Iterator[tuple[tiling.Span, np.ndarray]]:
        for row in plan.rows:
            # Besides its own rows those from which colour bleeds into it.
            start = max(0, row.start // planes.REACH * planes.REACH - planes.REACH)
            stop = min(size[0], tiling.round_up(row.stop, planes.REACH) + planes.REACH)
            read = window.read(start, stop)
            with meter.part("gather"):
                picture = planes.split(read)
                alpha = picture.alpha
                if alpha is not None and runner.overlap.fade and not isinstance(alpha, np.ndarray):
                    alpha = np.full_like(picture.colour, alpha)  # its neighbour may not be constant
                if window.channels in (2, 4) and not isinstance(alpha, np.ndarray):
                    meter.forgo(len(plan.columns))
                band = np.stack((picture.colour, alpha)) if isinstance(alpha, np.ndarray) else picture.colour[None]
                band = band[:, row.start - start : row.stop - start]
                band = tiling.pad_to(band, (row.stop - row.start, plan.padded[1]))
            constants.append(None if isinstance(alpha, np.ndarray) else alpha)
            yield row, band

    def place(shape: tuple[int, ...], top: int, bottom: int) -> np.ndarray:
        """Put every strip into the same memory: the one before has been taken out of it."""
        nonlocal buffer
        count = int(np.prod(shape))
        if buffer.size < count:
            buffer = np.empty(count, first_rows.dtype)
        return buffer[:count].reshape(shape)

    strips = runner.strips(padded(), plan, meter, colours=1, place=place)
    for strip in tiling.finished_rows(strips, plan, scale=runner.scale):
        alpha = constants.popleft()
        for top in range(0, strip.shape[1], ROWS):
            band = strip[:, top : top + ROWS]
            joined = planes.join(Planes(band[0], band[1] if len(band) > 1 else alpha), channels=window.channels)
            yield joined.copy() if np.may_share_memory(joined, buffer) else joined
    window.check_end()


class Window:
    """Reads rows of a picture from top to bottom.

    rows: (any number, W) or (any number, W, C) arrays, together (size[0], size[1]); checked as they come, and copied
    before the next one is asked for, so that the source may fill one buffer again and again.
    """

    def __init__(self, rows: Iterable[np.ndarray], size: tuple[int, int]):
        self._size = size
        self._bands = self._checked(rows)
        self._start = 0  # row number of the first one kept
        self._kept: deque[np.ndarray] = deque()  # the last rows read, and what is left of the last band

    def read(self, start: int, stop: int) -> np.ndarray:
        """Give rows `start` to `stop`, which are not to be changed; rows before `start` are forgotten.

        Raises: ImageError if the source ends too early, or its bands differ in width, channels or dtype.
        """
        if not self._kept:
            self._kept.append(next(self._bands))
        rows = np.empty((stop - start, *self._kept[0].shape[1:]), self._kept[0].dtype)
        have = self._start
        while have < stop:
            band = self._kept.popleft() if self._kept else next(self._bands)
            wanted = band[max(0, start - have) : stop - have]
            end = min(stop, have + len(band))
            rows[end - len(wanted) - start : end - start] = wanted
            if have + len(band) > stop:
                self._kept.appendleft(band[stop - have :])
            have = end
        self._kept.appendleft(rows)
        self._start = start
        return rows

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
