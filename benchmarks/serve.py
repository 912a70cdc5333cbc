"""sr-serve under many clients at once: its throughput beside that of files, latencies, and wrong results."""

from __future__ import annotations

import http.client
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from sdk import Bundle, Upscaler
from sdk.errors import BackendError

from .result import model_facts, result_head
from .runtime import Figure, write_photographs
from .runtime import Settings as RuntimeSettings

PROTOCOL = (
    "The same photographs, JPEG to PNG, in turns: `files`, Upscaler.upscale_file for one after the other; "
    "`overlapped`, Upscaler.upscale_files; `served`, POST /v1/upscale to sr-serve in a process of its own on "
    "loopback, by as many clients as are named, each a thread with a connection that sends the next picture when it "
    "has its answer; a 429 is sent again after a tenth of a second. Clients and server share the cores. Ratios: of "
    "the medians over the rounds of the wall-clock of one round; below 1 the server is faster. Wrong: bytes that "
    "differ from those of upscale_file. Latency: of an answer, from the first byte sent to the last one read, all "
    "rounds."
)
MAX_RATIO = 1 / 0.9  # of the time: at least 0.9 of the throughput
AGAIN_S = 0.1
START_S = 300


@dataclass(frozen=True)
class Settings:
    """What is measured. pictures: folder of the photographs, None for those of the repository."""

    model: str | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    clients: int = 50
    photographs: int = 50
    rounds: int = 5
    pictures: Path | None = None


@dataclass(frozen=True)
class Answer:
    """What came back for one picture. refusals: of the server, 429, before."""

    status: int
    body: bytes
    seconds: float
    refusals: int


def run_serve(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Measure the server. Returns: the JSON form, as run_runtime gives.

    Raises: SRError for a missing model or picture; BackendError if the server does not come up, or refuses a picture.
    """
    bundle = Bundle.load(settings.model)
    head = result_head("serve", protocol=PROTOCOL) | {"model": model_facts(bundle)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = RuntimeSettings(pictures=settings.pictures, photographs=settings.photographs)
        sources = write_photographs(chosen, folder)
        upscaler = Upscaler(
            bundle.folder, backend=settings.backend, device=settings.device, precision=settings.precision
        )
        with upscaler, _serving(bundle, folder / "state", settings) as address:
            info = upscaler.info
            seconds: dict[str, list[float]] = {"files": [], "overlapped": [], "served": []}
            answers: list[Answer] = []
            wrong = 0
            for number in range(settings.rounds + 1):  # the first one fills the caches and makes engines ready
                progress(f"round {number} of {settings.rounds}")
                found, came = _round(upscaler, sources, address, settings.clients)
                wrong += sum(
                    answer.body != path.with_suffix(".png").read_bytes()
                    for answer, path in zip(came, sources, strict=True)
                )
                if number:
                    answers += came
                    for key, value in found.items():
                        seconds[key].append(value)
    return head | {
        "info": info,
        "rows": [row.row() for row in _figures(seconds, answers, wrong, settings)],
        "skipped": [],
    }


def _round(
    upscaler: Upscaler, sources: Sequence[Path], address: str, clients: int
) -> tuple[dict[str, float], list[Answer]]:
    """Do all pictures in the three ways; give what each took, and the server's answers."""
    started = time.perf_counter()
    for path in sources:
        upscaler.upscale_file(path, path.with_suffix(".png"), overwrite=True)
    files = time.perf_counter() - started
    started = time.perf_counter()
    again = [(path, path.with_suffix(".overlapped.png")) for path in sources]
    for _, error in upscaler.upscale_files(again, overwrite=True):
        if error:
            raise error
    overlapped = time.perf_counter() - started
    bodies = [path.read_bytes() for path in sources]
    started = time.perf_counter()
    answers = ask_all(address, bodies, clients=clients)
    return {"files": files, "overlapped": overlapped, "served": time.perf_counter() - started}, answers


def ask_all(address: str, bodies: Sequence[bytes], *, clients: int) -> list[Answer]:
    """Send pictures from many clients at once; give the answers in order. Raises: BackendError for another than 200."""
    waiting = iter(list(enumerate(bodies)))
    answers: list[Answer | None] = [None] * len(bodies)

    def client(_: int) -> None:
        place = urlsplit(address)
        with closing(http.client.HTTPConnection(str(place.hostname), place.port)) as connection:
            for index, body in waiting:  # next() of a list's iterator is atomic
                answers[index] = _ask(connection, body)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return [answer for answer in answers if answer is not None]


def _ask(connection: http.client.HTTPConnection, body: bytes) -> Answer:
    started, refusals = time.perf_counter(), 0
    while True:
        connection.request("POST", "/v1/upscale", body)
        response = connection.getresponse()
        data = response.read()
        if response.status == 200:
            return Answer(response.status, data, time.perf_counter() - started, refusals)
        if response.status != 429:
            raise BackendError(f"sr-serve answered {response.status}: {data[:200].decode(errors='replace')}")
        refusals += 1
        time.sleep(AGAIN_S)


@contextmanager
def _serving(bundle: Bundle, state: Path, settings: Settings) -> Iterator[str]:
    """Run sr-serve in a process of its own; give its address. Raises: BackendError if it does not come up."""
    options = {"model": bundle.folder, "backend": settings.backend, "device": settings.device,
               "precision": settings.precision, "state": state, "port": 0}  # fmt: skip
    command = [sys.executable, "-m", "sdk.serve.cli", *(f"--{key}={value}" for key, value in options.items())]
    log = state.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        ends = time.monotonic() + START_S
        while not (found := re.search(r"page: (\S+)", log.read_text(encoding="utf-8"))):
            if process.poll() is not None or time.monotonic() > ends:
                raise BackendError(f"sr-serve does not come up: {log.read_text(encoding='utf-8').strip()[-300:]}")
            time.sleep(AGAIN_S)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def _figures(
    seconds: dict[str, list[float]], answers: Sequence[Answer], wrong: int, settings: Settings
) -> Iterator[Figure]:
    case = f"{settings.photographs} photographs, {settings.clients} clients"
    medians = {f"{key}_s": statistics.median(values) for key, values in seconds.items()}
    details = medians | {f"{key}_all_s": values for key, values in seconds.items()}
    times = np.array([answer.seconds for answer in answers]) * 1000
    yield Figure(
        "sr-serve / upscale_file, time", case, medians["served_s"] / medians["files_s"], "x", MAX_RATIO, details
    )
    yield Figure("sr-serve / upscale_files, time", case, medians["served_s"] / medians["overlapped_s"], "x", None)
    percentiles = {f"p{share}_ms": float(np.percentile(times, share)) for share in (50, 95, 99)}
    yield Figure("sr-serve, latency of an answer", case, percentiles["p50_ms"], "ms", None, percentiles)
    details = {"answers": len(answers), "refusals": sum(answer.refusals for answer in answers)}
    yield Figure("sr-serve, wrong results", case, wrong, "pictures", 0, details)
