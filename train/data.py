"""Photographs on disk -> training samples. Every random choice derives from (seed, stage, phase, index)."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .check import describe_fault, find_pictures, hold_out, perceptual_hash, pixel_digest, read_picture
from .degrade import degrade
from .errors import DataError, ResourceError
from .recipe import DegradeConfig, StageConfig

LOG = logging.getLogger(__name__)
# A reduction filter reaches 2*scale pixels beyond a crop; this many are cut with it and dropped after.
MARGIN_LR = 8
BLUR_REACH = 3  # standard deviations

Item = TypeVar("Item")
AnyPhotographs = TypeVar("AnyPhotographs", bound="Photographs")
AnyPairs = TypeVar("AnyPairs", bound="PairedPhotographs")


@dataclass(frozen=True)
class Photographs:
    """Decoded pictures: each (H, W, 3) uint8 RGB, with the path it came from."""

    paths: tuple[Path, ...]
    pictures: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """A hash of the pixels of each picture."""
        return tuple(pixel_digest(picture) for picture in self.pictures)

    def fingerprint(self) -> str:
        """Hash pixels and order, not names: tells whether a resumed run sees the same data."""
        pairs = zip(self.pictures, self.digests, strict=True)
        text = "\n".join(f"{picture.shape} {digest}" for picture, digest in pairs)
        return f"pixels-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def take(self: AnyPhotographs, indices: Sequence[int]) -> AnyPhotographs:
        """Give some of them, in the order of `indices`."""
        return replace(self, paths=_at(self.paths, indices), pictures=_at(self.pictures, indices))

    def cut(
        self, index: int, *, size: int, scale: int, config: DegradeConfig, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Make one sample of a picture: see random_pair."""
        return random_pair(self.pictures[index], size=size, scale=scale, config=config, rng=rng)


