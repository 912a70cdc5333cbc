"""Runs side by side: what differs, what they reached, and the same pictures by each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from train.checkpoint import Checkpoint, save_checkpoint
from train.compare import compare, compare_command, compare_runs, format_comparison, read_runs
from train.errors import CheckpointError, DataError
from train.models import Network, build_model
from train.plots import GAP, TITLE_HEIGHT, read_panel, write_panel
from train.recipe import Recipe, load_recipe
from train.run_folder import append_log, write_run

MakePhoto = Callable[..., np.ndarray]
SMALL = "model.options={channels=8,blocks=[1,1,1]}"


def trained_model(recipe: Recipe, seed: int) -> Network:
    """Build a network as if it had been trained: a new one only enlarges."""
    model = build_model(recipe.model, weights="random").eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def make_run(run: Path, *overrides: str, psnr: float = 30.0, stages: int = 1, seed: int = 0) -> Recipe:
    """Write a run of a small network with two validations and the weights of its first stages."""
    recipe = load_recipe("fast", overrides=(SMALL, *overrides))
    write_run(run, recipe, {})
    for step in (1, 2, 3):
        entry: dict[str, Any] = {"done_steps": step, "terms": {"pixel": 1.0}, "images_per_second": 10.0 * step}
        entry["validation"] = None if step == 2 else {"psnr_y": psnr - step, "colour_drift": step / 4}
        append_log(run, entry)
    for stage in recipe.stages[:stages]:
        tensors = {f"model.{key}": value for key, value in trained_model(recipe, seed).state_dict().items()}
        save_checkpoint(run / "stages" / stage.name, Checkpoint(tensors, {"stage": stage.name}))
    return recipe


def add_panel(run: Path, hr: np.ndarray, scale: int = 2) -> None:
    write_panel([(np.ascontiguousarray(hr[::scale, ::scale]), 255 - hr, hr)], run / "panels" / "00000003.png")


@pytest.fixture
def runs(tmp_path: Path, make_photo: MakePhoto) -> list[Path]:
    paths = [tmp_path / "a", tmp_path / "b"]
    make_run(paths[0], seed=0)
    make_run(paths[1], "stages.0.batch=4", "loss.pixel=l1", "stages.1.phases=[{epochs=1.0}]", psnr=31.5, seed=1)
    add_panel(paths[0], make_photo(128, 128, 0))
    return paths


def test_only_what_differs_is_listed(runs: list[Path]) -> None:
    comparison = compare(read_runs(runs))
    assert comparison["runs"] == ["a", "b"]
    assert comparison["recipe"] == {
        "loss.pixel": ["charbonnier", "l1"],
        "stages.0.batch": [16, 4],
        "stages.1.phases.0.epochs": [0.8, 1.0],
        "stages.1.phases.0.learning_rate": [2e-4, 1e-3],
    }


def test_what_the_runs_reached(runs: list[Path]) -> None:
    results = compare(read_runs(runs))["results"]
    model = build_model(load_recipe("fast", overrides=(SMALL,)).model, weights="random")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert results == {
        "last PSNR-Y [dB]": [27.0, 28.5],
        "best PSNR-Y [dB]": [29.0, 30.5],
        "last colour drift": [0.75, 0.75],
        "steps": [3, 3],
        "images/s": [20.0, 20.0],
        "parameters": [count, count],
    }


def test_a_key_that_one_recipe_lacks_is_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", 'stages=[{name="96",size=96,phases=[{epochs=18.0,learning_rate=1e-3}]}]')
    comparison = compare(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert comparison["recipe"]["stages.1.size"] == [192, None]
    assert all(key.startswith("stages.1.") for key in comparison["recipe"])


def test_the_table_is_aligned(runs: list[Path]) -> None:
    lines = format_comparison(compare(read_runs(runs))).splitlines()
    place = lines[0].index("a")
    assert lines[0].split() == ["a", "b"]
    assert all(line[place - 1] == " " and line[place] != " " for line in lines if not line.startswith("--"))
    assert next(line for line in lines if line.startswith("loss.pixel ")).split() == ["loss.pixel", "charbonnier", "l1"]


def test_equal_recipes_and_empty_logs_make_a_table_too(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name, load_recipe("fast", overrides=(SMALL,)), {})
    (tmp_path / "b" / "log.jsonl").write_text('[]\n{"done_steps": "x"}\n{}\n')
    text = format_comparison(compare(read_runs([tmp_path / "a", tmp_path / "b"])))
    assert "(the recipes are the same)" in text
    assert [line.split()[-2:] for line in text.splitlines() if line.startswith("steps")] == [["-", "-"]]


def test_the_sheet_shows_each_runs_prediction(runs: list[Path], tmp_path: Path, make_photo: MakePhoto) -> None:
    hr = make_photo(128, 128, 0)
    shown: list[str] = []
    compare_runs(runs, tmp_path / "out", show=shown.append)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.json",
        "compare.png",
        "compare_panel.png",
    ]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == compare(read_runs(runs))
    assert shown == [format_comparison(compare(read_runs(runs)))]
    with Image.open(tmp_path / "out" / "compare_panel.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (128 + TITLE_HEIGHT, 4 * (128 + GAP) - GAP, 3)
    nearest, first, second, target = (sheet[TITLE_HEIGHT:, left : left + 128] for left in range(0, 528, 128 + GAP))
    assert np.array_equal(target, hr) and np.array_equal(nearest, hr[::2, ::2].repeat(2, 0).repeat(2, 1))
    for seed, result in enumerate((first, second)):
        model = trained_model(load_recipe("fast", overrides=(SMALL,)), seed)
        with torch.inference_mode():
            lr = torch.from_numpy(np.ascontiguousarray(hr[::2, ::2])).permute(2, 0, 1)[None] / 255
            expected = (model(lr, 2)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        assert np.abs(result - expected).max() <= 0.51  # rounded to whole code values
    assert not np.array_equal(first, second)


def test_photographs_can_be_given(runs: list[Path], photo_folder: Path, tmp_path: Path) -> None:
    compare_runs(runs, tmp_path / "out", data=photo_folder)
    with Image.open(tmp_path / "out" / "compare_panel.png") as image:
        # Four crops as large as the smallest of them allows, each enlarged until its title fits.
        zoomed = 96 * 2
        assert image.size == (4 * (zoomed + GAP) - GAP, 4 * (zoomed + TITLE_HEIGHT))


def test_runs_that_cannot_stand_side_by_side_are_told(runs: list[Path], tmp_path: Path) -> None:
    make_run(tmp_path / "x4", "model.scales=[4]")
    make_run(tmp_path / "young", stages=0)
    for path, message in (
        (tmp_path / "x4", "several scales.*a x2, x4 x4"),
        (tmp_path / "young", "no stage of this run is finished"),
    ):
        shown: list[str] = []
        out = tmp_path / f"out-{path.name}"
        with pytest.raises(CheckpointError, match=message):
            compare_runs([runs[0], path], out, show=shown.append)
        # The table and the curves need no weights.
        assert shown and sorted(child.name for child in out.iterdir()) == ["compare.json", "compare.png"]


def test_weights_of_another_network_are_told(runs: list[Path], tmp_path: Path) -> None:
    recipe = load_recipe("fast", overrides=("model.options={channels=16,blocks=[1,1,1]}",))
    write_run(runs[1], recipe, {})
    with pytest.raises(CheckpointError, match="do not fit the recipe's network"):
        compare_runs(runs, tmp_path / "out")


def test_pictures_that_are_missing_or_broken_are_told(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "panels" / "00000003.png").write_text("no picture")
    with pytest.raises(DataError, match="give photographs with --data"):
        compare_runs(runs, tmp_path / "out")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_text("no picture")
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        compare_runs(runs, tmp_path / "out", data=tmp_path / "data")
    Image.new("RGB", (3, 3)).save(tmp_path / "data" / "a.png")
    with pytest.raises(DataError, match="smaller than"):
        compare_runs(runs, tmp_path / "out", data=tmp_path / "data")


def test_folders_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    make_run(tmp_path / "deep" / "a")
    assert [run.name for run in read_runs([runs[0], tmp_path / "deep" / "a"])] == [
        str(runs[0]),
        str(tmp_path / "deep" / "a"),
    ]


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "nothing"]])
def test_the_command_ends_with_one_line(names: list[str], runs: list[Path], tmp_path: Path) -> None:
    arguments = [str(tmp_path / name) for name in names]
    result = CliRunner().invoke(compare_command, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_that_training_refuses_are_refused(runs: list[Path], tmp_path: Path, make_photo: MakePhoto) -> None:
    (tmp_path / "data").mkdir()
    deep = make_photo(64, 64, 0)[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "data" / "deep.png")
    with pytest.raises(DataError, match=r"deep.png: cannot be read \(I;16 pixels, only 8-bit pictures are read\)"):
        compare_runs(runs, tmp_path / "out", data=tmp_path / "data")


def test_the_command_prints_the_table(runs: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(compare_command, [*map(str, runs), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "stages.0.batch" in result.output
    with Image.open(tmp_path / "out" / "compare.png") as image:
        assert image.size == (1200, 450)  # PSNR-Y and colour drift
    assert len(read_panel(runs[0] / "panels" / "00000003.png")) == 1
