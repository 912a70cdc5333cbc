"""Measure the runtime against its bounds: the bare engine, the codecs, the canvas, an empty process."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

import sdk
from sdk import Bundle, Upscaler, files, tiling
from sdk.backends import Request, open_backend
from sdk.errors import BackendError, BackendUnavailable
from sdk.files import Metadata

from . import plain
from .cores import usable_cores
from .memory import own_peak_mib, own_rss_mib, run_fresh
from .pictures import draw_picture, find_pictures, read_picture
from .result import model_facts, result_head
from .timing import take_turns

PROTOCOL = (
    "All ratios are of medians of one run. "
    "End to end: Upscaler.upscale from array to array / one inference of the bare engine on the same pixels, in turns. "
    "The bare engine is OpenVINO's own API: a model compiled for that shape in the SDK's precision, one request, no "
    "copy of input or output; on another engine the SDK's backend object. "
    "Tiled: (milliseconds / pixels kept) / (milliseconds / pixels of one window as a picture of its own); the halo's "
    "share is 1 - pixels kept / pixels run. "
    "Many: wall-clock of Upscaler.upscale_files, JPEG to PNG, / bound; on the CPU the bound is (compute + decode + "
    "encode CPU-seconds) / cores, on a GPU the slowest of compute wall-clock, decode and encode / cores; each step is "
    "measured alone, the codecs in one thread (its CPU time), compute as the process's CPU time. A new Upscaler each "
    "time, its engine made ready by a picture of one stride. "
    "Memory: peak resident memory of a new process, interpreter, libraries and input included, minus the canvas (the "
    "result); growth: largest resident memory after the first 100 pictures minus that at 100. "
    "Start: medians of new processes, files in the page cache; the first result is of a 128x128 picture and timed "
    "from the start to the end of the process."
)
PICTURES = Path(__file__).parent.parent / "export" / "pictures"
CROP_SIDES = (400, 701)  # of photographs, in pixels
SMALL_SIDES = (64, 257)  # of the pictures that memory must not grow with
JPEG_QUALITY = 90
RSS_EVERY = 100  # pictures
MB = 1_000_000
MB_PER_MIB = 2**20 / MB


@dataclass(frozen=True)
class Settings:
    """What is measured.

    sizes, tiled_size, memory_sizes: LR, (height, width); `sizes` are multiples of the model's stride. pictures: folder
    of the photographs, None for those of the repository. rounds: of many photographs. starts: processes for a median.
    memory_mib: of the tiled run, as for Upscaler.
    """

    model: str | None = None
    parts: tuple[str, ...] = ()
    repeats: int = 15
    sizes: tuple[tuple[int, int], ...] = ((256, 256), (512, 512), (768, 768))
    tiled_size: tuple[int, int] = (2000, 3000)
    memory_mib: int | str = "auto"
    pictures: Path | None = None
    photographs: int = 50
    rounds: int = 3
    memory_sizes: tuple[tuple[int, int], ...] = ((512, 512), (1500, 2000), (3000, 4000))
    small_pictures: int = 2000
    starts: int = 7


@dataclass(frozen=True)
class Figure:
    """One row of the result.

    unit: "x" is a ratio. target: the largest value that is wanted, None where there is none. details: what the value
    was made from.
    """

    part: str
    case: str
    value: float
    unit: str
    target: float | None
    details: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Give the JSON form."""
        met = None if self.target is None else self.value <= self.target
        return asdict(self) | {"value": round(self.value, 3), "met": met, "details": _rounded(self.details)}


