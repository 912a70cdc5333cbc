"""Time the SDK on every engine against interpolation, and against the same network run by other means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdk import Bundle
from sdk.backends import MODULES

from . import torch_eager
from .contestants import (
    BASELINE,
    EAGER,
    REFERENCE,
    Contestant,
    Runner,
    Setup,
    choose,
    open_contestant,
    open_contestants,
)
from .device_memory import watch_device
from .energy import energy_joules
from .memory import measure_peak_mib
from .metrics import psnr
from .pictures import draw_picture, fit_picture, read_picture
from .result import first_line, model_facts, result_head
from .timing import WARM_UPS, Timing, summarise, take_turns

PROTOCOL = (
    "From a uint8 array to a uint8 array in memory. All contestants take turns in one process; a turn is a pause of "
    "50 ms, an untimed run and a timed run. Five runs each before the first turn. Percentiles: linear between "
    "samples. Bilinear, bicubic, lanczos: Pillow's, or OpenCV's; bilinear through an engine: a model of one Resize, "
    "run by the SDK as the networks are. Plain: the engine's own API on the whole picture, ONNX Runtime with default "
    "options, OpenVINO compiled for the shape; PyTorch on channels-last tensors, bf16 by autocast, compiled for the "
    "shape where it says so, on CPUs with weights frozen; its fp32 is not TF32. Speed-ups: over ONNX Runtime by the "
    "SDK and eager PyTorch in fp32 on the same device. Peak memory: resident, of a process of its own that does the "
    "same work as often as before the first turn, interpreter and libraries included; of a GPU's memory, by how much "
    "less was free meanwhile than before. Energy: of the processor's packages (RAPL) over a second of such runs, "
    "divided by their number, where it can be read; not for what runs on a GPU. PSNR: of the engine's result against "
    "ONNX Runtime's in fp32, RGB."
)


@dataclass(frozen=True)
class Settings:
    """What is timed.

    sizes: of the LR input, (height, width). batches: pictures at once. stages: resolution stages; none: that of setup.
    contestants: names; none: all. picture: file that the input is cut from; None: a drawn one. setup.threads: the
    number of cores that the process was limited to.
    """

    sizes: tuple[tuple[int, int], ...]
    repeats: int
    setup: Setup = field(default_factory=Setup)
    batches: tuple[int, ...] = (1,)
    stages: tuple[str, ...] = ()
    contestants: tuple[str, ...] = ()
    picture: Path | None = None


@dataclass(frozen=True)
class Memory:
    """Peaks in MiB: of the process, and of what it takes on a GPU; None where it cannot be read, or ended early."""

    peak_memory_mib: float | None
    peak_device_mib: float | None


def run_latency(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Measure every contestant that can run here.

    Returns: the JSON form: facts, one row for each size and contestant, and what was skipped and why.
    Raises: SRError for a missing model, stage, run or picture, or an unknown contestant.
    """
    setup = settings.setup
    choose(settings.contestants)
    bundle = Bundle.load(setup.model)
    stages = [bundle.stage(name).name for name in settings.stages or (setup.stage,)]
    source = None if settings.picture is None else read_picture(settings.picture)
    head = result_head("latency", protocol=PROTOCOL) | {
        "model": model_facts(bundle, stage=stages[0]),
        "repeats": settings.repeats,
        "threads": setup.threads,
        "picture": "drawn" if settings.picture is None else settings.picture.name,
        "torch_weights": torch_eager.describe_weights(setup.run),
    }
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for stage in dict.fromkeys(stages):
        for batch in dict.fromkeys(settings.batches):
            chosen = replace(setup, stage=stage, batch=None if batch == 1 else batch)
            found, others = _measure(settings, chosen, batch, source, bundle.manifest.scale, progress)
            rows += found
            skipped += [each for each in others if each not in skipped]
    return head | {"rows": rows, "skipped": skipped}


