"""How near each engine comes to what the processor could do: a graph's work against measured rates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdk import Bundle
from sdk.backends import MODULES
from sdk.bundle import Stage
from sdk.errors import BackendUnavailable

from . import rates
from .contestants import CONTESTANTS, Contestant, Runner, Setup, open_contestants
from .graph_cost import Layer, count_layers
from .pictures import draw_picture
from .result import model_facts, result_head
from .timing import take_turns

PROTOCOL = (
    "Operations: two for each multiplication of a convolution or matrix product of the ONNX graph at that size; all "
    "else counts as free. Bytes at the ends: the picture, the result, the weights. Bytes of the layers: what each of "
    "those products reads and writes in the engine's precision, as if no cache held any of it; intensity: operations "
    "for each of them. Matrix rate: the best of "
    f"{rates.ROUNDS} products of square matrices ({rates.MATRIX_SIDES['cpu']} on a CPU, {rates.MATRIX_SIDES['cuda']} "
    "on a GPU) in PyTorch in that precision; copy rate: bytes read and written by the best of as many copies of "
    f"{rates.COPY_MIB} MiB. Floor: the larger of operations / matrix rate and bytes at the ends / copy rate. Time: the "
    "median of Upscaler.upscale, from array to array, engines in turns. Share: floor / time."
)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ENGINES = tuple(each for each in CONTESTANTS if each.engine in MODULES and each.precision in BYTES)


@dataclass(frozen=True)
class Settings:
    """What is measured. sizes: of the LR input, (height, width). stages: names; none of them: all."""

    sizes: tuple[tuple[int, int], ...]
    model: str | None = None
    stages: tuple[str, ...] = ()
    repeats: int = 15


def run_roofline(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Measure every engine of the SDK that runs here in floating point.

    Returns: the JSON form: facts, one row for each stage, size and engine, and what was skipped and why.
    Raises: SRError for a missing model or stage; BackendUnavailable without PyTorch or onnx.
    """
    bundle = Bundle.load(settings.model)
    stages = [bundle.stage(name) for name in dict.fromkeys(settings.stages)] or list(bundle.manifest.stages)
    head = result_head("roofline", protocol=PROTOCOL) | {"model": model_facts(bundle), "repeats": settings.repeats}
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for stage in stages:
        with ExitStack() as stack:
            setup = Setup(settings.model, stage.name)
            opened, others = open_contestants(ENGINES, setup, stack)
            engines, unrated = _with_rates(opened)
            skipped += [
                {"stage": stage.name, "engine": each["contestant"], "reason": each["reason"]}
                for each in [*others, *unrated]
            ]
            names = ", ".join(each.name for each in engines)
            for size in settings.sizes:
                progress(f"stage {stage.name}, {size[0]}x{size[1]}: timing {names}")
                about = {"stage": stage.name, "size": list(size)}
                rows += [about | row for row in _measure(bundle, stage, engines, size, repeats=settings.repeats)]
    return head | {"rows": rows, "skipped": skipped}


def _with_rates(engines: Mapping[Contestant, Runner]) -> tuple[dict[Contestant, Runner], list[dict[str, str]]]:
    """Leave out the engines on a GPU that PyTorch does not see; give those with reasons.

    Raises: BackendUnavailable without PyTorch.
    """
    rated, unrated = {}, []
    for each, run in engines.items():
        try:
            _matrix_rate(each.device, each.precision)
            rated[each] = run
        except BackendUnavailable as exc:
            if each.device == "cpu":
                raise
            unrated.append({"contestant": each.name, "reason": str(exc)})
    return rated, unrated


def _measure(
    bundle: Bundle, stage: Stage, engines: Mapping[Contestant, Runner], size: tuple[int, int], *, repeats: int
) -> Iterator[dict[str, Any]]:
    picture = draw_picture(size)
    padded = [-(-side // stage.stride) * stage.stride for side in size]
    graph = bundle.folder / stage.graph(precision="fp32", ends="uint8").file.name
    layers = count_layers(graph, (1, *padded, 3))
    end_bytes = 3 * padded[0] * padded[1] * (1 + bundle.manifest.scale**2)  # of uint8
    found = {each: (_matrix_rate(each.device, each.precision), _copy_rate(each.device)) for each in engines}
    times = take_turns({each: functools.partial(run, picture) for each, run in engines.items()}, repeats=repeats)
    for each, (matrix, copy) in found.items():
        yield {"engine": each.name, "device": each.device, "precision": each.precision} | make_row(
            layers, times[each], width=BYTES[each.precision], end_bytes=end_bytes, matrix=matrix, copy=copy
        )


# Once for each device and precision.
_matrix_rate = functools.cache(rates.matrix_rate)
_copy_rate = functools.cache(rates.copy_rate)


def make_row(
    layers: Sequence[Layer], times_ms: Sequence[float], *, width: int, end_bytes: int, matrix: float, copy: float
) -> dict[str, Any]:
    """Set a network's work beside its time.

    width: bytes of an element in the engine's precision. end_bytes: of the picture and the result. matrix: operations
    a second. copy: bytes a second.
    """
    operations = 2 * sum(layer.multiplications for layer in layers)
    weight_bytes = width * sum(layer.weights for layer in layers)
    layer_bytes = width * sum(layer.elements for layer in layers)
    median_ms = float(np.median(times_ms))
    floors_ms = {"compute": operations / matrix * 1e3, "ends": (end_bytes + weight_bytes) / copy * 1e3}
    floor_ms = max(floors_ms.values())
    return {
        "layers": len(layers),
        "gigaoperations": round(operations / 1e9, 6),
        "end_mb": round((end_bytes + weight_bytes) / 1e6, 3),
        "layer_mb": round(layer_bytes / 1e6, 3),
        "intensity": round(operations / layer_bytes, 1),
        "matrix_gops": round(matrix / 1e9, 1),
        "copy_gb_per_s": round(copy / 1e9, 2),
        "floor_ms": round(floor_ms, 4),
        "bound": max(floors_ms, key=floors_ms.__getitem__),
        "median_ms": round(median_ms, 4),
        "min_ms": round(min(times_ms), 4),
        "max_ms": round(max(times_ms), 4),
        "reached_gops": round(operations / median_ms / 1e6, 1),
        "share_of_floor": round(floor_ms / median_ms, 4),
    }
