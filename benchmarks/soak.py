"""Hours of mixed requests from several threads: memory, drift of the latency, errors and wrong pixels."""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdk import Bundle, ImageError, Upscaler

from .memory import own_rss_mib
from .pictures import draw_picture
from .result import model_facts, result_head

PROTOCOL = (
    "Clients are threads that share one Upscaler; each asks for one request after the other, drawn by its seed from a "
    "fixed set (several sizes of each kind). Wrong: a result whose bytes differ from those that the request gave alone "
    "before. Refused: a request of the kind `empty` that raised ImageError, as it must; errors are all other "
    "exceptions, and an `empty` one that raised none. Latency: of the call, divided by that of the same request alone "
    "(median of {alone}, after {warm} more); of an interval, the median of a kind. Drift: median of the last quarter "
    "of the intervals / that of the first. Growth: largest resident memory at the end of an interval, of the last "
    "quarter - of the first."
)
ALONE, WARM = 3, 5
SIDES = (17, 61, 128, 255)  # of the pictures of a kind


@dataclass(frozen=True)
class Settings:
    """What is asked for. seconds: in all, in so many intervals. clients: threads."""

    seconds: float = 3600.0
    intervals: int = 40
    clients: int = 4
    seed: int = 1
    model: str | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"


@dataclass(frozen=True)
class Request:
    """A call of Upscaler.upscale; must_fail: with ImageError."""

    kind: str
    picture: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)
    must_fail: bool = False


def make_requests(*, tiles: bool = True) -> list[Request]:
    """Give the requests that clients draw from; tiles: of a model that can be run in tiles, too."""
    requests = []
    for number, side in enumerate(SIDES):
        rgb = draw_picture((side, side + 20), seed=number)
        alpha = np.ascontiguousarray(np.dstack((rgb, rgb[:, ::-1, :1])))
        requests += [
            Request("rgb", rgb),
            Request("grey", np.ascontiguousarray(rgb[:, :, 0])),
            Request("alpha", alpha),
            Request("uint16", rgb.astype(np.uint16) * 257),
            Request("float32", rgb.astype(np.float32) / 255),
            Request("factor", rgb, {"factor": 1.5}),
        ]
        if tiles:
            requests.append(Request("tiled", draw_picture((3 * side, 2 * side), seed=number), {"tile": 64}))
    return [*requests, Request("empty", np.empty((0, 8, 3), np.uint8), must_fail=True)]


@dataclass(frozen=True)
class Answer:
    """What a request gave alone: the hash of its bytes, and how long it took."""

    digest: str
    milliseconds: float


class Tally:
    """What has happened in one interval; every client adds to it."""

    def __init__(self) -> None:
        self.latencies: defaultdict[str, list[float]] = defaultdict(list)
        self.outcomes: Counter[str] = Counter()
        self.first_error: str | None = None
        self._lock = threading.Lock()

    def add(self, outcome: str, *, error: str | None = None) -> None:
        """Count a request that gave no pixels: "refused" or "error"."""
        with self._lock:
            self.outcomes[outcome] += 1
            self.first_error = self.first_error or error

    def add_result(self, kind: str, latency: float, *, is_right: bool) -> None:
        """Count one that did."""
        with self._lock:
            self.outcomes["right" if is_right else "wrong"] += 1
            self.latencies[kind].append(latency)


