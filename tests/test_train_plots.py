"""Pictures of a run are written whole, for any log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.atomic import replacing
from train.errors import ResourceError
from train.plots import (
    GAIN,
    GAP,
    TITLE_HEIGHT,
    Curve,
    draw_metric,
    metric_svg,
    read_metrics,
    read_panel,
    stage_borders,
    thin,
    validation_of,
    write_comparison,
    write_loss_curve,
    write_panel,
    write_rate_plot,
    write_sheet,
)

MakePhoto = Callable[..., np.ndarray]


def entry(done_steps: int, terms: Any, psnr_y: float | None = None, **more: Any) -> dict[str, Any]:
    validation = None if psnr_y is None else {"psnr_y": psnr_y}
    return {"done_steps": done_steps, "terms": terms, "validation": validation} | more


def read_cells(path: Path, size: int, columns: int) -> list[np.ndarray]:
    """Cut the first row's pictures out of a panel of square pictures that are not enlarged."""
    with Image.open(path) as image:
        panel = np.asarray(image)
    assert panel.shape == (2 * (size + TITLE_HEIGHT), columns * (size + GAP) - GAP, 3)
    lefts = range(0, panel.shape[1], size + GAP)
    return [panel[TITLE_HEIGHT : TITLE_HEIGHT + size, left : left + size] for left in lefts]


def test_a_panel_shows_six_columns(tmp_path: Path, make_photo: MakePhoto) -> None:
    hr = make_photo(128, 128, 0)
    lr = np.ascontiguousarray(hr[::2, ::2])
    write_panel([(lr, 255 - hr, hr)] * 2, tmp_path / "deep" / "panel.png")
    nearest, bilinear, prediction, target, residual, ideal = read_cells(tmp_path / "deep" / "panel.png", 128, 6)
    assert np.array_equal(nearest, lr.repeat(2, 0).repeat(2, 1))
    expected = np.asarray(Image.fromarray(lr).resize((128, 128), Image.Resampling.BILINEAR))
    assert np.array_equal(bilinear, expected)
    assert np.array_equal(prediction, 255 - hr)
    assert np.array_equal(target, hr)
    for shown, picture in ((residual, 255 - hr), (ideal, hr)):
        difference = picture.astype(int) - expected
        assert np.array_equal(shown, np.clip(128 + GAIN * difference, 0, 255))


def test_a_residual_is_mid_grey_but_where_something_was_added(tmp_path: Path) -> None:
    flat = np.full((128, 128, 3), 100, np.uint8)
    sr = flat.copy()
    sr[5, 7] = (110, 90, 100)
    write_panel([(flat[::4, ::4], sr, flat)] * 2, tmp_path / "panel.png")
    *_, residual, ideal = read_cells(tmp_path / "panel.png", 128, 6)
    assert residual[5, 7].tolist() == [128 + 10 * GAIN, 128 - 10 * GAIN, 128]
    residual = residual.copy()
    residual[5, 7] = 128
    assert (residual == 128).all() and (ideal == 128).all()


def test_at_scale_1_the_input_stands_once(tmp_path: Path, make_photo: MakePhoto) -> None:
    damaged, sr, hr = (make_photo(128, 128, seed) for seed in range(3))
    write_panel([(damaged, sr, hr)] * 2, tmp_path / "panel.png")
    shown, prediction, target, residual, _ = read_cells(tmp_path / "panel.png", 128, 5)
    assert np.array_equal(shown, damaged) and np.array_equal(prediction, sr) and np.array_equal(target, hr)
    assert np.array_equal(residual, np.clip(128 + GAIN * (sr.astype(int) - damaged), 0, 255))
    assert all(np.array_equal(*pair) for pair in zip(read_panel(tmp_path / "panel.png")[1], (damaged, sr, hr)))


@pytest.mark.parametrize(("side", "scale"), [(16, 4), (96, 3), (256, 2)])
def test_the_pictures_of_a_panel_are_found_again(side: int, scale: int, tmp_path: Path, make_photo: MakePhoto) -> None:
    rows = []
    for seed in range(3):
        hr = make_photo(side, side, seed)
        rows.append((np.ascontiguousarray(hr[::scale, ::scale]), 255 - hr, hr))
    write_panel(rows, tmp_path / "panel.png")
    for expected, found in zip(rows, read_panel(tmp_path / "panel.png"), strict=True):
        assert all(np.array_equal(*pair) for pair in zip(expected, found, strict=True))


