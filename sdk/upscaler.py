"""Upscaler: plan -> gather -> run -> place. Formats, engines and colour live in the modules beside it."""

from __future__ import annotations

import logging
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from . import bands, files, jobs, memory, pipeline, pixels, resize, tiling
from .backends import Backend, Request, open_backend
from .bundle import Bundle
from .errors import BackendError, ImageError, OptionError, OutOfMemory, SRError
from .stats import Meter, Stats, shape_pixels

LOG = logging.getLogger(__name__)
Picture = TypeVar("Picture", np.ndarray, Image.Image)
# (start, stop) -> (N, stop - start, W, 3): rows of padded pictures.
ReadRows = Callable[[int, int], np.ndarray]

# seams -> largest difference from the untiled result that is accepted, in 8-bit code values.
SEAMS = {"exact": 1.0, "fast": 4.0}
MANY = 1000  # runs that `warmup` makes ready for
BAND_ROWS = 64  # of a result that goes out in bands: putting planes together takes several copies of them
TILE = "a number of pixels from 1, or None"


class Upscaler:
    """Enlarges pictures with a model bundle.

    model: name of a shipped model, a bundle folder, or None for the default one.
    backend: "auto", "onnxruntime" or "openvino"; device: "auto", "cpu" or "cuda:N"; precision: "auto", "fp32",
        "fp16" or "bf16", of 8-bit pictures; others always run in fp32. What is asked for by name is used or refused,
        never replaced.
    stage: resolution stage of the bundle; "auto" is the last one trained, whatever the picture's size.
    seams: the halo is the one measured at export to keep tiles within 1 code value of the untiled result in fp32
        ("exact"), or within 4 and cross-faded ("fast").
    batch: windows run at once, or "auto".
    memory_mib: what the engine's activations may take; it sets how large a piece is run at once. "auto" is enough for
        little overlap, and at most a quarter of the memory that is free now.
    on_picture: called with the Stats of each picture that is done, in the thread that made it; what it raises
        surfaces in the call that made the picture.
    Raises: BundleError, BackendUnavailable or OptionError.
    Thread-safe: calls keep nothing on the object but the totals in `stats`. Does not survive a fork: make it in the
    worker process.
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
        memory_mib: int | str = "auto",
        on_picture: Callable[[Stats], None] | None = None,
    ):
        if seams not in SEAMS:
            raise OptionError(f"seams {seams!r}: one of {', '.join(SEAMS)}")
        wanted_batch = None if batch == "auto" else _count(batch, "batch", "'auto' or a number from 1")
        wanted_mib = None if memory_mib == "auto" else _count(memory_mib, "memory_mib", "'auto' or a number from 1")
        self._bundle = Bundle.load(model)
        self._stage = self._bundle.stage(stage)
        self._seams = seams
        self._overlap = tiling.Overlap(
            halo=self._stage.context(error=SEAMS[seams]),
            stride=self._stage.stride,
            fade=tiling.fade_width(self._stage.stride) if seams == "fast" else 0,
        )
        self._on_picture = on_picture
        self._lock = threading.Lock()
        self._stats = Stats()
        self._closed = False
        self._process = os.getpid()
        request = Request(self._bundle.folder, self._stage, "uint8", device, precision)
        self._backends: dict[str, Backend] = {"uint8": open_backend(backend, request)}
        self._batch = wanted_batch or self._backends["uint8"].batch
        # Read once: the same picture is cut the same way, whatever else runs later.
        self._too_large: int | None = None  # window pixels that an engine ran out of memory with
        self._window_pixels = max(
            self._overlap.smallest_window**2,
            memory.window_pixels(
                self._stage.activation_bytes, halo=self._overlap.halo, batch=self._batch, limit_mib=wanted_mib
            ),
        )

    @property
    def scale(self) -> int:
        """The factor that sides grow by in one pass."""
        return self._bundle.manifest.scale

    @property
    def info(self) -> dict[str, Any]:
        """What runs: model, stage, backend, engine, device, precision, and how pictures are cut."""
        backend = self._backends["uint8"]
        side = int(self._window_pixels**0.5) // self._stage.stride * self._stage.stride
        return {
            "model": self._bundle.manifest.name,
            "scale": self.scale,
            "stage": self._stage.name,
            "weights_sha256": self._stage.weights.sha256,
            "backend": backend.name,
            "engine": backend.engine,
            "device": backend.device,
            "precision": backend.precision,
            "seams": self._seams,
            "halo": self._overlap.halo,
            "stride": self._stage.stride,
            "one_piece_pixels": self._window_pixels,
            "largest_window": (side, side),
            "batch": self._batch,
        }

    @property
    def stats(self) -> Stats:
        """Running totals, a snapshot."""
        with self._lock:
            return self._stats

    def upscale(
        self,
        image: Picture,
        tile: int | None = None,
        *,
        factor: float | None = None,
        size: tuple[int | None, int | None] | None = None,
    ) -> Picture:
        """Enlarge one picture by `scale`, or to another factor or size.

        image: (H, W), (H, W, 1..4) uint8, uint16 or float32 in [0, 1], RGB order; or a PIL picture. Not modified.
        tile: side of a tile in LR pixels, without its halo; None runs in one piece where that fits in memory.
        factor, size: instead of `scale`; size is (height, width) of the result, one of which may be None to keep the
        shape. The network is applied as often as comes nearest, then one antialiased resize gives the exact size.
        Returns: the same type, dtype and channels, a new array or picture of (H*scale, W*scale). PIL palettes, CMYK and
        the like become RGB or RGBA; ICC profile and EXIF stay in `info`, and an orientation in it is not applied.
        Raises: ImageError for anything else; OptionError for another tile, factor or size; OutOfMemory or another
        BackendError if the engine fails.
        uint8 runs as it is; uint16 and float32 run in fp32, whatever the precision of the 8-bit path.
        Thread-safe; blocks until done.
        """
        meter = Meter()
        result = self.upscale_metered(image, tile, factor=factor, size=size, meter=meter)
        self.record(meter.stats())
        return result

    def upscale_batch(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Enlarge pictures of one shape and dtype together, as the frames of a video.

        images: arrays as for `upscale`. Returns: one new array each.
        Raises: as `upscale`; ImageError if shapes or dtypes differ.
        """
        if not images:
            return []
        meter = Meter()
        for image in images:
            pixels.check_array(image)
        if len({(image.shape, image.dtype) for image in images}) > 1:
            raise ImageError("the pictures of a batch differ in shape or dtype")
        results = []
        with _memory_errors((len(images), *images[0].shape)):
            split = [pixels.split(image) for image in images]
            colours = self._enlarge(np.stack([planes.colour for planes in split]), None, meter)
            for image, planes, colour in zip(images, split, colours, strict=True):
                alpha = planes.alpha
                if isinstance(alpha, np.ndarray):
                    alpha = self._enlarge(alpha[None], None, meter)[0]
                results.append(pixels.join(pixels.Planes(colour, alpha), channels=_channels(image), dtype=image.dtype))
                meter.add(pixels=shape_pixels(image))
        self.record(meter.stats(pictures=len(images)))
        return results

    def upscale_bands(
        self, rows: Iterable[np.ndarray], size: tuple[int, int], tile: int | None = None
    ) -> Iterator[np.ndarray]:
        """Enlarge a picture that comes and goes in bands of rows, so that it need never be whole in memory.

        rows: (any number, W) or (any number, W, 1..4) arrays from top to bottom, together of `size` (height, width).
        Yields: bands of the result from top to bottom, of the same dtype and channels.
        Raises: as `upscale`; ImageError if the rows do not make up the size.
        The same result as `upscale`, but for the colour of invisible pixels, which is filled from each band alone.
        """
        if tile is not None:
            tile = _count(tile, "tile", TILE)
        size = _size(size, "size")
        meter = Meter()
        window = bands.Window(rows, size, stride=self._stage.stride)
        plan = self._plan(size, tile)

        def strips() -> Iterator[np.ndarray]:
            for row in plan.rows:
                with meter.part("gather"):
                    planes = pixels.split(window.read(row.start, row.stop))
                strip = self._strip_of_band(planes.colour, row, plan, meter)
                alpha = planes.alpha
                if isinstance(alpha, np.ndarray):
                    strip = np.concatenate((strip, self._strip_of_band(alpha, row, plan, meter)))
                elif alpha is not None:
                    strip = np.concatenate((strip, np.full_like(strip, alpha)))
                yield strip  # (1 or 2, kept*scale, W*scale, 3): colour and alpha

        with _memory_errors(size):
            for part in tiling.finished_rows(strips(), plan, scale=self.scale):
                for top in range(0, part.shape[1], BAND_ROWS):
                    band = part[:, top : top + BAND_ROWS]
                    planes = pixels.Planes(band[0], band[1] if len(band) > 1 else None)
                    yield pixels.join(planes, channels=window.channels, dtype=window.dtype)
        window.check_end()
        meter.add(pixels=size[0] * size[1])
        self.record(meter.stats())

    def upscale_file(
        self,
        src: str | Path,
        dst: str | Path,
        *,
        overwrite: bool = False,
        quality: int = 95,
        factor: float | None = None,
        size: tuple[int | None, int | None] | None = None,
    ) -> None:
        """Enlarge a file; ICC profile and EXIF are kept, orientation is applied, animations stay animated.

        quality: of JPEG, WebP and AVIF, 1 to 100. Existing files are replaced only if `overwrite`.
        factor, size: as for `upscale`.
        Raises: ImageError for an unreadable source, OutputError for an unwritable destination, OptionError for another
        quality, BackendError if the engine fails; no partial file stays.
        """
        options = jobs.Options(overwrite=overwrite, quality=quality, factor=factor, size=size)
        jobs.run_file(self, jobs.Job(Path(src), Path(dst)), options)

    def upscale_many(
        self, images: Iterable[np.ndarray | Image.Image | str | Path]
    ) -> Iterator[np.ndarray | Image.Image | SRError]:
        """Enlarge pictures one after the other, reading files ahead while the engine works.

        images: arrays, PIL pictures, or paths (which give arrays). Lazy: a few items are taken ahead.
        Yields: results in order; an item that fails yields its SRError instead, and the others go on.
        Raises: OptionError for a single path, which would be read letter by letter.
        """
        if isinstance(images, (str, Path)):
            raise OptionError(f"upscale_many takes several pictures; for one file write [{str(images)!r}]")
        return self._upscale_many(images)

    def upscale_files(
        self,
        pairs: Iterable[tuple[str | Path, str | Path]],
        *,
        overwrite: bool = False,
        quality: int = 95,
        factor: float | None = None,
        size: tuple[int | None, int | None] | None = None,
    ) -> Iterator[tuple[Path, SRError | None]]:
        """Enlarge files (source, destination); decoding, computing and encoding overlap.

        Yields: (source, None) when its destination is written, or (source, its SRError), in order.
        """
        options = jobs.Options(overwrite=overwrite, quality=quality, factor=factor, size=size)
        todo = (jobs.Job(Path(src), Path(dst)) for src, dst in pairs)
        for job, error in jobs.run_files(self, todo, options):
            yield job.source, error

    def warmup(self, size: tuple[int, int] | None = None) -> None:
        """Run ahead of time, so that the first picture of that (height, width) meets a ready engine.

        Raises: OptionError unless both are at least 1; BackendError if the engine fails.
        """
        height, width = _size(size or (self._stage.stride, self._stage.stride), "warmup size")
        plan = self._plan((height, width), None)
        self._expect(self._backend("uint8"), plan, runs=MANY)
        self._enlarge(np.zeros((1, height, width, 3), np.uint8), None, Meter())

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

    def record(self, stats: Stats) -> None:
        """Add to the totals, and tell `on_picture`."""
        with self._lock:
            self._stats += stats
        if self._on_picture:
            self._on_picture(stats)

    def upscale_metered(
        self,
        image: Picture,
        tile: int | None = None,
        *,
        factor: float | None = None,
        size: tuple[int | None, int | None] | None = None,
        meter: Meter,
    ) -> Picture:
        """Do what `upscale` does, but leave the counting to the caller."""
        if tile is not None:
            tile = _count(tile, "tile", TILE)
        if isinstance(image, Image.Image):
            array = self.upscale_metered(pixels.from_pil(image), tile, factor=factor, size=size, meter=meter)
            picture = pixels.to_pil(array)
            picture.info.update(pixels.kept_info(image, picture.mode))
            return picture
        pixels.check_array(image)
        wanted = resize.target_size(image.shape[:2], scale=self.scale, factor=factor, size_wanted=size)
        result = image
        with _memory_errors(image.shape):
            for _ in range(resize.count_passes(image.shape[:2], wanted, scale=self.scale)):
                result = self._pass(result, tile, meter)
            result = resize.resize(result, wanted)
        meter.add(pixels=shape_pixels(image))
        return result

    def _upscale_many(self, images: Iterable[Any]) -> Iterator[np.ndarray | Image.Image | SRError]:
        def decode(item: Any) -> Any:
            return files.read(Path(item))[0] if isinstance(item, (str, Path)) else item

        with closing(pipeline.overlap(images, decode=decode, compute=self.upscale)) as results:
            for _, result in results:
                yield result

    def _pass(self, image: np.ndarray, tile: int | None, meter: Meter) -> np.ndarray:
        """Apply the network once to a checked array."""
        planes = pixels.split(image)
        colour = self._enlarge(planes.colour[None], tile, meter)[0]
        alpha = planes.alpha
        if isinstance(alpha, np.ndarray):
            alpha = self._enlarge(alpha[None], tile, meter)[0]
        return pixels.join(pixels.Planes(colour, alpha), channels=_channels(image), dtype=image.dtype)

    def _enlarge(self, images: np.ndarray, tile: int | None, meter: Meter) -> np.ndarray:
        """(N, H, W, 3) uint8 or float32 -> (N, H*scale, W*scale, 3) of the same dtype."""
        while True:
            plan = self._plan(images.shape[1:3], tile)
            try:
                return self._run(images, plan, meter)
            except OutOfMemory:
                if not self._shrink_windows(plan, meter):
                    raise

    def _plan(self, size: tuple[int, int], tile: int | None) -> tiling.Plan:
        limit = self._window_pixels
        if tile is not None:
            side = tiling.round_up(tile, self._stage.stride) + self._overlap.width
            if self._too_large is None or side**2 < self._too_large:
                return tiling.plan(size, window=(side, side), overlap=self._overlap)
        window = tiling.choose_window(size, limit=limit, overlap=self._overlap)
        return tiling.plan(size, window=window, overlap=self._overlap)

    def _shrink_windows(self, plan: tiling.Plan, meter: Meter) -> bool:
        """Halve the windows from now on, so that the next picture does not fail first; False if they cannot be."""
        pixels_run, smallest = plan.window[0] * plan.window[1], self._overlap.smallest_window**2
        if pixels_run <= smallest:
            return False
        limit = max(pixels_run // 2, smallest)
        LOG.warning("out of memory: trying again with windows of %d pixels", limit)
        with self._lock:
            self._window_pixels = min(self._window_pixels, limit)
            self._too_large = min(self._too_large or pixels_run, pixels_run)
        meter.add(retries=1)
        return True

    def _run(self, images: np.ndarray, plan: tiling.Plan, meter: Meter) -> np.ndarray:
        padded = tiling.pad_to(images, plan.padded)
        if len(plan.rows) == 1:
            return self._strip(padded, plan.rows[0], plan, meter)
        height, width = (side * self.scale for side in plan.size)
        canvas = np.empty((len(images), height, width, 3), images.dtype)
        self._expect(self._backend_for(images), plan, runs=plan.count)
        strips = (
            self._strip(
                padded[:, row.start : row.stop],
                row,
                plan,
                meter,
                out=canvas[:, row.keep_start * self.scale : row.keep_stop * self.scale],
            )
            for row in plan.rows
        )
        for _ in tiling.finished_rows(strips, plan, scale=self.scale):
            pass  # it is in the canvas
        return canvas

    def _strip(
        self, band: np.ndarray, row: tiling.Span, plan: tiling.Plan, meter: Meter, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Run one row of windows: (N, h, W, 3) padded rows -> (N, kept*scale, W*scale, 3), into `out` if given."""
        backend = self._backend_for(band)
        band = tiling.pad_to(band, (band.shape[1], plan.padded[1]))
        windows = [(index, columns) for index in range(len(band)) for columns in plan.columns]
        height, width = (min(row.keep_stop, plan.size[0]) - row.keep_start) * self.scale, plan.size[1] * self.scale
        first = 0
        while first < len(windows):
            batch = windows[first : first + self._batch]
            with meter.part("gather"):
                inputs = tiling.gather(band, batch)
            try:
                with meter.part("run"):
                    outputs = self._checked_run(backend, inputs)
            except OutOfMemory:
                if len(batch) == 1:
                    raise
                LOG.warning("out of memory: trying again with batch %d", len(batch) // 2)
                with self._lock:
                    self._batch = min(self._batch, len(batch) // 2)
                meter.add(retries=1)
                continue
            meter.add(tiles=len(batch))
            if out is None and len(windows) == 1 and outputs.shape[1:3] == (height, width):
                return outputs
            with meter.part("place"):
                if out is None:
                    out = np.empty((len(band), height, width, 3), band.dtype)
                tiling.place(out, outputs, batch, rows=row, scale=self.scale)
            first += len(batch)
        assert out is not None
        return out

    def _strip_of_band(self, band: np.ndarray, row: tiling.Span, plan: tiling.Plan, meter: Meter) -> np.ndarray:
        """Run one row of windows of a picture that comes in bands: (h, W, 3) -> (1, kept*scale, W*scale, 3)."""
        try:
            self._expect(self._backend_for(band), plan, runs=plan.count)
            return self._strip(band[None], row, plan, meter)
        except OutOfMemory:  # the rows before are given away: this one is cut anew, inside its context
            if not self._shrink_windows(plan, meter):
                raise
            height, width = min(row.keep_stop, plan.size[0]) - row.keep_start, plan.size[1]
            top = (row.keep_start - row.start) * self.scale
            return self._enlarge(band[None], None, meter)[:, top : top + height * self.scale, : width * self.scale]

    def _checked_run(self, backend: Backend, inputs: np.ndarray) -> np.ndarray:
        outputs = backend.run(inputs)
        count, height, width, _ = inputs.shape
        expected = (count, height * self.scale, width * self.scale, 3)
        if outputs.shape != expected or outputs.dtype != inputs.dtype:
            raise BackendError(
                f"{backend.name} returned {outputs.dtype} {outputs.shape}, expected {inputs.dtype} {expected}"
            )
        if outputs.dtype == np.float32 and not np.isfinite(outputs).all():
            raise BackendError(
                f"stage {self._stage.name!r} on {backend.name} {backend.precision} produced NaN or infinite values; "
                "use precision='fp32' or another stage"
            )
        return outputs

    def _expect(self, backend: Backend, plan: tiling.Plan, *, runs: int) -> None:
        backend.expect((min(self._batch, len(plan.columns)), *plan.window, 3), runs=runs)

    def _backend_for(self, image: np.ndarray) -> Backend:
        return self._backend("uint8" if image.dtype == np.uint8 else "float32")

    def _backend(self, ends: str) -> Backend:
        """Give the engine for 8-bit or float pictures; the latter is opened when first needed, always in fp32."""
        if os.getpid() != self._process:  # before the lock, which another thread may have held at the fork
            raise BackendError(
                "this Upscaler was made before a fork, and engines do not survive one: make it in the worker process "
                "(gunicorn: post_fork; multiprocessing: in the worker's initializer)"
            )
        with self._lock:
            if self._closed:
                raise BackendError("this Upscaler is closed")
            if ends not in self._backends:
                main = self._backends["uint8"]
                request = Request(self._bundle.folder, self._stage, ends, main.device, "fp32")
                self._backends[ends] = open_backend(main.name, request)
            return self._backends[ends]


@contextmanager
def _memory_errors(shape: tuple[int, ...]) -> Iterator[None]:
    """Turn NumPy's and Python's lack of memory into an error of ours."""
    try:
        yield
    except MemoryError as exc:
        raise OutOfMemory(f"the enlargement of a picture of shape {shape} does not fit into memory") from exc


def _channels(image: np.ndarray) -> int | None:
    """Give the channels that pixels.join takes: None for an (H, W) array."""
    return image.shape[2] if image.ndim == 3 else None


def _size(value: Any, name: str) -> tuple[int, int]:
    """Take (height, width), whole numbers from 1. Raises: OptionError."""
    expected = "(height, width), both from 1"
    if not isinstance(value, Sequence) or len(value) != 2:
        raise OptionError(f"{name} {value!r}: {expected}")
    return _count(value[0], name, expected), _count(value[1], name, expected)


def _count(value: Any, name: str, expected: str) -> int:
    """Take a whole number from 1, NumPy's too. Raises: OptionError."""
    try:
        number = operator.index(value)
    except TypeError as exc:
        raise OptionError(f"{name} {value!r}: {expected}") from exc
    if isinstance(value, bool) or number < 1:
        raise OptionError(f"{name} {value!r}: {expected}")
    return number
