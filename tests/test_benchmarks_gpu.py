"""The acceptance run for a GPU, on stand-ins: it checks what it says, and finds what is wrong."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import bundles
import fake_cuda
import fake_tensorrt
import numpy as np
import pytest

from benchmarks import gpu_acceptance
from sdk.backends import tensorrt
from sdk.backends.tensorrt_builder import Profile

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt.Behaviour:
    bundles.shared("unet")
    machine, made = fake_cuda.Machine(limit=5 << 30), fake_tensorrt.Behaviour()
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    fake_cuda.install(monkeypatch, machine)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module(machine, "10.16.1.11", onnxruntime, made))
    monkeypatch.setattr(gpu_acceptance, "GIB", 1 << 20)
    monkeypatch.setattr(gpu_acceptance, "CROP", 96)
    monkeypatch.setattr(gpu_acceptance, "SHAPES", ((1, 64, 64), (2, 32, 64), (3, 64, 64)))
    monkeypatch.setattr(tensorrt, "choose_profile", lambda stage, total: Profile(stage.stride, 2, 288))
    return made


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    target = tmp_path / "gpu.json"
    code = gpu_acceptance.main(
        ["--model", str(bundles.shared("unet")), "--repeats", "2", "--json", str(target), *options]
    )
    gc.collect()
    return code, json.loads(target.read_text(encoding="utf-8"))


def test_everything_is_checked_and_timed(behaviour: fake_tensorrt.Behaviour, tmp_path: Path) -> None:
    code, result = run(tmp_path)
    assert code == 0, [row for row in result["checks"] if not row["passed"]]
    names = {(row["check"], row["precision"]) for row in result["checks"]}
    checks = ("built once", "parity", "tiled is untiled", "8 threads", "little memory")
    assert names >= {(check, precision) for check in checks for precision in ("fp32", "fp16")}
    assert {("damaged, built anew", "fp32"), ("of another GPU, built anew", "fp32")} <= names
    rows = [row for row in result["timings"] if row["contestant"] == "tensorrt"]
    cases = {(row["precision"], row["graphs"], *row["shape"]) for row in rows}
    assert len(rows) == len(cases) == 8, "every shape but the one beyond the profile"
    assert all(min(row["host_ms"], row["device_ms"], row["mp_per_s"]) > 0 for row in rows)
    assert result["command"].startswith("python -m benchmarks.gpu_acceptance ")
    assert result["ceilings"]["gpu"] == fake_cuda.NAME and result["ceilings"]["copy_gb_per_s"] > 0
    told = {row["part"] for row in result["skipped"]}
    assert "matrix rate" in told and any("onnxruntime" in part for part in told), "neither runs on these GPUs"


def test_what_is_wrong_fails_the_run(behaviour: fake_tensorrt.Behaviour, tmp_path: Path) -> None:
    behaviour.wrong = True
    code, result = run(tmp_path)
    failed = {(row["check"], row.get("precision")) for row in result["checks"] if not row["passed"]}
    assert code == 1 and ("parity", "fp32") in failed


def test_an_engine_that_cannot_be_built_fails_the_run(behaviour: fake_tensorrt.Behaviour, tmp_path: Path) -> None:
    behaviour.loses_half = True
    code, result = run(tmp_path)
    assert code == 1 and any("without one in fp16" in row.get("error", "") for row in result["checks"])


def test_results_can_be_brought_along(
    behaviour: fake_tensorrt.Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tmp_path / "reference.npz"
    model = ["--model", str(bundles.shared("unet"))]
    assert gpu_acceptance.main([*model, "--make-reference", str(reference)]) == 0
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _ = run(tmp_path, "--reference", str(reference))
    assert code == 0
    changed = {name: np.zeros_like(array) for name, array in np.load(reference).items()}
    np.savez(reference, **changed)
    code, result = run(tmp_path, "--reference", str(reference))
    assert code == 1 and {row["check"] for row in result["checks"] if not row["passed"]} == {"parity"}


def test_a_machine_without_a_gpu_passes_nothing(tmp_path: Path) -> None:
    code, result = run(tmp_path)
    assert code == 1 and result["checks"] == [] and result["skipped"]
