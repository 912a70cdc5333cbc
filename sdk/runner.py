"""Runs a picture's windows on the engines of one stage: in batches and lanes, and in less where memory runs out."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np

from . import device_arrays, memory, pipeline, planes, tiling
from .backends import Backend, Request, open_backend
from .errors import BackendError, OptionError, OutOfMemory
from .sharing import SharedBatches
from .stats import Meter

LOG = logging.getLogger(__name__)
MANY = 1000  # runs that `warm` makes ready for
MAX_HALO = 1 << 16  # as if all of a picture were halo: one that is never cut may take all the memory there is
DARK = 8  # a mean code value: what is darker may well come out black
# Of the rows of a picture that are held at once, besides its canvas; what windows are kept low for.
ROWS_BYTES = 512 << 20
MIN_HEIGHT_HALOS = 4  # lower windows would be little but halo
# rows of windows -> a place for their result: (shape, first row, last row) -> array of that shape.
Place = Callable[[tuple[int, ...], int, int], np.ndarray]


class Runner:
    """The engines of a stage, and how pictures are cut for them.

    request: of the engine for 8-bit pictures; the one for others is opened when it is first needed, in fp32.
    batch: windows run at once, None is what the engine likes. memory_mib: for activations, None is automatic.
    shares: windows of calls in several threads may stand in one batch.
    Thread-safe.
    """

    def __init__(
        self,
        backend: str,
        request: Request,
        *,
        overlap: tiling.Overlap,
        batch: int | None,
        memory_mib: int | None,
        shares: bool = False,
    ):
        self.stage, self.scale, self.overlap = request.stage, request.scale, overlap
        self._request = request
        self._lock, self._opening = threading.Lock(), threading.Lock()
        self._closed = False
        self._process = os.getpid()
        main = open_backend(backend, request)
        self.backends: dict[str, Backend] = {"uint8": main}
        self.batch = min(batch or main.batch, main.max_batch or sys.maxsize)
        self._shares = shares and self.batch > 1
        self._shared: dict[str, SharedBatches] = {}
        # With shared batches, as many threads as can stand in one.
        threads = main.lanes * (self.batch if self._shares else 1)
        self._lanes = pipeline.Lanes(threads) if main.lanes > 1 else None
        # Read once: the same picture is cut the same way, whatever else runs later.
        self._too_large: int | None = None  # window pixels that an engine ran out of memory with
        self.window_pixels = max(
            overlap.smallest_window**2,
            memory.window_pixels(
                self.stage.activation_bytes,
                halo=overlap.halo if self.stage.halo else MAX_HALO,
                batch=self.batch,
                limit_mib=memory_mib,
                device_free=main.free_bytes(),
            ),
        )

    def backend(self, ends: str) -> Backend:
        """Give the engine for "uint8" or "float32" pictures. Raises: BackendError if closed, or in a forked child."""
        if os.getpid() != self._process:  # before the lock, which another thread may have held at the fork
            raise BackendError(
                "this Upscaler was made before a fork, and engines do not survive one: make it in the worker process "
                "(gunicorn: post_fork; multiprocessing: in the worker's initializer)"
            )
        if found := self._opened(ends):
            return found
        with self._opening:  # which may take minutes: only those wait who need that engine
            if found := self._opened(ends):
                return found
            main = self.backends["uint8"]
            made = open_backend(main.name, replace(self._request, ends=ends, device=main.device, precision="fp32"))
            with self._lock:
                if not self._closed:
                    self.backends[ends] = made
                    return made
            made.close()
            raise BackendError("this Upscaler is closed")

    def _opened(self, ends: str) -> Backend | None:
        with self._lock:
            if self._closed:
                raise BackendError("this Upscaler is closed")
            return self.backends.get(ends)

    def close(self) -> None:
        """Free the engines; what is run later fails."""
        with self._lock:
            self._closed = True
            for backend in self.backends.values():
                backend.close()

    def plan(self, size: tuple[int, int], dtype: np.dtype, tile: int | None = None) -> tiling.Plan:
        """Cut a picture of (height, width): as few pixels run twice as memory lets, or tiles of a side.

        Raises: OptionError or OutOfMemory if it would be cut, and the network looks at the whole picture.
        """
        if not self.stage.halo:
            return self._whole(size, tile)
        if tile is not None:
            side = tiling.round_up(tile, self.stage.stride) + self.overlap.width
            longest = self.backends["uint8"].max_side
            if longest and min(side, tiling.round_up(max(size), self.stage.stride)) > longest:
                raise OptionError(f"tile {tile}: this engine takes at most {longest - self.overlap.width}")
            if self._too_large is None or side**2 < self._too_large:
                return tiling.plan(size, window=(side, side), overlap=self.overlap)
        # A row of windows is held as it comes and as it goes, each with alpha.
        row_bytes = size[1] * dtype.itemsize * (6 * self.scale**2 + 20)
        lowest = max(self.overlap.smallest_window, MIN_HEIGHT_HALOS * self.overlap.halo)
        max_height = max(lowest, ROWS_BYTES // row_bytes)
        window = tiling.choose_window(
            size,
            limit=self.window_pixels,
            overlap=self.overlap,
            max_height=max_height,
            max_side=self.backends["uint8"].max_side,
        )
        return tiling.plan(size, window=window, overlap=self.overlap)

    def _whole(self, size: tuple[int, int], tile: int | None) -> tiling.Plan:
        """Plan a picture in one piece."""
        height, width = (tiling.round_up(side, self.stage.stride) for side in size)
        longest = min(self.backends["uint8"].max_side or sys.maxsize, tile or sys.maxsize)
        where = f"stage {self.stage.name!r} looks at the whole picture, so that this one of {size[1]}x{size[0]} pixels"
        if max(size) > longest:
            raise OptionError(f"{where} cannot be cut into pieces of {longest}: leave tile away, or take a smaller one")
        if height * width > self.window_pixels:
            raise OutOfMemory(
                f"{where} must fit into memory in one piece, and {self.window_pixels} pixels do: take a smaller "
                "picture, another stage or model, or raise memory_mib"
            )
        return tiling.plan(size, window=(height, width), overlap=self.overlap)

    def enlarge(
        self,
        images: np.ndarray,
        meter: Meter,
        *,
        tile: int | None = None,
        is_alpha: bool = False,
        in_lanes: bool = True,
    ) -> np.ndarray:
        """(N, H, W, 3) -> (N, H*scale, W*scale, 3) of the same dtype."""
        colours = 0 if is_alpha else len(images)
        plan = self.plan(images.shape[1:3], images.dtype, tile)
        padded = tiling.pad_to(images, plan.padded)
        bands = ((row, padded[:, row.start : row.stop]) for row in plan.rows)
        if len(plan.rows) == 1:
            (strip,) = self.strips(bands, plan, meter, colours=colours, in_lanes=in_lanes)
            return strip
        height, width = (side * self.scale for side in plan.size)
        canvas = np.empty((len(images), height, width, 3), images.dtype)
        self.expect(plan, images.dtype, meter)
        strips = self.strips(
            bands, plan, meter, colours=colours, place=lambda _, top, bottom: canvas[:, top:bottom], in_lanes=in_lanes
        )
        for _ in tiling.finished_rows(strips, plan, scale=self.scale):
            pass  # it is in the canvas
        return canvas

    def enlarge_on_device(
        self, picture: device_arrays.View, meter: Meter, *, tile: int | None = None
    ) -> device_arrays.DeviceArray:
        """Enlarge a picture in a GPU's memory, where the result stays. Raises: BackendUnavailable on another device."""
        backend = self.backend(str(picture.dtype)).on_device(picture.index)
        height, width, _ = picture.shape
        result = device_arrays.DeviceArray(backend.gpu, (height * self.scale, width * self.scale, 3), picture.dtype)
        backend.gpu.synchronize()  # what makes the picture may still be under way
        while True:
            plan = self.plan((height, width), picture.dtype, tile)
            batch = min(self.batch, plan.count)
            if plan.count > 1:
                backend.expect((batch, *plan.window, 3), runs=plan.count // batch)
            try:
                with meter.part("run"):
                    device_arrays.enlarge(picture, result, backend, plan, scale=self.scale, batch=batch)
                meter.add(tiles=plan.count)
                return result
            except OutOfMemory:
                if not self._shrink(batch, plan.window[0] * plan.window[1]):
                    raise
                meter.add(retries=1)

    def strips(
        self,
        bands: Iterable[tuple[tiling.Span, np.ndarray]],
        plan: tiling.Plan,
        meter: Meter,
        *,
        colours: int,
        place: Place | None = None,
        in_lanes: bool = True,
    ) -> Iterator[np.ndarray]:
        """Run rows of windows: (N, h, W, 3) padded rows -> (N, kept*scale, W*scale, 3), where `place` puts them.

        Batches run ahead in the engine's lanes; they are placed in order, in the caller's thread. Pictures after the
        first `colours` are alpha.
        """

        def run(task: tuple[tiling.Span, np.ndarray, list[tuple[int, tiling.Span]]]) -> np.ndarray:
            _, band, windows = task
            with meter.part("gather"):
                pieces = tiling.gather(band, windows)
            outputs = planes.from_engine(self._run(planes.to_engine(pieces), meter), band.dtype)
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
                if place is None and outputs.shape == shape:
                    yield outputs
                    continue
                if strip is None:
                    strip = place(shape, top, bottom) if place else np.empty(shape, band.dtype)
                with meter.part("place"):
                    tiling.place(strip, outputs, windows, rows=row, scale=self.scale)
                if windows[-1] == (len(band) - 1, plan.columns[-1]):
                    yield strip
                    strip = None

    def expect(self, plan: tiling.Plan, dtype: np.dtype, meter: Meter, *, runs: int | None = None) -> None:
        """Have the engine made ready for a plan's windows; what it has no memory for is cut when its turn comes."""
        count = min(self.batch, len(plan.columns))
        try:
            self._backend_for(dtype).expect((count, *plan.window, 3), runs=runs or plan.count)
        except OutOfMemory:
            if not self._shrink(count, plan.window[0] * plan.window[1]):
                raise
            meter.add(retries=1)

    def warm(self, size: tuple[int, int]) -> None:
        """Run an 8-bit picture of (height, width), so that the next one meets a ready engine."""
        meter, eight_bits = Meter(), np.dtype(np.uint8)
        self.expect(self.plan(size, eight_bits), eight_bits, meter, runs=MANY)
        self.enlarge(np.zeros((1, *size, 3), eight_bits), meter)

    def _batches(self, pictures: int, plan: tiling.Plan) -> Iterator[list[tuple[int, tiling.Span]]]:
        """Cut one row of windows, (picture, columns) each, into batches."""
        windows = [(index, columns) for index in range(pictures) for columns in plan.columns]
        while windows:
            batch, windows = windows[: self.batch], windows[self.batch :]
            yield batch

    def _run(self, inputs: np.ndarray, meter: Meter) -> np.ndarray:
        """Run a batch; if memory runs out in halves, and at last each window cut anew inside its context.

        Raises: OutOfMemory if the smallest window does not fit.
        """
        count, height, width, _ = inputs.shape
        if self._too_large is None or height * width < self._too_large:
            try:
                with meter.part("run"):
                    outputs = self._checked_run(inputs)
                meter.add(tiles=count)
                return outputs
            except OutOfMemory:
                if not self._shrink(count, height * width):
                    raise
                meter.add(retries=1)
        if count == 1:
            return self.enlarge(inputs, meter, in_lanes=False)  # a lane must not wait for lanes
        halves = inputs[: count // 2], inputs[count // 2 :]
        return np.concatenate([self._run(half, meter) for half in halves])

    def _shrink(self, count: int, window_pixels: int) -> bool:
        """After a lack of memory, halve the batch, or else the windows, of what follows.

        Returns: False if both are least, or windows must not be cut.
        """
        smallest = self.overlap.smallest_window**2
        if count == 1 and (window_pixels <= smallest or not self.stage.halo):
            return False
        with self._lock:
            if count > 1:
                LOG.warning("out of memory: trying again with batch %d", count // 2)
                self.batch = min(self.batch, count // 2)
            else:
                limit = max(window_pixels // 2, smallest)
                LOG.warning("out of memory: trying again with windows of %d pixels", limit)
                self.window_pixels = min(self.window_pixels, limit)
                self._too_large = min(self._too_large or window_pixels, window_pixels)
        return True

    def _checked_run(self, inputs: np.ndarray) -> np.ndarray:
        backend = self._backend_for(inputs.dtype)
        outputs = self._shared_batches(backend, inputs.dtype).run(inputs) if self._shares else backend.run(inputs)
        count, height, width, _ = inputs.shape
        expected = (count, height * self.scale, width * self.scale, 3)
        if outputs.shape != expected or outputs.dtype != inputs.dtype:
            raise BackendError(
                f"{backend.name} returned {outputs.dtype} {outputs.shape}, expected {inputs.dtype} {expected}"
            )
        if self._has_nan(inputs, outputs):
            raise BackendError(
                f"stage {self.stage.name!r} on {backend.name} {backend.precision} produced NaN or infinite values; "
                "use precision='fp32' or another stage"
            )
        return outputs

    def _shared_batches(self, backend: Backend, dtype: np.dtype) -> SharedBatches:
        with self._lock:
            return self._shared.setdefault(
                str(dtype), SharedBatches(backend.run, lanes=backend.lanes, most=lambda: self.batch)
            )

    def _has_nan(self, inputs: np.ndarray, outputs: np.ndarray) -> bool:
        """Tell whether a network computed NaN or infinity, which a graph with 8-bit ends turns into black."""
        if outputs.dtype == np.uint8:
            if outputs.any() or inputs.mean() <= DARK:
                return False
            outputs = self.backend("float32").run(inputs / np.float32(255))
        return not np.isfinite(outputs).all()

    def _backend_for(self, dtype: np.dtype) -> Backend:
        return self.backend("uint8" if dtype == np.uint8 else "float32")
