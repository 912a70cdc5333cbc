from __future__ import annotations

import json
import os
from pathlib import Path

import fake_upscaler
import numpy as np
import pytest
from click.testing import CliRunner
from given import TEST_SETS, WEIGHTS
from PIL import Image, ImageFilter

from benchmarks import metrics, quality
from benchmarks.cli import main
from benchmarks.lpips_like import HEADS_FILE, LABEL, TAPS, LpipsLike, LpipsUnavailable
from benchmarks.pictures import draw_picture, find_pictures
from benchmarks.result import check_writable, write_json
from sdk import ImageError, OutputError, bundle

ROOT = Path(__file__).parent.parent
SHIPPED = bundle.MODELS_DIR / bundle.DEFAULT_MODEL / bundle.MANIFEST

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / HEADS_FILE).is_file(), reason=f"the weights of {LABEL} are not there: set SR_WEIGHTS_DIR"
)


@pytest.fixture
def fake_model(monkeypatch):
    monkeypatch.delenv("SR_WEIGHTS_DIR", raising=False)
    fake_upscaler.install(monkeypatch, quality, scale=2)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in (1, 2):
        Image.fromarray(draw_picture((41, 52), seed=seed)).save(folder / f"{seed}.png")
    return folder


def test_luma_has_the_limited_range():
    ends = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    assert metrics.luma(ends)[0] == pytest.approx([16, 235], abs=1e-12)


def test_luma_weighs_the_channels_as_bt601():
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert metrics.luma(primaries)[0] - 16 == pytest.approx([65.481, 128.553, 24.966], abs=1e-12)


def test_psnr_of_a_known_error():
    a = np.full((4, 4), 100, np.uint8)
    assert metrics.psnr(a, a + np.uint8(5)) == pytest.approx(10 * np.log10(255**2 / 25), abs=1e-12)


def test_psnr_of_uint8_does_not_wrap_around():
    assert metrics.psnr(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8)) == 0


def test_psnr_of_equal_planes_is_the_cap():
    a = np.zeros((4, 4))
    assert metrics.psnr(a, a) == metrics.psnr(a, a + 1e-9) == metrics.MAX_PSNR_DB


def test_ssim_of_equal_planes_is_one():
    plane = metrics.luma(draw_picture((30, 40)))
    assert metrics.ssim(plane, plane) == pytest.approx(1, abs=1e-12)


def test_ssim_of_flat_planes_is_the_luminance_term():
    a, b = np.full((11, 11), 50.0), np.full((11, 11), 70.0)
    assert metrics.ssim(a, b) == pytest.approx((2 * 50 * 70 + metrics.C1) / (50**2 + 70**2 + metrics.C1), abs=1e-9)


def test_ssim_equals_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    a = metrics.luma(draw_picture((60, 47)))
    b = a + np.random.default_rng(0).normal(0, 8, a.shape)
    whole = skimage.structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
    )[1]
    assert metrics.ssim(a, b) == pytest.approx(whole[5:-5, 5:-5].mean(), abs=1e-10)


def test_colour_drift_is_the_worst_channel():
    hr = np.full((4, 6, 3), 100, np.uint8)
    sr = hr.copy()
    sr[:2, :, 1] += 3
    sr[:, :, 2] -= 1
    assert metrics.colour_drift(sr, hr) == 1.5


def test_crop_to_scale_keeps_the_top_left():
    picture = draw_picture((45, 38))
    assert np.array_equal(quality.crop_to_scale(picture, 4, name="p"), picture[:44, :36])


def test_crop_to_scale_refuses_what_has_no_ssim():
    assert quality.crop_to_scale(draw_picture((18, 18)), 2, name="p").shape == (18, 18, 3)
    with pytest.raises(ImageError, match="p: 16x18 pixels"):
        quality.crop_to_scale(draw_picture((19, 17)), 2, name="p")


