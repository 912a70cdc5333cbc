"""Photographs on disk -> training samples. Every random choice derives from (seed, stage, phase, index)."""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .degrade import degrade
from .errors import DataError, ResourceError
from .recipe import DegradeConfig, StageConfig

LOG = logging.getLogger(__name__)
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# A reduction filter reaches 2*scale pixels beyond a crop; this many are cut with it and dropped after.
MARGIN_LR = 8


@dataclass(frozen=True)
class Photographs:
    """Decoded pictures: each (H, W, 3) uint8 RGB, with the path it came from."""

    paths: tuple[Path, ...]
    pictures: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def fingerprint(self) -> str:
        """Hash the names and sizes: tells whether a resumed run sees the same data."""
        pairs = zip(self.paths, self.pictures, strict=True)
        text = "\n".join(f"{path.name} {picture.shape}" for path, picture in pairs)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_pictures(folder: Path) -> list[Path]:
    """List the pictures below a folder, sorted by path.

    Raises: DataError if the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder of photographs")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{folder}: no pictures found ({', '.join(sorted(SUFFIXES))})")
    return paths


def read_photographs(
    folder: Path, *, smallest_side: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Photographs:
    """Decode every picture of a folder into memory and leave out what is too small.

    Raises: DataError that lists every unreadable file, so that none of them ends a run hours later;
    ResourceError if the pictures do not fit into memory.
    """
    paths = find_pictures(folder)
    kept: list[Path] = []
    pictures: list[np.ndarray] = []
    unreadable: list[str] = []
    for index, path in enumerate(paths):
        try:
            picture = _read_picture(path)
        except MemoryError as exc:
            raise ResourceError(f"{folder}: memory ended at picture {index + 1} of {len(paths)}; use fewer") from exc
        except UnidentifiedImageError:
            unreadable.append(f"{path.relative_to(folder)} (not a picture)")
        except Exception as exc:  # decoders raise nearly anything on broken files
            unreadable.append(f"{path.relative_to(folder)} ({exc})")
        else:
            if min(picture.shape[:2]) < smallest_side:
                LOG.warning("%s: left out, %s is smaller than %d", path.name, picture.shape[:2], smallest_side)
            else:
                kept.append(path)
                pictures.append(picture)
        progress(index + 1, len(paths))
    if unreadable:
        raise DataError(f"{folder}: {len(unreadable)} unreadable pictures, remove them: {'; '.join(unreadable)}")
    if not pictures:
        raise DataError(f"{folder}: every picture is smaller than {smallest_side} pixels, the largest training size")
    return Photographs(tuple(kept), tuple(pictures))


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"{image.mode} pixels, only 8-bit pictures are read")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def split_validation(photographs: Photographs, count: int) -> tuple[Photographs, Photographs]:
    """Set up to `count` pictures aside, chosen by a hash of their pixels: it does not depend on names or order.

    At most a fifth of the pictures is taken. Pictures with equal pixels fall on the same side.
    """
    room = min(count, len(photographs) // 5)
    digests = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in photographs.pictures]
    held_out = set()
    for digest, copies in sorted(Counter(digests).items()):
        if copies <= room:
            held_out.add(digest)
            room -= copies
    train = [index for index, digest in enumerate(digests) if digest not in held_out]
    validation = [index for index, digest in enumerate(digests) if digest in held_out]
    return _take(photographs, train), _take(photographs, validation)


def _take(photographs: Photographs, indices: Sequence[int]) -> Photographs:
    return Photographs(
        tuple(photographs.paths[index] for index in indices),
        tuple(photographs.pictures[index] for index in indices),
    )


class CropPairs(Dataset[tuple[Tensor, Tensor]]):
    """Random LR/HR crop pairs; sample `index` is the same in every process and on every resume.

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
        picture = self.photographs.pictures[order[place]]
        lr, hr = random_pair(picture, size=self.stage.size, scale=scale, config=self.config, rng=rng)
        return _to_tensor(lr), _to_tensor(hr)


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)  # (H, W, 3) -> (3, H, W)


def random_pair(
    picture: np.ndarray, *, size: int, scale: int, config: DegradeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one HR crop at random, flip or turn it, and degrade it.

    picture: (H, W, 3) uint8, both sides at least `size`.
    Returns: LR (size/scale, size/scale, 3) and HR (size, size, 3), uint8.
    """
    height, width = picture.shape[:2]
    top, left = int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1))
    # Cut with a margin, where the picture has one, so that the reduction meets real neighbours.
    margin = MARGIN_LR * scale
    above, before = min(margin, top // scale * scale), min(margin, left // scale * scale)
    below = min(margin, (height - top - size) // scale * scale)
    after = min(margin, (width - left - size) // scale * scale)
    region = picture[top - above : top + size + below, left - before : left + size + after]
    lr = degrade(region, scale=scale, config=config, rng=rng)
    lr = lr[above // scale : (above + size) // scale, before // scale : (before + size) // scale]
    hr = region[above : above + size, before : before + size]
    turns, flip = int(rng.integers(0, 4)), bool(rng.integers(0, 2))
    if flip:
        lr, hr = lr[:, ::-1], hr[:, ::-1]
    return np.ascontiguousarray(np.rot90(lr, turns)), np.ascontiguousarray(np.rot90(hr, turns))


class Steps(Sampler[list[int]]):
    """The sample indices of the steps `first` to `last` - 1; a step's batch depends on its number alone."""

    def __init__(self, first: int, last: int, *, batch: int):
        self.first, self.last, self.batch = first, last, batch

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield list(range(step * self.batch, (step + 1) * self.batch))


GRACE_SECONDS = 10


def _leave_signals_to_the_parent(worker: int) -> None:
    """Outlive a signal sent to the whole process group for a while: the parent saves, and ends its workers then.

    Not for ever, because SIGTERM is also how a parent that leaves in mid-epoch ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


def batches(
    dataset: CropPairs, *, batch: int, first_step: int, last_step: int, workers: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the batches of steps first_step to last_step - 1: (N, 3, h, w) LR and (N, 3, H, W) HR."""
    # fork shares the decoded pictures with the workers; the start methods that pickle would copy them.
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        dataset,
        batch_sampler=Steps(first_step, last_step, batch=batch),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    yield from loader
