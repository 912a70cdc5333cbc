"""Hours of mixed requests from several threads: memory, drift of the latency, errors and wrong pixels."""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    "exceptions, and an `empty` one that raised none. Memory: resident, at the end of each of the intervals. Drift: "
    "median latency of the last quarter of the intervals / that of the first; growth: largest memory of the last "
    "quarter - that of the first."
)
INTERVALS = 40
SIDES = (17, 61, 128, 255)  # of the pictures of a kind


@dataclass(frozen=True)
class Settings:
    """What is asked for. seconds: in all. clients: threads."""

    seconds: float = 3600.0
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


def make_requests() -> list[Request]:
    """Give the requests that clients draw from."""
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
            Request("tiled", draw_picture((3 * side, 2 * side), seed=number), {"tile": 64}),
            Request("factor", rgb, {"factor": 1.5}),
        ]
    return [*requests, Request("empty", np.empty((0, 8, 3), np.uint8), must_fail=True)]


class Tally:
    """What has happened in one interval; every client adds to it."""

    def __init__(self) -> None:
        self.times_ms: defaultdict[str, list[float]] = defaultdict(list)
        self.outcomes: Counter[str] = Counter()
        self.first_error: str | None = None
        self._lock = threading.Lock()

    def add(self, kind: str, outcome: str, times_ms: float, *, error: str | None = None) -> None:
        """Count a request: "right", "wrong", "refused" or "error"."""
        with self._lock:
            self.outcomes[outcome] += 1
            self.times_ms[kind].append(times_ms)
            self.first_error = self.first_error or error


def run_soak(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Ask for as long as the settings say.

    Returns: the JSON form: facts, totals, one row for each kind of request, and one entry for each interval.
    Raises: SRError for a missing model, or a request that fails alone.
    """
    requests = make_requests()
    intervals: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    first_error = None
    with Upscaler(
        settings.model, backend=settings.backend, device=settings.device, precision=settings.precision
    ) as upscaler:
        info = upscaler.info
        progress(f"{len(requests)} requests, each alone")
        expected = [None if each.must_fail else _digest(upscaler, each) for each in requests]
        generators = [np.random.default_rng((settings.seed, client)) for client in range(settings.clients)]
        started = time.monotonic()
        with ThreadPoolExecutor(settings.clients) as pool:
            for number in range(INTERVALS):
                tally, until = Tally(), started + settings.seconds * (number + 1) / INTERVALS
                clients = [pool.submit(_ask, upscaler, requests, expected, rng, tally, until) for rng in generators]
                for client in clients:
                    client.result()
                outcomes += tally.outcomes
                first_error = first_error or tally.first_error
                memory = own_rss_mib()
                intervals.append(
                    {
                        "seconds": round(time.monotonic() - started, 1),
                        "requests": tally.outcomes.total(),
                        "rss_mib": None if memory is None else round(memory, 1),
                        "median_ms": {
                            kind: round(statistics.median(times), 4) for kind, times in sorted(tally.times_ms.items())
                        },
                    }
                )
                progress(
                    f"{intervals[-1]['seconds']:.0f} of {settings.seconds:.0f} s: {outcomes.total()} requests, "
                    f"{outcomes['wrong']} wrong, {outcomes['error']} errors, {memory or 0:.0f} MiB"
                )
    totals = {key: outcomes[key] for key in ("right", "refused", "wrong", "error")}
    head = result_head("soak", protocol=PROTOCOL) | {"model": model_facts(Bundle.load(settings.model)), "info": info}
    return head | {
        "clients": settings.clients, "seed": settings.seed, "totals": totals, "first_error": first_error,
        "growth_mib": growth(intervals), "rows": drift(intervals), "intervals": intervals,
    }  # fmt: skip


def _ask(
    upscaler: Upscaler,
    requests: list[Request],
    expected: list[str | None],
    rng: np.random.Generator,
    tally: Tally,
    until: float,
) -> None:
    while True:
        index = int(rng.integers(len(requests)))
        request = requests[index]
        error = None
        started = time.perf_counter_ns()
        try:
            outcome = "right" if _digest(upscaler, request) == expected[index] else "wrong"
            if request.must_fail:
                outcome, error = "error", f"{request.kind}: was not refused"
        except ImageError as exc:
            outcome = "refused" if request.must_fail else "error"
            error = None if request.must_fail else f"{request.kind}: {exc}"
        except Exception as exc:  # whatever it is, it is counted and the first one told
            outcome, error = "error", f"{request.kind}: {type(exc).__name__}: {exc}"
        tally.add(request.kind, outcome, (time.perf_counter_ns() - started) / 1e6, error=error)
        if time.monotonic() >= until:
            return


def _digest(upscaler: Upscaler, request: Request) -> str:
    result = upscaler.upscale(request.picture, **request.options)
    return hashlib.sha256(np.ascontiguousarray(result).tobytes()).hexdigest()


def drift(intervals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each kind's latency in the last quarter of the intervals with that in the first."""
    quarter = max(1, len(intervals) // 4)
    rows = []
    for kind in sorted({kind for interval in intervals for kind in interval["median_ms"]}):
        first, last = (
            [interval["median_ms"][kind] for interval in part if kind in interval["median_ms"]]
            for part in (intervals[:quarter], intervals[-quarter:])
        )
        medians = [statistics.median(part) if part else None for part in (first, last)]
        ratio = round(medians[1] / medians[0], 3) if medians[0] and medians[1] is not None else None
        rows.append({"kind": kind, "first_ms": medians[0], "last_ms": medians[1], "drift": ratio})
    return rows


def growth(intervals: list[dict[str, Any]]) -> float | None:
    """Give the memory that the last quarter took more than the first, in MiB; None where it is not known."""
    quarter = max(1, len(intervals) // 4)
    found = [[each["rss_mib"] for each in part] for part in (intervals[:quarter], intervals[-quarter:])]
    if any(value is None for part in found for value in part):
        return None
    return round(max(found[1]) - max(found[0]), 1)