def test_what_is_no_panel_is_told(tmp_path: Path, make_photo: MakePhoto) -> None:
    Image.fromarray(make_photo(50, 70, 0)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="not a panel"):
        read_panel(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError):
        read_panel(tmp_path / "text.png")


def test_long_and_strange_titles_stay_in_their_column(tmp_path: Path) -> None:
    black = np.zeros((128, 128, 3), np.uint8)
    write_sheet([["a" * 500, "\ud800\n\0" * 100]], [[black, black]], tmp_path / "sheet.png", lr_size=(64, 64))
    with Image.open(tmp_path / "sheet.png") as image:
        panel = np.asarray(image)
    assert (panel[:, 128 : 128 + GAP] == 255).all()
    assert (panel[:TITLE_HEIGHT, :128] == 0).any() and (panel[:TITLE_HEIGHT, 128 + GAP :] < 100).any()


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ([], (1200, 300)),
        ([entry(1, {})], (1200, 300)),
        ([{}, {"done_steps": None}, {"done_steps": 1}, entry(2, None), entry(3, {"a": "text"}), [], 7], (1200, 300)),
        ([entry(1, {"pixel": 0.1}, 30.0)], (1200, 600)),
        ([entry(1, {"pixel": 0.1}, 30.0), entry(2, {}), entry(3, {"pixel": 0.0, "luma": 0.01}, 31.0)], (1200, 900)),
        ([entry(1, {"pixel": float("nan")}), entry(2, {"pixel": float("inf")}), entry(3, {"pixel": -1})], (1200, 300)),
        ([entry(1, {"$x^$": 1.0, "\ud800\u4e2d": 10**400, "_": 0.0}, stage="$\\frac$")] * 3, (1200, 600)),
        (
            [entry(n, {"pixel": 1.0}, validation={"psnr_y": 9.0, "colour_drift": 1, "x": 2}) for n in (1, 2)],
            (1200, 900),
        ),
        (
            [entry(n, {"pixel": 1 / (n + 1)}, n % 9 + 0.0, stage=str(n // 500), step=n % 500) for n in range(1500)],
            (1200, 600),
        ),
    ],
)
def test_the_loss_curve_takes_any_log(entries: list[Any], size: tuple[int, int], tmp_path: Path) -> None:
    write_loss_curve(entries, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == size
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_log_is_sorted_by_what_was_measured() -> None:
    old = entry(1, {"pixel": 0.5, "luma": 0.25}, 30.0)
    new = {"done_steps": 5, "terms": {"pixel": 0.25, "luma": 0.25, "critic": 2.0}}
    new["validation"] = {"luma": 0.125, "pixel": 0.5, "colour_drift": 1.0, "psnr_y": 31.0}
    metrics = {metric.name: metric for metric in read_metrics([old, {"done_steps": 3}, new])}
    assert list(metrics) == ["psnr_y", "colour_drift", "loss", "critic", "luma", "pixel"]
    assert [metric.is_loss for metric in metrics.values()] == [False, False, True, True, True, True]
    assert metrics["psnr_y"].best() == (5.0, 31.0)
    assert all(metric.span == (1, 5) for metric in metrics.values())

    def values(curve: Curve | None) -> list[float] | None:
        return None if curve is None else curve.values.tolist()

    assert values(metrics["pixel"].train) == pytest.approx([0.5, np.nan, 0.25], nan_ok=True)
    assert values(metrics["pixel"].validation) == [0.5]
    # The sums are of the terms that validation measures as well, so without the critic's.
    assert values(metrics["loss"].train) == pytest.approx([0.75, np.nan, 0.5], nan_ok=True)
    assert values(metrics["loss"].validation) == [0.625]
    assert metrics["critic"].validation is None


def test_validation_of_an_entry() -> None:
    assert validation_of({}) == {}
    assert validation_of({"validation": None}) == validation_of({"validation": 3}) == {}
    assert validation_of({"validation": {"psnr_y": 31.0, "loss": 0.5}}) == {"psnr_y": 31.0, "loss": 0.5}


def test_a_long_curve_keeps_its_spikes_and_gaps() -> None:
    values = np.ones(100_000)
    values[50_000], values[70_000] = 9.0, -9.0
    values[20_000:30_000] = np.nan
    steps, low, mean, high = thin(Curve(np.arange(100_000.0), values), buckets=100)
    assert len(steps) == 100 and (np.diff(steps) > 0).all()
    assert np.nanmax(high) == 9 and np.nanmin(low) == -9
    assert mean[50] == pytest.approx(1.008) and np.isnan(mean).sum() == 10 and np.isnan(low[20:30]).all()


def test_a_short_curve_is_left_as_it_is() -> None:
    curve = Curve(np.array([1.0, 2.0, 3.0]), np.array([3.0, np.nan, 1.0]))
    for drawn, expected in zip(thin(curve), (curve.steps, *[curve.values] * 3), strict=True):
        assert np.array_equal(drawn, expected, equal_nan=True)


def test_stages_begin_where_the_one_before_ends() -> None:
    log = [entry(7, {}, stage="96", step=7), entry(10, {}, stage="96", step=10), entry(12, {}, stage="192", step=2)]
    assert stage_borders([*log, "broken", {}]) == [(0.0, "96"), (10.0, "192")]


def test_a_logarithmic_chart_is_drawn_on_logarithmic_axes() -> None:
    from matplotlib.figure import Figure

    (metric,) = read_metrics([entry(1, {"pixel": 1.0}), entry(2, {"pixel": 0.0}), entry(3, {"pixel": 0.001})])
    for is_log in (False, True):
        axes = Figure().subplots()
        draw_metric(axes, metric, [(0.0, "a"), (2.0, "b")], is_log=is_log)
        assert axes.get_yscale() == ("log" if is_log else "linear")
        assert [text.get_text() for text in axes.texts] == ["stage a", "stage b"]


def test_a_chart_for_a_page_holds_nothing_foreign() -> None:
    (metric,) = read_metrics([entry(1, {"pixel": 1.0}), entry(2, {"pixel": 0.5})])
    svg = metric_svg(metric, [(0.0, "</svg><script>"), (1.0, "b")])
    assert svg.startswith('<svg viewBox="0 0 ') and svg.rstrip().endswith("</svg>")
    assert "http" not in svg and "<script" not in svg and "&lt;/svg&gt;&lt;script" in svg
    assert svg != metric_svg(metric, [(0.0, "a"), (1.0, "b")])


def test_a_comparison_takes_runs_without_curves(tmp_path: Path) -> None:
    curve = Curve(np.array([1.0, 2.0]), np.array([30.0, np.nan]))
    write_comparison([("PSNR", [curve, None]), ("$drift$", [None, None])], ["_a", "$b$"], tmp_path / "compare.png")
    with Image.open(tmp_path / "compare.png") as image:
        assert image.size == (1200, 450)


def test_the_rate_plot_is_a_picture(tmp_path: Path) -> None:
    write_rate_plot([1e-3, 1e-2, 1e-1], [3.0, 2.0, 4.0], 1e-2, tmp_path / "rates.png")
    with Image.open(tmp_path / "rates.png") as image:
        assert image.size == (600, 400)


def test_a_plot_that_cannot_be_written_is_told(tmp_path: Path, make_photo: MakePhoto) -> None:
    (tmp_path / "panels").write_text("")  # a file where the folder belongs
    hr = make_photo(32, 32, 0)
    with pytest.raises(ResourceError, match=r"x.png: cannot be written \(.*\); free space or choose --out"):
        write_panel([(hr, hr, hr)], tmp_path / "panels" / "x.png")
    with pytest.raises(ResourceError, match=r"loss.png: cannot be written"):
        write_loss_curve([entry(1, {"pixel": 1.0})], tmp_path / "panels" / "loss.png")
    with pytest.raises(ResourceError, match=r"rates.png: cannot be written"):
        write_rate_plot([1.0, 2.0], [1.0, 2.0], 1.0, tmp_path / "panels" / "rates.png")


def test_a_failure_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(ResourceError, match="No space left"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