def run_runtime(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Measure the parts that are asked for, or all of them.

    Returns: the JSON form: facts, one row a figure, and what was skipped and why.
    Raises: SRError for a missing model or picture.
    """
    head = result_head("runtime", protocol=PROTOCOL) | {"model": model_facts(Bundle.load(settings.model))}
    with Upscaler(settings.model) as upscaler:
        head["info"] = upscaler.info
    rows, skipped = [], []
    for part in settings.parts or PARTS:
        progress(f"measuring {part}")
        try:
            rows += [figure.row() for figure in PARTS[part](settings)]
        except BackendError as exc:
            skipped.append({"part": part, "reason": str(exc)})
    return head | {"rows": rows, "skipped": skipped}


def measure_overhead(settings: Settings) -> Iterator[Figure]:
    """Compare Upscaler.upscale with the bare engine on pictures that are run in one piece."""
    with Upscaler(settings.model) as upscaler:
        for size in settings.sizes:
            lr = draw_picture(size)
            turns: dict[str, Callable[[], object]] = {
                "upscale_ms": functools.partial(upscaler.upscale, lr),
                "bare_ms": open_bare(Bundle.load(settings.model), upscaler.info, lr),
            }
            times = _medians(take_turns(turns, repeats=settings.repeats))
            ratio = times["upscale_ms"] / times["bare_ms"]
            yield Figure("end to end / bare engine", _size(size), ratio, "x", 1.15, {**times, **_cut(upscaler, size)})


def open_bare(bundle: Bundle, info: dict[str, Any], lr: np.ndarray) -> Callable[[], object]:
    """Make one inference of the engine that an Upscaler chose, without the SDK around it.

    info: of the Upscaler. lr: (h, w, 3) uint8.
    Raises: BackendUnavailable if the picture is not on the model's grid.
    """
    stage = bundle.stage()
    if any(side % stage.stride for side in lr.shape[:2]):
        raise BackendUnavailable(f"a picture of {lr.shape[:2]} is not on the stride grid of {stage.stride}")
    batch = lr[None]
    if info["backend"] != "openvino":
        request = Request(bundle.folder, stage, info["scale"], "uint8", info["device"], info["precision"])
        return functools.partial(open_backend(info["backend"], request).run, batch)
    graph = bundle.folder / stage.graph(precision="fp32", ends="uint8").file.name
    return functools.partial(plain.compile_openvino(graph, batch.shape, precision=info["precision"]), batch)


def measure_tiling(settings: Settings) -> Iterator[Figure]:
    """Compare the time of a pixel in a picture that is cut with that in a window that is a picture of its own."""
    with Upscaler(settings.model, memory_mib=settings.memory_mib) as upscaler:
        size = settings.tiled_size
        plan = _plan(upscaler, size)
        kept, window = size[0] * size[1], plan.window[0] * plan.window[1]
        turns: dict[str, Callable[[], object]] = {
            "tiled_ms": functools.partial(upscaler.upscale, draw_picture(size)),
            "one_piece_ms": functools.partial(upscaler.upscale, draw_picture(plan.window)),
        }
        times = _medians(take_turns(turns, repeats=-(-settings.repeats // 3)))
        ratio = times["tiled_ms"] / kept / (times["one_piece_ms"] / window)
        run = window * plan.count
        details = {**times, **_cut(upscaler, size), "without_halo": ratio * kept / run}
        yield Figure("tiled / one piece, a pixel", _size(size), ratio, "x", None, details)
        yield Figure("halo's share of pixels run", _size(size), 100 * (1 - kept / run), "%", None)


def _cut(upscaler: Upscaler, size: tuple[int, int]) -> dict[str, Any]:
    plan = _plan(upscaler, size)
    return {"windows": plan.count, "window": list(plan.window)}


def _plan(upscaler: Upscaler, size: tuple[int, int]) -> tiling.Plan:
    """Cut a picture as the Upscaler does under seams="exact"."""
    info = upscaler.info
    overlap = tiling.Overlap(halo=info["halo"], stride=info["stride"])
    window = tiling.choose_window(size, limit=info["one_piece_pixels"], overlap=overlap)
    return tiling.plan(size, window=window, overlap=overlap)


def measure_many(settings: Settings) -> Iterator[Figure]:
    """Compare Upscaler.upscale_files with what its steps cost alone; PROTOCOL has the formula."""
    cores = usable_cores()
    with tempfile.TemporaryDirectory() as name:
        sources = write_photographs(settings, Path(name))
        # The first round fills the caches.
        rounds = [_time_steps(settings, sources) | _time_files(settings, sources) for _ in range(settings.rounds + 1)]
        megapixels = sum(image.shape[0] * image.shape[1] for image in map(read_picture, sources)) / 1e6
    seconds = _medians({key: [row[key] for row in rounds[1:]] for key in rounds[0]})
    with Upscaler(settings.model) as upscaler:
        on_cpu = upscaler.info["device"] == "cpu"
    decode, encode = seconds["decode_cpu_s"], seconds["encode_cpu_s"]
    if on_cpu:
        bound = (seconds["compute_cpu_s"] + decode + encode) / cores
    else:
        bound = max(seconds["compute_s"], decode, encode / cores)
    details = {**seconds, "bound_s": bound, "cores": cores, "lr_megapixels": megapixels}
    yield Figure("many files / bound", f"{len(sources)} photographs", seconds["files_s"] / bound, "x", 1.1, details)


def write_photographs(settings: Settings, folder: Path) -> list[Path]:
    """Write seeded crops of the photographs as JPEG files, taking the pictures in turn if there are too few."""
    rng = np.random.default_rng(1)
    paths = []
    found = find_pictures(settings.pictures or PICTURES)
    for index, path in enumerate(islice(cycle(found), settings.photographs)):
        picture = read_picture(path)
        height, width = np.minimum(rng.integers(*CROP_SIDES, 2), picture.shape[:2])
        top, left = rng.integers(0, picture.shape[0] - height + 1), rng.integers(0, picture.shape[1] - width + 1)
        paths.append(folder / f"{index}.jpg")
        crop = picture[top : top + height, left : left + width]
        files.write(paths[-1], np.ascontiguousarray(crop), Metadata(), quality=JPEG_QUALITY, overwrite=True)
    return paths


def _time_steps(settings: Settings, sources: Sequence[Path]) -> dict[str, float]:
    """Do each step alone. Compute runs in the engine's threads, so it has the CPU time of the process."""
    started = time.thread_time()
    pictures = [files.read(path) for path in sources]
    decode_cpu_s = time.thread_time() - started
    with _ready(settings) as upscaler:
        started, started_cpu = time.perf_counter(), time.process_time()
        results = [upscaler.upscale(image) for image, _ in pictures]
        compute_s, compute_cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    started = time.thread_time()
    for path, result, (_, metadata) in zip(sources, results, pictures):
        files.write(path.with_suffix(".alone.png"), result, metadata, quality=95, overwrite=True)
    encode_cpu_s = time.thread_time() - started
    return {
        "decode_cpu_s": decode_cpu_s,
        "compute_cpu_s": compute_cpu_s,
        "compute_s": compute_s,
        "encode_cpu_s": encode_cpu_s,
    }


def _time_files(settings: Settings, sources: Sequence[Path]) -> dict[str, float]:
    """Do all steps in the SDK's pipeline. Raises: the error of a file that fails."""
    pairs = [(path, path.with_suffix(".png")) for path in sources]
    with _ready(settings) as upscaler:
        started, started_cpu = time.perf_counter(), time.process_time()
        for _, error in upscaler.upscale_files(pairs, overwrite=True):
            if error:
                raise error
        return {"files_s": time.perf_counter() - started, "files_cpu_s": time.process_time() - started_cpu}


def _ready(settings: Settings) -> Upscaler:
    upscaler = Upscaler(settings.model)
    upscaler.warmup()
    return upscaler


def measure_memory(settings: Settings) -> Iterator[Figure]:
    """Take the peak of one picture, and the growth over many small ones, each in a process of its own."""
    scale = Bundle.load(settings.model).manifest.scale
    for size in settings.memory_sizes:
        canvas_mb = size[0] * size[1] * scale**2 * 3 / MB
        peaks = run_fresh(_peaks_of_one_size, settings.model, size)
        for name, peak_mib in zip(("first", "again"), peaks):
            peak_mb = peak_mib * MB_PER_MIB
            details = {"peak_mb": peak_mb, "canvas_mb": canvas_mb}
            case = f"{_size(size)}, {name}"
            yield Figure("peak memory beyond the canvas", case, peak_mb - canvas_mb, "MB", 300, details)
    rss = [mib * MB_PER_MIB for mib in run_fresh(_rss_over_pictures, settings.model, settings.small_pictures)]
    case = f"{settings.small_pictures} small pictures"
    details = {"rss_mb": rss, "every": RSS_EVERY}
    yield Figure("memory growth", case, max(rss) - rss[0], "MB", 20, details)


def _peaks_of_one_size(model: str | None, size: tuple[int, int]) -> list[float]:
    """Give the peak in MiB after a picture, and after the same once more, for which an engine may prepare itself."""
    peaks = []
    lr = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    with Upscaler(model) as upscaler:
        for _ in range(2):
            upscaler.upscale(lr)
            peaks.append(own_peak_mib())
    return peaks


def _rss_over_pictures(model: str | None, count: int) -> list[float]:
    """Give the resident memory in MiB after every RSS_EVERY pictures, and at the end."""
    rng = np.random.default_rng(1)
    found = []
    with Upscaler(model) as upscaler:
        for index in range(1, count + 1):
            upscaler.upscale(rng.integers(0, 256, (*rng.integers(*SMALL_SIDES, 2), 3), np.uint8))
            if index % RSS_EVERY == 0 or index == count:
                rss = own_rss_mib()
                if rss is None:
                    raise BackendUnavailable("this system does not tell the resident memory of a process")
                found.append(rss)
    return found


IMPORT_NUMPY = "import sys, time, numpy, PIL.Image; start = time.perf_counter(); "
TIME_IMPORT = IMPORT_NUMPY + "import sdk; print(time.perf_counter() - start)"
HELP = "from sdk.cli import main; main(['--help'])"
FIRST_RESULT = (
    "import sys, numpy, sdk; sdk.Upscaler(sys.argv[1] or None).upscale(numpy.zeros((128, 128, 3), numpy.uint8))"
)


def measure_start(settings: Settings) -> Iterator[Figure]:
    """Time new processes, the cases in turn."""
    model = settings.model or ""
    with tempfile.TemporaryDirectory() as warm:

        def first_in_an_empty_cache() -> float:
            with tempfile.TemporaryDirectory() as empty:
                return _time_process(FIRST_RESULT, model, cache=empty)[0]

        cases: dict[str, tuple[float, Callable[[], float]]] = {
            "import sdk, beyond numpy and PIL": (100, lambda: float(_time_process(TIME_IMPORT)[1])),
            "sr-upscale --help": (400, lambda: _time_process(HELP)[0]),
            "first result, warm cache": (2000, lambda: _time_process(FIRST_RESULT, model, cache=warm)[0]),
            "first result, empty cache": (2000, first_in_an_empty_cache),
        }
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(settings.starts + 1):
            for case, (_, measure) in cases.items():
                seconds[case].append(measure())
    for case, (target, _) in cases.items():
        times_ms = [second * 1e3 for second in seconds[case][1:]]  # the first round fills the caches
        yield Figure("start", case, statistics.median(times_ms), "ms", target, {"times_ms": times_ms})


def _time_process(code: str, *arguments: str, cache: str | None = None) -> tuple[float, str]:
    """Run Python code in a new process; give its wall-clock seconds and what it prints.

    Raises: BackendError if it fails.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(sdk.__file__).parent.parent)}
    if cache is not None:
        environment["SR_CACHE_DIR"] = cache
        environment.pop("SR_ENGINE_DIR", None)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"a new process failed: {last}")
    return took, done.stdout


PARTS: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "overhead": measure_overhead,
    "tiled": measure_tiling,
    "many": measure_many,
    "memory": measure_memory,
    "start": measure_start,
}


def _medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {key: statistics.median(values) for key, values in samples.items()}


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _rounded(value: Any) -> Any:
    """Round the floats of a JSON value to what can be meant."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