def test_score_ignores_the_shaved_border():
    hr = draw_picture((40, 40))
    sr = hr.copy()
    sr[:2], sr[:, -2:] = 0, 255
    scores = quality.score(sr, hr, scale=2)
    assert scores["psnr_y_db"] == metrics.MAX_PSNR_DB
    assert scores["ssim_y"] == pytest.approx(1, abs=1e-12)
    assert quality.score(sr, hr, scale=1)["psnr_y_db"] < 40


def test_grid_excess_sees_a_faint_grid_and_nothing_else():
    hr = metrics.luma(draw_picture((192, 160)))
    noise = np.random.default_rng(1).normal(0, 2, hr.shape)
    hr = hr + noise
    assert metrics.grid_excess(hr, hr) == 0
    blurred = (hr + np.roll(hr, 1, axis=1)) / 2
    assert metrics.grid_excess(blurred, hr) < 0.7
    for period, decibels in ((2, 3.0), (4, 1.0)):
        striped = hr.copy()
        striped[:, ::period] += 1
        assert metrics.grid_excess(striped, hr) > decibels
    third = hr.copy()
    third[:, ::3] += 1
    assert metrics.grid_excess(third, hr) < 0.3
    assert metrics.grid_excess(np.zeros((15, 9)), np.zeros((15, 9))) == 0


def test_evaluate_means_are_those_of_the_pictures(pictures):
    rows = quality.evaluate(pictures, scale=2, methods=quality.interpolations(2))
    assert [(row["dataset"], row["scale"], row["method"]) for row in rows] == [
        ("pictures", 2, "bilinear"),
        ("pictures", 2, "bicubic"),
    ]
    for row in rows:
        assert [picture["file"] for picture in row["pictures"]] == ["1.png", "2.png"]
        for key in ("psnr_y_db", "ssim_y", "colour_drift"):
            assert row["means"][key] == pytest.approx(np.mean([picture[key] for picture in row["pictures"]]))
        assert "lpips_like" not in row["means"]


def test_bicubic_reaches_the_published_figure():
    folder = TEST_SETS / "Set5"
    if not folder.is_dir():
        pytest.skip("no test set Set5: name the folder that holds it with SR_TEST_SETS")
    rows = {row["method"]: row for row in quality.evaluate(folder, scale=2, methods=quality.interpolations(2))}
    # Published: 33.66 dB and 0.9299. PIL's bicubic is within 0.03 dB of the MATLAB one behind them.
    assert rows["bicubic"]["means"]["psnr_y_db"] == pytest.approx(33.66, abs=0.03)
    assert rows["bicubic"]["means"]["ssim_y"] == pytest.approx(0.9299, abs=0.001)
    assert rows["bilinear"]["means"]["psnr_y_db"] < rows["bicubic"]["means"]["psnr_y_db"]


def test_find_pictures_takes_pictures_only(pictures):
    (pictures / "README.txt").write_text("not a picture")
    (pictures / "inside").mkdir()
    assert [path.name for path in find_pictures(pictures)] == ["1.png", "2.png"]


