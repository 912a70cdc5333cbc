"""Many pictures on a Ray cluster: Ray Data hands them to actors with an Upscaler each, and a manifest tells of all.

A source and its result are files that every node sees under their absolute names, or fsspec URLs. A result appears
whole, and is not made again while it is there: so a rerun goes on, and the pictures of a worker that died are done by
the next one. Those that worker after worker dies of are given up.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import files, inputs, jobs, remote, video
from .bundle import Bundle
from .cluster_worker import Ledger, Outcome, RemoteLedger, Task, Worker, name_of
from .errors import BackendError, BackendUnavailable, OptionError, OutputError
from .opening import one_line

MANIFEST = "sr-manifest.jsonl"
BLOCK = 8  # pictures handed out at once
MAX_THREADS = 4  # of an engine on the CPU: more workers with fewer threads each waste less


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
    tasks = []
    for source in sources:
        name = remote.base_name(source) if remote.is_url(source) else os.path.basename(source)
        target = _join(output, inputs.result_name(name, suffix))
        if target == source:
            raise OutputError(f"{source}: would be replaced by its own result; name another folder with -o")
        if not remote.is_url(source) and video.is_video(Path(source)):
            raise OptionError(f"{source}: videos are not enlarged on a cluster; leave --ray out for them")
        tasks.append(Task(source, target))
    is_remote = remote.is_url(output)
    inputs.refuse_twins((task.source, task.target if is_remote else Path(task.target)) for task in tasks)
    return tasks


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
    if not remote.is_url(output):
        inputs.make_folder(output)
    scratch = None
    try:
        waiting = []
        for task in tasks:
            if name_of(task.target) in there:
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
        came = set() if options.overwrite else _names(output) - there
        _write_manifest(output, [_settled(outcome, came) for outcome in outcomes.values()])


def _settled(outcome: Outcome, came: set[str]) -> Outcome:
    """Give an outcome, or of one that nobody has told yet, that its result is there all the same.

    came: names of the results that were not there before.
    """
    is_there = outcome.outcome == "open" and name_of(outcome.target) in came
    return replace(outcome, outcome="done", attempts=1) if is_there else outcome


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
                "ledger": RemoteLedger(ledger),
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


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if remote.is_url(folder) else os.path.abspath(os.path.join(folder, name))


def _names(folder: str) -> set[str]:
    """List the files of a folder of results; none if it is not there. Raises: OutputError."""
    if remote.is_url(folder):
        return remote.names(folder)
    try:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()
    except OSError as exc:
        raise OutputError(f"{folder}: the folder cannot be read ({exc.strerror})") from exc


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
