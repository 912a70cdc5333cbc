"""Photographs on disk -> training samples. Every random choice derives from (seed, stage, phase, index)."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .degrade import Damages, apply_damages, draw_damages, is_clean
from .devices import memory_bytes
from .errors import DataError, ResourceError
from .pictures import (
    describe_fault,
    find_pictures,
    hold_out,
    perceptual_hash,
    picture_size,
    pixel_digest,
    read_picture,
)
from .recipe import DegradeConfig, StageConfig

LOG = logging.getLogger(__name__)
# A reduction filter reaches 2*scale pixels beyond a crop. What damages do near an edge should not be seen either; the
# margin, in pixels of the LR picture, is dropped after them.
FILTER_REACH, MARGIN_LR = 2, 8
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
        return _contiguous(self.apply(index, self.draw(index, size=size, scale=scale, config=config, rng=rng)))

    def draw(
        self,
        index: int,
        *,
        size: int,
        scale: int,
        config: DegradeConfig,
        rng: np.random.Generator,
        seeds_noise: bool = False,
    ) -> Cut:
        """Draw a sample of a picture: see draw_cut."""
        shape = self.pictures[index].shape[:2]
        return draw_cut(shape, size=size, scale=scale, config=config, rng=rng, seeds_noise=seeds_noise)

    def apply(self, index: int, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
        """Make the sample of a picture that was drawn: see apply_cut."""
        return apply_cut(self.pictures[index], cut)


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

    def draw(
        self,
        index: int,
        *,
        size: int,
        scale: int,
        config: DegradeConfig,
        rng: np.random.Generator,
        seeds_noise: bool = False,
    ) -> Cut:
        """See draw_paired_cut. `config` is not asked: the LR picture is damaged already."""
        return draw_paired_cut(self.lr_pictures[index].shape[:2], size=size, scale=scale, rng=rng)

    def apply(self, index: int, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
        """See apply_paired_cut."""
        return apply_paired_cut(self.lr_pictures[index], self.pictures[index], cut)


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
        raise DataError(
            f"{folder}: every picture is smaller than {smallest_side} pixels, the largest training size; "
            "--set stages.N.size=... takes smaller crops in stage N, counted from 0"
        )
    return Photographs(_at(paths, kept), _at(pictures, kept))


def decode_all(
    paths: Sequence[Path], *, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[np.ndarray], list[str]]:
    """Decode the pictures of a folder; those that cannot be read come as empty arrays.

    Returns: (H, W, 3) uint8 RGB for each path, and "name (reason)" for each unreadable one.
    Raises: ResourceError if they do not fit into memory.
    """
    _check_memory(paths, folder=folder)
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


def _check_memory(paths: Sequence[Path], *, folder: Path) -> None:
    """Refuse more pictures than there is memory for: the system would end the process without a word."""
    free = memory_bytes()
    if free is None:
        return
    needed = 0
    for path in paths:
        with suppress(Exception):  # a broken file is told when it is decoded
            needed += 3 * math.prod(picture_size(path))
    if needed > free:
        raise ResourceError(
            f"{folder}: {len(paths)} pictures take {needed / 1e9:.1f} GB in memory, and {free / 1e9:.1f} GB are free; "
            "use fewer or smaller ones"
        )


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
        self._epoch, self._order = -1, np.empty(0, int)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        lr, hr = self.pixels(index)
        return lr / 255, hr / 255

    def pixels(self, index: int) -> tuple[Tensor, Tensor]:
        """Give a sample as it is passed between processes, in a quarter of the bytes: uint8."""
        picture, cut = self.draw(index)
        lr, hr = (image.transpose(2, 0, 1) for image in self.photographs.apply(picture, cut))  # HWC -> CHW
        return torch.from_numpy(np.ascontiguousarray(lr)), torch.from_numpy(np.ascontiguousarray(hr))

    def draw(self, index: int, *, seeds_noise: bool = False) -> tuple[int, Cut]:
        """Draw a sample: its picture, and what is made of it. seeds_noise: see draw_damages."""
        epoch, place = divmod(index, len(self.photographs))
        if epoch != self._epoch:
            self._order = np.random.default_rng((*self.entropy, 0, epoch)).permutation(len(self.photographs))
            self._epoch = epoch
        rng = np.random.default_rng((*self.entropy, 1, index))
        scale = self.scales[0]
        if len(self.scales) > 1:  # all samples of a batch have one scale, so it is drawn by the batch
            batch_rng = np.random.default_rng((*self.entropy, 2, index // self.stage.batch))
            scale = int(batch_rng.choice(self.scales))
        picture = int(self._order[place])
        return picture, self.photographs.draw(
            picture, size=self.stage.size, scale=scale, config=self.config, rng=rng, seeds_noise=seeds_noise
        )


def to_floats(pixels: Tensor, device: torch.device) -> Tensor:
    """(N, 3, H, W) uint8 -> float32 in [0, 1], on a device and channels last."""
    return pixels.to(device, memory_format=torch.channels_last, non_blocking=True) / 255


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)


@dataclass(frozen=True)
class Cut:
    """One sample as it was drawn: where it lies in a photograph, and what is done to it.

    size: of the HR crop, a square.
    reduced: (height, width) that the photograph is reduced to before.
    rows, columns: of that reduction, the crop with a margin; above, before: how much of it lies at the top and left.
    damages: of rows and columns; None where the LR picture is there already.
    flip, turns: of the sample at last; a flip from left to right, then so many quarters of a turn.
    """

    size: int
    scale: int
    reduced: tuple[int, int]
    rows: slice
    columns: slice
    above: int
    before: int
    damages: Damages | None
    flip: bool
    turns: int


def draw_cut(
    shape: tuple[int, ...],
    *,
    size: int,
    scale: int,
    config: DegradeConfig,
    rng: np.random.Generator,
    seeds_noise: bool = False,
) -> Cut:
    """Draw a sample of a photograph of (height, width), both at least `size`. seeds_noise: see draw_damages."""
    height, width = _drawn_size(shape, smallest=size, factors=config.crop_scale, rng=rng)
    top, left = int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1))
    # Cut with a margin, where the picture has one, so that the reduction meets real neighbours.
    margin = _margin(config, scale)
    above, before = min(margin, top // scale * scale), min(margin, left // scale * scale)
    below = min(margin, (height - top - size) // scale * scale)
    after = min(margin, (width - left - size) // scale * scale)
    rows, columns = slice(top - above, top + size + below), slice(left - before, left + size + after)
    region = rows.stop - rows.start, columns.stop - columns.start
    damages = draw_damages(region, scale=scale, config=config, rng=rng, seeds_noise=seeds_noise)
    turns, flip = _draw_turn(rng)
    return Cut(size, scale, (height, width), rows, columns, above, before, damages, flip, turns)


def draw_paired_cut(lr_shape: tuple[int, ...], *, size: int, scale: int, rng: np.random.Generator) -> Cut:
    """Draw a sample of a pair whose LR picture is of (height, width)."""
    side = size // scale
    top, left = (int(rng.integers(0, length - side + 1)) * scale for length in lr_shape)
    turns, flip = _draw_turn(rng)
    reduced = lr_shape[0] * scale, lr_shape[1] * scale
    return Cut(size, scale, reduced, slice(top, top + size), slice(left, left + size), 0, 0, None, flip, turns)


def _draw_turn(rng: np.random.Generator) -> tuple[int, bool]:
    return int(rng.integers(0, 4)), bool(rng.integers(0, 2))


def random_pair(
    picture: np.ndarray, *, size: int, scale: int, config: DegradeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one HR crop at random out of a picture or a reduction of it, degrade it, and flip or turn both.

    picture: (H, W, 3) uint8, both sides at least `size`.
    Returns: LR (size/scale, size/scale, 3) and HR (size, size, 3), uint8.
    """
    return _contiguous(apply_cut(picture, draw_cut(picture.shape[:2], size=size, scale=scale, config=config, rng=rng)))


