"""Time the SDK on every engine against bilinear interpolation and PyTorch, all in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sdk import Bundle, Upscaler
from sdk.errors import BackendError, BackendUnavailable, BundleError

from . import torch_eager
from .cores import has_strays
from .memory import measure_peak_mib
from .metrics import psnr
from .pictures import BILINEAR, draw_picture, enlarge, fit_picture, read_picture
from .result import model_facts, result_head

PROTOCOL = (
    "From a uint8 array to a uint8 array in memory. All contestants take turns in one process; a turn is a pause of "
    "50 ms, an untimed run and a timed run. Two runs each before the first turn. Peak memory: resident, of a process "
    "of its own that does the same work twice, interpreter and libraries included, graphics memory not. PSNR: of the "
    "engine's result against ONNX Runtime's in fp32, RGB."
)
WARM_UPS = 2
# Worker threads of one engine spin for a while after its run, on the cores of the next.
PAUSE_S = 0.05

Runner = Callable[[np.ndarray], np.ndarray]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Contestant:
    """engine: "bilinear" (PIL), "pytorch", or a backend of the SDK."""

    engine: str
    device: str
    precision: str

    @property
    def name(self) -> str:
        parts = (self.engine, "" if self.precision == "uint8" else self.precision, self.device.replace("cpu", ""))
        return " ".join(filter(None, parts))


BASELINE = Contestant("bilinear", "cpu", "uint8")
REFERENCE = Contestant("onnxruntime", "cpu", "fp32")
EAGER = Contestant("pytorch", "cpu", "fp32")
CONTESTANTS = (
    BASELINE,
    REFERENCE,
    Contestant("openvino", "cpu", "fp32"),
    Contestant("openvino", "cpu", "bf16"),
    Contestant("tensorrt", "cuda:0", "fp32"),
    Contestant("tensorrt", "cuda:0", "fp16"),
    Contestant("onnxruntime", "cuda:0", "fp32"),
    Contestant("onnxruntime", "cuda:0", "fp16"),
    EAGER,
    Contestant("pytorch", "cpu", "bf16"),
    Contestant("pytorch", "cuda:0", "fp32"),
    Contestant("pytorch", "cuda:0", "fp16"),
    Contestant("pytorch", "cuda:0", "bf16"),
)


@dataclass(frozen=True)
class Settings:
    """What is timed.

    sizes: of the LR input, (height, width). picture: file that the input is cut from; None: a drawn one.
    threads: the number of cores that the process was limited to. run: folder of the weights that PyTorch uses.
    """

    sizes: tuple[tuple[int, int], ...]
    repeats: int
    model: str | None = None
    threads: int | None = None
    picture: Path | None = None
    run: Path | None = None


@dataclass(frozen=True)
class Timing:
    """Statistics of one contestant's samples, in milliseconds."""

    median_ms: float
    p95_ms: float
    min_ms: float
    max_ms: float


