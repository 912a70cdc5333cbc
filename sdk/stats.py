"""What an Upscaler has done: totals by part, safe to add up from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Progress = Callable[[float], object]  # given the share of a picture's windows that have been run, 0 to 1


@dataclass(frozen=True)
class Stats:
    """Totals of one picture, or of all since the Upscaler was made.

    pictures: an animation is one. pixels: of the input. retries: after an engine ran out of memory.
    seconds: wall-clock of the work: a call from its begin to its end; of a file, and of a picture of upscale_many, the
    sum of its steps (read, enlarge, write) without the time that it waits between them. Steps and calls that run beside
    each other each count, so the sum may be more than has passed.
    decode_s, encode_s: reading and writing files. gather_s, run_s, place_s: cutting windows out, the engine, putting
    results together; summed over the threads that do it.
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
    """Adds up what one picture costs, from any thread, and tells how far it is.

    progress: called when it is known how many windows there will be, and after each batch of them, in the thread that
    ran it, but by one thread at a time and never with less than before; what it raises ends the work.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._started = time.perf_counter()
        self._total = Stats()
        self._lock = threading.Lock()
        self._progress = progress
        self._expected = 0  # windows; 0 is not known yet
        self._forgone = 0
        self._telling = threading.Lock()
        self._told = -1.0

    @property
    def is_watched(self) -> bool:
        """Whether somebody is told; if not, what is to come need not be counted."""
        return self._progress is not None

    def expect(self, tiles: int) -> bool:
        """Set how many windows there will be; False if that has been set for a whole that this is a part of."""
        if self._expected:
            return False
        self._expected = tiles
        self._tell()
        return True

    def forgo(self, tiles: int) -> None:
        """Take note of windows that were expected and turn out not to be needed."""
        self._forgone += tiles

    def add(self, *, tiles: int = 0, pixels: int = 0, retries: int = 0) -> None:
        """Add to the counts."""
        with self._lock:
            self._total += Stats(tiles=tiles, pixels=pixels, retries=retries)
        if tiles:
            self._tell()

    def _tell(self) -> None:
        if self._progress and self._expected:
            with self._telling:
                # A picture that is cut smaller for lack of memory has more windows than were expected.
                share = min(1.0, (self._total.tiles + self._forgone) / self._expected)
                if share > self._told:
                    self._told = share
                    self._progress(share)

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

    def each(self, items: Iterable[Item], name: str) -> Iterator[Item]:
        """Pass items on, and add what each takes to come to a part."""
        source, end = iter(items), object()
        while True:
            with self.part(name):
                item = next(source, end)
            if item is end:
                return
            yield item  # type: ignore[misc]  # not the end

    def stats(self, *, pictures: int = 1) -> Stats:
        """Give the totals up to now; `pictures` is 0 for a step that does not finish one."""
        with self._lock:
            return replace(self._total, pictures=pictures, seconds=time.perf_counter() - self._started)


def shape_pixels(image: np.ndarray) -> int:
    """Count the pixels of an (H, W) or (H, W, C) picture."""
    return image.shape[0] * image.shape[1]
