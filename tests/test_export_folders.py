"""Folders that appear whole: others are left alone, what killed processes left goes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import int8, parity
from export.errors import ExportError
from export.folders import new_folder, refuse_existing


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bundle"
    with new_folder(out) as folder:
        (folder / "file").write_text("content")
        assert not out.exists()
    assert (out / "file").read_text() == "content" and [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_two_at_once_do_not_take_each_others_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two containers, where both have process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    out = tmp_path / "bundle"
    with pytest.raises(ExportError, match="cannot be written"), new_folder(out) as first:
        (first / "file").write_text("1")
        with new_folder(out) as second:
            (second / "file").write_text("2")
        assert (first / "file").read_text() == "1"
    assert (out / "file").read_text() == "2" and [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    old, new = tmp_path / ".bundle.00000000.tmp", tmp_path / ".bundle.11111111.tmp"
    for left in (old, new):
        left.mkdir()
    os.utime(old, (0, 0))
    with new_folder(tmp_path / "bundle"):
        pass
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_one_goes(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "bundle"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_names_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, said in (("link", "exists already"), ("a\x1b]0;b", "not a printable name"), ("x\udcff", "UTF-8")):
        with pytest.raises(ExportError, match=said):
            refuse_existing(tmp_path / name)


def test_pictures_of_all_kinds_are_read(tmp_path: Path) -> None:
    """16 bits are reduced, not cut off; hidden files and folders are no pictures."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    (tmp_path / "._grey.png").write_bytes(b"of another system")
    (tmp_path / "folder.png").mkdir()
    ((name, picture),) = parity.read_pictures(tmp_path, largest=64)
    assert name == "grey.png" and np.array_equal(picture[..., 0], ramp >> 8)
    assert [path.name for path in int8.find_photographs(tmp_path)] == ["grey.png"]


def test_int8_is_not_judged_on_nothing() -> None:
    tiny = np.zeros((6, 6, 3), np.uint8)
    with pytest.raises(ExportError, match="every picture is too small"):
        int8.Yardstick(lambda batch: batch, [("tiny", tiny, tiny)], scale=2, stride=8)
