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
    """One axis of a window: it is run from `start` to `stop`; `keep_start` to `keep_stop` of it is placed."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


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


def plan(size: tuple[int, int], *, window: tuple[int, int], halo: int, stride: int) -> Plan:
    """Cover a picture with equal windows, each trusted only `halo` pixels away from its inner edges.

    size: of the picture, at least (1, 1). window: at most this large; each side a multiple of `stride` and larger
    than 2*halo, unless the padded picture fits into it. halo: a multiple of stride.
    Along each axis the windows are made no larger than their count asks for.
    """
    padded = (round_up(size[0], stride), round_up(size[1], stride))
    rows = spans(padded[0], window=window[0], halo=halo, stride=stride)
    columns = spans(padded[1], window=window[1], halo=halo, stride=stride)
    shape = (rows[0].stop - rows[0].start, columns[0].stop - columns[0].start)
    return Plan(size, padded, shape, tuple((row, column) for row in rows for column in columns))


def spans(length: int, *, window: int, halo: int, stride: int) -> list[Span]:
    """Cut one axis of a padded picture; the kept parts cover it once and without gaps."""
    if length <= window:
        return [Span(0, length, 0, length)]
    assert window > 2 * halo and window % stride == halo % stride == length % stride == 0
    cuts = [0]
    while cuts[-1] + window < length:
        cuts.append(cuts[-1] + window - 2 * halo)
    cuts[-1] = length - window  # the last window is shifted inwards
    result = []
    kept = 0
    for index, start in enumerate(cuts):
        keep_stop = length if index + 1 == len(cuts) else start + window - halo
        result.append(Span(start, start + window, kept, keep_stop))
        kept = keep_stop
    return result


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
        target[:] = output[top : top + target.shape[0], left : left + target.shape[1]]
