"""Geometry of tiles: which windows of a picture are run, and which part of each result is kept.

All sizes are (height, width) in LR pixels. Windows lie on the model's stride grid, because a network with
downsampling is shift-equivariant only there. Windows of one plan have one shape, so that they can be batched:
at the picture's edges they are shifted inwards, and their zero padding meets the same border as in one piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CALL_PIXELS = 4096  # what calling an engine costs, in pixels that it runs in that time (about a millisecond)
MIN_FADE = 8  # LR pixels of a cross-fade: enough to hide a step of a few code values


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

    padded: size after mirror padding to the grid; rows, columns: the spans of both axes; every pair is a window.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @property
    def window(self) -> tuple[int, int]:
        """Size of every window."""
        return self.rows[0].stop - self.rows[0].start, self.columns[0].stop - self.columns[0].start

    @property
    def count(self) -> int:
        """Number of windows; 1 if nothing is cut."""
        return len(self.rows) * len(self.columns)


@dataclass(frozen=True)
class Overlap:
    """How neighbouring windows meet.

    halo: context on each side that is thrown away; fade: width of the cross-fade of kept pixels. Both are multiples
    of the stride.
    """

    halo: int
    stride: int
    fade: int = 0

    @property
    def width(self) -> int:
        """Pixels that two neighbours share."""
        return 2 * self.halo + self.fade

    @property
    def smallest_window(self) -> int:
        """Side of the smallest window that still advances."""
        return self.width + self.stride


def fade_width(stride: int) -> int:
    """Give the width of a cross-fade on a stride grid."""
    return round_up(MIN_FADE, stride)


def round_up(length: int, stride: int) -> int:
    """Round up to a multiple of the stride."""
    return -(-length // stride) * stride


def plan(size: tuple[int, int], *, window: tuple[int, int], overlap: Overlap) -> Plan:
    """Cover a picture with equal windows, of which only pixels `halo` away from inner edges are kept.

    size: of the picture, at least (1, 1). window: each side a multiple of the stride, and at least
    `overlap.smallest_window` unless the padded picture fits into it.
    """
    padded = (round_up(size[0], overlap.stride), round_up(size[1], overlap.stride))
    rows, columns = (tuple(spans(length, side, overlap)) for length, side in zip(padded, window, strict=True))
    return Plan(size, padded, rows, columns)


def spans(length: int, window: int, overlap: Overlap) -> list[Span]:
    """Cut one axis of a padded picture; the kept parts cover it, and only cross-fades twice."""
    if length <= window:
        return [Span(0, length, 0, length)]
    assert window >= overlap.smallest_window
    count = count_windows(length, window, overlap)
    starts = [index * (window - overlap.width) for index in range(count - 1)]
    starts.append(length - window)  # shifted inwards
    result: list[Span] = []
    for start in starts:
        last = start == starts[-1]
        fade = overlap.fade if result else 0
        keep_start = result[-1].keep_stop - fade if result else 0
        keep_stop = length if last else start + window - overlap.halo
        result.append(Span(start, start + window, keep_start, keep_stop, fade))
    return result


def choose_window(
    size: tuple[int, int],
    *,
    limit: int,
    overlap: Overlap,
    max_height: int | None = None,
    max_side: int | None = None,
) -> tuple[int, int]:
    """Find the window of at most `limit` pixels that runs the fewest pixels over a whole picture.

    max_height: of a window, at least `overlap.smallest_window`, if the picture does not fit in one. max_side: of any
    window, likewise on the grid.
    One piece wins where it fits. Otherwise every height is tried with the greatest width that the limit leaves it, both
    shrunk to what their count needs: engines take the same time for a pixel, whatever the window.
    """
    stride, smallest = overlap.stride, overlap.smallest_window
    padded = (round_up(size[0], stride), round_up(size[1], stride))
    if padded[0] * padded[1] <= limit and (max_side is None or max(padded) <= max_side):
        return padded
    longest = max_side or max(smallest, *padded)
    highest = max(smallest, min(limit // smallest, max_height or longest, longest))
    best: tuple[int, tuple[int, int]] | None = None
    for side in range(smallest, highest + 1, stride):
        height = _shrink(padded[0], side, overlap)
        widest = max(smallest, min(limit // height // stride * stride, longest))
        width = _shrink(padded[1], widest, overlap)
        windows = count_windows(padded[0], height, overlap) * count_windows(padded[1], width, overlap)
        cost = windows * (height * width + CALL_PIXELS)
        if best is None or cost <= best[0]:
            best = cost, (height, width)
    assert best is not None
    return best[1]


def _shrink(length: int, window: int, overlap: Overlap) -> int:
    """Give the smallest window that needs no more spans than `window` does."""
    count = count_windows(length, window, overlap)
    if count == 1:
        return length
    # count windows reach count * (window - width) + width pixels.
    return round_up(-(-(length - overlap.width) // count), overlap.stride) + overlap.width


def count_windows(length: int, window: int, overlap: Overlap) -> int:
    """Count the spans that one axis needs."""
    if length <= window:
        return 1
    return 1 + -(-(length - window) // (window - overlap.width))


def pad_to(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mirror (without repeating the edge) at the right and bottom: (..., H, W, C) -> (..., size[0], size[1], C)."""
    bottom, right = size[0] - images.shape[-3], size[1] - images.shape[-2]
    if bottom == right == 0:
        return images
    return np.pad(images, ((0, 0),) * (images.ndim - 3) + ((0, bottom), (0, right), (0, 0)), mode="reflect")


