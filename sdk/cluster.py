"""Many pictures on a Ray cluster: Ray Data hands them to actors with an Upscaler each, and a manifest tells of all.

A source and its result are files that every node sees under their absolute names, or fsspec URLs. A result appears
whole, and is not made again while it is there: so a rerun goes on, and the pictures of a worker that died are done by
the next one. Those that worker after worker dies of are given up.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import files, inputs, jobs, pipeline, remote, video
from .bundle import Bundle
from .errors import BackendError, BackendUnavailable, OptionError, OutputError, SRError
from .opening import one_line
from .upscaler import Upscaler

LOG = logging.getLogger(__name__)
MANIFEST = "sr-manifest.jsonl"
BLOCK = 8  # pictures handed out at once
MAX_THREADS = 4  # of an engine on the CPU: more workers with fewer threads each waste less
MAX_DEATHS = 3


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


def plan_tasks(arguments: Sequence[str], output: str, *, suffix: str | None = None) -> list[Task]:
    """Pair the pictures that files, folders, globs and URLs mean with their results in a folder or URL.

    Raises: as inputs.plan_jobs; BackendUnavailable without fsspec.
    """
    if not output:
        raise OptionError("-o is empty: a folder or a URL is needed")
    sources: list[str] = []
    for argument in arguments:
        if remote.is_url(argument):
            sources += remote.expand(argument)
        else:
            sources += [os.path.abspath(path) for path in inputs.expand((argument,))[0]]
    taken: dict[str, str] = {}
    for source in sources:
        name = remote.base_name(source) if remote.is_url(source) else os.path.basename(source)
        target = _join(output, inputs.result_name(name, suffix))
        if target == source:
            raise OutputError(f"{source}: would be replaced by its own result; name another folder with -o")
        if not remote.is_url(source) and video.is_video(Path(source)):
            raise OptionError(f"{source}: videos are not enlarged on a cluster; leave --ray out for them")
        if target in taken:
            raise OutputError(f"{taken[target]} and {source} would both become {target}")
        taken[target] = source
    return [Task(source, target) for target, source in taken.items()]


def enlarge(
    tasks: Sequence[Task],
    output: str,
    *,
    address: str,
    engine: Mapping[str, Any],
    options: jobs.Options,
    workers: int | None = None,
) -> Generator[Outcome, None, None]:
    """Enlarge pictures on a cluster; the manifest in `output` is written at the end, however that comes.

    address: of a Ray cluster, "auto", or "local" for one of its own on this machine. engine: options of Upscaler.
    workers: actors; None is one for each GPU, or one for every few cores.
    Yields: an outcome for each task, as they come. Raises: BundleError for the model;
    BackendUnavailable without Ray or a cluster at the address;
    OutputError if the output or its manifest cannot be written.
    """
    Bundle.load(engine.get("model")).stage(engine.get("stage", "auto"))  # before a cluster is started for it
    outcomes = {task: Outcome(task.source, task.target, "open") for task in tasks}
    there = set() if options.overwrite else _names(output)
    _make_folder(output)
    scratch = None
    try:
        waiting = []
        for task in tasks:
            if posixpath.basename(task.target.replace(os.sep, "/")) in there:
                outcomes[task] = replace(outcomes[task], outcome="skipped")
                yield outcomes[task]
            else:
                waiting.append(task)
        if waiting:
            scratch = None if remote.is_url(output) else os.path.abspath(_make_scratch(output))
            with closing(_run(waiting, address, engine, options, workers, scratch)) as found:
                for outcome in found:
                    outcomes[Task(outcome.source, outcome.target)] = outcome
                    yield outcome
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)  # with what workers that died have left there
        _write_manifest(output, _settled(outcomes, there=there, overwrite=options.overwrite))


def _settled(outcomes: Mapping[Task, Outcome], *, there: set[str], overwrite: bool) -> list[Outcome]:
    """Give the outcomes, and of those that nobody has told yet whether their result has come meanwhile.

    there: names of the results that were there before.
    """
    if overwrite:
        return list(outcomes.values())
    made: dict[str, set[str]] = {}
    settled = []
    for task, outcome in outcomes.items():
        folder, _, name = task.target.replace(os.sep, "/").rpartition("/")
        if outcome.outcome == "open":
            found = made.setdefault(folder, _names(folder))
            outcome = replace(outcome, outcome="done", attempts=1) if name in found - there else outcome
        settled.append(outcome)
    return settled


def _run(
    tasks: Sequence[Task],
    address: str,
    engine: Mapping[str, Any],
    options: jobs.Options,
    workers: int | None,
    scratch: str | None,
) -> Generator[Outcome, None, None]:
    with _connected(address) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        shares = _shares(ray, device=engine.get("device", "auto"), workers=workers)
        # If the node that it is on dies, it begins anew on another: some are then tried more often.
        ledger = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger).remote()
        rows = ray.data.from_items([asdict(task) for task in tasks], override_num_blocks=-(-len(tasks) // BLOCK))
        results = rows.map_batches(
            Worker,
            fn_constructor_kwargs={
                "engine": dict(engine),
                "options": options,
                "threads": shares.threads,
                "ledger": _RemoteLedger(ledger),
                "scratch": scratch,
            },
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=shares.workers),
            num_cpus=shares.cpus,
            num_gpus=shares.gpus,
        )
        for batch in results.iter_batches(batch_size=None):
            for values in zip(*(batch[name].tolist() for name in Outcome.__dataclass_fields__), strict=True):
                outcome = Outcome(*values)
                yield replace(outcome, error=outcome.error or None)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Connect to a cluster, or take the connection that this process has. Raises: BackendUnavailable."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise BackendUnavailable("a cluster needs Ray: pip install 'sr-sdk[ray]'") from exc
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        with _failures(ray):
            yield ray
        return
    dashboard = False if address == "local" else None
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as exc:  # Ray raises many kinds
        raise BackendUnavailable(f"no Ray cluster at {address!r}: {one_line(exc)}") from exc
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray has taken it
    try:
        with _failures(ray):
            yield ray
    finally:
        ray.shutdown()


@contextmanager
def _failures(ray: Any) -> Iterator[None]:
    """Turn errors of Ray, which hold whole tracebacks, into one that tells their end."""
    try:
        yield
    except ray.exceptions.RayError as exc:
        last = [line.strip() for line in str(exc).splitlines() if line.strip()][-1]
        raise BackendError(f"the Ray cluster failed: {one_line(last)}") from exc


@dataclass(frozen=True)
class Shares:
    """How a cluster is shared out: workers, and for each its cores, GPUs and the threads of its engine."""

    workers: int
    cpus: int
    gpus: int
    threads: int


def _shares(ray: Any, *, device: str, workers: int | None) -> Shares:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        return Shares(workers or gpus, 1, 1, 0)
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise BackendUnavailable("the Ray cluster has neither GPUs nor cores to work on")
    threads = min(MAX_THREADS, min(cores)) if workers is None else max(1, sum(cores) // workers)
    threads = min(threads, max(cores))
    return Shares(workers or sum(count // threads for count in cores), threads, 0, threads)


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


class _RemoteLedger:
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
        ledger: Ledger | _RemoteLedger,
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
        name = posixpath.basename(task.target.replace(os.sep, "/"))
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


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if remote.is_url(folder) else os.path.abspath(os.path.join(folder, name))


def _exists(target: str) -> bool:
    return remote.exists(target) if remote.is_url(target) else os.path.lexists(target)


def _names(folder: str) -> set[str]:
    """List the files of a folder of results; none if it is not there. Raises: OutputError."""
    if remote.is_url(folder):
        return remote.names(folder)
    try:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()
    except OSError as exc:
        raise OutputError(f"{folder}: the folder cannot be read ({exc.strerror})") from exc


def _make_folder(folder: str) -> None:
    if not remote.is_url(folder):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as exc:
            raise OutputError(f"{folder}: a folder is needed, and it cannot be made ({exc.strerror})") from exc


def _make_scratch(folder: str) -> str:
    """Raises: OutputError."""
    try:
        return tempfile.mkdtemp(prefix=".sr-cluster-", dir=folder)
    except OSError as exc:
        raise OutputError(f"{folder}: cannot be written ({exc.strerror})") from exc


def _write_manifest(folder: str, outcomes: Sequence[Outcome]) -> None:
    """Write one line of JSON for each outcome. Raises: OutputError."""
    lines = "".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
    if remote.is_url(folder):
        with tempfile.TemporaryDirectory(prefix="sr-cluster-") as name:
            path = Path(name) / MANIFEST
            path.write_text(lines, encoding="utf-8")
            remote.store(path, _join(folder, MANIFEST))
        return
    with files.new_file(Path(folder) / MANIFEST, overwrite=True) as stream:
        stream.write(lines.encode())
