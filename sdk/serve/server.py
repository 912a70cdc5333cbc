"""What stands behind the routes: how it is put together, begins and ends."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..bundle import DEFAULT_MODEL, shipped_models
from ..errors import BackendError, OutputError, SRError
from .jobs import JobRunner
from .metrics import Metrics
from .models import Limits, Models
from .options import MIB, Options
from .requests import Desk
from .store import Store

LOG = logging.getLogger(__name__)
WARM_SIZE = (256, 256)  # of the picture that the default model is made ready with
WORK = ".sr-serve-work"  # the folder of the work under way; a name that nobody else's folder has
ANSWER_S = 1.0  # for requests to be answered whose work is stopped at the end
STOP_S = 5.0  # for work that is stopped to notice


class Server:
    """The parts of a server. `is_still`, after `close`: no thread is at work that could not be stopped.

    state: folder of its jobs, and of the files of the work under way. on_failure: told if the default model cannot be
    opened.
    Raises: OutputError if the folder cannot be used; BundleError or OptionError for the models.
    """

    def __init__(self, state: Path, options: Options, *, on_failure: Callable[[SRError], None]):
        self.options = options
        self._on_failure = on_failure
        self._ends = 0.0  # of the grace, once it has begun
        self.store = Store(state, keep_s=options.keep_h * 3600, max_bytes=options.max_state_mib * MIB)
        engine = {
            "backend": options.backend,
            "device": options.device,
            "precision": options.precision,
            "batch": options.batch or "auto",
            "memory_mib": options.memory_mib or "auto",
            "share_batches": True,
        }
        shipped = [DEFAULT_MODEL, *(name for name in shipped_models() if name != DEFAULT_MODEL)]
        limits = Limits(options.max_pixels, options.max_result_pixels)
        try:
            self.models = Models(options.models or shipped, engine, limits=limits, folder=_empty_folder(state / WORK))
        except SRError:
            self.store.close()
            raise
        self.desk = Desk(self.models, workers=options.workers, places=options.places)
        self.runner = JobRunner(self.models, self.store, workers=options.job_workers, limit_s=options.job_s)
        self.warmed, self.draining = threading.Event(), threading.Event()
        self.is_still = True  # after close: no thread is at work
        self.metrics = Metrics(
            stats=self.models.stats,
            gauges={
                "sr_requests_receiving": ("Pictures that are coming in.", lambda: self.desk.receiving),
                "sr_requests_taken": ("Pictures under way, those that wait among them.", lambda: self.desk.taken),
                "sr_requests_working": ("Pictures that are being worked on.", lambda: self.desk.working),
            },
            jobs=self.store.counts,
        )

    def start(self) -> None:
        """Begin to work."""
        self.runner.start()
        threading.Thread(target=self._warm, name="sr-warm", daemon=True).start()

    def _warm(self) -> None:
        try:
            self.models.upscaler(None).warmup(WARM_SIZE)
            self.warmed.set()
        except SRError as exc:
            self._on_failure(exc)
        except Exception as exc:  # a mistake of ours; else /readyz would say for ever that the model is being opened
            LOG.exception("the default model")
            self._on_failure(BackendError(f"the default model cannot be opened: {exc}"))

    def drain(self) -> None:
        """Take no new work; what is under way goes on, for as long as the server lets it."""
        if not self.draining.is_set():
            self.draining.set()
            self._ends = time.monotonic() + self.options.grace_s
            self.runner.drain()
            # Before uvicorn does it, without an answer.
            timer = threading.Timer(max(0.0, self.options.grace_s - ANSWER_S), self.desk.stop)
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        """End, when the last request has been answered."""
        self.drain()
        is_still = self.runner.close(max(0.0, self._ends - time.monotonic()), STOP_S)
        is_still = self.desk.close(STOP_S) and is_still
        self.store.close()
        if is_still:
            self.models.close()
        self.is_still = is_still


def _empty_folder(folder: Path) -> Path:
    """Make a folder, or empty what a killed server has left in it. Raises: OutputError."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
    except OSError as exc:
        raise OutputError(f"{folder}: cannot be made ({exc.strerror})") from exc
    return folder
