"""Run the SDK's GPU engines on a real GPU: are they right, do they hold, how fast are they beside its ceilings.

    python -m benchmarks.gpu_acceptance --json gpu.json [--model BUNDLE ...] [--reference results.npz]

Needs numpy, pillow and at least one of tensorrt, onnxruntime-gpu and torch; what is missing is listed as skipped. Where
ONNX Runtime is missing, --reference brings its results along: made on any machine with --make-reference FILE.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdk import BackendUnavailable, Bundle, OutOfMemory, Upscaler, files
from sdk.backends import Backend, DeviceBackend, Request, open_backend
from sdk.backends.cuda import Buffer, open_device
from sdk.backends.engine_cache import parse_engine, write_engine
from sdk.backends.tensorrt import engine_dir
from sdk.bundle import shipped_models

from . import torch_gpu
from .metrics import psnr
from .pictures import BILINEAR, enlarge
from .result import result_head, write_json

PICTURES = Path(__file__).parent.parent / "export" / "pictures"
ENGINES = ("tensorrt", "onnxruntime")
PRECISIONS = ("fp32", "fp16")
MIN_PSNR_DB = {"fp32": 60.0, "fp16": 50.0}
MAX_SEAM = {"fp32": 1, "fp16": 3}  # code values: half precision rounds other windows otherwise
CROP = 256
SHAPES = ((1, 256, 256), (2, 256, 256), (4, 256, 256), (8, 256, 256), (1, 512, 512), (1, 1024, 1024), (4, 1024, 1024))
PROTOCOL = (
    "Times: median of the repeats, of one batch each. device: input and output stay on the GPU; host: from a uint8 "
    "array to a uint8 array, page-locked staging included. Throughput: megapixels of output a second, host to host, as "
    "many batches at once as the engine has lanes. taken_mib: of the GPU's memory, by the engine and its buffers after "
    "the shape. Ceilings are measured in the same run. PSNR: of photographs, against ONNX Runtime's CPU provider in "
    "fp32."
)
GIB = 1 << 30


class Report:
    """Collects what was checked, timed and left out."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []

    def check(self, name: str, passed: bool, **facts: Any) -> None:
        """Note a check and say it."""
        self.checks.append({"check": name, "passed": bool(passed), **facts})
        print("ok  " if passed else "FAIL", name, facts, flush=True)

    def time(self, contestant: str, **facts: Any) -> None:
        """Note a time and say it."""
        self.timings.append({"contestant": contestant, **facts})
        print("    ", contestant, facts, flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Do something that may be missing or break without ending the run: both are in the result."""
        try:
            yield
        except BackendUnavailable as exc:
            self.skipped.append({"part": name, "reason": str(exc)})
            print("SKIP", name, exc, flush=True)
        except Exception as exc:  # whatever it is, it is not what was to be shown
            self.check(name, False, error=f"{type(exc).__name__}: {exc}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="shipped model or bundle folder; may be repeated")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reference", type=Path, help="results of ONNX Runtime on the CPU")
    parser.add_argument("--make-reference", type=Path, help="write them and end")
    options = parser.parse_args(arguments)
    models = options.model or shipped_models()
    pictures = read_pictures()
    if options.make_reference:
        np.savez_compressed(options.make_reference, allow_pickle=False, **make_reference(models, pictures))
        return 0
    reference = dict(np.load(options.reference)) if options.reference else make_reference(models, pictures)
    report = Report()
    with own_cache():
        result = measure(models, pictures, reference, options, report)
    if options.json:
        write_json(result, options.json)
    failed = [row for row in report.checks if not row["passed"]]
    print(f"{len(report.checks) - len(failed)} of {len(report.checks)} checks passed, {len(report.skipped)} skipped")
    return 1 if failed or not report.checks else 0


@contextmanager
def own_cache() -> Iterator[None]:
    """Keep engines in a folder of their own meanwhile: they are built, damaged and built again."""
    before = {name: os.environ.pop(name, None) for name in ("SR_CACHE_DIR", "SR_ENGINE_DIR")}
    with tempfile.TemporaryDirectory(prefix="sr-acceptance-") as folder:
        os.environ["SR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["SR_CACHE_DIR"]
            os.environ.update({name: value for name, value in before.items() if value is not None})


def measure(
    models: Sequence[str],
    pictures: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    options: argparse.Namespace,
    report: Report,
) -> dict[str, Any]:
    """Check and time every engine on every model; give the result's JSON form."""
    head = result_head("gpu", protocol=PROTOCOL, command="python -m benchmarks.gpu_acceptance")
    head["ceilings"] = measure_ceilings(options.device, report)
    for model in models:
        for stage in Bundle.load(model).manifest.stages:
            for engine in ENGINES:
                for precision in sorted({graph.precision for graph in stage.graphs} & {*PRECISIONS}, reverse=True):
                    with report.part(f"{model} {stage.name} {engine} {precision}"):
                        accept(model, stage.name, engine, precision, pictures, reference, options, report)
        with report.part(f"{model} pytorch"):
            for facts in torch_gpu.time_network(Bundle.load(model), SHAPES, options.device, repeats=options.repeats):
                report.time("pytorch", model=model, **facts)
    for count, height, width in SHAPES:
        lr = np.zeros((height, width, 3), np.uint8)
        milliseconds = median_ms(partial(enlarge, lr, 2, resample=BILINEAR), repeats=options.repeats)
        report.time("bilinear cpu, x2", shape=[count, height, width], host_ms=round(count * milliseconds, 4))
    return head | {"checks": report.checks, "timings": report.timings, "skipped": report.skipped}


def read_pictures() -> dict[str, np.ndarray]:
    """Read our photographs, cut to a size that every engine takes in one piece."""
    found = {}
    for path in sorted(PICTURES.glob("*.webp")):
        found[path.stem] = np.ascontiguousarray(files.read(path)[0][:CROP, :CROP, :3])
    return found


def make_reference(models: Sequence[str], pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Enlarge every picture with every stage in fp32 on the CPU: "model/stage/picture" -> result."""
    results = {}
    for model in models:
        bundle = Bundle.load(model)
        for stage in bundle.manifest.stages:
            with Upscaler(model, stage=stage.name, backend="onnxruntime", device="cpu", precision="fp32") as upscaler:
                for name, picture in pictures.items():
                    results[f"{bundle.manifest.name}/{stage.name}/{name}"] = upscaler.upscale(picture)
    return results


def accept(
    model: str,
    stage: str,
    engine: str,
    precision: str,
    pictures: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    options: argparse.Namespace,
    report: Report,
) -> None:
    """Check one engine, then time it."""
    facts = {"model": model, "stage": stage, "engine": engine, "precision": precision}
    device = f"cuda:{options.device}"
    gpu = open_device(options.device)

    def opened() -> Upscaler:
        return Upscaler(model, stage=stage, backend=engine, device=device, precision=precision)

    if engine == "tensorrt":
        check_cache(opened, facts, report)
    with opened() as upscaler:
        name = Bundle.load(model).manifest.name
        results = {key: upscaler.upscale(picture) for key, picture in pictures.items()}
        worst = min(psnr(result, reference[f"{name}/{stage}/{key}"]) for key, result in results.items())
        report.check("parity", worst >= MIN_PSNR_DB[precision], **facts, psnr_db=round(min(worst, 200.0), 2))
        mosaic = np.concatenate([np.concatenate([*pictures.values()], axis=1)] * 2)
        seam = np.abs(upscaler.upscale(mosaic).astype(int) - upscaler.upscale(mosaic, tile=96)).max()
        report.check("tiled is untiled", seam <= MAX_SEAM[precision], **facts, max_error=int(seam))
        jobs = [picture[: 64 + 8 * (number % 5)] for number, picture in enumerate([*pictures.values()] * 16)]
        alone = [upscaler.upscale(job) for job in jobs]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(upscaler.upscale, jobs))
        same = all((one == other).all() for one, other in zip(alone, together))
        report.check("8 threads", same, **facts, pictures=len(jobs))
    with report.part(f"{facts} little memory"):
        with opened() as upscaler:
            wanted = upscaler.upscale(mosaic)
        with fill(options.device, leave=GIB), opened() as upscaler:
            error = int(np.abs(upscaler.upscale(mosaic).astype(int) - wanted).max())
            retries = upscaler.stats.retries
            report.check("little memory", error <= MAX_SEAM[precision], **facts, max_error=error, retries=retries)
    bundle = Bundle.load(model)
    request = Request(bundle.folder, bundle.stage(stage), bundle.manifest.scale, "uint8", device, precision)
    for graphs in (True, False):
        with cuda_graphs(graphs), report.part(f"{facts} times"):
            free = gpu.free_bytes()
            with closing(open_backend(engine, request)) as backend:
                for shape in SHAPES:
                    if fits(shape, backend):
                        times = time_backend(backend, (*shape, 3), options.device, repeats=options.repeats)
                        taken = (free - gpu.free_bytes()) >> 20
                        report.time(engine, **facts, graphs=graphs, shape=list(shape), taken_mib=taken, **times)


def fits(shape: tuple[int, int, int], backend: Backend) -> bool:
    """Tell whether a batch is inside what an engine was built for."""
    count, *sides = shape
    return count <= (backend.max_batch or count) and max(sides) <= (backend.max_side or max(sides))


@contextmanager
def cuda_graphs(on: bool) -> Iterator[None]:
    """Let engines that are opened meanwhile make CUDA graphs, or not."""
    before = os.environ.get("SR_CUDA_GRAPHS")
    os.environ["SR_CUDA_GRAPHS"] = str(int(on))
    try:
        yield
    finally:
        if before is None:
            del os.environ["SR_CUDA_GRAPHS"]
        else:
            os.environ["SR_CUDA_GRAPHS"] = before


def check_cache(opened: Callable[[], Upscaler], facts: dict[str, str], report: Report) -> None:
    """See that an engine is built once, and again when its file is not the one that was written."""

    def open_timed() -> float:
        start = time.perf_counter()
        opened().close()
        return round(time.perf_counter() - start, 2)

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in engine_dir().glob("*.engine")}

    before = stamps()
    first_s, built = open_timed(), stamps()
    again_s = open_timed()
    once = stamps() == built and len(built) > len(before)
    report.check("built once", once, **facts, first_s=first_s, again_s=again_s)
    if not before:  # once is enough: it takes minutes
        for path in built:
            path.write_bytes(path.read_bytes()[:-1])
        open_timed()
        report.check("damaged, built anew", stamps() != built, **facts)
        for path in built:
            key, plan = parse_engine(path.read_bytes())
            write_engine(path, replace(key, gpu="another GPU"), plan, built={})
        mismatched = stamps()
        open_timed()
        report.check("of another GPU, built anew", stamps() != mismatched, **facts)


def time_backend(backend: Backend, shape: tuple[int, ...], device: int, *, repeats: int) -> dict[str, float]:
    """Time batches of one shape; as CUDA graphs where the engine makes them of what recurs."""
    batch = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    on_device: DeviceBackend = backend.on_device(device)
    backend.expect(shape, runs=repeats)

    def stay(*_: Any) -> None:
        """Leave the data where it is."""

    host_ms = median_ms(lambda: backend.run(batch), repeats=repeats)
    device_ms = median_ms(lambda: on_device.run_on_device(shape, batch.dtype, stay, stay), repeats=repeats)
    count = repeats * backend.lanes
    with ThreadPoolExecutor(backend.lanes) as pool:
        start = time.perf_counter()
        sizes = [result.size for result in pool.map(backend.run, [batch] * count)]
        seconds = time.perf_counter() - start
    return {
        "host_ms": round(host_ms, 4),
        "device_ms": round(device_ms, 4),
        "mp_per_s": round(sum(sizes) / 3 / seconds / 1e6, 1),
    }


def median_ms(work: Callable[[], object], *, repeats: int) -> float:
    """Time a piece of work that is over when it returns, after three runs that are not timed."""
    samples = []
    for number in range(repeats + 3):
        start = time.perf_counter_ns()
        work()
        if number >= 3:
            samples.append((time.perf_counter_ns() - start) / 1e6)
    return float(np.median(samples))


def measure_ceilings(device: int, report: Report) -> dict[str, float]:
    """Measure what bounds every engine: copies within the GPU's memory, and half-precision matrix products."""
    found: dict[str, float] = {}
    with report.part("copy rate"):
        gpu = open_device(device)
        source, target, stream = Buffer(gpu, GIB), Buffer(gpu, GIB), gpu.new_stream()

        def copy() -> None:
            gpu.copy_rows(target.address, GIB >> 10, source.address, GIB >> 10, width=GIB >> 10, rows=1 << 10,
                          stream=stream)  # fmt: skip
            gpu.synchronize(stream)

        found["copy_gb_per_s"] = round(2 * GIB / median_ms(copy, repeats=10) / 1e6, 1)
        found["gpu"] = gpu.facts().name  # type: ignore[assignment]
    with report.part("matrix rate"):
        found["fp16_tflops"] = round(torch_gpu.matrix_tflops(device), 1)
    print("ceilings", found, flush=True)
    return found


@contextmanager
def fill(device: int, *, leave: int) -> Iterator[None]:
    """Take the GPU's memory away, but for some bytes."""
    gpu = open_device(device)
    with ExitStack() as stack:
        size = max(gpu.free_bytes() - leave, 0)
        while size > 1 << 20:
            try:
                buffer = Buffer(gpu, size)
            except OutOfMemory:
                size //= 2
                continue
            stack.callback(buffer.free)
            size = max(gpu.free_bytes() - leave, 0)
        yield


if __name__ == "__main__":
    sys.exit(main())