def apply_cut(picture: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """Make of a photograph, (H, W, 3) uint8, what was drawn for it: LR and HR as from random_pair, perhaps views."""
    assert cut.damages is not None, "pairs have apply_paired_cut"
    region = _reduced_region(picture, cut)
    top, left, side = cut.above // cut.scale, cut.before // cut.scale, cut.size // cut.scale
    lr = apply_damages(region, cut.damages)[top : top + side, left : left + side]
    return _turned(lr, region[cut.above : cut.above + cut.size, cut.before : cut.before + cut.size], cut)


def apply_paired_cut(lr: np.ndarray, hr: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """Make of a pair what was drawn for it: views of the same place of (h, w, 3) and (h*scale, w*scale, 3) uint8."""
    assert hr.shape[:2] == cut.reduced, (hr.shape, cut)
    top, left, side = cut.rows.start // cut.scale, cut.columns.start // cut.scale, cut.size // cut.scale
    return _turned(lr[top : top + side, left : left + side], hr[cut.rows, cut.columns], cut)


def _turned(lr: np.ndarray, hr: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """Flip and turn both in the same way."""
    if cut.flip:
        lr, hr = lr[:, ::-1], hr[:, ::-1]
    return np.rot90(lr, cut.turns), np.rot90(hr, cut.turns)


def _contiguous(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(pair[0]), np.ascontiguousarray(pair[1])


def _drawn_size(
    shape: tuple[int, ...], *, smallest: int, factors: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int]:
    """Draw the (height, width) that a picture is reduced to, as small as `factors` say and a crop still fits."""
    height, width = shape
    if factors == (1.0, 1.0):
        return height, width
    factor = max(rng.uniform(*factors), smallest / min(height, width))
    return max(smallest, round(height * factor)), max(smallest, round(width * factor))


def _margin(config: DegradeConfig, scale: int) -> int:
    """Give how much is cut around a crop, in pixels on the grid of the reduction."""
    if is_clean(config) and config.crop_scale == (1.0, 1.0):  # else the box in Pillow would be rounded otherwise
        return FILTER_REACH * scale
    reach = BLUR_REACH * config.blur_sigma[1] if config.blur_probability else 0.0
    return MARGIN_LR * scale + math.ceil(reach / scale) * scale


def _reduced_region(picture: np.ndarray, cut: Cut) -> np.ndarray:
    """Cut a region out of a picture's reduction without reducing all of it.

    picture: (H, W, 3) uint8. Returns: (rows, columns, 3) uint8, a view where the size is the picture's own.
    """
    if cut.reduced == picture.shape[:2]:
        return picture[cut.rows, cut.columns]
    rows, columns, box = source_window(picture.shape, cut)
    image = Image.fromarray(np.ascontiguousarray(picture[rows, columns]))
    size = cut.columns.stop - cut.columns.start, cut.rows.stop - cut.rows.start
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))


def source_window(shape: tuple[int, ...], cut: Cut) -> tuple[slice, slice, tuple[float, float, float, float]]:
    """Tell what of a photograph of (height, width) the region of a cut is made of.

    Returns: its rows, its columns, and which part of them the region is: (left, top, right, bottom), fractional.
    """
    windows, starts, stops = [], [], []
    for part, old, new in zip((cut.rows, cut.columns), shape, cut.reduced):
        ratio = old / new
        start, stop = part.start * ratio, part.stop * ratio
        # The bicubic filter reaches two pixels of the reduction further; Pillow reads beyond the box if it can.
        reach = math.ceil(2 * ratio) + 1
        window = slice(max(0, int(start) - reach), min(old, math.ceil(stop) + reach))
        windows.append(window)
        starts.append(start - window.start)
        # Rounding may lead out by an epsilon.
        stops.append(min(stop - window.start, window.stop - window.start))
    return windows[0], windows[1], (starts[1], starts[0], stops[1], stops[0])
