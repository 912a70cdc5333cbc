"""Several processes train what one would: the same losses with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.checkpoint import load_checkpoint, stage_folder
from train.run_folder import read_log

RECIPE = """
samples_per_epoch = 16
[model]
options = { channels = 8, blocks = [1, 1, 1] }
[loss]
luma_weight = 1.0
[optimizer]
muon_rate = 10.0
[[stages]]
name = "32"
size = 32
batch = 4
phases = [{ epochs = 2.0 }]
"""
STEPS = 8


def train(folder: Path, photographs: Path, *, processes: int, report_all: str) -> Path:
    """Train in processes of their own, with news of every step."""
    out = folder / f"run-{processes}"
    code = f"from train import clock; clock.REPORT_SECONDS = {report_all}; from train.cli import main; main()"
    script = folder / "train_often.py"
    script.write_text(code)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [photographs, "--recipe", folder / "tiny.toml", "--out", out, "--device", "cpu", "--precision", "fp32"]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, str(script), *map(str, arguments), "--workers", "0"],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def test_two_processes_give_the_losses_of_one(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    one, two = (train(tmp_path, photo_folder, processes=count, report_all="-1") for count in (1, 2))
    logs = [read_log(run) for run in (one, two)]
    assert [len(log) for log in logs] == [STEPS, STEPS], "one writer, one line a step"
    for alone, together in zip(*logs, strict=True):
        assert alone["terms"] == pytest.approx(together["terms"], rel=1e-4)
    weights = [load_checkpoint(stage_folder(run, "32")).group("model") for run in (one, two)]
    for name, value in weights[0].items():
        distance = (value - weights[1][name]).norm() / value.norm().clamp(min=1e-3)
        assert distance < 0.001, f"{name}: sums in another order"
    facts = json.loads((two / "run.json").read_text())
    assert facts["processes"] == 2


def test_a_batch_that_cannot_be_shared_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE.replace("batch = 4", "batch = 3"))
    with pytest.raises(AssertionError, match="a batch of 3 cannot be shared by 2 processes evenly"):
        train(tmp_path, photo_folder, processes=2, report_all="-1")


AGREE = """
import logging, os, sys
import torch
from train.devices import choose_device, join_processes
from train.models.critics import SRGANCritic
from train.models.fast_unet import FastUNet
logging.basicConfig(format="%(message)s")
device = choose_device("cpu")
processes = join_processes(device)
line = f"{processes.rank} {processes.agree(('here', 3))} {processes.agree(processes.rank)}"
os.write(1, (line + os.linesep).encode())  # at once: print's pieces would mix with the other process's
for network in (FastUNet(channels=4), SRGANCritic(channels=4, dense=4)):
    assert processes.share_batch_norm(network, device) is network
torch.distributed.destroy_process_group()
"""


def test_processes_tell_whether_they_agree_and_whose_norms_they_cannot_share(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*arguments, str(script)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split("\n"))[1:] == ["0 True False", "1 True False"]
    assert result.stderr.count("SRGANCritic has BatchNorm, which on CPUs sees each process's part") == 1
    assert "FastUNet has" not in result.stderr