def gather(band: np.ndarray, windows: Sequence[tuple[int, Span]]) -> np.ndarray:
    """Copy windows out of a band of padded rows.

    band: (N, h, W, C); windows: (picture, columns). Returns: (len(windows), h, w, C), C-contiguous, without a copy
    where the band is the only window.
    """
    if len(windows) == len(band) == 1 and windows[0][1].stop - windows[0][1].start == band.shape[2]:
        return np.ascontiguousarray(band)
    return np.stack([band[index, :, columns.start : columns.stop] for index, columns in windows])


def place(
    strip: np.ndarray, outputs: np.ndarray, windows: Sequence[tuple[int, Span]], *, rows: Span, scale: int
) -> None:
    """Write the kept part of each result into a strip of kept rows, from left to right.

    strip: (N, kept*scale, W*scale, C), which may be smaller than the padded picture; outputs: (len(windows), h*scale,
    w*scale, C).
    """
    top = (rows.keep_start - rows.start) * scale
    for output, (index, columns) in zip(outputs, windows, strict=True):
        target = strip[index, :, columns.keep_start * scale : columns.keep_stop * scale]
        left = (columns.keep_start - columns.start) * scale
        kept = output[top : top + target.shape[0], left : left + target.shape[1]]
        fade = columns.fade * scale
        target[:, fade:] = kept[:, fade:]
        if fade:
            target[:, :fade] = _cross_fade(target[:, :fade], kept[:, :fade], axis=1)


def finished_rows(strips: Iterable[np.ndarray], plan: Plan, *, scale: int) -> Iterator[np.ndarray]:
    """Join strips of kept rows from top to bottom; yield each row once, when no later strip changes it.

    strips: (N, kept*scale, W*scale, C), one for each of the plan's rows. They are changed, and may overlap in memory
    as they do in the picture: the cross-fade is held back as a copy until the next strip comes.
    """
    held: np.ndarray | None = None
    for rows, below, strip in zip(plan.rows, (*plan.rows[1:], None), strips):
        if held is not None:
            fade = rows.fade * scale
            strip[:, :fade] = _cross_fade(held, strip[:, :fade], axis=1)
        finished = strip.shape[1] - (below.fade * scale if below else 0)
        held = strip[:, finished:].copy()
        yield strip[:, :finished]


def _cross_fade(before: np.ndarray, after: np.ndarray, *, axis: int) -> np.ndarray:
    """Go over from one picture to the other along an axis."""
    length = before.shape[axis]
    weight = ((np.arange(length) + 0.5) / max(length, 1)).astype(np.float32)
    weight = weight.reshape([length if index == axis else 1 for index in range(before.ndim)])
    mixed = before * (1 - weight) + after * weight
    return mixed if before.dtype == np.float32 else np.rint(mixed).astype(before.dtype)
