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
from train.plots import TITLE_HEIGHT, write_loss_curve, write_panel, write_rate_plot

MakePhoto = Callable[..., np.ndarray]


def entry(step: int, terms: dict[str, float], psnr_y: float | None = None) -> dict[str, Any]:
    return {"done_steps": step, "terms": terms, "psnr_y": psnr_y}


def test_a_panel_shows_four_columns(tmp_path: Path, make_photo: MakePhoto) -> None:
    hr = make_photo(32, 32, 0)
    lr = hr[::2, ::2]
    write_panel([(lr, 255 - hr, hr)] * 2, tmp_path / "deep" / "panel.png")
    with Image.open(tmp_path / "deep" / "panel.png") as image:
        panel = np.asarray(image)
    assert panel.shape == (2 * (32 + TITLE_HEIGHT), 4 * 32, 3)
    assert np.array_equal(panel[TITLE_HEIGHT : TITLE_HEIGHT + 32, :32], lr.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(panel[TITLE_HEIGHT : TITLE_HEIGHT + 32, 64:96], 255 - hr)
    assert np.array_equal(panel[TITLE_HEIGHT : TITLE_HEIGHT + 32, 96:], hr)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry(1, {})],
        [entry(1, {"pixel": 0.1}, 30.0)],
        [entry(1, {"pixel": 0.1}, 30.0), entry(2, {}), entry(3, {"pixel": 0.0, "colour": 0.01}, 31.0)],
    ],
)
def test_the_loss_curve_takes_any_log(entries: list[dict[str, Any]], tmp_path: Path) -> None:
    write_loss_curve(entries, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1200, 400)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


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
