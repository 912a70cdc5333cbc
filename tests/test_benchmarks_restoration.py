from __future__ import annotations

import json
import zlib

import bundles
import fake_upscaler
import numpy as np
import pytest
from click.testing import CliRunner
from given import WEIGHTS
from PIL import Image

from benchmarks import metrics, restoration
from benchmarks.lpips_like import HEADS_FILE
from benchmarks.pictures import draw_picture, enlarge
from sdk import ImageError
from train.degrade import degrade_with_mask
from train.errors import RecipeError
from train.recipe import DegradeConfig


@pytest.fixture
def fake_model(monkeypatch):
    monkeypatch.delenv("SR_WEIGHTS_DIR", raising=False)
    fake_upscaler.install(monkeypatch, restoration, scale=1)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in (1, 2, 3):
        Image.fromarray(draw_picture((61, 72), seed=seed)).save(folder / f"{seed}.png")
    return folder


def test_score_of_a_known_error():
    hr = np.full((20, 30, 3), 100, np.uint8)
    region = np.zeros((20, 30), bool)
    region[2:7, 3:9] = True
    damaged, sr = hr.copy(), hr.copy()
    damaged[region] = 150
    sr[region] = 105
    sr[0, 0] = 110
    scores = restoration.score(sr, damaged, hr, region=region)
    share = 30 / 600
    assert scores["region_share"] == pytest.approx(share)
    assert scores["damaged_psnr_db"] == pytest.approx(10 * np.log10(255**2 / (2500 * share)))
    assert scores["damaged_region_psnr_db"] == pytest.approx(10 * np.log10(255**2 / 2500))
    assert scores["restored_region_psnr_db"] == pytest.approx(10 * np.log10(255**2 / 25))
    assert scores["restored_psnr_db"] == pytest.approx(10 * np.log10(255**2 / (25 * share + 100 / 600)))
    assert scores["region_gain_db"] == pytest.approx(20)  # a tenth of the error
    assert scores["gain_db"] == pytest.approx(scores["restored_psnr_db"] - scores["damaged_psnr_db"])
    assert scores["colour_drift"] == pytest.approx(5 * share + 10 / 600)


def test_without_a_region_its_figures_are_none():
    hr = draw_picture((20, 20))
    scores = restoration.score(hr, hr, hr, region=np.zeros((20, 20), bool))
    assert scores["damaged_psnr_db"] == scores["restored_psnr_db"] == metrics.MAX_PSNR_DB and scores["gain_db"] == 0
    assert [key for key, value in scores.items() if value is None] == [
        "damaged_region_psnr_db", "restored_region_psnr_db", "region_gain_db",
        "damaged_lpips_like", "restored_lpips_like",
    ]  # fmt: skip


def test_the_distance_is_of_the_damaged_and_of_the_restored_picture():
    hr, damaged, sr = (np.full((20, 20, 3), value, np.uint8) for value in (10, 40, 15))
    region = np.zeros((20, 20), bool)

    def distance(a, b):
        return float(np.abs(a.astype(float) - b).mean())

    scores = restoration.score(sr, damaged, hr, region=region, distance=distance)
    assert (scores["damaged_lpips_like"], scores["restored_lpips_like"]) == (30, 5)


def test_means_leave_out_what_a_picture_does_not_have():
    rows = [{"file": "a", "x": 1.0, "y": None, "z": None}, {"file": "b", "x": 3.0, "y": 5.0, "z": None}]
    assert restoration.means(rows) == {"x": 2.0, "y": 5.0, "z": None}


@pytest.mark.parametrize("task", ["jpeg", "denoise", "deblur", "inpaint", "text", "colourise", "real"])
def test_what_does_nothing_gains_nothing(task, fake_model, pictures):
    (row,) = restoration.measure([None], [pictures], [task])["rows"]
    assert (row["dataset"], row["scale"], row["task"], row["method"]) == ("pictures", 1, task, "fake")
    assert row["means"]["gain_db"] == 0 and 5 < row["means"]["damaged_psnr_db"] < 60
    has_region = task in ("inpaint", "text")
    assert (row["means"]["region_gain_db"] == 0) if has_region else (row["means"]["region_gain_db"] is None)
    if has_region:
        assert 0 < row["means"]["region_share"] < 0.9
        assert row["means"]["damaged_region_psnr_db"] < row["means"]["damaged_psnr_db"]


def test_a_perfect_restorer_gains_what_was_lost(pictures):
    originals = iter([np.asarray(Image.open(pictures / f"{seed}.png")) for seed in (1, 2, 3)])
    scores = restoration.evaluate(
        sorted(pictures.iterdir()), restore=lambda lr: next(originals), scale=1,
        config=restoration.task_config("inpaint"), entropy=(1,),
    )  # fmt: skip
    for each in scores:
        assert each["restored_psnr_db"] == each["restored_region_psnr_db"] == metrics.MAX_PSNR_DB
        assert each["gain_db"] == pytest.approx(metrics.MAX_PSNR_DB - each["damaged_psnr_db"])


