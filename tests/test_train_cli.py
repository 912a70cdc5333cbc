"""sr-train as a person meets it: one line for each mistake, and a run that survives being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from train import cli
from train.checkpoint import latest_checkpoint, load_checkpoint, stage_folder
from train.cli import _without_folder, main
from train.loop import Progress
from train.run_folder import hold, read_log
from train.validation import colour_drift

ROOT = Path(__file__).parent.parent
TINY = """
samples_per_epoch = 8
model = { options = { channels = 8, blocks = [1, 1, 1] } }
optimizer = { muon_rate = 10.0 }

[[stages]]
name = "32"
size = 32
batch = 2
phases = [{ epochs = EPOCHS }]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of 12 steps."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace("EPOCHS", "3.0"))
    return path


@pytest.fixture(autouse=True)
def _state_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the command sets for a whole process: signal handlers."""
    monkeypatch.delenv("SR_WEIGHTS_DIR", raising=False)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)


def run(*arguments: object) -> Result:
    options = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
    return CliRunner().invoke(main, [*options, *map(str, arguments)])


def assert_one_line(result: Result, expected: str) -> None:
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and result.output.splitlines()[-1] == errors[0], result.output
    assert expected in errors[0]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    options = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
    return [sys.executable, "-c", "from train.cli import main; main()", *options, *map(str, arguments)]


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # importing it would raise
        "from train.cli import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Train a super-resolution network" in done.stdout


def test_a_missing_extra_is_named(photo_folder: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom train.cli import main; main()"
    arguments = [sys.executable, "-c", code, str(photo_folder), "--out", str(tmp_path / "run")]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: torch is not installed: pip install 'sr-sdk[train]'\n"


def test_a_whole_run_then_again(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(photo_folder, "--recipe", recipe, "--out", out)
    assert first.exit_code == 0, first.output
    assert "reading pictures 6/6" in first.output and "12/12" in first.output and "done: 32 in" in first.output
    facts = json.loads((out / "run.json").read_text())
    assert facts["command"].startswith("sr-train") and facts["data"] == "photos"
    assert load_checkpoint(stage_folder(out, "32")).facts["complete"] is True
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run(photo_folder, "--recipe", recipe, "--out", out)
    assert again.exit_code == 0
    assert "finished already, at step 12: nothing to do" in again.output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_max_steps_then_the_rest(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(photo_folder, "--recipe", recipe, "--out", out, "--max-steps", 5)
    assert first.exit_code == 0 and "stopped at step 5, as --max-steps asks; a larger one" in first.output
    assert "(5/12)" in first.output  # its last line is told however soon after the one before
    assert [entry["done_steps"] for entry in read_log(out)][-1] == 5
    assert load_checkpoint(stage_folder(out, "32")).facts["complete"] is False
    second = run(photo_folder, "--recipe", recipe, "--out", out)
    assert second.exit_code == 0 and f"resumed {out} at step 5" in second.output
    assert load_checkpoint(stage_folder(out, "32")).facts["complete"] is True


def test_another_recipe_on_an_existing_run_is_refused(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(photo_folder, "--recipe", recipe, "--out", out, "--max-steps", 1)
    before = (out / "recipe.json").read_text(), (out / "run.json").read_text()
    result = run(photo_folder, "--recipe", recipe, "--out", out, "--set", "seed=4", "--set", "loss.pixel=l1")
    assert_one_line(result, 'seed: 1 before, 4 now; loss.pixel: "charbonnier" before, "l1" now')
    assert ((out / "recipe.json").read_text(), (out / "run.json").read_text()) == before


def test_a_learning_rate_edited_between_is_told(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(photo_folder, "--recipe", recipe, "--out", out, "--max-steps", 1)
    recipe.write_text(recipe.read_text().replace("epochs = 3.0", "epochs = 3.0, learning_rate = 1e-4"))
    result = run(photo_folder, "--recipe", recipe, "--out", out)
    assert_one_line(result, "stages.0.phases.0.learning_rate: 0.001 before, 0.0001 now")
    assert_one_line(result, "go on with the same, or start anew with another --out (and --init to keep the weights)")


def test_the_effective_recipe_is_printed_and_saved(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for steps in (1, 2):  # also when the run is resumed
        told = run(photo_folder, "--recipe", recipe, "--out", out, "--set", "seed=5", "--max-steps", steps).output
        (printed,) = (json.loads(line) for line in told.splitlines() if line.startswith("{"))
        assert printed["seed"] == 5 and printed["stages"][0]["phases"][0]["learning_rate"] == 1e-3  # the default
        folder = latest_checkpoint(out)
        assert folder is not None and folder.name.endswith(str(steps))
        assert load_checkpoint(folder).facts["recipe"] == printed == json.loads((out / "recipe.json").read_text())
        assert load_checkpoint(stage_folder(out, "32")).facts["recipe"] == printed


def test_news_come_at_once_and_tell_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    news = cli._News()
    told = []
    for step, seconds in ((1, 100.0), (2, 110.0), (11, 140.0)):
        now = seconds
        news.add(Progress("32", "all", step, 91, step, 91, 1e-3, {"pixel": 0.5}, 7.0, 0, None))
        told.append(capsys.readouterr().err)
    assert told[0].startswith("stage 32 all 1/91 (1/91), rate 1.00e-03, pixel 0.50000, 7 images/s")
    assert "min left" not in told[0] and told[1] == ""  # nothing is known yet; every half minute is enough
    assert "11/91" in told[2] and "5.3 min left" in told[2]  # 10 steps took 40 s, 80 are left
    news.close()
    assert capsys.readouterr().err == ""  # told already
    news.add(Progress("32", "all", 12, 91, 12, 91, 1e-3, {"pixel": 0.5}, 7.0, 0, None))
    news.close()
    assert "12/91" in capsys.readouterr().err


def test_a_small_folder_is_told_what_it_lacks(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    plenty = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "a", "--max-steps", 1)
    assert "warning: " not in plenty.output
    for path in sorted(photo_folder.iterdir())[3:]:
        path.unlink()
    options = ["--set", "samples_per_epoch=0", "--max-steps", 1]
    result = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "b", *options)
    assert result.exit_code == 0, result.output
    assert "to set any aside (a fifth, at most): no validation, no panels, no best checkpoint" in result.output
    assert "3 pictures make " in result.output and "--set samples_per_epoch=40000" in result.output


@pytest.mark.parametrize("tool", ["", *cli.TOOLS])
def test_every_command_has_a_short_help(tool: str) -> None:
    result = run(*([tool] if tool else []), "-h")
    assert result.exit_code == 0 and "Usage: " in result.output


def test_colour_drift_is_logged(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run")
    drifts = [entry["validation"]["colour_drift"] for entry in read_log(tmp_path / "run") if entry["validation"]]
    assert len(drifts) >= 2 and all(0 <= drift < 20 for drift in drifts)  # at the first step and at the last
    hr = np.full((4, 4, 3), 100, np.uint8)
    assert colour_drift(hr + np.array([0, 3, 1], np.uint8), hr) == 3.0


def test_find_lr_tells_its_steps_and_changes_nothing(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(photo_folder, "--recipe", recipe, "--out", out, "--find-lr")
    assert result.exit_code == 0, result.output
    assert "learning-rate finder: step" in result.output
    assert "no rate suggested" in result.output  # a network that starts as its own skip
    assert [path.name for path in out.iterdir()] == ["find_lr.png"]


def test_init_from_another_run(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    run(photo_folder, "--recipe", recipe, "--out", tmp_path / "first")
    tuned = tmp_path / "tuned"
    arguments = [photo_folder, "--recipe", recipe, "--set", "loss.pixel=l1", "--out", tuned]
    result = run(*arguments, "--init", tmp_path / "first", "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert json.loads((tuned / "run.json").read_text())["init"]["stage"] == "32"
    resumed = run(*arguments, "--max-steps", 2)  # the weights to start from are not needed again
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((tuned / "run.json").read_text())["init"]["stage"] == "32"


def test_a_missing_data_folder_is_one_line(recipe: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "gone", "--recipe", recipe, "--out", tmp_path / "run")
    assert_one_line(result, "gone: no such folder; give a folder of photographs")
    assert not (tmp_path / "run").exists()


def test_an_empty_data_folder_is_one_line(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(run(tmp_path / "empty", "--recipe", recipe, "--out", tmp_path / "run"), "no pictures found")


def test_unreadable_pictures_are_one_line(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    (photo_folder / "a.jpg").write_text("x")
    (photo_folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run")
    assert_one_line(result, "2 unreadable pictures, remove them: a.jpg (not a picture); b.png (")
    assert not (tmp_path / "run").exists()


def test_small_pictures_are_one_line(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    result = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run", "--set", "stages.0.size=512")
    assert_one_line(result, "every picture is smaller than 512 pixels")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "fsat"], "unknown recipe 'fsat': one of autoencoder"),
        (["--set", "sede=1"], "did you mean 'seed'?"),
        (["--set", "model.name=vdsr"], "unknown model 'vdsr': one of fast"),
        (["--set", "loss.pixel=l3"], "loss.pixel: one of"),
        (["--set", "stages.0.size=40"], "not a multiple of 16"),
        (["--device", "cuda:99"], "device cuda:99: "),
        (["--device", "gpu"], "expected auto, cpu or cuda:N"),
        (["--weights", "nowhere"], "--weights nowhere: no such folder; give a folder that holds them"),
        (["--set", "loss.feature_net=vgg19_normalised"], "--weights DIR or SR_WEIGHTS_DIR, or start without"),
        (["--init", "nowhere"], "--init nowhere: no such folder; a shipped model's lies in sdk/models"),
        (["--teacher", "nowhere", "--set", "loss.teacher_weight=1"], "--teacher nowhere: no such folder"),
        (["--init", "."], "not a run of sr-train, whose folder holds recipe.json"),
        (["--paired", "lr", "--task", "jpeg"], "--paired pictures are taken as they are"),
        (["--paired", "lr", "--set", "degrade.jpeg_probability=1.0"], "--paired pictures are taken as they are"),
        (["--max-steps", "-1"], "Invalid value for '--max-steps'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], message: str, photo_folder: Path, recipe: Path) -> None:
    assert_one_line(run(photo_folder, "--recipe", recipe, "--out", photo_folder.parent / "run", *arguments), message)
    assert not (photo_folder.parent / "run").exists()


def test_commands_tell_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["/home/me/photos", "--out=/home/me/x", "--out", "../y", "runs/z", "--set", "loss.pixel=l1", "--init=a/b"]
    assert [_without_folder(each) for each in given] == [
        "photos", "--out=x", "--out", "y", "runs/z", "--set", "loss.pixel=l1", "--init=a/b",
    ]  # fmt: skip


def test_an_unwritable_out_is_one_line(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "file" / "run")
    assert_one_line(result, "cannot be written")
    assert_one_line(run(photo_folder, "--recipe", recipe, "--out", tmp_path / "file"), "cannot be written")
    found = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "file", "--find-lr")
    assert_one_line(found, "cannot be written")
    (tmp_path / "run" / "find_lr.png").mkdir(parents=True)
    found = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run", "--find-lr")
    assert_one_line(found, "find_lr.png: cannot be written")


def test_a_run_does_not_lie_among_its_photographs(photo_folder: Path, recipe: Path) -> None:
    for out in (photo_folder, photo_folder / "run"):
        result = run(photo_folder, "--recipe", recipe, "--out", out)
        assert_one_line(result, "lies in the folder of the photographs, which it would become part of")
    assert not (photo_folder / "run").exists()


def test_a_second_sr_train_waits_outside(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    with hold(tmp_path / "run"):
        result = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run")
        assert_one_line(result, "another sr-train writes here; wait for it, or choose another --out")
    assert run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run", "--max-steps", "1").exit_code == 0


def test_a_terminal_that_is_gone_does_not_end_a_run(
    photo_folder: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = click.echo

    def broken(message: Any = None, err: bool = False, **options: Any) -> None:
        if err and str(message).startswith("stage "):
            raise BrokenPipeError(32, "Broken pipe")
        echo(message, err=err, **options)

    monkeypatch.setattr("train.cli.click.echo", broken)
    result = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0 and "done: 32" in result.output, result.output


def test_a_report_that_is_missing_is_written_when_the_run_is_called_again(
    photo_folder: Path, recipe: Path, tmp_path: Path
) -> None:
    run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    assert "finished already" in run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run").output
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_diverging_run_is_one_line(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    absurd = ("--set", "stages.0.phases.0.learning_rate=1e17", "--set", "stages.0.phases.0.epochs=20")
    result = run(photo_folder, "--recipe", recipe, "--out", tmp_path / "run", *absurd)
    assert_one_line(result, "lower the learning rate")


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_is_one_line(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "from train.cli import main; main()"
    )
    arguments = command(photo_folder, "--recipe", recipe, "--out", tmp_path / "run", "--set", "validation_pictures=0")
    arguments[2] = limited
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written (File too large); free space or choose --out" in done.stderr.splitlines()[-1]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith((".", "step-", "32"))]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_and_ends_well(
    number: signal.Signals, photo_folder: Path, tmp_path: Path
) -> None:
    endless = tmp_path / "endless.toml"
    endless.write_text(TINY.replace("EPOCHS", "1e6"))
    out = tmp_path / "run"
    arguments = command(photo_folder, "--recipe", endless, "--out", out, "--workers", 1)
    code = arguments.index("-c") + 1
    # A shell's background jobs inherit that it is ignored, and so does all that they start.
    arguments[code] = f"import signal; signal.signal({int(number)}, signal.SIG_DFL); {arguments[code]}"
    process = start(arguments)
    wait_for((out / "loss.png").exists, process)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal, or a scheduler: the worker gets it too
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "stopped at step " in output and "the same command goes on from there" in output
    folder = latest_checkpoint(out)
    assert folder is not None
    steps = load_checkpoint(folder).facts["done_steps"]
    assert steps >= 1 and f"stopped at step {steps};" in output


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_killed_run_goes_on_bit_for_bit(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # A checkpoint at every step, and a pause so long that the kill comes in the middle.
    slow = (
        "import time, train.loop as loop\n"
        "made = loop.Settings.__init__\n"
        "def often(self, **values): made(self, **values, checkpoint_seconds=-1.0)\n"
        "loop.Settings.__init__ = often\n"
        "save = loop.Trainer.save\n"
        "def save_and_wait(self, *name):\n"
        "    save(self, *name)\n"
        "    time.sleep(600 if self.done_steps == 6 and not name else 0)\n"
        "loop.Trainer.save = save_and_wait\n"
        "from train.cli import main; main()"
    )
    arguments = command(photo_folder, "--recipe", recipe, "--out", killed)
    arguments[2] = slow
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for((killed / "checkpoints" / "step-000000006").exists, process)
    process.kill()
    process.communicate()
    assert not (killed / "stages").exists()

    for out in (whole, killed):
        done = subprocess.run(
            command(photo_folder, "--recipe", recipe, "--out", out), env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "at step 6" in done.stdout
    first, second = (load_checkpoint(out / "checkpoints" / "step-000000012").tensors for out in (whole, killed))
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[key], second[key]) for key in first)
    products = [load_checkpoint(stage_folder(out, "32")).tensors for out in (whole, killed)]
    assert all(torch.equal(products[0][key], products[1][key]) for key in products[0])
