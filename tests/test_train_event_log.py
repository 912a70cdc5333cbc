"""TensorBoard's events of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.errors import ResourceError
from train.event_log import EventLog
from train.plots import write_panel


def entry(step: int, **more: Any) -> dict[str, Any]:
    return {"done_steps": step, "terms": {"pixel": step / 10}, "learning_rate": 1e-3, "images_per_second": 5.0} | more


def read_events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return events


def test_a_missing_tensorboard_is_told_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ResourceError, match="pip install tensorboard"):
        EventLog(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_entries_and_panels_are_found_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    hr = np.full((16, 16, 3), 90, np.uint8)
    write_panel([(hr[::2, ::2], hr, hr)], tmp_path / "panels" / "00000002.png")
    log = EventLog(tmp_path / "events")
    log.add(entry(1, validation={"psnr_y": 30.0}))
    log.add(entry(2, validation={"psnr_y": 31.0, "colour_drift": 0.5, "pixel": float("nan")}))
    log.add({"terms": None})
    log.add(entry(3, terms="broken", validation=None, learning_rate="?"))
    log.add_panel(tmp_path / "panels" / "00000002.png")
    log.close()
    events = read_events(tmp_path / "events")
    expected = {"train/pixel", "validation/psnr_y", "validation/colour_drift", "learning_rate", "images_per_second"}
    assert set(events.Tags()["scalars"]) == expected
    assert [(event.step, event.value) for event in events.Scalars("validation/psnr_y")] == [(1, 30.0), (2, 31.0)]
    assert [event.step for event in events.Images("panel")] == [2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    first = EventLog(tmp_path)
    for step in (1, 2, 3, 4):
        first.add(entry(step))
    first.close()  # killed after step 4, its checkpoint is of step 2
    second = EventLog(tmp_path, done_steps=2)
    for step in (3, 4, 5):
        second.add(entry(step, terms={"pixel": 9.0}))
    second.close()
    events = read_events(tmp_path)
    assert [event.step for event in events.Scalars("train/pixel")] == [1, 2, 3, 4, 5]
    assert [event.value for event in events.Scalars("train/pixel")][2:] == [9.0, 9.0, 9.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "events").write_text("")  # a file where the folder belongs
    with pytest.raises(ResourceError, match="events cannot be written"):
        EventLog(tmp_path / "events")
