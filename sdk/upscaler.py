"""Upscaler: what applications call. Cutting and running is runner.py; formats, colour and engines lie beside it."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from . import bands, device_arrays, files, jobs, pipeline, pixels, planes, resize, tiling
from .backends import Request
from .bundle import Bundle
from .errors import ImageError, OptionError, OutOfMemory, SRError
from .planes import Planes
from .runner import Runner
from .stats import Meter, Progress, Stats, shape_pixels

Picture = TypeVar("Picture", np.ndarray, Image.Image)

# seams -> largest difference from the untiled result that was measured at export with the halo, in 8-bit code values.
# "fast" asks for half of what it promises: on a picture that was not measured 3 have become 5.
SEAMS = {"exact": 1.0, "fast": 2.0}
MAX_MIB = 1 << 24
MAX_SIDE = 1 << 24  # pixels
TILE = "a number of pixels from 1, or None"


class Upscaler:
    """Enlarges pictures with a model bundle.

    model: name of a shipped model, a bundle folder, or None for the default one.
    backend: "auto", "tensorrt", "onnxruntime" or "openvino"; device: "auto", "cpu", "cuda:N" or, with windows shared
        out among several, "cuda:N,M"; precision: "auto", "fp32", "fp16", "bf16" or "int8", of 8-bit pictures; others
        always run in fp32. What is asked for by name is used or refused, never replaced.
    stage: resolution stage of the bundle; "auto" is the last one trained, whatever the picture's size.
    seams: the halo is the one measured at export to keep tiles within 1 code value of the untiled result in fp32
        ("exact"), or within 4 and cross-faded ("fast").
    batch: windows run at once, or "auto". share_batches: windows of calls in several threads may stand in one batch,
        which fills a GPU with small pictures; an engine whose results depend on what else is in its batch (none on the
        CPU) may then give pixels that differ by a code value from call to call.
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
        share_batches: bool = False,
        memory_mib: int | str = "auto",
        on_picture: Callable[[Stats], None] | None = None,
    ):
        if not isinstance(seams, str) or seams not in SEAMS:
            raise OptionError(f"seams {seams!r}: one of {', '.join(SEAMS)}")
        wanted_batch = None if batch == "auto" else _count(batch, "batch", "'auto' or a number from 1")
        wanted_mib = None if memory_mib == "auto" else _count(memory_mib, "memory_mib", "'auto' or a number from 1")
        wanted_mib = wanted_mib and min(wanted_mib, MAX_MIB)
        self._bundle = Bundle.load(model)
        self._seams = seams
        self._on_picture = on_picture
        self._lock = threading.Lock()
        self._stats = Stats()
        chosen = self._bundle.stage(stage)
        overlap = tiling.Overlap(
            halo=chosen.context(error=SEAMS[seams]) if chosen.halo else 0,
            stride=chosen.stride,
            fade=tiling.fade_width(chosen.stride) if seams == "fast" and chosen.halo else 0,
        )
        request = Request(self._bundle.folder, chosen, self.scale, "uint8", device, precision)
        self._runner = Runner(
            backend, request, overlap=overlap, batch=wanted_batch, memory_mib=wanted_mib, shares=share_batches
        )

    @property
    def scale(self) -> int:
        """The factor that sides grow by in one pass."""
        return self._bundle.manifest.scale

    @property
    def info(self) -> dict[str, Any]:
        """What runs: model, stage, backend, engine, device, precision, and how pictures are cut."""
        runner, stage = self._runner, self._runner.stage
        backend = runner.backends["uint8"]
        side = int(runner.window_pixels**0.5) // stage.stride * stage.stride
        return {
            "model": self._bundle.manifest.name,
            "scale": self.scale,
            "stage": stage.name,
            "weights_sha256": stage.weights.sha256,
            "backend": backend.name,
            "engine": backend.engine,
            "device": backend.device,
            "precision": backend.precision,
            "seams": self._seams,
            "halo": runner.overlap.halo,
            "stride": stage.stride,
            "one_piece_pixels": runner.window_pixels,
            "largest_window": (side, side),
            "batch": runner.batch,
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
        progress: Progress | None = None,
    ) -> Picture:
        """Enlarge one picture by `scale`, or to another factor or size.

        image: (H, W), (H, W, 1..4) uint8, uint16 or float32 in [0, 1], RGB order; or a PIL picture. Not modified.
            On a CUDA device also an array in its memory (`__cuda_array_interface__`: torch, CuPy and others), of
            (H, W, 3) uint8 or float32, whose values are not checked; it gives a DeviceArray, which they take as it is.
        tile: side of a tile in LR pixels, without its halo; None runs in one piece where that fits in memory.
        factor, size: instead of `scale`; size is (height, width) of the result, one of which may be None to keep the
        shape. The network is applied as often as comes nearest, then one antialiased resize gives the exact size.
        progress: called with the share of the windows that have been run, 0 to 1 and rising, in the threads that run
        them, one at a time; what it raises ends the work and comes out here.
        Returns: the same type, dtype and channels, a new array or picture of (H*scale, W*scale). PIL palettes, CMYK and
        the like become RGB or RGBA; ICC profile and EXIF stay in `info`, and an orientation in it is not applied.
        Raises: ImageError for anything else; OptionError for another tile, factor or size; OutOfMemory or another
        BackendError if the engine fails.
        uint8 runs as it is; uint16 and float32 run in fp32, whatever the precision of the 8-bit path.
        Thread-safe; blocks until done.
        """
        meter = Meter(progress)
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
            colours = self._runner.enlarge(np.stack([picture.colour for picture in split]), meter)
            for image, picture, colour in zip(images, split, colours, strict=True):
                alpha = picture.alpha
                if isinstance(alpha, np.ndarray):
                    alpha = self._runner.enlarge(alpha[None], meter, is_alpha=True)[0]
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
        meter = Meter()
        yield from self.upscale_bands_metered(rows, size, tile, meter=meter)
        self.record(meter.stats())

    def upscale_bands_metered(
        self, rows: Iterable[np.ndarray], size: tuple[int, int], tile: int | None = None, *, meter: Meter
    ) -> Iterator[np.ndarray]:
        """Do what `upscale_bands` does, but leave the counting to the caller."""
        if tile is not None:
            tile = _count(tile, "tile", TILE)
        size = _size(size, "size")
        with _memory_errors(size):
            yield from bands.enlarge(self._runner, rows, size, meter, tile=tile)
        meter.add(pixels=size[0] * size[1])

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
        progress: Progress | None = None,
    ) -> None:
        """Enlarge a file; ICC profile and EXIF are kept, orientation is applied, animations stay animated.

        overwrite: replace an existing file. quality: of JPEG, WebP and AVIF, 1 to 100. subsampling: of the colour of
        JPEG and AVIF, "4:4:4", "4:2:2" or "4:2:0". lossless: of WebP, instead of a quality.
        factor, size, tile, progress: as for `upscale`. max_pixels: larger sources are refused; 0 or None is no limit,
        and lets very large results be streamed.
        Raises: ImageError for an unreadable source, OutputError for an unwritable destination, OptionError for another
        option, BackendError if the engine fails; no partial file stays.
        """
        options = jobs.Options(
            overwrite=overwrite, quality=quality, subsampling=subsampling, lossless=lossless, factor=factor, size=size,
            tile=tile, max_pixels=max_pixels,
        )  # fmt: skip
        jobs.run_file(self, jobs.Job(Path(src), Path(dst)), options, progress=progress)

    def upscale_many(
        self, images: Iterable[np.ndarray | Image.Image | str | Path]
    ) -> Iterator[np.ndarray | Image.Image | SRError]:
        """Enlarge pictures one after the other, reading files ahead while the engine works.

        images: arrays, PIL pictures, or paths (which give arrays). Lazy: a few items are taken ahead, in a thread.
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
        wanted = _size(size or (self._runner.stage.stride,) * 2, "warmup size")
        with _memory_errors(wanted):
            self._runner.warm(wanted)

    def close(self) -> None:
        """Free the engines; later calls of `upscale` raise BackendError."""
        self._runner.close()

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
            passes = resize.count_passes(image.shape[:2], wanted, scale=self.scale)
            if meter.is_watched:
                windows = self.count_windows(image.shape[:2], image.dtype, tile, passes=passes)
                is_opaque = not planes.has_alpha(image)
                if not meter.expect(windows if is_opaque else 2 * windows) and is_opaque:
                    meter.forgo(windows)  # of a frame, whose alpha was expected to need some
            for _ in range(passes):
                result = self._pass(result, tile, meter)
            result = resize.resize(result, wanted)
        meter.add(pixels=shape_pixels(image))
        return result

    def count_windows(self, size: tuple[int, int], dtype: np.dtype, tile: int | None, *, passes: int) -> int:
        """Tell how many windows a picture of (height, width) will be cut into, in all passes; alpha not counted."""
        sizes = [(size[0] * self.scale**done, size[1] * self.scale**done) for done in range(passes)]
        return sum(self._runner.plan(each, dtype, tile).count for each in sizes)

    def _upscale_on_device(self, image: Any, tile: int | None, meter: Meter) -> Any:
        if self._runner.overlap.fade:
            raise OptionError("a picture on a GPU needs seams='exact'")
        view = device_arrays.view(image)
        result = self._runner.enlarge_on_device(view, meter, tile=tile)
        meter.add(pixels=view.shape[0] * view.shape[1])
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
        colour = self._runner.enlarge(picture.colour[None], meter, tile=tile)[0]
        alpha = picture.alpha
        if isinstance(alpha, np.ndarray):
            alpha = self._runner.enlarge(alpha[None], meter, tile=tile, is_alpha=True)[0]
        return planes.join(Planes(colour, alpha), channels=_channels(image))


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
