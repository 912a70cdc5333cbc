"""How good a network is on photographs that were set aside, and how its results look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .data import Photographs
from .models import Network
from .recipe import DegradeConfig

MAX_SIDE = 256
LUMA = np.array([65.481, 128.553, 24.966]) / 255  # BT.601, limited range


@dataclass(frozen=True)
class Look:
    """Means over the validation pictures, and the first of them: LR, result and HR, uint8 RGB.

    metrics: "psnr_y" in dB, "colour_drift" in code values, and each loss term. The PSNR is that of the mean of the
    pictures' squared errors: one that no damage met, whose own PSNR is infinite, must not outweigh all others.
    """

    metrics: dict[str, float]
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@torch.no_grad()
def validate(
    model: Network,
    photographs: Photographs,
    *,
    loss: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    config: DegradeConfig,
    seed: int,
    device: torch.device,
    autocast: bool,
) -> Look:
    """Degrade and enlarge photographs, the same way every time. model: in eval mode; its first scale is taken."""
    scale = model.scales[0]
    grid = model.output_grid()
    sides = (side for picture in photographs.pictures for side in picture.shape[:2])
    size = min(MAX_SIDE, *sides) // grid * grid
    sums: dict[str, float] = {}
    rows = []
    for index in range(len(photographs)):
        rng = np.random.default_rng((seed, index))
        cut = photographs.draw(index, size=size, scale=scale, config=config, rng=rng)
        lr, hr = photographs.apply(index, replace(cut, flip=False, turns=0))  # as one looks at them
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            result = model(to_batch(lr, device), scale).float()
        _, terms = loss(result, to_batch(hr, device))
        sr = to_picture(result[0])
        values = {name: float(term) for name, term in terms.items()}
        values |= {"mse_y": mse_y(sr, hr, shave=scale), "colour_drift": colour_drift(sr, hr)}
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        rows.append((lr, sr, hr))
    metrics = {name: total / len(photographs) for name, total in sums.items()}
    return Look(metrics | {"psnr_y": _decibels(metrics.pop("mse_y"))}, rows)


def to_batch(picture: np.ndarray, device: torch.device) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None].to(device).float() / 255


def to_picture(tensor: Tensor) -> np.ndarray:
    """(3, H, W) float -> (H, W, 3) uint8, clamped and rounded."""
    return (tensor.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def psnr_y(sr: np.ndarray, hr: np.ndarray, *, shave: int) -> float:
    """PSNR in dB on BT.601 limited-range luma, `shave` pixels cut off each side; (H, W, 3) uint8 both."""
    return _decibels(mse_y(sr, hr, shave=shave))


def mse_y(sr: np.ndarray, hr: np.ndarray, *, shave: int) -> float:
    """Mean squared error on BT.601 limited-range luma, in squared code values; as psnr_y."""
    difference = ((sr.astype(np.float64) - hr) @ LUMA)[shave:-shave, shave:-shave]
    return float(np.mean(difference**2))


def _decibels(mse: float) -> float:
    return float(10 * np.log10(255**2 / max(mse, 1e-12)))


def colour_drift(sr: np.ndarray, hr: np.ndarray) -> float:
    """Give the largest difference of a channel's mean, in code values; (H, W, 3) uint8 both."""
    return float(np.abs((sr.astype(np.float64) - hr).mean(axis=(0, 1))).max())
