"""Jobs: long work that is accepted, done by threads of its own, and asked for later."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path

from .models import Models
from .orders import Failure, Order, Stopped, Watch
from .store import NoRoom, Store

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
        self._untold: dict[str, Failure] = {}  # of jobs that failed, and whose end could not be kept
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

    def close(self, grace_s: float, stop_s: float) -> bool:
        """Let the jobs under way end within a time; those that do not are stopped, and done by the next server.

        stop_s: for them to notice. Returns: False if one is still at work, in a step that cannot be stopped.
        """
        self.drain()
        with suppress(sqlite3.Error):  # the disk is full, say: their attempts count
            self._store.spare()
        self._join(grace_s)
        for watch in list(self._watches.values()):
            watch.stop()
        return self._join(stop_s)

    def _join(self, limit_s: float) -> bool:
        ends = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        swept = 0.0
        while not self._closing:
            is_idle = True
            try:
                self._tell()
                if time.monotonic() - swept > SWEEP_S:
                    swept = time.monotonic()
                    self._store.sweep()
                if job := self._store.take():
                    is_idle = False
                    self._do(*job)
            except Exception:  # a full disk, a lack of memory: the jobs are still there when that is over
                LOG.exception("the store of jobs")
                is_idle = True
            if is_idle:
                with self._changed:
                    if not self._closing:
                        self._changed.wait(IDLE_S)  # a notice may have come before

    def _tell(self) -> None:
        """Keep what could not be kept before."""
        for name, failure in list(self._untold.items()):
            self._store.fail(name, failure.status, failure.message)
            self._untold.pop(name, None)

    def _do(self, name: str, order: str) -> None:
        """Do one job. Raises: sqlite3.Error if what became of it cannot be kept."""
        watch = self._watches[name] = Watch(self._limit_s)
        try:
            failure = self._try(name, order, watch)
        except Stopped:
            if self._closing:
                self._store.release(name)
            return
        finally:
            del self._watches[name]
        if failure:
            self._untold[name] = failure
            self._tell()

    def _try(self, name: str, text: str, watch: Watch) -> Failure | None:
        """Do the work, and keep its result; give what went wrong. Raises: Stopped."""
        source = self._models.new_file("source")
        result: Path | None = None
        try:
            order = Order.model_validate_json(text)
            self._models.check(order)  # of an earlier server, maybe, which had other models
            with source.open("xb") as stream:
                for piece in self._store.pieces(name):
                    stream.write(piece)
            if self._store.get(name) is None:  # removed before it could be stopped
                raise Stopped
            result = self._models.enlarge(order, source, watch)
            self._store.finish(name, result)
            return None
        except Stopped:
            raise
        except Failure as exc:
            return exc
        except NoRoom:
            return Failure(507, "the store of jobs has no room for the result: fetch and remove some")
        except (sqlite3.Error, OSError) as exc:
            return Failure(507, f"the server has no room for it ({exc})")
        except Exception:  # a mistake of ours is this job's end, not the thread's
            LOG.exception("job %s", name)
            return Failure(500, "the server made a mistake; its log tells more")
        finally:
            for path in (source, result):
                if path:
                    path.unlink(missing_ok=True)