def test_damage_depends_on_seed_and_file_alone(pictures):
    seen = {}

    def watch(lr):
        seen.setdefault(len(seen), lr.copy())
        return lr

    def scores(paths, entropy=(1, 2)):
        seen.clear()
        config = restoration.task_config("real")
        found = restoration.evaluate(paths, restore=watch, scale=1, config=config, entropy=entropy)
        return {each["file"]: each for each in found}, list(seen.values())

    paths = sorted(pictures.iterdir())
    first, damaged = scores(paths)
    again, _ = scores(paths[::-1])
    alone, (last,) = scores(paths[2:])
    assert again == first and alone["3.png"] == first["3.png"] and np.array_equal(last, damaged[2])
    other, _ = scores(paths, entropy=(2, 2))
    assert all(other[name]["damaged_psnr_db"] != first[name]["damaged_psnr_db"] for name in first)


def test_other_scales_are_shown_beside_bicubic_and_masks_are_enlarged(pictures):
    config = DegradeConfig(holes_probability=1.0)
    path = pictures / "1.png"
    seen = []
    (scores,) = restoration.evaluate(
        [path], restore=lambda lr: seen.append(lr) or lr.repeat(4, axis=0).repeat(4, axis=1), scale=4, config=config,
        entropy=(7,),
    )  # fmt: skip
    hr = np.asarray(Image.open(path))[:60, :72]
    assert seen[0].shape == (15, 18, 3)
    damaged = enlarge(seen[0], 4, resample=Image.Resampling.BICUBIC)
    assert scores["damaged_psnr_db"] == metrics.psnr(damaged, hr)
    rng = np.random.default_rng((7, zlib.crc32(b"1.png")))
    lr, mask = degrade_with_mask(hr, scale=4, config=config, rng=rng)
    assert np.array_equal(lr, seen[0]) and scores["region_share"] == mask.mean()
    region = mask.repeat(4, axis=0).repeat(4, axis=1)
    assert scores["damaged_region_psnr_db"] == metrics.psnr(damaged[region], hr[region])
    assert 0 < scores["region_share"] < 1


def test_a_shipped_form_of_model_runs(pictures):
    result = restoration.measure(
        [bundles.shared("identity"), bundles.shared("blur")], [pictures], ["x2", "inpaint"], backend="onnxruntime",
        precision="fp32",
    )  # fmt: skip
    rows = result["rows"]
    assert [(row["task"], row["method"]) for row in rows] == [
        ("x2", "identity"), ("inpaint", "identity"), ("x2", "blur"), ("inpaint", "blur"),
    ]  # fmt: skip
    assert {row["scale"] for row in rows} == {2} and all(len(row["pictures"]) == 3 for row in rows)
    assert rows[0]["means"]["region_share"] == 0 < rows[1]["means"]["region_share"]
    # The same damage for every model.
    assert rows[1]["means"]["damaged_psnr_db"] == rows[3]["means"]["damaged_psnr_db"]
    assert [model["name"] for model in result["models"]] == ["identity", "blur"]


def test_an_unknown_task_and_a_wrong_folder_are_told_before_a_model_is_loaded(pictures, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'text'"):
        restoration.measure(["gone"], [pictures], ["test"])
    with pytest.raises(ImageError, match="no such folder"):
        restoration.measure(["gone"], [tmp_path / "gone"], ["text"])


def run(*arguments):
    return CliRunner().invoke(restoration.restoration_command, [str(argument) for argument in arguments])


def test_command_writes_json_and_a_table(fake_model, pictures, tmp_path):
    out = tmp_path / "restoration.json"
    options = ["--task", "inpaint", "--task", "jpeg", "--json", out, "--model", "a", "--model", "b"]
    result = run(pictures, *options)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert (written["schema"], written["kind"], written["seed"]) == (1, "restoration", 1)
    assert written["protocol"] == restoration.PROTOCOL and "cpu" in written["machine"]
    assert [model["method"] for model in written["models"]] == ["fake", "fake #2"]
    assert [(row["task"], row["method"]) for row in written["rows"]] == [
        (task, name) for name in ("fake", "fake #2") for task in ("inpaint", "jpeg")
    ]
    assert "region gain dB" in result.stdout and "pictures x1  jpeg     fake #2" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if " jpeg " in line]
    assert lines[0][-6:-1] == ["-"] * 5 and written["lpips_like_missing"] in result.stdout


@pytest.mark.skipif(not (WEIGHTS / HEADS_FILE).is_file(), reason=f"no {HEADS_FILE} in SR_WEIGHTS_DIR")
def test_command_measures_the_distance(fake_model, pictures):
    result = run(pictures, "--model", "a", "--task", "jpeg", "--weights", WEIGHTS)
    assert result.exit_code == 0, result.output
    damaged, restored = result.stdout.splitlines()[-1].split()[-3:-1]
    assert damaged == restored and float(damaged) > 0.01


def test_command_refuses_weights_that_are_not_there(fake_model, pictures, tmp_path):
    result = run(pictures, "--model", "a", "--task", "jpeg", "--weights", tmp_path)
    assert result.exit_code == 1 and "are not both there" in result.stderr


@pytest.mark.parametrize("kind", ["missing", "empty", "unreadable", "small"])
def test_command_tells_a_bad_folder_in_one_line(kind, fake_model, tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out.json"
    if kind != "missing":
        folder.mkdir()
    if kind == "unreadable":
        (folder / "a.png").write_bytes(b"no picture")
    if kind == "small":
        Image.fromarray(draw_picture((64, 15))).save(folder / "a.png")
    result = run(folder, "--model", "a", "--task", "jpeg", "--json", out)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith(f"Error: {folder}")
    assert not out.exists()
