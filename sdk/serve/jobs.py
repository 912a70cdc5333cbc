"""Jobs: long work that is accepted, done by threads of its own, and asked for later."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from pathlib import Path

from .models import Models
from .orders import Failure, Order, Stopped, Watch
from .store import Store

LOG = logging.getLogger(__name__)
SWEEP_S = 60.0
IDLE_S = 1.0


class JobRunner:
    """Does the jobs of a store, the oldest first, in `workers` threads.

    limit_s: how long one may take. Thread-safe.
    """

    def __init__(self, models: Models, store: Store, *, workers: int, limit_s: float):
        self._models, self._store, self._limit_s = models, store, limit_s
        self._changed = threading.Condition()
        self._closing = False
        self._watches: dict[str, Watch] = {}  # of the jobs under way
        self._threads = [threading.Thread(target=self._work, name="sr-job", daemon=True) for _ in range(workers)]

    def start(self) -> None:
        """Begin to work, first on what an earlier server has left."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Tell the threads that a job has come."""
        with self._changed:
            self._changed.notify()

    def share(self, name: str) -> float | None:
        """Tell how much of a job is done, 0 to 1; None if it is not under way."""
        watch = self._watches.get(name)
        return watch.share if watch else None

    def remove(self, name: str) -> bool:
        """Forget a job and stop its work; False if it is not known."""
        known = self._store.remove(name)
        if watch := self._watches.get(name):
            watch.stop()
        return known

    def drain(self) -> None:
        """Begin no other job."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self, grace_s: float) -> None:
        """Let the jobs under way end within a time; those that do not are done by the next server."""
        self.drain()
        ends = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        for watch in list(self._watches.values()):
            watch.stop()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        swept = 0.0
        while not self._closing:
            job = None
            try:
                if time.monotonic() - swept > SWEEP_S:
                    swept = time.monotonic()
                    self._store.sweep()
                job = self._store.take()
                if job:
                    self._do(*job)
            except sqlite3.Error:  # a full disk, say; the jobs are still there when there is room again
                LOG.exception("the store of jobs")
                job = None
            if job is None:
                with self._changed:
                    if not self._closing:
                        self._changed.wait(IDLE_S)  # a notice may have come before

    def _do(self, name: str, order: str, data: bytes) -> None:
        """Do one job. Raises: sqlite3.Error if what became of it cannot be kept."""
        watch = self._watches[name] = Watch(self._limit_s)
        source = self._models.new_file("source")
        result: Path | None = None
        try:
            source.write_bytes(data)
            result = self._models.enlarge(Order.model_validate_json(order), source, watch)
            self._store.finish(name, result.read_bytes())
        except Stopped:
            if self._closing:
                self._store.release(name)
        except Failure as exc:
            self._store.fail(name, exc.status, exc.message)
        except (sqlite3.Error, OSError) as exc:
            self._store.fail(name, 507, f"the server has no room for it ({exc})")
        except Exception:
            LOG.exception("job %s", name)
            self._store.fail(name, 500, "the server made a mistake; its log tells more")
        finally:
            del self._watches[name]
            for path in (source, result):
                if path:
                    path.unlink(missing_ok=True)
