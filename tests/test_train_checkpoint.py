"""Checkpoints: whole or not at all, and readable or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from train import checkpoint as module
from train.atomic import read_json
from train.checkpoint import (
    FACTS,
    TENSORS,
    Checkpoint,
    keep_latest,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    stage_folder,
)
from train.errors import CheckpointError, ResourceError


def example(value: float = 1.0) -> Checkpoint:
    tensors = {"model.a": torch.full((2, 3), value), "ema.a": torch.zeros(1), "model.count": torch.tensor(3)}
    return Checkpoint(tensors, {"position": [0, 1, 2], "done_steps": 7})


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", example())
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.facts == example().facts
    assert set(loaded.group("model")) == {"a", "count"}
    assert torch.equal(loaded.group("model")["a"], torch.ones(2, 3))
    assert loaded.tensors["model.count"].dtype == torch.int64


def test_memory_format_does_not_matter(tmp_path: Path) -> None:
    weight = torch.rand(4, 3, 3, 3).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "c", Checkpoint({"w": weight}, {}))
    assert torch.equal(load_checkpoint(tmp_path / "c").tensors["w"], weight)


def test_files_are_safetensors_and_json(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", example())
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [FACTS, TENSORS]
    with safe_open(tmp_path / "c" / TENSORS, "pt") as file:
        assert set(file.keys()) == set(example().tensors)
    json.loads((tmp_path / "c" / FACTS).read_text())


@pytest.mark.parametrize("when", ["tensors", "facts", "rename"])
def test_a_failure_in_the_middle_keeps_the_old_one(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "c", example(1.0))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "tensors":
            patch.setattr(module, "save_file", fail)
        elif when == "facts":
            patch.setattr(Path, "write_text", fail)
        else:
            patch.setattr(Path, "rename", fail)
        with pytest.raises(ResourceError, match=r"No space left on device.*free space or choose --out"):
            save_checkpoint(tmp_path / "c", example(2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert float(load_checkpoint(tmp_path / "c").tensors["model.a"][0, 0]) == 1.0


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "c", example(1.0))
    rename = Path.rename
    calls = []

    def killed_at_the_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt  # like a kill: passes every handler of errors
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path / "c", example(2.0))
    assert float(load_checkpoint(tmp_path / "c").tensors["model.a"][0, 0]) == 1.0
    save_checkpoint(tmp_path / "c", example(3.0))
    assert float(load_checkpoint(tmp_path / "c").tensors["model.a"][0, 0]) == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="the checkpoint could not be written"):
        save_checkpoint(tmp_path / "file" / "c", example())


@pytest.mark.parametrize("name", [TENSORS, FACTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_a_damaged_checkpoint_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", example())
    file = tmp_path / "c" / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "truncated": whole[: len(whole) - 5], "garbage": b"\x80\x04K\x01."}[damage])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "c")


def test_of_a_damaged_checkpoint_the_way_out_is_told(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints" / f"step-{step:09d}", example())
        newest = latest_checkpoint(tmp_path)
        assert newest is not None
        (newest / TENSORS).write_bytes(b"")
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(newest)
        assert ("delete it to go on from the one before" in str(caught.value)) == (step == 2)


def test_facts_must_be_a_table(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", example())
    (tmp_path / "c" / FACTS).write_text("[]")
    with pytest.raises(CheckpointError, match=r"state.json holds no table"):
        load_checkpoint(tmp_path / "c")


def test_the_newest_is_found_and_the_rest_deleted(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path / "checkpoints" / f"step-{step:09d}", example())
    (tmp_path / "checkpoints" / ".step-000000200.tmp").mkdir()  # a process that was killed while it saved
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000000100"
    keep_latest(tmp_path, 2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000000010", "step-000000100"]


def test_stage_folder(tmp_path: Path) -> None:
    assert stage_folder(tmp_path, "128") == tmp_path / "stages" / "128"


def steps(run: Path, *names: str) -> Path:
    for name in names:
        save_checkpoint(run / "checkpoints" / name, Checkpoint({"a": torch.zeros(1)}, {"name": name}))
    return run


def test_a_replacement_killed_half_way_loses_nothing(tmp_path: Path) -> None:
    run = steps(tmp_path, "step-000000001", "step-000000002")
    folders = run / "checkpoints"
    (folders / "step-000000002").rename(folders / ".step-000000002.old")
    (folders / ".step-000000002.tmp").mkdir()
    newest = latest_checkpoint(run)
    assert newest is not None and load_checkpoint(newest).facts == {"name": "step-000000002"}
    keep_latest(run, 2)
    assert sorted(path.name for path in folders.iterdir()) == [".step-000000002.old", "step-000000001"]
    steps(run, "step-000000003", "step-000000004")
    keep_latest(run, 2)
    assert sorted(path.name for path in folders.iterdir()) == ["step-000000003", "step-000000004"]


def test_what_a_user_has_put_beside_checkpoints_is_none(tmp_path: Path) -> None:
    run = steps(tmp_path, "step-000000009", "step-1000000000", "step-000000010.bak", "step-latest", "best")
    steps(run, "step-2000000000.old", ".step-2000000001")
    newest = latest_checkpoint(run)
    assert newest is not None and newest.name == "step-1000000000"
    (run / "checkpoints" / ".step-x").write_text("")
    keep_latest(run, 1)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step-1000000000", "step-000000010.bak", "step-latest", "best", "step-2000000000.old"}


def test_a_folder_of_checkpoints_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be read"):
        latest_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX")
def test_json_that_cannot_be_read_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")
