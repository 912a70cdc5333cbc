from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import train
from benchmarks.cli import main
from train.recipe import StageConfig

TINY = """
samples_per_epoch = 8
[model]
options = { channels = 8, blocks = [1, 1, 1] }
[[stages]]
name = "32"
size = 32
batch = 2
phases = [{ name = "first", epochs = 1.0 }, { name = "last", epochs = 1.0, learning_rate = 1e-4 }]
[[stages]]
name = "48"
size = 48
batch = 3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def run(photographs: Path, *arguments: object) -> Any:
    return CliRunner().invoke(main, ["train", *map(str, (photographs, "--device", "cpu", *arguments))])


def test_each_stage_has_its_speeds_and_shares(photo_folder: Path, recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run(
        photo_folder, "--recipe", recipe, "--set", "seed=3", "--task", "jpeg", "--workers", 0, "--precision", "fp32",
        "--seconds", 0, "--turns", 2, "--json", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert (result["kind"], result["recipe"], result["turns"], result["workers"]) == ("train", "tiny", 2, 0)
    assert (result["device"], result["precision"], result["samples"]) == ("cpu", "fp32", "cpu")
    assert result["pictures"] == 6, "none is set aside: nothing is validated"
    assert result["machine"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert [(row["stage"], row["size"], row["batch"]) for row in result["rows"]] == [("32", 32, 2), ("48", 48, 3)]
    for row in result["rows"]:
        for part in ("loop_images_per_s", "step_images_per_s", "forward_backward_images_per_s", "share_of_step"):
            assert 0 < row[part]["min"] <= row[part]["median"] <= row[part]["max"], part
        assert row["stage"] in done.output and f"{row['share_of_step']['median']:.3f}" in done.output


def test_a_row_holds_shares_of_the_same_turn() -> None:
    speeds = {"loop": [9.0, 16.0, 8.0], "step": [10.0, 20.0, 8.0], "forward_backward": [20.0, 20.0, 16.0]}
    row = train.make_row(StageConfig(name="64", size=64, batch=4), speeds)
    assert row["loop_images_per_s"] == {"median": 9.0, "min": 8.0, "max": 16.0}
    assert row["share_of_step"] == {"median": 0.9, "min": 0.8, "max": 1.0}
    assert row["share_of_forward_backward"] == {"median": 0.5, "min": 0.45, "max": 0.8}


def test_only_the_last_phase_of_a_stage_is_timed(
    photo_folder: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = []
    opened = train._open

    def spy(*arguments: Any) -> Any:
        trainer = opened(*arguments)
        phases.extend(phase.name for stage in trainer.recipe.stages for phase in stage.phases)
        return trainer

    monkeypatch.setattr(train, "_open", spy)
    done = run(photo_folder, "--recipe", recipe, "--workers", 0, "--seconds", 0, "--turns", 1)
    assert done.exit_code == 0, done.output
    assert phases == ["last", "all"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nonsense"], "unknown recipe 'nonsense'"),
        (["--json", "missing/result.json"], "cannot be written"),
        (["--device", "cuda:99"], "device cuda:99"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, photo_folder: Path) -> None:
    done = run(photo_folder, *arguments)
    assert done.exit_code == 1 and message in done.output
    assert "Traceback" not in done.output
