"""Geometry of tiles: which windows of a picture are run, and which part of each result is kept.

All sizes are (height, width) in LR pixels. Windows lie on the model's stride grid, because a network with
downsampling is shift-equivariant only there. Windows of one plan have one shape, so that they can be batched:
at the picture's edges they are shifted inwards, and their zero padding meets the same border as in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """One axis of a window: it is run from `start` to `stop`; `keep_start` to `keep_stop` of it is placed.

    The first `fade` kept pixels are blended with what the window before left there.
    """

    start: int
    stop: int
    keep_start: int
    keep_stop: int
    fade: int = 0


@dataclass(frozen=True)
class Plan:
    """How one picture is run.

    padded: size after mirror padding to the grid; windows: (rows, columns) in reading order, all of `window` size.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    window: tuple[int, int]
    windows: tuple[tuple[Span, Span], ...]

    @property
    def one_piece(self) -> bool:
        """Whether nothing is cut."""
        return len(self.windows) == 1


def round_up(length: int, stride: int) -> int:
    """Round up to a multiple of the stride."""
    return -(-length // stride) * stride


def plan(size: tuple[int, int], *, window: tuple[int, int], halo: int, stride: int, blend: bool = False) -> Plan:
    """Cover a picture with equal windows, each trusted only `halo` pixels away from its inner edges.

    size: of the picture, at least (1, 1). window: each side a multiple of `stride`, and larger than 2*halo unless
    the padded picture fits into it. halo: a multiple of stride. blend: cross-fade neighbours over half the halo
    on each side of a cut.
    """
    padded = (round_up(size[0], stride), round_up(size[1], stride))
    rows, columns = (
        spans(length, window=side, halo=halo, fade=halo if blend else 0)
        for length, side in zip(padded, window, strict=True)
    )
    shape = (rows[0].stop - rows[0].start, columns[0].stop - columns[0].start)
    return Plan(size, padded, shape, tuple((row, column) for row in rows for column in columns))


def spans(length: int, *, window: int, halo: int, fade: int = 0) -> list[Span]:
    """Cut one axis of a padded picture; without `fade` the kept parts cover it once and without gaps.

    fade: width of the cross-fade around each cut, at most 2*halo.
    """
    if length <= window:
        return [Span(0, length, 0, length)]
    assert window > 2 * halo >= fade
    count = count_windows(length, window=window, halo=halo)
    starts = [index * (window - 2 * halo) for index in range(count - 1)]
    starts.append(length - window)  # shifted inwards
    # Where one window's kept part ends and the next one's begins.
    cuts = [start + window - halo for start in starts[:-1]]
    result = []
    for index, start in enumerate(starts):
        keep_start = cuts[index - 1] - fade // 2 if index else 0
        keep_stop = cuts[index] + fade // 2 if index < len(cuts) else length
        result.append(Span(start, start + window, keep_start, keep_stop, fade // 2 * 2 if index else 0))
    return result


def choose_window(size: tuple[int, int], *, limit: int, halo: int, stride: int) -> tuple[int, int]:
    """Find the window of at most `limit` pixels that runs the fewest pixels over a whole picture.

    One piece wins where it fits. Otherwise squares are tried, then shrunk to what their count needs.
    """
    padded = (round_up(size[0], stride), round_up(size[1], stride))
    if padded[0] * padded[1] <= limit:
        return padded
    smallest = 2 * halo + stride
    largest = max(smallest, int(limit**0.5) // stride * stride)
    best: tuple[int, tuple[int, int]] | None = None
    for side in range(smallest, largest + 1, stride):
        window = tuple(_shrink(length, window=side, halo=halo, stride=stride) for length in padded)
        counts = [count_windows(length, window=w, halo=halo) for length, w in zip(padded, window, strict=True)]
        cost = counts[0] * counts[1] * window[0] * window[1]
        if best is None or cost <= best[0]:
            best = cost, (window[0], window[1])
    assert best is not None
    return best[1]


def _shrink(length: int, *, window: int, halo: int, stride: int) -> int:
    """Give the smallest window that needs no more spans than `window` does."""
    count = count_windows(length, window=window, halo=halo)
    if count == 1:
        return length
    # count windows reach count * (window - 2*halo) + 2*halo pixels.
    return round_up(-(-(length - 2 * halo) // count), stride) + 2 * halo


def count_windows(length: int, *, window: int, halo: int) -> int:
    """Count the spans that one axis needs."""
    if length <= window:
        return 1
    return 1 + -(-(length - window) // (window - 2 * halo))


def pad_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mirror (without repeating the edge) at the right and bottom: (H, W, C) -> (size[0], size[1], C)."""
    bottom, right = size[0] - image.shape[0], size[1] - image.shape[1]
    if bottom == right == 0:
        return image
    return np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="reflect")


def gather(padded: np.ndarray, windows: Sequence[tuple[Span, Span]]) -> np.ndarray:
    """Copy windows out of a padded picture: (H, W, C) -> (N, h, w, C), C-contiguous."""
    return np.stack([padded[rows.start : rows.stop, columns.start : columns.stop] for rows, columns in windows])


def place(canvas: np.ndarray, outputs: np.ndarray, windows: Sequence[tuple[Span, Span]], *, scale: int) -> None:
    """Write the kept part of each result into the canvas, which may be smaller than the padded picture.

    canvas: (H*scale, W*scale, C); outputs: (N, h*scale, w*scale, C).
    """
    for output, (rows, columns) in zip(outputs, windows, strict=True):
        target = canvas[
            rows.keep_start * scale : rows.keep_stop * scale, columns.keep_start * scale : columns.keep_stop * scale
        ]
        top, left = (rows.keep_start - rows.start) * scale, (columns.keep_start - columns.start) * scale
        kept = output[top : top + target.shape[0], left : left + target.shape[1]]
        if rows.fade or columns.fade:
            vertical = _ramp(target.shape[0], rows.fade * scale)
            weight = (vertical[:, None] * _ramp(target.shape[1], columns.fade * scale))[:, :, None]
            # A fresh canvas may hold anything, NaN included, where a window is the first to write.
            with np.errstate(invalid="ignore"):
                mixed = np.where(weight < 1, kept * weight + target * (1 - weight), kept)
            kept = np.rint(mixed).astype(target.dtype) if target.dtype == np.uint8 else mixed
        target[:] = kept


def _ramp(length: int, fade: int) -> np.ndarray:
    """Give (length,) float32 weights that rise from 0 to 1 over the first `fade` entries."""
    ramp = np.ones(length, np.float32)
    ramp[:fade] = ((np.arange(fade) + 0.5) / max(fade, 1))[:length]
    return ramp
