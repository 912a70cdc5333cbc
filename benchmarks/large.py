"""Enlarge a file much larger than memory should have to hold; record its peak and its time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdk import Bundle, Upscaler, large, vips
from sdk.jobs import Options

from .memory import own_peak_mib, run_fresh
from .pictures import find_pictures, read_picture
from .result import model_facts, result_head
from .runtime import JPEG_QUALITY, MB, MB_PER_MIB, PICTURES, Figure

NOISE = 4  # code values
TARGET_MB = 1536 * MB_PER_MIB  # 1.5 GiB
PROTOCOL = (
    "sdk.large.enlarge on a square JPEG made of a repeated photograph and noise. Memory: peak resident of a new "
    "process, interpreter and libraries included; time: wall-clock of that call alone."
)


def run_large(
    model: str | None, *, side: int, suffix: str, progress: Callable[[str], None] = lambda news: None
) -> dict[str, Any]:
    """Enlarge a JPEG of side x side pixels into a file.

    suffix: of the result, without a dot. Returns: the JSON form, as run_runtime gives.
    Raises: BackendUnavailable without pyvips; other SRErrors as large.enlarge.
    """
    scale = Bundle.load(model).manifest.scale
    head = result_head("large", protocol=PROTOCOL) | {"model": model_facts(Bundle.load(model))}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.jpg"), Path(folder, f"target.{suffix}")
        progress(f"writing {side}x{side}")
        run_fresh(write_source, source, side)
        progress("enlarging")
        found = run_fresh(_enlarge, model, source, target)
        files_mb = {"source_mb": source.stat().st_size / MB, "target_mb": target.stat().st_size / MB}
    head["info"] = found["info"]
    case = f"{side}x{side} jpg -> {side * scale}x{side * scale} {suffix}"
    speed = {"output_mp_per_s": (side * scale) ** 2 / MB / found["seconds"], "cpu_s": found["cpu_s"]}
    figures = (
        Figure("large file: peak memory", case, found["peak_mib"] * MB_PER_MIB, "MB", TARGET_MB, files_mb),
        Figure("large file: time", case, found["seconds"], "s", None, speed),
    )
    return head | {"rows": [figure.row() for figure in figures], "skipped": []}


def write_source(path: Path, side: int) -> None:
    """Repeat a photograph over side x side pixels, streamed to a JPEG file; noise, so that no encoder has it easy."""
    pyvips = vips.import_vips("a large picture")
    tile = read_picture(find_pictures(PICTURES)[0])
    across, down = (-(-side // length) for length in (tile.shape[1], tile.shape[0]))
    repeated = pyvips.Image.new_from_array(tile, interpretation="srgb").replicate(across, down).crop(0, 0, side, side)
    noise = pyvips.Image.gaussnoise(side, side, mean=0, sigma=NOISE, seed=1)
    (repeated + noise).cast("uchar").copy(interpretation="srgb").jpegsave(str(path), Q=JPEG_QUALITY)


def _enlarge(model: str | None, source: Path, target: Path) -> dict[str, Any]:
    with Upscaler(model) as upscaler:
        started, cpu_started = time.perf_counter(), time.process_time()
        large.enlarge(upscaler, source, target, Options(max_pixels=0))
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "cpu_s": time.process_time() - cpu_started,
            "peak_mib": own_peak_mib(),
            "info": upscaler.info,
        }