def _measure(
    settings: Settings,
    setup: Setup,
    batch: int,
    source: np.ndarray | None,
    scale: int,
    progress: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Measure one stage and batch at all sizes; give the rows, and what was skipped."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        runners, skipped = open_contestants(choose(settings.contestants), setup, stack)
        for size in settings.sizes:
            picture = draw_picture(size) if source is None else fit_picture(source, size)
            lr = picture if batch == 1 else np.stack([np.roll(picture, 8 * number, axis=1) for number in range(batch)])
            able, unable = try_all(runners, lr)
            skipped += unable
            what = f"stage {setup.stage}, {batch} of {size[0]}x{size[1]}"
            progress(f"{what}: timing {', '.join(contestant.name for contestant in able)}")
            turns = {contestant: partial(runner, lr) for contestant, runner in able.items()}
            samples = take_turns(turns, repeats=settings.repeats)
            timings = {contestant: summarise(times_ms) for contestant, times_ms in samples.items()}
            psnr_db = compare_results(able, lr)
            energy_j = {each: energy_joules(turn) for each, turn in turns.items() if each.device == "cpu"}
            progress(f"{what}: peak memory")
            memory = {}
            for contestant in able:
                try:
                    memory[contestant] = measure_memory(contestant, setup, lr.shape)
                except Exception as exc:  # of the engine, in a process that began with less
                    memory[contestant] = Memory(None, None)
                    skipped.append({"contestant": contestant.name, "reason": f"peak memory: {first_line(exc)}"})
            about = {"stage": setup.stage, "batch": batch}
            found = make_rows(timings, memory, psnr_db, energy_j, size=size, scale=scale, batch=batch)
            rows += [about | row for row in found]
    return rows, skipped


def try_all(
    runners: Mapping[Contestant, Runner], lr: np.ndarray
) -> tuple[dict[Contestant, Runner], list[dict[str, str]]]:
    """Run each once; give those that can, and the rest with reasons: a large picture may be too much for some."""
    able, unable = {}, []
    for contestant, runner in runners.items():
        try:
            runner(lr)
            able[contestant] = runner
        except Exception as exc:  # each engine has errors of its own
            size = "x".join(map(str, lr.shape[:-1]))
            unable.append({"contestant": contestant.name, "reason": f"{size}: {first_line(exc)}"})
    return able, unable


def compare_results(runners: Mapping[Contestant, Runner], lr: np.ndarray) -> dict[Contestant, float]:
    """Give the PSNR in dB of each engine of the SDK against the reference; none if that does not run here.

    PyTorch is left out: its weights may be random.
    """
    engines = [contestant for contestant in runners if contestant.engine.removeprefix("plain ") in MODULES]
    if REFERENCE not in engines:
        return {}
    expected = runners[REFERENCE](lr)
    return {contestant: psnr(runners[contestant](lr), expected) for contestant in engines if contestant != REFERENCE}


def make_rows(
    timings: Mapping[Contestant, Timing],
    memory: Mapping[Contestant, Memory],
    psnr_db: Mapping[Contestant, float],
    energy_j: Mapping[Contestant, float | None],
    *,
    size: tuple[int, int],
    scale: int,
    batch: int = 1,
) -> list[dict[str, Any]]:
    """Make the table of one LR size, with ratios of medians; a figure is None where what it needs did not run.

    The references are those on the same device, but for bilinear.
    """
    output_mp = batch * size[0] * size[1] * scale**2 / 1e6
    baseline_ms = timings[BASELINE].median_ms

    def speedup(contestant: Contestant, reference: Contestant) -> float | None:
        found = timings.get(replace(reference, device=contestant.device))
        return None if found is None else round(found.median_ms / timings[contestant].median_ms, 3)

    return [
        {
            "size": list(size),
            "contestant": contestant.name,
            **asdict(contestant),
            **{key: round(value, 4) for key, value in asdict(timing).items()},
            "output_mp_per_s": round(output_mp / timing.median_ms * 1e3, 3),
            "times_bilinear": round(timing.median_ms / baseline_ms, 3),
            "speedup_over_onnxruntime_fp32": speedup(contestant, REFERENCE),
            "speedup_over_pytorch_fp32": speedup(contestant, EAGER),
            "psnr_to_onnxruntime_fp32_db": round(psnr_db[contestant], 2) if contestant in psnr_db else None,
            **{key: value and round(value, 1) for key, value in asdict(memory[contestant]).items()},
            "energy_j": (found := energy_j.get(contestant)) and round(found, 4),
        }
        for contestant, timing in timings.items()
    ]


def measure_memory(contestant: Contestant, setup: Setup, shape: tuple[int, ...]) -> Memory:
    """Have a process of its own do what a contestant is timed for. Raises: as measure_peak_mib."""
    with watch_device(contestant.device) as device_mib:
        return Memory(measure_peak_mib(_work, contestant, setup, shape), device_mib())


def _work(contestant: Contestant, setup: Setup, shape: tuple[int, ...]) -> None:
    """Do what a contestant is timed for, as often as before the first timed run: by then all is allocated."""
    with ExitStack() as stack:
        runner = open_contestant(contestant, setup, stack)
        for _ in range(WARM_UPS):
            runner(np.zeros(shape, np.uint8))
