"""Pictures on a Ray cluster: nothing lost and nothing twice, whoever dies; and files behind URLs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import bundles
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sdk import BackendUnavailable, ImageError, OptionError, OutputError, Upscaler, cluster, jobs, remote
from sdk.cli import main
from sdk.cluster import MANIFEST, plan_tasks
from sdk.cluster_worker import MAX_DEATHS, Ledger, Outcome, Task, Worker

pytest.importorskip("onnxruntime")

ENGINE = {"model": str(bundles.shared("blur")), "backend": "onnxruntime", "device": "cpu"}
WAIT_S = 120


def photo(seed: int = 0, side: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)


def write_photos(folder: Path, count: int, *, side: int = 20) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(photo(number, side)).save(path)
    return paths


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def make_worker(scratch: Path | None) -> Worker:
    return Worker(ENGINE, jobs.Options(), 0, Ledger(), scratch and str(scratch))


def work(worker: Worker, tasks: list[Task]) -> list[Outcome]:
    """Hand a block to a worker as Ray Data does, in columns."""
    block = {name: np.array([getattr(task, name) for task in tasks]) for name in ("source", "target")}
    columns = worker(block)
    return [Outcome(*row) for row in zip(*(columns[name].tolist() for name in columns), strict=True)]


# --- what is to be done -------------------------------------------------------------------------------------------


def test_files_folders_globs_and_urls_are_planned(tmp_path):
    write_photos(tmp_path / "in", 2)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / "old.tga").write_bytes(b"")
    local = plan_tasks([str(tmp_path / "in")], str(tmp_path / "out"))
    assert [Path(task.target).name for task in local] == ["000.png", "001.png", "old.png"]
    assert all(os.path.isabs(task.source) and os.path.isabs(task.target) for task in local)
    url = f"file://{tmp_path}/in"
    assert [task.source for task in plan_tasks([url], "memory://out")] == [
        f"{url}/{name}" for name in ("000.png", "001.png", "old.tga")
    ]
    assert [task.target for task in plan_tasks([f"{url}/0*.png"], "memory://out/", suffix="webp")] == [
        "memory://out/000.webp", "memory://out/001.webp",
    ]  # fmt: skip
    assert plan_tasks([f"{url}/000.png"], "out")[0].target == os.path.abspath("out/000.png")


def test_names_in_urls(tmp_path):
    assert remote.base_name("https://host/a/b.jpg?X-Amz=1/2") == "b.jpg"
    assert remote.base_name("s3://bucket/a?b.jpg") == "a?b.jpg"
    (source,) = write_photos(tmp_path / "in", 1)
    source.rename(tmp_path / "in" / "[1].png")
    assert remote.expand(f"file://{tmp_path}/in/[1].png") == [f"file://{tmp_path}/in/[1].png"]


def test_what_cannot_be_planned_is_told(tmp_path):
    write_photos(tmp_path / "in", 1)
    write_photos(tmp_path / "twin", 1)
    with pytest.raises(OutputError, match="would both become"):
        plan_tasks([str(tmp_path / "in"), str(tmp_path / "twin")], "out")
    with pytest.raises(OutputError, match="no such file, or no pictures"):
        plan_tasks([f"file://{tmp_path}/nothing"], "out")
    with pytest.raises(OutputError, match="no such file, or no pictures"):
        plan_tasks([str(tmp_path / "nothing")], "out")
    with pytest.raises(OptionError, match="-o is empty"):
        plan_tasks([str(tmp_path / "in")], "")
    with pytest.raises(OutputError, match="replaced by its own result"):
        plan_tasks([str(tmp_path / "in")], str(tmp_path / "in"))
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(OptionError, match="videos are not enlarged on a cluster"):
        plan_tasks([str(tmp_path / "clip.mp4")], "out")
    with pytest.raises(OptionError, match="nowhere"):
        plan_tasks(["nowhere://bucket/folder"], "out")


# --- a worker -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "urls"])
def test_a_worker_enlarges_its_block_and_tells_of_each(tmp_path, kind):
    sources = write_photos(tmp_path / "in", 3)
    sources[1].write_bytes(b"not a picture")
    (tmp_path / "out").mkdir()
    output = str(tmp_path / "out") if kind == "files" else f"file://{tmp_path}/out"
    scratch = tmp_path if kind == "files" else None
    given = str(tmp_path / "in") if kind == "files" else f"file://{tmp_path}/in"
    first, second, third = work(make_worker(scratch), plan_tasks([given], output))
    assert [first.outcome, second.outcome, third.outcome] == ["done", "failed", "done"]
    assert "not a picture" in second.error
    assert first.attempts == 1
    assert first.seconds > 0
    with Upscaler(**ENGINE) as upscaler:
        for number in (0, 2):
            result = np.asarray(Image.open(tmp_path / "out" / f"{number:03}.png"))
            np.testing.assert_array_equal(result, upscaler.upscale(photo(number)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000.png", "002.png"]  # no other


def test_after_a_death_what_is_there_is_not_made_again_and_the_guilty_is_given_up(tmp_path):
    write_photos(tmp_path / "in", 4)
    (tmp_path / "out").mkdir()
    tasks = plan_tasks([str(tmp_path / "in")], str(tmp_path / "out"))
    worker = make_worker(tmp_path)
    worker._ledger.begin("block of " + tasks[0].source)  # by one that died
    worker._ledger.begin(tasks[2].source)
    worker._ledger.begin(tasks[2].source)  # and two more, of this picture
    Path(tasks[0].target).write_bytes(b"done before it died")
    outcomes = work(worker, tasks)
    assert [outcome.outcome for outcome in outcomes] == ["done", "done", "failed", "done"]
    assert [outcome.attempts for outcome in outcomes] == [1, 2, 3, 2]
    assert "3 workers have died of it" in outcomes[2].error
    assert Path(tasks[0].target).read_bytes() == b"done before it died"


def test_pictures_beside_one_that_kills_are_not_to_blame(tmp_path, monkeypatch):
    sources = write_photos(tmp_path / "in", 4)
    sources[0].write_bytes(b"not a picture")
    (tmp_path / "out").mkdir()
    tasks = plan_tasks([str(tmp_path / "in")], str(tmp_path / "out"))
    worker = make_worker(tmp_path)
    decode = jobs.Steps.decode

    def deadly(steps: jobs.Steps, job: jobs.Job):
        if job.source.name == "002.png":
            raise SystemExit  # stands for a death: nothing of the block is told
        return decode(steps, job)

    monkeypatch.setattr(jobs.Steps, "decode", deadly)
    for _ in range(MAX_DEATHS):
        with pytest.raises(SystemExit):
            work(worker, tasks)
    outcomes = work(worker, tasks)
    assert [outcome.outcome for outcome in outcomes] == ["failed", "done", "failed", "done"]
    assert "not a picture" in outcomes[0].error
    assert "3 workers have died of it" in outcomes[2].error


def test_a_storage_that_stammers_is_the_outcome_of_one_picture(tmp_path, monkeypatch):
    write_photos(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    tasks = plan_tasks([str(tmp_path / "in")], f"file://{tmp_path}/out")
    worker = make_worker(None)
    worker._ledger.begin("block of " + tasks[0].source)
    exists = remote.exists

    def stammer(url: str) -> bool:
        if "000" in url:
            raise OutputError(f"{url}: connection lost")
        return exists(url)

    monkeypatch.setattr(remote, "exists", stammer)
    assert [outcome.outcome for outcome in work(worker, tasks)] == ["failed", "done"]


def test_what_came_before_an_interruption_is_told():
    told = [
        cluster._settled(Outcome(f"in/{name}", f"/out/{name}", outcome), came={"a.png", "b.png"}).outcome
        for name, outcome in (("a.png", "open"), ("b.png", "failed"), ("c.png", "open"))
    ]
    assert told == ["done", "failed", "open"]


# --- storage ------------------------------------------------------------------------------------------------------


def test_a_stored_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    import fsspec

    (tmp_path / "a").write_bytes(b"data")
    remote.store(tmp_path / "a", "memory://new/folder/a.png")
    assert remote.names("memory://new/folder") == {"a.png"}
    assert remote.exists("memory://new/folder/a.png")
    assert not remote.exists("memory://new/folder/b.png")
    remote.fetch("memory://new/folder/a.png", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"data"
    system = fsspec.filesystem("memory")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("connection lost")

    monkeypatch.setattr(type(system), "mv", fail)
    with pytest.raises(OutputError, match=r"^memory://new/folder/c.png: connection lost"):
        remote.store(tmp_path / "a", "memory://new/folder/c.png")
    assert remote.names("memory://new/folder") == {"a.png"}
    assert remote.names("memory://not/there") == set()


def test_missing_sources_and_packages_are_told(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match=r"^memory://new/none.png: "):
        remote.fetch("memory://new/none.png", tmp_path / "x")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'sr-sdk\[ray\]'"):
        remote.exists("memory://x")


# --- a cluster ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    module.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield module
    module.shutdown()


def run(tasks: list[Task], output: Path, **options: object) -> list[Outcome]:
    return list(
        cluster.enlarge(tasks, str(output), address="local", engine=ENGINE, options=jobs.Options(**options), workers=1)
    )


def worker_ids() -> list[int]:
    """List the processes of workers: Ray names them in /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker(MapBatches(Worker))."):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_worker_loses_nothing_and_nothing_is_made_twice(ray, tmp_path):
    # Large enough that the worker is at work when it is killed.
    side = 300
    sources = write_photos(tmp_path / "in", 60, side=side)
    sources[7].write_bytes(b"not a picture")
    output = tmp_path / "out"
    tasks = plan_tasks([str(tmp_path / "in")], str(output))
    killed = []

    def kill() -> None:
        ends = time.monotonic() + WAIT_S
        while time.monotonic() < ends and not killed:
            time.sleep(0.01)
            if len(list(output.glob("*.png"))) > 10:
                for process in worker_ids():
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = run(tasks, output)
    killer.join()
    assert killed
    assert Counter(outcome.source for outcome in outcomes) == Counter(str(path) for path in sources)
    assert [outcome.source for outcome in outcomes if outcome.outcome == "failed"] == [str(sources[7])]
    assert max(outcome.attempts for outcome in outcomes) > 1  # it did hit one at work
    with Upscaler(**ENGINE) as upscaler:
        for number, path in enumerate(sources):
            if number != 7:
                result = np.asarray(Image.open(output / path.name))
                np.testing.assert_array_equal(result, upscaler.upscale(photo(number, side)))
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [path.name for number, path in enumerate(sources) if number != 7] + [MANIFEST]
    )
    listed = manifest(output)
    assert [entry["source"] for entry in listed] == [str(path) for path in sources]
    assert Counter(entry["outcome"] for entry in listed) == {"done": 59, "failed": 1}

    # Again: what is there stays, what failed is tried anew.
    written = {path: path.stat().st_mtime_ns for path in output.glob("*.png")}
    Image.fromarray(photo(7)).save(sources[7])
    again = run(tasks, output)
    assert Counter(outcome.outcome for outcome in again) == {"skipped": 59, "done": 1}
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert Counter(entry["outcome"] for entry in manifest(output)) == {"skipped": 59, "done": 1}
    # Nothing is left to do: no worker is needed to find that out.
    assert {outcome.outcome for outcome in run(tasks, output)} == {"skipped"}