@needs_weights
def test_lpips_like_is_zero_for_equal_pictures_and_grows_with_blur():
    pytest.importorskip("torch")
    distance = LpipsLike.load(str(WEIGHTS))
    picture = draw_picture((96, 128))
    blurred = [
        np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))) for radius in (0.5, 1, 2, 4)
    ]
    distances = [distance(picture, other) for other in (picture, *blurred)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[1] > 0.001
    assert distance(blurred[1], picture) == pytest.approx(distances[2], rel=1e-4)


def test_lpips_like_runs_the_network_of_torchvision():
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    stack = torchvision.models.squeezenet1_1(weights=None).features.eval()
    with torch.inference_mode():
        picture = torch.rand(1, 3, 65, 50)
        ours = LpipsLike(stack.state_dict(), []).activations(picture)
        x = torchvision.transforms.functional.normalize(picture, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        theirs = []
        for index, module in enumerate(stack):
            x = module(x)
            if index in TAPS:
                theirs.append(x.clone())
    assert len(ours) == len(theirs) == 7
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the normalisation is rounded differently


def test_lpips_like_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("SR_WEIGHTS_DIR", raising=False)
    with pytest.raises(LpipsUnavailable, match="SR_WEIGHTS_DIR"):
        LpipsLike.load()
    with pytest.raises(LpipsUnavailable, match=HEADS_FILE):
        LpipsLike.load(str(tmp_path))


def test_cli_writes_json_and_a_table(fake_model, pictures, tmp_path):
    out = tmp_path / "quality.json"
    result = CliRunner().invoke(main, ["quality", str(pictures), "--json", str(out), "--model", "a", "--model", "b"])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert (written["schema"], written["kind"], written["protocol"]) == (1, "quality", quality.PROTOCOL)
    assert {"cpu", "cores", "gpus", "python", "versions", "commit"} <= written["machine"].keys()
    assert [model["method"] for model in written["models"]] == ["fake", "fake #2"]
    assert written["models"][0]["backend"] == "fake"
    assert [row["method"] for row in written["rows"]] == ["bilinear", "bicubic", "fake", "fake #2"]
    assert "SR_WEIGHTS_DIR" in written["lpips_like_missing"]
    assert f"no {LABEL}: " in result.stdout
    assert "PSNR-Y dB  SSIM-Y  colour drift" in result.stdout
    assert f"{written['rows'][1]['means']['psnr_y_db']:.2f}" in result.stdout
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == ["pictures"]


@needs_weights
def test_cli_labels_the_perceptual_figure(fake_model, pictures):
    pytest.importorskip("torch")
    result = CliRunner().invoke(main, ["quality", str(pictures), "--weights", str(WEIGHTS)])
    assert result.exit_code == 0, result.output
    assert LABEL in result.stdout and f"no {LABEL}" not in result.stdout


@pytest.mark.parametrize("kind", ["missing", "empty", "unreadable", "truncated", "small"])
def test_cli_tells_a_bad_folder_in_one_line(kind, fake_model, tmp_path):
    folder = tmp_path / "set"
    out = tmp_path / "out.json"
    if kind != "missing":
        folder.mkdir()
    if kind == "unreadable":
        (folder / "a.png").write_bytes(b"no picture")
    if kind == "truncated":
        Image.fromarray(draw_picture((64, 64))).save(folder / "a.png")
        (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    if kind == "small":
        Image.fromarray(draw_picture((64, 14))).save(folder / "a.png")
    result = CliRunner().invoke(main, ["quality", str(folder), "--json", str(out)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith(f"Error: {folder}")
    assert not out.exists()


def test_cli_refuses_weights_that_are_not_there(fake_model, pictures, tmp_path):
    result = CliRunner().invoke(main, ["quality", str(pictures), "--weights", str(tmp_path)])
    assert result.exit_code == 1
    assert "Traceback" not in result.output and HEADS_FILE in result.stderr


def test_check_writable_finds_a_missing_folder(tmp_path):
    check_writable(tmp_path / "new.json")
    for path in (tmp_path / "missing" / "out.json", tmp_path):
        with pytest.raises(OutputError):
            check_writable(path)


def test_write_json_leaves_the_old_file_if_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_json({"schema": 1}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not SHIPPED.is_file(), reason="sdk/models/fast-x2 is not there")
def test_shipped_model_beats_bicubic(pictures):
    pytest.importorskip("onnxruntime")
    astronaut = pytest.importorskip("skimage.data").astronaut()
    Image.fromarray(astronaut[:192, 128:320]).save(pictures / "1.png")
    (pictures / "2.png").unlink()
    settings = quality.Settings((pictures,), backend="onnxruntime", precision="fp32")
    means = {row["method"]: row["means"] for row in quality.run_quality(settings)["rows"]}
    assert means[bundle.DEFAULT_MODEL]["psnr_y_db"] > means["bicubic"]["psnr_y_db"] + 1
    assert means[bundle.DEFAULT_MODEL]["colour_drift"] < 0.5
