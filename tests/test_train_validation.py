"""Validation: what is measured, and on which pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from train.data import Photographs
from train.models import Network
from train.recipe import DegradeConfig
from train.validation import mse_y, psnr_y, validate


def test_psnr_y_of_a_known_difference():
    hr = np.full((20, 20, 3), 100, np.uint8)
    grey = hr + np.uint8(2)  # Y rises by 2 * (65.481 + 128.553 + 24.966) / 255 = 1.71765
    assert psnr_y(grey, hr, shave=2) == pytest.approx(20 * np.log10(255 / 1.717647), abs=1e-4)
    grey[0], grey[:, -2:] = 255, 255
    assert psnr_y(grey, hr, shave=2) == pytest.approx(43.4322, abs=1e-3)


class Unchanged(Network):
    """Gives what it gets."""

    scales = (1,)

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        return lr

    def stride(self, scale: int) -> int:
        return 1


def test_a_picture_without_damage_does_not_decide_the_validation(make_photo):
    pictures = tuple(make_photo(64, 64, seed) for seed in range(6))
    photographs = Photographs(tuple(Path(f"{index}.png") for index in range(6)), pictures)
    config = DegradeConfig(noise_probability=0.5, noise_sigma=(5.0, 5.0))
    found = validate(
        Unchanged(), photographs, loss=lambda sr, hr: ((sr - hr).abs().mean(), {}), config=config, seed=1,
        device=torch.device("cpu"), autocast=False,
    )  # fmt: skip
    errors = [mse_y(sr, hr, shave=1) for _, sr, hr in found.rows]
    assert min(errors) == 0 and max(errors) > 5
    assert found.metrics["psnr_y"] == pytest.approx(10 * np.log10(255**2 / np.mean(errors)))
    assert "mse_y" not in found.metrics


def test_pictures_are_looked_at_upright():
    ramp = np.tile(np.arange(80, dtype=np.uint8)[:, None] * 3, (1, 80))  # brighter from the top downwards
    pictures = tuple(np.stack([ramp + np.uint8(index)] * 3, axis=2) for index in range(6))
    photographs = Photographs(tuple(Path(f"{index}.png") for index in range(6)), pictures)
    found = validate(
        Unchanged(), photographs, loss=lambda sr, hr: ((sr - hr).abs().mean(), {}), config=DegradeConfig(), seed=1,
        device=torch.device("cpu"), autocast=False,
    )  # fmt: skip
    for _, sr, hr in found.rows:
        assert (np.diff(hr[..., 0].astype(int), axis=0) == 3).all() and np.array_equal(sr, hr)