@pytest.mark.filterwarnings("ignore")
def test_a_picture_that_kills_its_workers_is_given_up(ray, tmp_path):
    sources, output = write_photos(tmp_path / "in", 3), tmp_path / "out"
    Image.fromarray(photo(side=3000)).save(sources[1])  # so large that there is time to kill whoever does it
    begun, stop = set(), threading.Event()

    def kill() -> None:
        while not stop.wait(0.01):
            under_way = set(output.glob(".sr-cluster-*/*-001.png"))
            if under_way - begun:
                begun.update(under_way)
                for process in worker_ids():
                    os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        outcomes = run(plan_tasks([str(tmp_path / "in")], str(output)), output)
    finally:
        stop.set()
        killer.join()
    assert {Path(outcome.source).name: outcome.outcome for outcome in outcomes} == {
        "000.png": "done", "001.png": "failed", "002.png": "done",
    }  # fmt: skip
    assert len(begun) == MAX_DEATHS
    assert sorted(path.name for path in output.iterdir()) == ["000.png", "002.png", MANIFEST]


@pytest.mark.filterwarnings("ignore")
def test_the_command_works_on_a_cluster(ray, tmp_path):
    write_photos(tmp_path / "in", 3)
    (tmp_path / "in" / "bad.png").write_bytes(b"no")
    command = ["--ray", "local", str(tmp_path / "in"), "-o", f"file://{tmp_path}/out", "--format", "webp", "--lossless"]
    command += ["--model", ENGINE["model"], "--backend", "onnxruntime", "--device", "cpu", "--ray-workers", "2"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "1 of 4 files failed" in done.output
    assert "bad.png: not a picture" in done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000.webp", "001.webp", "002.webp", MANIFEST,
    ]  # fmt: skip
    with Upscaler(**ENGINE) as upscaler:
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "001.webp")), upscaler.upscale(photo(1)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_its_manifest_and_nothing_else(tmp_path, number):
    pytest.importorskip("ray")
    sources, output = write_photos(tmp_path / "in", 30), tmp_path / "out"
    for source in sources[10:]:
        Image.fromarray(photo(side=1500)).save(source)
    command = [sys.executable, "-m", "sdk.cli", "--ray", "local", str(tmp_path / "in"), "-o", str(output)]
    command += ["--model", ENGINE["model"], "--backend", "onnxruntime", "--device", "cpu", "--ray-workers", "1"]
    # The shell that started the tests may have had SIGINT ignored.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    ends = time.monotonic() + WAIT_S
    while len(list(output.glob("*.png"))) < 8:
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + number
    assert ("interrupted" if number == signal.SIGINT else "terminated") + ": finished files are kept" in told
    assert "Traceback" not in told
    outcomes = Counter(entry["outcome"] for entry in manifest(output))
    assert outcomes["open"] > 0
    assert sum(outcomes.values()) == 30
    assert not list(output.glob(".sr-*"))


def test_what_the_command_cannot_do_on_a_cluster(tmp_path, monkeypatch):
    write_photos(tmp_path / "in", 1)
    command = ["--ray", "local", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    assert "--compare is not made on a cluster" in CliRunner().invoke(main, [*command, "--compare"]).output
    assert "--ray is empty" in CliRunner().invoke(main, ["--ray", "", *command[2:]]).output
    assert "--ray-workers is for --ray" in CliRunner().invoke(main, ["--ray-workers", "2", *command[2:]]).output
    assert "neither a folder" in CliRunner().invoke(main, [*command, "--model", "nope"]).output
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert "pip install 'sr-sdk[ray]'" in CliRunner().invoke(main, command).output
    assert [entry["outcome"] for entry in manifest(tmp_path / "out")] == ["open"]
