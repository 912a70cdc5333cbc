"""What runs on each node of a Ray cluster: an actor with an Upscaler, and the ledger of those that die."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import files, jobs, pipeline, remote
from .errors import BackendError, OutputError, SRError
from .opening import one_line
from .upscaler import Upscaler

LOG = logging.getLogger(__name__)
MAX_DEATHS = 3  # of workers, of one picture


@dataclass(frozen=True)
class Task:
    """One picture: from a file or URL to another."""

    source: str
    target: str


@dataclass(frozen=True)
class Outcome:
    """What became of a task: "done", "skipped" (its result was there), "failed", or "open" (not reached).

    attempts: workers that have begun it. seconds: from its fetching to the writing of its result.
    """

    source: str
    target: str
    outcome: str
    error: str | None = None
    attempts: int = 0
    seconds: float = 0.0


class Ledger:
    """Counts how often something has been begun, for workers that die; an actor of its own."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        """Give how often that has been begun, this time among them."""
        self._begun[name] += 1
        return self._begun[name]

    def end(self, name: str) -> None:
        """Take note that whoever began it has lived through it."""
        del self._begun[name]


class RemoteLedger:
    """The ledger, from another process."""

    def __init__(self, actor: Any):
        self._actor = actor

    def begin(self, name: str) -> int:
        """See Ledger.begin."""
        import ray

        return int(ray.get(self._actor.begin.remote(name)))

    def end(self, name: str) -> None:
        """See Ledger.end."""
        import ray

        ray.get(self._actor.end.remote(name))


class Worker:
    """Holds an Upscaler, and enlarges a block of pictures at a time; an actor of Ray Data.

    engine: options of Upscaler. threads: of its engine on the CPU, 0 lets it choose. ledger: outlives this worker.
    scratch: folder for files under way, on the disk that results go to; None if they go to URLs.
    """

    def __init__(
        self,
        engine: Mapping[str, Any],
        options: jobs.Options,
        threads: int,
        ledger: Ledger | RemoteLedger,
        scratch: str | None,
    ):
        if threads:
            os.environ["SR_THREADS"] = str(threads)
        self._upscaler = Upscaler(**engine)
        self._options, self._ledger, self._scratch = options, ledger, scratch

    def __call__(self, block: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Enlarge a block of tasks, given and told of in columns."""
        tasks = [Task(str(source), str(target)) for source, target in zip(block["source"], block["target"])]
        if self._ledger.begin(f"block of {tasks[0].source}") == 1:
            outcomes = list(self._enlarge(tasks, attempts=1))
        else:
            # A worker died of one of them: they are done one by one, so that the guilty is found.
            outcomes = [self._enlarge_alone(task) for task in tasks]
        rows = [asdict(outcome) | {"error": outcome.error or ""} for outcome in outcomes]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _enlarge_alone(self, task: Task) -> Outcome:
        try:
            if not self._options.overwrite and _exists(task.target):
                return Outcome(task.source, task.target, "done", attempts=1)
        except SRError as exc:
            return Outcome(task.source, task.target, "failed", str(exc), attempts=1)
        attempts = 1 + self._ledger.begin(task.source)
        if attempts > MAX_DEATHS:
            error = f"{task.source}: {MAX_DEATHS} workers have died of it, or of what else was on their machine"
            return Outcome(task.source, task.target, "failed", error, MAX_DEATHS)
        outcome = next(self._enlarge([task], attempts=attempts))
        self._ledger.end(task.source)
        return outcome

    def _enlarge(self, tasks: Sequence[Task], *, attempts: int) -> Iterator[Outcome]:
        """Fetch, enlarge and store pictures, the steps overlapped; an error is the outcome of its picture."""
        steps = jobs.Steps(self._upscaler, self._options)
        with _scratch_folder(self._scratch) as scratch:
            works = [_Work(task, scratch, overwrite=self._options.overwrite) for task in tasks]
            done = pipeline.overlap(
                works,
                decode=_told(lambda work: steps.decode(work.fetch())),
                compute=_told(lambda enlarge: enlarge()),
                encode=_told(lambda work, enlarged: work.store(steps, enlarged)),
            )
            with closing(done) as results:
                for work, error in results:
                    task = work.task
                    if isinstance(error, SRError):
                        work.remove()
                        yield Outcome(task.source, task.target, "failed", work.worded(error), attempts, work.seconds)
                    else:
                        yield Outcome(task.source, task.target, "done", None, attempts, work.seconds)


@contextmanager
def _scratch_folder(folder: str | None) -> Iterator[Path]:
    """Give the folder for files under way, or a temporary one of this machine, which is removed again."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="sr-cluster-") as name:
        yield Path(name)


def _told(step: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a step must not raise into an error of its picture: one mistake of ours is not to end a long run."""

    def run(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except SRError:
            raise
        except Exception as exc:
            LOG.exception("a picture that could not be enlarged")
            raise BackendError(f"{type(exc).__name__}: {one_line(exc)}") from exc

    return run


class _Work:
    """A task, and the files that stand for its source and target until it is done.

    scratch: an existing folder for them, where the target is if that is a file.
    """

    def __init__(self, task: Task, scratch: Path, *, overwrite: bool):
        self.task, self._overwrite = task, overwrite
        self._started, self.seconds = time.monotonic(), 0.0
        name = name_of(task.target)
        self._folder = scratch / f"{secrets.token_hex(4)}-{name}"
        source = self._folder / "source" if remote.is_url(task.source) else Path(task.source)
        self.job = jobs.Job(source, self._folder / name)

    def fetch(self) -> jobs.Job:
        """Bring the source here. Raises: ImageError."""
        self._started = time.monotonic()
        self._folder.mkdir()
        if remote.is_url(self.task.source):
            remote.fetch(self.task.source, self.job.source)
        return self.job

    def store(self, steps: jobs.Steps, enlarged: jobs.Enlarged) -> None:
        """Write the result, take it to its place, and remove what stood here. Raises: OutputError."""
        steps.encode(self.job, enlarged)
        target = self.task.target
        if remote.is_url(target):
            remote.store(self.job.target, target)
        else:
            try:
                if self._overwrite:
                    os.replace(self.job.target, target)
                else:
                    files.claim(self.job.target, Path(target))
            except OSError as exc:
                raise OutputError(f"{target}: cannot be written ({exc.strerror})") from exc
        self.seconds = time.monotonic() - self._started
        self.remove()

    def remove(self) -> None:
        """Remove what stood here."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def worded(self, error: SRError) -> str:
        """Give a message with the names that the user knows."""
        text = str(error).replace(str(self.job.source), self.task.source)
        return text.replace(str(self.job.target), self.task.target)


def name_of(target: str) -> str:
    """Give the last part of a file's name or URL."""
    return target.replace(os.sep, "/").rpartition("/")[2]


def _exists(target: str) -> bool:
    return remote.exists(target) if remote.is_url(target) else os.path.lexists(target)
