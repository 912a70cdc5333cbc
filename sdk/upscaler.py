"""Upscaler: plan -> gather -> run -> place. Formats, engines and colour live in the modules beside it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from . import files, memory, pipeline, pixels, tiling
from .backends import Backend, Request, open_backend
from .bundle import Bundle
from .errors import BackendError, OptionError, OutOfMemory, SRError

LOG = logging.getLogger(__name__)
Picture = TypeVar("Picture", np.ndarray, Image.Image)

# seams -> largest difference from the untiled result that is accepted, in 8-bit code values.
SEAMS = {"exact": 1.0, "fast": 4.0}


@dataclass(frozen=True)
class Stats:
    """Running totals since the Upscaler was made. seconds: inside `upscale`, summed over threads."""

    pictures: int = 0
    tiles: int = 0
    pixels: int = 0
    retries: int = 0
    seconds: float = 0.0


class Upscaler:
    """Enlarges pictures with a model bundle.

    model: name of a shipped model, a bundle folder, or None for the default one.
    backend: "auto", "onnxruntime" or "openvino"; device: "auto", "cpu" or "cuda:N"; precision: "auto", "fp32",
        "fp16" or "bf16", of 8-bit pictures; others always run in fp32. What is asked for by name is used or refused,
        never replaced.
    stage: resolution stage of the bundle; "auto" is the last one trained, whatever the picture's size.
    seams: the halo is the one measured at export to keep tiles within 1 code value of the untiled result in fp32
        ("exact"), or within 4 and cross-faded ("fast": up to 12 were seen on dithered pictures).
    batch: windows run at once, or "auto".
    Raises: BundleError, BackendUnavailable or OptionError.
    Thread-safe: calls keep nothing on the object but the totals in `stats`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        backend: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        stage: str = "auto",
        seams: str = "exact",
        batch: int | str = "auto",
    ):
        if seams not in SEAMS:
            raise OptionError(f"seams {seams!r}: one of {', '.join(SEAMS)}")
        if batch != "auto" and not _is_count(batch):
            raise OptionError(f"batch {batch!r}: 'auto' or a number from 1")
        self._bundle = Bundle.load(model)
        self._stage = self._bundle.stage(stage)
        self._seams = seams
        self._halo = self._stage.context(error=SEAMS[seams])
        self._lock = threading.Lock()
        self._stats = Stats()
        self._closed = False
        request = Request(self._bundle.folder, self._stage, "uint8", device, precision)
        self._backends: dict[str, Backend] = {"uint8": open_backend(backend, request)}
        self._batch = self._backends["uint8"].batch if batch == "auto" else int(batch)
        # Read once: the same picture is cut the same way, whatever else runs later.
        budget = memory.budget_bytes() // (self._stage.activation_bytes * self._batch)
        self._window_pixels = max((2 * self._halo + 2 * self._stage.stride) ** 2, budget)

    @property
    def scale(self) -> int:
        """The factor that sides grow by."""
        return self._bundle.manifest.scale

    @property
    def info(self) -> dict[str, Any]:
        """What runs: model, stage, backend, engine, device, precision, and how pictures are cut."""
        backend = self._backends["uint8"]
        return {
            "model": self._bundle.manifest.name,
            "scale": self.scale,
            "stage": self._stage.name,
            "backend": backend.name,
            "engine": backend.engine,
            "device": backend.device,
            "precision": backend.precision,
            "seams": self._seams,
            "halo": self._halo,
            "stride": self._stage.stride,
            "one_piece_pixels": self._window_pixels,
            "batch": self._batch,
        }

    @property
    def stats(self) -> Stats:
        """Running totals, a snapshot."""
        with self._lock:
            return self._stats

    def upscale(self, image: Picture, tile: int | None = None) -> Picture:
        """Enlarge one picture by `scale`.

        image: (H, W), (H, W, 1..4) uint8, uint16 or float32 in [0, 1], RGB order; or a PIL picture. Not modified.
        tile: side of a tile in LR pixels, without its halo; None runs in one piece where that fits in memory.
        Returns: the same type, dtype and channels, a new array or picture of (H*scale, W*scale). PIL palettes, CMYK and
        the like become RGB or RGBA; ICC profile and EXIF stay in `info`, and an orientation in it is not applied.
        Raises: ImageError for anything else; OptionError for another tile; OutOfMemory or another BackendError if the
        engine fails.
        uint8 runs as it is; uint16 and float32 run in fp32, whatever the precision of the 8-bit path.
        Thread-safe; blocks until done.
        """
        if tile is not None and not _is_count(tile):
            raise OptionError(f"tile {tile!r}: a number of pixels from 1, or None")
        if isinstance(image, Image.Image):
            picture = pixels.to_pil(self.upscale(pixels.from_pil(image), tile))
            picture.info.update(pixels.kept_info(image, picture.mode))
            return picture
        pixels.check_array(image)
        started = time.perf_counter()
        try:
            planes = pixels.split(image)
            colour, tiles = self._enlarge(planes.colour, tile)
            alpha = planes.alpha
            if isinstance(alpha, np.ndarray):
                alpha, alpha_tiles = self._enlarge(alpha, tile)
                tiles += alpha_tiles
            channels = image.shape[2] if image.ndim == 3 else None
            result = pixels.join(pixels.Planes(colour, alpha), channels=channels, dtype=image.dtype)
        except MemoryError as exc:
            raise OutOfMemory(f"the enlargement of a picture of shape {image.shape} does not fit into memory") from exc
        self._count(pictures=1, tiles=tiles, pixels=image.shape[0] * image.shape[1], started=started)
        return result

    def upscale_file(self, src: str | Path, dst: str | Path, *, overwrite: bool = False, quality: int = 95) -> None:
        """Enlarge a file; ICC profile and EXIF are kept, orientation is applied.

        quality: of JPEG and WebP, 1 to 100. Existing files are replaced only if `overwrite`.
        Raises: ImageError for an unreadable source, OutputError for an unwritable destination, OptionError for another
        quality, BackendError if the engine fails; no partial file stays.
        """
        files.check_quality(quality)
        files.check_output(Path(dst), overwrite=overwrite)
        image, metadata = files.read(Path(src))
        files.check_format(Path(dst), image, scale=self.scale)
        files.write(Path(dst), self.upscale(image), metadata, quality=quality, overwrite=overwrite)

    def upscale_many(
        self, images: Iterable[np.ndarray | Image.Image | str | Path]
    ) -> Iterator[np.ndarray | Image.Image | SRError]:
        """Enlarge pictures one after the other, reading files ahead while the engine works.

        images: arrays, PIL pictures, or paths (which give arrays). Lazy: a few items are taken ahead.
        Yields: results in order; an item that fails yields its SRError instead, and the others go on.
        """

        def decode(item: Any) -> Any:
            return files.read(Path(item))[0] if isinstance(item, (str, Path)) else item

        with closing(pipeline.overlap(images, decode=decode, compute=self.upscale)) as results:
            for _, result in results:
                yield result

    def warmup(self, size: tuple[int, int] | None = None) -> None:
        """Run once ahead of time, so that the first picture of that (height, width) meets a ready engine.

        Raises: OptionError unless both are at least 1; BackendError if the engine fails.
        """
        height, width = size or (self._stage.stride, self._stage.stride)
        if not (_is_count(height) and _is_count(width)):
            raise OptionError(f"warmup size {size!r}: (height, width), both from 1")
        self._enlarge(np.zeros((height, width, 3), np.uint8), None)

    def close(self) -> None:
        """Free the engines; later calls of `upscale` raise BackendError."""
        with self._lock:
            self._closed = True
            for backend in self._backends.values():
                backend.close()

    def __enter__(self) -> Upscaler:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _enlarge(self, image: np.ndarray, tile: int | None) -> tuple[np.ndarray, int]:
        """(H, W, 3) uint8 or float32 -> (H*scale, W*scale, 3) of the same dtype, and the number of windows run."""
        backend = self._backend("uint8" if image.dtype == np.uint8 else "float32")
        batch, limit = self._batch, self._window_pixels
        while True:
            plan = self._plan(image.shape[:2], tile, limit)
            try:
                return self._run(backend, image, plan, batch), len(plan.windows)
            except OutOfMemory:
                smallest = 2 * self._halo + self._stage.stride
                if batch > 1:
                    batch //= 2
                elif plan.window[0] * plan.window[1] > smallest**2:
                    tile, limit = None, plan.window[0] * plan.window[1] // 2
                else:
                    raise
                LOG.warning("out of memory: trying again with batch %d and windows of %d pixels", batch, limit)
                with self._lock:  # remembered, so that the next picture does not fail first
                    self._batch, self._window_pixels = min(self._batch, batch), min(self._window_pixels, limit)
                    self._stats = replace(self._stats, retries=self._stats.retries + 1)

    def _plan(self, size: tuple[int, int], tile: int | None, limit: int) -> tiling.Plan:
        stride, halo = self._stage.stride, self._halo
        if tile is not None:
            side = tiling.round_up(tile, stride) + 2 * halo
            window = (side, side)
        else:
            window = tiling.choose_window(size, limit=limit, halo=halo, stride=stride)
        return tiling.plan(size, window=window, halo=halo, stride=stride, blend=self._seams == "fast")

    def _run(self, backend: Backend, image: np.ndarray, plan: tiling.Plan, batch: int) -> np.ndarray:
        padded = tiling.pad_to(image, plan.padded)
        canvas = np.empty((image.shape[0] * self.scale, image.shape[1] * self.scale, 3), image.dtype)
        for first in range(0, len(plan.windows), batch):
            windows = plan.windows[first : first + batch]
            outputs = backend.run(tiling.gather(padded, windows))
            expected = (len(windows), plan.window[0] * self.scale, plan.window[1] * self.scale, 3)
            if outputs.shape != expected or outputs.dtype != image.dtype:
                raise BackendError(
                    f"{backend.name} returned {outputs.dtype} {outputs.shape}, expected {image.dtype} {expected}"
                )
            if outputs.dtype == np.float32 and not np.isfinite(outputs).all():
                raise BackendError(f"{backend.name} {backend.precision} produced NaN or infinite values: use fp32")
            tiling.place(canvas, outputs, windows, scale=self.scale)
        return canvas

    def _backend(self, ends: str) -> Backend:
        """Give the engine for 8-bit or float pictures; the latter is opened when first needed, always in fp32."""
        with self._lock:
            if self._closed:
                raise BackendError("this Upscaler is closed")
            if ends not in self._backends:
                main = self._backends["uint8"]
                request = Request(self._bundle.folder, self._stage, ends, main.device, "fp32")
                self._backends[ends] = open_backend(main.name, request)
            return self._backends[ends]

    def _count(self, *, pictures: int, tiles: int, pixels: int, started: float) -> None:
        with self._lock:
            self._stats = replace(
                self._stats,
                pictures=self._stats.pictures + pictures,
                tiles=self._stats.tiles + tiles,
                pixels=self._stats.pixels + pixels,
                seconds=self._stats.seconds + time.perf_counter() - started,
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
