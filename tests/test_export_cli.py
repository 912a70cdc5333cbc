"""sr-export as a shell would call it: what serves a bundle. Exporting itself is in test_export_bundle and its like."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from export.cli import main

pytest.importorskip("onnxruntime")


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["runs/mine"],
        ["--out", "bundle"],
        ["runs/mine", "--onnx", "model.onnx", "--out", "bundle"],
        ["--onnx", "model.onnx", "--triton", "repository"],
        ["runs/mine", "--out", "bundle", "--level", "9"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str]) -> None:
    output = run(*arguments, code=2).output
    assert "Usage:" in output and "Traceback" not in output


def test_engines_that_are_asked_for_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for arguments in (["--tensorrt"], ["--engine-dir", str(tmp_path / "engines")]):
        output = run("fast-x2", *arguments, code=1).output
        assert "Error: tensorrt is not installed: pip install 'sr-sdk[tensorrt]'" in output


def test_a_bundle_that_is_not_there() -> None:
    assert "Error: model 'nowhere'" in run("nowhere", "--tensorrt", code=1).output


def test_a_triton_repository_of_a_shipped_model(tmp_path: Path) -> None:
    output = run("fast-x2", "--triton", str(tmp_path / "repository")).output
    assert "Triton models fast-x2-96, fast-x2-192" in output
    assert (tmp_path / "repository" / "fast-x2-192" / "config.pbtxt").is_file()


@pytest.mark.parametrize(
    "option", ["--fp16", "--int8=pictures", "--arch=fast", "--set=model.channels=8", "--incomplete"]
)
def test_somebody_elses_graph_takes_no_options_of_ours(tmp_path: Path, option: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    output = run("--onnx", str(tmp_path / "model.onnx"), "--out", str(tmp_path / "out"), option, code=1).output
    assert f"{option.partition('=')[0]}: not for --onnx" in output


@pytest.mark.parametrize(
    "options,needs",
    [
        (["--triton", "r", "--scale", "4"], "--scale needs --out"),
        (["--triton", "r", "--fp16"], "--fp16 needs --out"),
        (["--triton", "r", "--int8", "nowhere"], "--int8 needs --out"),
        (["--triton", "r", "--licence", "CC0"], "--licence needs --out"),
        (["--triton", "r", "--level", "3"], "--level needs --tensorrt"),
        (["--tensorrt", "--triton-engine", "x"], "--triton-engine needs --triton"),
        (["--out", "o", "--device", "cuda:1"], "--device needs --tensorrt"),
    ],
)
def test_an_option_is_used_or_refused(options: list[str], needs: str) -> None:
    assert needs in run("fast-x2", *options, code=2).output


def test_a_repository_that_is_there_is_told_before_the_work(tmp_path: Path) -> None:
    output = run("nowhere", "--out", str(tmp_path / "o"), "--triton", str(tmp_path), code=2).output
    assert "exists already" in output and not (tmp_path / "o").exists()


def test_one_stage_of_a_bundle_is_served(tmp_path: Path) -> None:
    plan = tmp_path / "trtexec.plan"
    plan.write_bytes(b"a plan of others")
    sizes = ("--triton-batch", "2", "--triton-window", "64")
    folder = tmp_path / "r"
    output = run("fast-x2", "--triton", str(folder), "--triton-engine", str(plan), *sizes, "--stage", "192").output
    assert [path.name for path in folder.iterdir()] == ["fast-x2-192"] and "fast-x2-192" in output


def test_messages_give_no_orders_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"\x1b]0;hi\x07\nError: all is well": torch.zeros(1)}, path)
    output = run(str(path), "--arch", "fast", "--scale", "2", "--out", str(tmp_path / "o"), code=1).output
    assert "\x1b" not in output and output.strip().count("\n") == 0 and "1 unknown" in output


def test_a_plain_checkpoint_needs_its_network(tmp_path: Path) -> None:
    output = run(str(tmp_path / "model.pth"), "--out", str(tmp_path / "out"), code=1).output
    assert "--arch must name the network" in output
