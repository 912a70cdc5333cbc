"""Upscaler: plan -> gather -> run -> place. Formats, engines and colour live in the modules beside it."""

from __future__ import annotations

import logging
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from . import bands, device_arrays, files, jobs, memory, pipeline, pixels, planes, resize, tiling
from .backends import Backend, Request, open_backend
from .bundle import Bundle
from .errors import BackendError, ImageError, OptionError, OutOfMemory, SRError
from .planes import Planes
from .stats import Meter, Stats, shape_pixels

LOG = logging.getLogger(__name__)
Picture = TypeVar("Picture", np.ndarray, Image.Image)
# (start, stop) -> (N, stop - start, W, 3): rows of padded pictures.
ReadRows = Callable[[int, int], np.ndarray]

# seams -> largest difference from the untiled result that is accepted, in 8-bit code values.
SEAMS = {"exact": 1.0, "fast": 4.0}
MANY = 1000  # runs that `warmup` makes ready for
BAND_ROWS = 64  # of a result that goes out in bands: putting planes together takes several copies of them
DARK = 8  # a mean code value: what is darker may well come out black
MAX_MIB = 1 << 24
MAX_SIDE = 1 << 24  # pixels
TILE = "a number of pixels from 1, or None"


class Upscaler:
    """Enlarges pictures with a model bundle.

    model: name of a shipped model, a bundle folder, or None for the default one.
    backend: "auto", "onnxruntime" or "openvino"; device: "auto", "cpu", "cuda:N" or, with windows shared out among
        several, "cuda:N,M"; precision: "auto", "fp32",
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
        if not isinstance(seams, str) or seams not in SEAMS:
            raise OptionError(f"seams {seams!r}: one of {', '.join(SEAMS)}")
        wanted_batch = None if batch == "auto" else _count(batch, "batch", "'auto' or a number from 1")
        wanted_mib = None if memory_mib == "auto" else _count(memory_mib, "memory_mib", "'auto' or a number from 1")
        wanted_mib = wanted_mib and min(wanted_mib, MAX_MIB)
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
        request = Request(self._bundle.folder, self._stage, self.scale, "uint8", device, precision)
        main = open_backend(backend, request)
        self._backends: dict[str, Backend] = {"uint8": main}
        self._lanes = pipeline.Lanes(main.lanes) if main.lanes > 1 else None
        self._batch = wanted_batch or main.batch
        # Read once: the same picture is cut the same way, whatever else runs later.
        self._too_large: int | None = None  # window pixels that an engine ran out of memory with
        self._window_pixels = max(
            self._overlap.smallest_window**2,
            memory.window_pixels(
                self._stage.activation_bytes,
                halo=self._overlap.halo,
                batch=self._batch,
                limit_mib=wanted_mib,
                device_free=main.free_bytes(),
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
            On a CUDA device also an array in its memory (`__cuda_array_interface__`: torch, CuPy and others), of
            (H, W, 3) uint8 or float32, whose values are not checked; it gives a DeviceArray, which they take as it is.
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
        images = list(images)
        if not images:
            return []
        meter = Meter()
        for image in images:
            pixels.check_array(image)
        if len({(image.shape, image.dtype) for image in images}) > 1:
            raise ImageError("the pictures of a batch differ in shape or dtype")
        results = []
        with _memory_errors((len(images), *images[0].shape)):
            split = [planes.split(image) for image in images]
            colours = self._enlarge(np.stack([picture.colour for picture in split]), None, meter)
            for image, picture, colour in zip(images, split, colours, strict=True):
                alpha = picture.alpha
                if isinstance(alpha, np.ndarray):
                    alpha = self._enlarge(alpha[None], None, meter, is_alpha=True)[0]
                results.append(planes.join(Planes(colour, alpha), channels=_channels(image)))
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
        The same result as `upscale`.
        """
        if tile is not None:
            tile = _count(tile, "tile", TILE)
        size = _size(size, "size")
        meter = Meter()
        window = bands.Window(rows, size, stride=self._stage.stride)
        plan = self._plan(size, tile)

        constants: deque[np.generic | None] = deque()  # of each row of windows, its alpha if it is the same everywhere

        def padded() -> Iterator[tuple[tiling.Span, np.ndarray]]:
            for row in plan.rows:
                with meter.part("gather"):
                    # Besides its own rows those from which colour bleeds into it.
                    first = max(0, row.start // planes.REACH * planes.REACH - planes.REACH)
                    last = min(size[0], tiling.round_up(row.stop, planes.REACH) + planes.REACH)
                    picture = planes.split(window.read(first, last))
                    if isinstance(picture.alpha, np.ndarray):
                        band, constant = np.stack((picture.colour, picture.alpha)), None
                    else:
                        band, constant = picture.colour[None], picture.alpha
                    band = tiling.pad_to(
                        band[:, row.start - first : row.stop - first], (row.stop - row.start, plan.padded[1])
                    )
                if row is plan.rows[0]:
                    self._expect(self._backend_for(band), plan, meter, runs=plan.count)
                constants.append(constant)
                yield row, band

        def strips() -> Iterator[np.ndarray]:
            for strip in self._strips(padded(), plan, meter, colours=1):
                alpha = constants.popleft()
                # (1 or 2, kept*scale, W*scale, 3): colour and alpha
                yield strip if alpha is None else np.concatenate((strip, np.full_like(strip, alpha)))

        with _memory_errors(size):
            for part in tiling.finished_rows(strips(), plan, scale=self.scale):
                for top in range(0, part.shape[1], BAND_ROWS):
                    band = part[:, top : top + BAND_ROWS]
                    picture = Planes(band[0], band[1] if len(band) > 1 else None)
                    yield planes.join(picture, channels=window.channels)
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
        subsampling: str = "4:4:4",
        lossless: bool = False,
        factor: float | None = None,
        size: tuple[int | None, int | None] | None = None,
        tile: int | None = None,
        max_pixels: int | None = files.MAX_PIXELS,
    ) -> None:
        """Enlarge a file; ICC profile and EXIF are kept, orientation is applied, animations stay animated.

        overwrite: replace an existing file. quality: of JPEG, WebP and AVIF, 1 to 100. subsampling: of the colour of
        JPEG and AVIF, "4:4:4", "4:2:2" or "4:2:0". lossless: of WebP, instead of a quality.
        factor, size, tile: as for `upscale`. max_pixels: larger sources are refused; 0 or None is no limit, and lets
        very large results be streamed.
        Raises: ImageError for an unreadable source, OutputError for an unwritable destination, OptionError for another
        option, BackendError if the engine fails; no partial file stays.
        """
        options = jobs.Options(
            overwrite=overwrite, quality=quality, subsampling=subsampling, lossless=lossless, factor=factor, size=size,
            tile=tile, max_pixels=max_pixels,
        )  # fmt: skip
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
        subsampling: str = "4:4:4",
        lossless: bool = False,
        factor: float | None = None,
        size: tuple[int | None, int | None] | None = None,
        tile: int | None = None,
        max_pixels: int | None = files.MAX_PIXELS,
    ) -> Iterator[tuple[Path, SRError | None]]:
        """Enlarge files (source, destination); decoding, computing and encoding overlap.

        pairs: taken a few ahead, in a thread. The options are those of `upscale_file`.
        Yields: (source, None) when its destination is written, or (source, its SRError), in order.
        """
        options = jobs.Options(
            overwrite=overwrite, quality=quality, subsampling=subsampling, lossless=lossless, factor=factor, size=size,
            tile=tile, max_pixels=max_pixels,
        )  # fmt: skip
        todo = (jobs.Job(Path(src), Path(dst)) for src, dst in pairs)
        with closing(jobs.run_files(self, todo, options)) as results:
            for job, error in results:
                yield job.source, error

    def warmup(self, size: tuple[int, int] | None = None) -> None:
        """Run ahead of time, so that the first picture of that (height, width) meets a ready engine.

        Raises: OptionError unless both are at least 1; BackendError if the engine fails.
        """
        height, width = _size(size or (self._stage.stride, self._stage.stride), "warmup size")
        plan = self._plan((height, width), None)
        meter = Meter()
        with _memory_errors((height, width)):
            self._expect(self._backend("uint8"), plan, meter, runs=MANY)
            self._enlarge(np.zeros((1, height, width, 3), np.uint8), None, meter)

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
        if device_arrays.is_on_device(image):
            if factor is not None or size is not None:
                raise OptionError("a picture on a GPU is enlarged by the model's scale: leave factor and size away")
            return self._upscale_on_device(image, tile, meter)
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

    def _upscale_on_device(self, image: Any, tile: int | None, meter: Meter) -> Any:
        """Enlarge an array in a GPU's memory: (H, W, 3) -> DeviceArray of (H*scale, W*scale, 3)."""
        if self._overlap.fade:
            raise OptionError("a picture on a GPU needs seams='exact'")
        view = device_arrays.view(image)
        backend = self._backend(str(view.dtype)).on_device(view.index)
        height, width, _ = view.shape
        result = device_arrays.DeviceArray(backend.gpu, (height * self.scale, width * self.scale, 3), view.dtype)
        backend.gpu.synchronize()  # what makes the picture may still be under way
        while True:
            plan = self._plan((height, width), tile)
            batch = min(self._batch, plan.count)
            if plan.count > 1:
                backend.expect((batch, *plan.window, 3), runs=plan.count // batch)
            try:
                with meter.part("run"):
                    device_arrays.enlarge(view, result, backend, plan, scale=self.scale, batch=batch)
                break
            except OutOfMemory:
                if not self._shrink(batch, plan.window[0] * plan.window[1]):
                    raise
                meter.add(retries=1)
        meter.add(tiles=plan.count, pixels=height * width)
        return result

    def _upscale_many(self, images: Iterable[Any]) -> Iterator[np.ndarray | Image.Image | SRError]:
        def decode(item: Any) -> tuple[Any, Stats]:
            if not isinstance(item, (str, Path)):
                return item, Stats()
            meter = Meter()
            with meter.part("decode"):
                image, _ = files.read(Path(item))
            return image, meter.stats(pictures=0)

        def compute(decoded: tuple[Any, Stats]) -> Any:
            (image, spent), meter = decoded, Meter()
            result = self.upscale_metered(image, meter=meter)
            self.record(spent + meter.stats())
            return result

        with closing(pipeline.overlap(images, decode=decode, compute=compute)) as results:
            for _, result in results:
                yield result

    def _pass(self, image: np.ndarray, tile: int | None, meter: Meter) -> np.ndarray:
        """Apply the network once to a checked array."""
        picture = planes.split(image)
        colour = self._enlarge(picture.colour[None], tile, meter)[0]
        alpha = picture.alpha
        if isinstance(alpha, np.ndarray):
            alpha = self._enlarge(alpha[None], tile, meter, is_alpha=True)[0]
        return planes.join(Planes(colour, alpha), channels=_channels(image))

    def _enlarge(
        self, images: np.ndarray, tile: int | None, meter: Meter, *, is_alpha: bool = False, in_lanes: bool = True
    ) -> np.ndarray:
        """(N, H, W, 3) -> (N, H*scale, W*scale, 3) of the same dtype."""
        colours = 0 if is_alpha else len(images)
        plan = self._plan(images.shape[1:3], tile)
        padded = tiling.pad_to(images, plan.padded)
        bands = ((row, padded[:, row.start : row.stop]) for row in plan.rows)
        if len(plan.rows) == 1:
            (strip,) = self._strips(bands, plan, meter, colours=colours, in_lanes=in_lanes)
            return strip
        height, width = (side * self.scale for side in plan.size)
        canvas = np.empty((len(images), height, width, 3), images.dtype)
        self._expect(self._backend_for(images), plan, meter, runs=plan.count)
        strips = self._strips(bands, plan, meter, colours=colours, canvas=canvas, in_lanes=in_lanes)
        for _ in tiling.finished_rows(strips, plan, scale=self.scale):
            pass  # it is in the canvas
        return canvas

    def _plan(self, size: tuple[int, int], tile: int | None) -> tiling.Plan:
        if tile is not None:
            side = tiling.round_up(tile, self._stage.stride) + self._overlap.width
            if self._too_large is None or side**2 < self._too_large:
                return tiling.plan(size, window=(side, side), overlap=self._overlap)
        window = tiling.choose_window(size, limit=self._window_pixels, overlap=self._overlap)
        return tiling.plan(size, window=window, overlap=self._overlap)

    def _strips(
        self,
        bands: Iterable[tuple[tiling.Span, np.ndarray]],
        plan: tiling.Plan,
        meter: Meter,
        *,
        colours: int,
        canvas: np.ndarray | None = None,
        in_lanes: bool = True,
    ) -> Iterator[np.ndarray]:
        """Run rows of windows: (N, h, W, 3) padded rows -> (N, kept*scale, W*scale, 3), parts of the canvas if given.

        Batches run ahead in the engine's lanes; they are placed in order, in the caller's thread. Pictures after the
        first `colours` are alpha.
        """

        def run(task: tuple[tiling.Span, np.ndarray, list[tuple[int, tiling.Span]]]) -> np.ndarray:
            _, band, windows = task
            with meter.part("gather"):
                pieces = tiling.gather(band, windows)
            outputs = planes.from_engine(self._run_windows(planes.to_engine(pieces), meter), band.dtype)
            for number, (picture, _) in enumerate(windows):
                if picture >= colours:
                    outputs[number] = planes.bound_alpha(outputs[number], pieces[number], scale=self.scale)
            return outputs

        tasks = ((row, band, windows) for row, band in bands for windows in self._batches(len(band), plan))
        strip = None
        with closing(pipeline.in_order(tasks, run, pool=self._lanes if in_lanes else None)) as done:
            for (row, band, windows), outputs in done:
                top, bottom = row.keep_start * self.scale, min(row.keep_stop, plan.size[0]) * self.scale
                shape = (len(band), bottom - top, plan.size[1] * self.scale, 3)
                if canvas is None and outputs.shape == shape:
                    yield outputs
                    continue
                if strip is None:
                    strip = np.empty(shape, band.dtype) if canvas is None else canvas[:, top:bottom]
                with meter.part("place"):
                    tiling.place(strip, outputs, windows, rows=row, scale=self.scale)
                if windows[-1] == (len(band) - 1, plan.columns[-1]):
                    yield strip
                    strip = None

    def _batches(self, pictures: int, plan: tiling.Plan) -> Iterator[list[tuple[int, tiling.Span]]]:
        """Cut one row of windows, (picture, columns) each, into batches."""
        windows = [(index, columns) for index in range(pictures) for columns in plan.columns]
        while windows:
            batch, windows = windows[: self._batch], windows[self._batch :]
            yield batch

    def _run_windows(self, inputs: np.ndarray, meter: Meter) -> np.ndarray:
        """Run a batch; if memory runs out in halves, and at last each window cut anew inside its context.

        Raises: OutOfMemory if the smallest window does not fit.
        """
        count, height, width, _ = inputs.shape
        if self._too_large is None or height * width < self._too_large:
            try:
                with meter.part("run"):
                    outputs = self._checked_run(self._backend_for(inputs), inputs)
                meter.add(tiles=count)
                return outputs
            except OutOfMemory:
                if not self._shrink(count, height * width):
                    raise
                meter.add(retries=1)
        if count == 1:
            return self._enlarge(inputs, None, meter, in_lanes=False)  # a lane must not wait for lanes
        halves = inputs[: count // 2], inputs[count // 2 :]
        return np.concatenate([self._run_windows(half, meter) for half in halves])

    def _shrink(self, count: int, window_pixels: int) -> bool:
        """After a lack of memory, halve the batch, or else the windows, of what follows; False if both are least."""
        smallest = self._overlap.smallest_window**2
        if count == 1 and window_pixels <= smallest:
            return False
        with self._lock:
            if count > 1:
                LOG.warning("out of memory: trying again with batch %d", count // 2)
                self._batch = min(self._batch, count // 2)
            else:
                limit = max(window_pixels // 2, smallest)
                LOG.warning("out of memory: trying again with windows of %d pixels", limit)
                self._window_pixels = min(self._window_pixels, limit)
                self._too_large = min(self._too_large or window_pixels, window_pixels)
        return True

    def _checked_run(self, backend: Backend, inputs: np.ndarray) -> np.ndarray:
        outputs = backend.run(inputs)
        count, height, width, _ = inputs.shape
        expected = (count, height * self.scale, width * self.scale, 3)
        if outputs.shape != expected or outputs.dtype != inputs.dtype:
            raise BackendError(
                f"{backend.name} returned {outputs.dtype} {outputs.shape}, expected {inputs.dtype} {expected}"
            )
        if self._has_nan(inputs, outputs):
            raise BackendError(
                f"stage {self._stage.name!r} on {backend.name} {backend.precision} produced NaN or infinite values; "
                "use precision='fp32' or another stage"
            )
        return outputs

    def _has_nan(self, inputs: np.ndarray, outputs: np.ndarray) -> bool:
        """Tell whether a network computed NaN or infinity, which a graph with 8-bit ends turns into black."""
        if outputs.dtype == np.uint8:
            if outputs.any() or inputs.mean() <= DARK:
                return False
            outputs = self._backend("float32").run(inputs / np.float32(255))
        return not np.isfinite(outputs).all()

    def _expect(self, backend: Backend, plan: tiling.Plan, meter: Meter, *, runs: int) -> None:
        """Have the engine made ready for a plan's windows; what it has no memory for is cut when its turn comes."""
        count = min(self._batch, len(plan.columns))
        try:
            backend.expect((count, *plan.window, 3), runs=runs)
        except OutOfMemory:
            if not self._shrink(count, plan.window[0] * plan.window[1]):
                raise
            meter.add(retries=1)

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
                request = Request(self._bundle.folder, self._stage, self.scale, ends, main.device, "fp32")
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
    expected = f"(height, width), both from 1 to {MAX_SIDE}"
    if not isinstance(value, Sequence) or len(value) != 2:
        raise OptionError(f"{name} {value!r}: {expected}")
    height, width = _count(value[0], name, expected), _count(value[1], name, expected)
    if max(height, width) > MAX_SIDE:
        raise OptionError(f"{name}: {expected}")
    return height, width


def _count(value: Any, name: str, expected: str) -> int:
    """Take a whole number from 1, NumPy's too. Raises: OptionError."""
    try:
        number = operator.index(value)
    except TypeError as exc:
        raise OptionError(f"{name} {value!r}: {expected}") from exc
    if isinstance(value, bool) or number < 1:
        raise OptionError(f"{name} {value!r}: {expected}")
    return number
