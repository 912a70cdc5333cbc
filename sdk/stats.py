"""What an Upscaler has done: totals by part, safe to add up from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np


@dataclass(frozen=True)
class Stats:
    """Totals of one picture, or of all since the Upscaler was made.

    pixels: of the input. retries: after an engine ran out of memory. seconds: wall-clock of the pictures, summed over
    threads; the parts below are in it, but for the decoding and encoding that a pipeline does ahead.
    """

    pictures: int = 0
    tiles: int = 0
    pixels: int = 0
    retries: int = 0
    seconds: float = 0.0
    decode_s: float = 0.0
    gather_s: float = 0.0
    run_s: float = 0.0
    place_s: float = 0.0
    encode_s: float = 0.0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


class Meter:
    """Adds up what one picture costs, from any thread."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._total = Stats()
        self._lock = threading.Lock()

    def add(self, *, tiles: int = 0, pixels: int = 0, retries: int = 0) -> None:
        """Add to the counts."""
        with self._lock:
            self._total += Stats(tiles=tiles, pixels=pixels, retries=retries)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part: decode, gather, run, place or encode."""
        started = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            with self._lock:
                self._total = replace(self._total, **{f"{name}_s": getattr(self._total, f"{name}_s") + took})

    def stats(self, *, pictures: int = 1) -> Stats:
        """Give the totals up to now."""
        with self._lock:
            return replace(self._total, pictures=pictures, seconds=time.perf_counter() - self._started)


def shape_pixels(image: np.ndarray) -> int:
    """Count the pixels of an (H, W) or (H, W, C) picture."""
    return image.shape[0] * image.shape[1]
