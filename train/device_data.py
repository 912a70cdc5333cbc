"""Photographs in a device's memory -> batches made there; the host draws what is to be done, and no more."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data import CropPairs, Cut, PairedPhotographs, Photographs, source_window
from .device_degrade import Canvas, apply_damages, resize
from .loading import Made, Steps, batches

LOG = logging.getLogger(__name__)
SHARE = 0.5  # of the free memory, which photographs may take

Window = tuple[slice, slice]  # rows, columns
Sample = tuple[int, Cut]  # a picture's index, and what is made of it


class StoredPictures:
    """Pictures of any sizes on a device, as one list of their pixels: (P, 3) uint8.

    shapes: (height, width) of each. starts: the place of its first pixel.
    """

    def __init__(self, pictures: Sequence[np.ndarray], device: torch.device):
        self.shapes = [picture.shape[:2] for picture in pictures]
        areas = [height * width for height, width in self.shapes]
        self.starts = np.cumsum([0, *areas[:-1]]).tolist()
        self.pixels = torch.empty((sum(areas), 3), dtype=torch.uint8, device=device)
        for picture, start, area in zip(pictures, self.starts, areas, strict=True):
            self.pixels[start : start + area] = torch.from_numpy(np.ascontiguousarray(picture)).view(-1, 3)

    def cut(self, indices: Sequence[int], windows: Sequence[Window]) -> Canvas:
        """Cut a window out of each picture."""
        sizes = tuple((rows.stop - rows.start, columns.stop - columns.start) for rows, columns in windows)
        facts = [
            (self.starts[index], self.shapes[index][1], rows.start, rows.stop - 1, columns.start, columns.stop - 1)
            for index, (rows, columns) in zip(indices, windows, strict=True)
        ]
        start, width, top, bottom, left, right = torch.tensor(facts, device=self.pixels.device).T[..., None]  # (N, 1)
        down, across = (torch.arange(max(sides), device=self.pixels.device) for sides in zip(*sizes))
        # Windows smaller than the largest are filled with their last row and column.
        rows, columns = (top + down).minimum(bottom), (left + across).minimum(right)
        places = (start + rows * width)[:, :, None] + columns[:, None, :]  # (N, H, W)
        return Canvas(self.pixels[places].permute(0, 3, 1, 2).double(), sizes)


class StoredPhotographs:
    """Photographs, and their LR pictures where they have any, on a device that makes samples of them."""

    def __init__(self, photographs: Photographs, device: torch.device):
        self.hr = StoredPictures(photographs.pictures, device)
        self.lr: StoredPictures | None = None
        if isinstance(photographs, PairedPhotographs):
            self.lr = StoredPictures(photographs.lr_pictures, device)

    def make(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Make the batch that was drawn; all samples have one size and one scale.

        Returns: LR (N, 3, size/scale, size/scale) and HR (N, 3, size, size), float32 RGB in [0, 1].
        """
        indices, cuts = [index for index, _ in samples], [cut for _, cut in samples]
        size, scale = cuts[0].size, cuts[0].scale
        if self.lr is not None:
            windows = [(_divided(cut.rows, scale), _divided(cut.columns, scale)) for cut in cuts]
            lr = self.lr.cut(indices, windows).pixels
            hr = self.hr.cut(indices, [(cut.rows, cut.columns) for cut in cuts]).pixels
        else:
            region = self._regions(indices, cuts)
            damages = [cut.damages for cut in cuts if cut.damages is not None]
            places = [(cut.above, cut.before) for cut in cuts]
            hr = _crop(region, places, size)
            places = [(above // scale, before // scale) for above, before in places]
            lr = _crop(apply_damages(region, damages), places, size // scale)
        return _turned(lr, cuts).float() / 255, _turned(hr, cuts).float() / 255

    def _regions(self, indices: Sequence[int], cuts: Sequence[Cut]) -> Canvas:
        """Cut the crops with their margins out of the photographs, or of reductions of them."""
        shapes = [self.hr.shapes[index] for index in indices]
        if all(cut.reduced == shape for cut, shape in zip(cuts, shapes)):
            return self.hr.cut(indices, [(cut.rows, cut.columns) for cut in cuts])
        sources = [source_window(shape, cut) for cut, shape in zip(cuts, shapes)]
        canvas = self.hr.cut(indices, [(rows, columns) for rows, columns, _ in sources])
        sizes = [(cut.rows.stop - cut.rows.start, cut.columns.stop - cut.columns.start) for cut in cuts]
        return resize(canvas, [box for _, _, box in sources], sizes, [Image.Resampling.BICUBIC] * len(cuts))


def _divided(part: slice, scale: int) -> slice:
    return slice(part.start // scale, part.stop // scale)


def _crop(canvas: Canvas, places: Sequence[tuple[int, int]], size: int) -> Tensor:
    """Cut a square out of each picture, its top left corner at (row, column): (N, 3, size, size)."""
    pixels = canvas.pixels
    corners = torch.tensor(places, device=pixels.device)[:, :, None]  # (N, 2, 1)
    rows, columns = (corners + torch.arange(size, device=pixels.device)).unbind(dim=1)
    picture = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return pixels[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # NHWC -> NCHW


def _turned(pixels: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Flip and turn each square as it was drawn."""
    facts = torch.tensor([(cut.flip, cut.turns % 2, cut.turns // 2) for cut in cuts], device=pixels.device).bool()
    flip, once, twice = facts.T[..., None, None, None]  # each (N, 1, 1, 1)
    pixels = torch.where(flip, pixels.flip(3), pixels)
    pixels = torch.where(once, pixels.rot90(1, (2, 3)), pixels)
    return torch.where(twice, pixels.flip(2, 3), pixels)


def store(photographs: Photographs, device: torch.device) -> StoredPhotographs | None:
    """Put photographs into a GPU's memory; None for the CPU, and where they would take too much of it."""
    if device.type != "cuda":
        return None
    pictures = photographs.pictures
    if isinstance(photographs, PairedPhotographs):
        pictures += photographs.lr_pictures
    needed, free = sum(picture.nbytes for picture in pictures), torch.cuda.mem_get_info(device)[0]
    if needed > SHARE * free:
        LOG.warning(
            "the photographs take %.1f of %.1f GB that %s has free: samples are made on the CPU",
            needed / 1e9, free / 1e9, device,
        )  # fmt: skip
        return None
    return StoredPhotographs(photographs, device)


def device_batches(
    stored: StoredPhotographs, pairs: CropPairs, steps: Steps, *, workers: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the batches of steps, on the device: (N, 3, h, w) LR and (N, 3, H, W) HR."""
    for samples in batches(Made(partial(pairs.draw, seeds_noise=True)), steps, workers=workers, collate=list):
        yield stored.make(samples)
