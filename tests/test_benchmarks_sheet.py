from __future__ import annotations

from functools import partial
from pathlib import Path

import bundles
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import sheet
from benchmarks.cli import main
from benchmarks.pictures import BICUBIC, draw_picture, enlarge
from benchmarks.quality import read_pair
from sdk import OutputError


@pytest.mark.parametrize("at", [(0, 0), (32, 160), (156, 256)])
def test_the_patch_is_where_the_detail_is(at):
    picture = np.full((300, 400, 3), 128, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (144, 144, 3), dtype=np.uint8)
    picture[at[0] : at[0] + 144, at[1] : at[1] + 144] = noise
    rows, columns = sheet.most_detailed(picture)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (144, 144)
    assert abs(rows.start - at[0]) <= sheet.STEP
    assert abs(columns.start - at[1]) <= sheet.STEP


def test_a_small_picture_is_its_own_patch():
    assert sheet.most_detailed(draw_picture((40, 150))) == (slice(0, 40), slice(0, 144))


def test_every_method_has_a_cell_in_every_row(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        for index in range(3):
            Image.fromarray(draw_picture((200, 180), seed=number + index)).save(folder / f"{index}.png")
    methods = {
        "bicubic": partial(enlarge, scale=2, resample=BICUBIC),
        "black": lambda lr: (lr * 0).repeat(2, 0).repeat(2, 1),
    }
    drawn = sheet.draw_sheet(folders, scale=2, methods=methods, prepare=read_pair)
    side = round(sheet.PATCH * sheet.MAGNIFIED)
    height = side + 18  # and a title
    assert drawn.shape == (4 * height, 4 * side, 3)
    for row in range(4):
        cells = [drawn[(row + 1) * height - side : (row + 1) * height, n * side : (n + 1) * side] for n in range(4)]
        assert not cells[2].any()
        assert all(cells[n].any() for n in (0, 1, 3))
        errors = [np.abs(cells[n].astype(int) - cells[3]).mean() for n in (1, 2)]
        assert errors[0] < errors[1]


def test_the_command_writes_a_sheet_for_each_scale(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.fromarray(draw_picture((64, 64))).save(folder / "a.png")
    command = ["quality", str(folder), "--model", str(bundles.shared("blur")), "--backend", "onnxruntime"]
    done = CliRunner().invoke(main, [*command, "--sheet", str(tmp_path / "sheet.png")])
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.glob("*.png")] == ["sheet-x2.png"]


def test_a_sheet_that_cannot_be_written_is_told():
    with pytest.raises(OutputError, match="cannot be written"):
        sheet.write_sheet(np.zeros((4, 4, 3), np.uint8), Path("/nowhere/sheet.png"))