def run_soak(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Ask for as long as the settings say, or until a KeyboardInterrupt.

    Returns: the JSON form: facts, totals, one row for each kind of request, and one entry for each interval.
    Raises: SRError for a missing model, or a request that fails alone.
    """
    bundle = Bundle.load(settings.model)
    head = result_head("soak", protocol=PROTOCOL.format(alone=ALONE, warm=WARM)) | {"model": model_facts(bundle)}
    requests = make_requests(tiles=bool(bundle.stage().halo))
    intervals: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    first_error = None
    stop = threading.Event()
    with Upscaler(
        settings.model, backend=settings.backend, device=settings.device, precision=settings.precision
    ) as upscaler:
        progress(f"{len(requests)} requests, each alone")
        expected = [None if each.must_fail else _alone(upscaler, each) for each in requests]
        generators = [np.random.default_rng((settings.seed, client)) for client in range(settings.clients)]
        started = time.monotonic()
        with ThreadPoolExecutor(settings.clients) as pool:
            for number in range(settings.intervals):
                tally, until = Tally(), started + settings.seconds * (number + 1) / settings.intervals
                work = [pool.submit(_ask, upscaler, requests, expected, rng, tally, until, stop) for rng in generators]
                try:
                    wait(work)
                except KeyboardInterrupt:
                    stop.set()
                    wait(work)
                for client in work:
                    client.result()
                outcomes += tally.outcomes
                first_error = first_error or tally.first_error
                intervals.append(_interval(tally, time.monotonic() - started))
                progress(
                    f"{intervals[-1]['seconds']:.0f} of {settings.seconds:.0f} s: {outcomes.total()} requests, "
                    f"{outcomes['wrong']} wrong, {outcomes['error']} errors, {intervals[-1]['rss_mib'] or 0:.0f} MiB"
                )
                if stop.is_set():
                    break
        info = upscaler.info
    totals = {key: outcomes[key] for key in ("right", "refused", "wrong", "error")}
    return head | {
        "info": info, "clients": settings.clients, "seed": settings.seed, "interrupted": stop.is_set(),
        "totals": totals, "first_error": first_error, "growth_mib": growth(intervals), "rows": drift(intervals),
        "intervals": intervals,
    }  # fmt: skip


def _alone(upscaler: Upscaler, request: Request) -> Answer:
    for _ in range(WARM):
        result = upscaler.upscale(request.picture, **request.options)
    times_ms = []
    for _ in range(ALONE):
        started = time.perf_counter_ns()
        upscaler.upscale(request.picture, **request.options)
        times_ms.append((time.perf_counter_ns() - started) / 1e6)
    return Answer(_digest(result), statistics.median(times_ms))


def _ask(
    upscaler: Upscaler,
    requests: list[Request],
    expected: list[Answer | None],
    rng: np.random.Generator,
    tally: Tally,
    until: float,
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        index = int(rng.integers(len(requests)))
        request, answer = requests[index], expected[index]
        started = time.perf_counter_ns()
        try:
            result = upscaler.upscale(request.picture, **request.options)
            milliseconds = (time.perf_counter_ns() - started) / 1e6
            if answer is None:
                tally.add("error", error=f"{request.kind}: was not refused")
            else:
                is_right = _digest(result) == answer.digest
                tally.add_result(request.kind, milliseconds / answer.milliseconds, is_right=is_right)
        except ImageError as exc:
            if request.must_fail:
                tally.add("refused")
            else:
                tally.add("error", error=f"{request.kind}: {exc}")
        except Exception as exc:  # whatever it is, it is counted and the first one told
            tally.add("error", error=f"{request.kind}: {type(exc).__name__}: {exc}")
        if time.monotonic() >= until:
            return


def _digest(result: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(result).tobytes()).hexdigest()


def _interval(tally: Tally, seconds: float) -> dict[str, Any]:
    memory = own_rss_mib()
    return {
        "seconds": round(seconds, 1),
        "requests": tally.outcomes.total(),
        "rss_mib": None if memory is None else round(memory, 1),
        "latency": {kind: round(statistics.median(found), 4) for kind, found in sorted(tally.latencies.items())},
    }


def drift(intervals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each kind's latency in the last quarter of the intervals with that in the first."""
    quarter = max(1, len(intervals) // 4)
    rows = []
    for kind in sorted({kind for interval in intervals for kind in interval["latency"]}):
        first, last = (
            [interval["latency"][kind] for interval in part if kind in interval["latency"]]
            for part in (intervals[:quarter], intervals[-quarter:])
        )
        medians = [statistics.median(part) if part else None for part in (first, last)]
        ratio = round(medians[1] / medians[0], 3) if medians[0] and medians[1] is not None else None
        rows.append({"kind": kind, "first": medians[0], "last": medians[1], "drift": ratio})
    return rows


def growth(intervals: list[dict[str, Any]]) -> float | None:
    """Give the memory that the last quarter took more than the first, in MiB; None where it is not known."""
    quarter = max(1, len(intervals) // 4)
    found = [[each["rss_mib"] for each in part] for part in (intervals[:quarter], intervals[-quarter:])]
    if any(value is None for part in found for value in part):
        return None
    return round(max(found[1]) - max(found[0]), 1)