def run_latency(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Measure every contestant that can run here.

    Returns: the JSON form: facts, one row for each size and contestant, and what was skipped and why.
    Raises: SRError for a missing model, run or picture.
    """
    bundle = Bundle.load(settings.model)
    source = None if settings.picture is None else read_picture(settings.picture)
    head = result_head("latency", protocol=PROTOCOL) | {
        "model": model_facts(bundle),
        "repeats": settings.repeats,
        "threads": settings.threads,
        "picture": "drawn" if settings.picture is None else settings.picture.name,
        "torch_weights": torch_eager.describe_weights(settings.run),
    }
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        runners, skipped = _open_all(settings, stack)
        names = ", ".join(contestant.name for contestant in runners)
        for size in settings.sizes:
            progress(f"{size[0]}x{size[1]}: timing {names}")
            lr = draw_picture(size) if source is None else fit_picture(source, size)
            turns = {contestant: partial(runner, lr) for contestant, runner in runners.items()}
            samples = take_turns(turns, repeats=settings.repeats)
            timings = {contestant: summarise(times_ms) for contestant, times_ms in samples.items()}
            psnr_db = compare_results(runners, lr)
            progress(f"{size[0]}x{size[1]}: peak memory")
            memory_mib = {contestant: measure_peak_mib(_work, contestant, settings, size) for contestant in runners}
            rows += make_rows(timings, memory_mib, psnr_db, size=size, scale=bundle.manifest.scale)
    return head | {"rows": rows, "skipped": skipped}


def take_turns(
    runners: Mapping[Key, Callable[[], object]], *, repeats: int, pause_s: float = PAUSE_S
) -> dict[Key, list[float]]:
    """Time the contestants in turn, so that whatever else the machine does meets all of them.

    Returns: `repeats` samples in milliseconds for each.
    """
    for runner in runners.values():
        for _ in range(WARM_UPS):
            runner()
    samples: dict[Key, list[float]] = {contestant: [] for contestant in runners}
    for _ in range(repeats):
        for contestant, runner in runners.items():
            time.sleep(pause_s)
            runner()
            start = time.perf_counter_ns()
            runner()
            samples[contestant].append((time.perf_counter_ns() - start) / 1e6)
    return samples


def compare_results(runners: Mapping[Contestant, Runner], lr: np.ndarray) -> dict[Contestant, float]:
    """Give the PSNR in dB of each engine of the SDK against the reference; none if that does not run here.

    PyTorch is left out: its weights may be random.
    """
    engines = [contestant for contestant in runners if contestant.engine not in ("bilinear", "pytorch")]
    if REFERENCE not in engines:
        return {}
    expected = runners[REFERENCE](lr)
    return {contestant: psnr(runners[contestant](lr), expected) for contestant in engines if contestant != REFERENCE}


def summarise(times_ms: Sequence[float]) -> Timing:
    """Reduce samples to median, 95th percentile (linear between samples), minimum and maximum."""
    median, p95 = np.percentile(times_ms, (50, 95))
    return Timing(float(median), float(p95), float(min(times_ms)), float(max(times_ms)))


def make_rows(
    timings: Mapping[Contestant, Timing],
    memory_mib: Mapping[Contestant, float],
    psnr_db: Mapping[Contestant, float],
    *,
    size: tuple[int, int],
    scale: int,
) -> list[dict[str, Any]]:
    """Make the table of one LR size, with ratios of medians; a figure is None where what it needs did not run."""
    output_mp = size[0] * size[1] * scale**2 / 1e6
    baseline_ms = timings[BASELINE].median_ms
    reference_ms = timings[REFERENCE].median_ms if REFERENCE in timings else None
    eager_ms = timings[EAGER].median_ms if EAGER in timings else None
    return [
        {
            "size": list(size),
            "contestant": contestant.name,
            **asdict(contestant),
            **{key: round(value, 4) for key, value in asdict(timing).items()},
            "output_mp_per_s": round(output_mp / timing.median_ms * 1e3, 3),
            "times_bilinear": round(timing.median_ms / baseline_ms, 3),
            "speedup_over_onnxruntime_fp32": reference_ms and round(reference_ms / timing.median_ms, 3),
            "speedup_over_pytorch_fp32": eager_ms and round(eager_ms / timing.median_ms, 3),
            "psnr_to_onnxruntime_fp32_db": round(psnr_db[contestant], 2) if contestant in psnr_db else None,
            "peak_memory_mib": round(memory_mib[contestant], 1),
        }
        for contestant, timing in timings.items()
    ]


def _open_all(settings: Settings, stack: ExitStack) -> tuple[dict[Contestant, Runner], list[dict[str, str]]]:
    runners, skipped = {}, []
    for contestant in CONTESTANTS:
        try:
            runners[contestant] = _open(contestant, settings, stack)
        except (BackendError, BundleError) as exc:  # BundleError: exported without that precision
            skipped.append({"contestant": contestant.name, "reason": str(exc)})
    return runners, skipped


def _open(contestant: Contestant, settings: Settings, stack: ExitStack) -> Runner:
    """Make a contestant ready; `stack` closes it.

    Raises: BackendUnavailable if it cannot run here.
    """
    device, precision = contestant.device, contestant.precision
    if contestant.engine in ("bilinear", "pytorch"):
        bundle = Bundle.load(settings.model)
        if contestant.engine == "pytorch":
            return torch_eager.open_network(bundle, run=settings.run, device=device, precision=precision)
        return lambda lr: enlarge(lr, bundle.manifest.scale, resample=BILINEAR)
    upscaler = Upscaler(settings.model, backend=contestant.engine, device=device, precision=precision)
    if settings.threads is not None and device == "cpu" and has_strays():
        upscaler.close()
        raise BackendUnavailable(f"{contestant.engine} does not keep to the cores that --threads gives it")
    return stack.enter_context(upscaler).upscale


def _work(contestant: Contestant, settings: Settings, size: tuple[int, int]) -> None:
    """Do what a contestant is timed for, twice: the first run may allocate less than the second."""
    with ExitStack() as stack:
        runner = _open(contestant, settings, stack)
        for _ in range(2):
            runner(draw_picture(size))
