"""Figures that compare a result with its original; the protocol around them is in quality.py."""

from __future__ import annotations

import numpy as np

MAX_PSNR_DB = 100.0
WINDOW = 11
SIGMA = 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def luma(image: np.ndarray) -> np.ndarray:
    """Turn (H, W, 3) uint8 RGB into (H, W) float64 Y, BT.601 limited range (16 to 235), not rounded."""
    return image @ (np.array([65.481, 128.553, 24.966]) / 255) + 16


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Give the peak signal-to-noise ratio in dB of two arrays of 8-bit code values, at most MAX_PSNR_DB."""
    mse = float(np.mean((a.astype(np.float64) - b) ** 2))
    return min(MAX_PSNR_DB, float(10 * np.log10(255**2 / mse))) if mse else MAX_PSNR_DB


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Give the structural similarity of two (H, W) planes of 8-bit code values, both sides at least 11.

    Source: Wang et al., "Image quality assessment", 2004, with its Gaussian window.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a, variance_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    above = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    below = (mean_a**2 + mean_b**2 + C1) * (variance_a + variance_b + C2)
    return float(np.mean(above / below))


def colour_drift(sr: np.ndarray, hr: np.ndarray) -> float:
    """Give the largest difference of the three channels' means, in code values; both (H, W, 3)."""
    return float(np.abs(sr.mean(axis=(0, 1)) - hr.mean(axis=(0, 1))).max())


def _blur(plane: np.ndarray) -> np.ndarray:
    """Average (H, W) with the Gaussian window: (H-10, W-10)."""
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for _ in range(2):  # down the columns, then along the rows
        length = plane.shape[0] - WINDOW + 1
        plane = np.sum([weight * plane[i : i + length] for i, weight in enumerate(weights)], axis=0).T
    return plane