@dataclass(frozen=True)
class PairedPhotographs(Photographs):
    """Photographs whose low-resolution pictures were made elsewhere, and are taken as they are.

    lr_pictures: for each picture (H, W, 3) its (H/scale, W/scale, 3) uint8 RGB.
    """

    lr_pictures: tuple[np.ndarray, ...]

    def fingerprint(self) -> str:
        """See Photographs.fingerprint; of both."""
        text = Photographs((), self.lr_pictures).fingerprint() + super().fingerprint()
        return f"pairs-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def take(self: AnyPairs, indices: Sequence[int]) -> AnyPairs:
        """See Photographs.take; of both."""
        taken = {name: _at(getattr(self, name), indices) for name in ("paths", "pictures", "lr_pictures")}
        return replace(self, **taken)

    def cut(
        self, index: int, *, size: int, scale: int, config: DegradeConfig, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut one sample of a pair: see paired_crop. `config` is not asked: the LR picture is damaged already."""
        return paired_crop(self.lr_pictures[index], self.pictures[index], size=size, scale=scale, rng=rng)


def _at(items: Sequence[Item], indices: Sequence[int]) -> tuple[Item, ...]:
    return tuple(items[index] for index in indices)


def read_photographs(
    folder: Path, *, smallest_side: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Photographs:
    """Decode every picture of a folder into memory and leave out what is too small.

    Raises: DataError that lists every unreadable file, so that none of them ends a run hours later;
    ResourceError if the pictures do not fit into memory.
    """
    paths = find_pictures(folder)
    pictures, unreadable = decode_all(paths, folder=folder, progress=progress)
    if unreadable:
        raise DataError(f"{folder}: {len(unreadable)} unreadable pictures, remove them: {'; '.join(unreadable)}")
    kept = []
    for index, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
        if min(picture.shape[:2]) < smallest_side:
            LOG.warning("%s: left out, %s is smaller than %d", path.name, picture.shape[:2], smallest_side)
        else:
            kept.append(index)
    if not kept:
        raise DataError(f"{folder}: every picture is smaller than {smallest_side} pixels, the largest training size")
    return Photographs(_at(paths, kept), _at(pictures, kept))


def decode_all(
    paths: Sequence[Path], *, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[np.ndarray], list[str]]:
    """Decode the pictures of a folder; those that cannot be read come as empty arrays.

    Returns: (H, W, 3) uint8 RGB for each path, and "name (reason)" for each unreadable one.
    Raises: ResourceError if they do not fit into memory.
    """
    pictures: list[np.ndarray] = []
    unreadable: list[str] = []
    for index, path in enumerate(paths):
        try:
            pictures.append(read_picture(path))
        except MemoryError as exc:
            raise ResourceError(f"{folder}: memory ended at picture {index + 1} of {len(paths)}; use fewer") from exc
        except Exception as exc:  # decoders raise nearly anything on broken files
            unreadable.append(f"{path.relative_to(folder)} ({describe_fault(exc)})")
            pictures.append(np.empty((0, 0, 3), np.uint8))
        progress(index + 1, len(paths))
    return pictures, unreadable


def split_validation(photographs: AnyPhotographs, count: int) -> tuple[AnyPhotographs, AnyPhotographs]:
    """Set up to `count` pictures aside, chosen by a hash of their pixels: it does not depend on names or order.

    At most a fifth of the pictures is taken. Pictures that show the same fall on the same side: see check.hold_out.
    """
    hashes = [perceptual_hash(picture) for picture in photographs.pictures]
    held_out = hold_out(photographs.digests, hashes, count)
    train = [index for index in range(len(photographs)) if index not in held_out]
    return photographs.take(train), photographs.take(sorted(held_out))


class CropPairs(Dataset[tuple[Tensor, Tensor]]):
    """Random LR/HR crop pairs; sample `index` is the same in every process and on every resume.

    photographs: PairedPhotographs give their own LR pictures; others are degraded.
    `entropy` is (seed, stage index, phase index). Items: LR (3, size/scale, size/scale) and HR (3, size, size),
    float32 RGB in [0, 1].
    """

    def __init__(
        self,
        photographs: Photographs,
        *,
        stage: StageConfig,
        config: DegradeConfig,
        scales: tuple[int, ...],
        entropy: tuple[int, int, int],
    ):
        self.photographs = photographs
        self.stage = stage
        self.config = config
        self.scales = scales
        self.entropy = entropy

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(index, len(self.photographs))
        order = np.random.default_rng((*self.entropy, 0, epoch)).permutation(len(self.photographs))
        rng = np.random.default_rng((*self.entropy, 1, index))
        # All samples of a batch have one scale, so it is drawn by the batch.
        batch_rng = np.random.default_rng((*self.entropy, 2, index // self.stage.batch))
        scale = int(batch_rng.choice(self.scales))
        lr, hr = self.photographs.cut(order[place], size=self.stage.size, scale=scale, config=self.config, rng=rng)
        return to_tensor(lr), to_tensor(hr)


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)


def random_pair(
    picture: np.ndarray, *, size: int, scale: int, config: DegradeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one HR crop at random out of a picture or a reduction of it, degrade it, and flip or turn both.

    picture: (H, W, 3) uint8, both sides at least `size`.
    Returns: LR (size/scale, size/scale, 3) and HR (size, size, 3), uint8.
    """
    height, width = _drawn_size(picture.shape[:2], smallest=size, factors=config.crop_scale, rng=rng)
    top, left = int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1))
    # Cut with a margin, where the picture has one, so that the reduction meets real neighbours.
    margin = MARGIN_LR * scale + _blur_margin(config, scale)
    above, before = min(margin, top // scale * scale), min(margin, left // scale * scale)
    below = min(margin, (height - top - size) // scale * scale)
    after = min(margin, (width - left - size) // scale * scale)
    rows, columns = slice(top - above, top + size + below), slice(left - before, left + size + after)
    region = _reduced_region(picture, (height, width), rows, columns)
    lr = degrade(region, scale=scale, config=config, rng=rng)
    lr = lr[above // scale : (above + size) // scale, before // scale : (before + size) // scale]
    return _turned(lr, region[above : above + size, before : before + size], rng)


def paired_crop(
    lr: np.ndarray, hr: np.ndarray, *, size: int, scale: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the same place out of both pictures of a pair, at random, and flip or turn both.

    lr: (h, w, 3) uint8. hr: (h*scale, w*scale, 3) uint8, both sides at least `size`.
    Returns: LR (size/scale, size/scale, 3) and HR (size, size, 3), uint8.
    """
    assert hr.shape[:2] == (lr.shape[0] * scale, lr.shape[1] * scale), (lr.shape, hr.shape, scale)
    side = size // scale
    top, left = (int(rng.integers(0, length - side + 1)) for length in lr.shape[:2])
    hr = hr[top * scale : (top + side) * scale, left * scale : (left + side) * scale]
    return _turned(lr[top : top + side, left : left + side], hr, rng)


def _turned(lr: np.ndarray, hr: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Flip and turn both at random, in the same way."""
    turns, flip = int(rng.integers(0, 4)), bool(rng.integers(0, 2))
    if flip:
        lr, hr = lr[:, ::-1], hr[:, ::-1]
    return np.ascontiguousarray(np.rot90(lr, turns)), np.ascontiguousarray(np.rot90(hr, turns))


def _drawn_size(
    shape: tuple[int, ...], *, smallest: int, factors: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int]:
    """Draw the (height, width) that a picture is reduced to, as small as `factors` say and a crop still fits."""
    height, width = shape
    if factors == (1.0, 1.0):
        return height, width
    factor = max(rng.uniform(*factors), smallest / min(height, width))
    return max(smallest, round(height * factor)), max(smallest, round(width * factor))


def _blur_margin(config: DegradeConfig, scale: int) -> int:
    """Give how far a blur reaches, in pixels, on the grid of the reduction."""
    reach = BLUR_REACH * config.blur_sigma[1] if config.blur_probability else 0.0
    return math.ceil(reach / scale) * scale


def _reduced_region(picture: np.ndarray, size: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    """Cut a region out of a picture's reduction to `size` without reducing all of it.

    picture: (H, W, 3) uint8. Returns: (rows, columns, 3) uint8, a view where the size is the picture's own.
    """
    if size == picture.shape[:2]:
        return picture[rows, columns]
    ratios = [old / new for old, new in zip(picture.shape, size)]
    ends = [(part.start * ratio, part.stop * ratio) for part, ratio in zip((rows, columns), ratios)]
    # The bicubic filter reaches two pixels of the reduction further; Pillow reads beyond the box where there is more.
    reaches = [math.ceil(2 * ratio) + 1 for ratio in ratios]
    firsts = [max(0, int(start) - reach) for (start, _), reach in zip(ends, reaches)]
    lasts = [math.ceil(stop) + reach for (_, stop), reach in zip(ends, reaches)]
    image = Image.fromarray(np.ascontiguousarray(picture[firsts[0] : lasts[0], firsts[1] : lasts[1]]))
    box = (ends[1][0] - firsts[1], ends[0][0] - firsts[0], ends[1][1] - firsts[1], ends[0][1] - firsts[0])
    inside = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # rounding may lead out by an epsilon
    result = image.resize((columns.stop - columns.start, rows.stop - rows.start), Image.Resampling.BICUBIC, box=inside)
    return np.asarray(result)
