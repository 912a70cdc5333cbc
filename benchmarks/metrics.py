"""Figures that compare a result with its original; the protocol around them is in quality.py."""

from __future__ import annotations

import numpy as np

MAX_PSNR_DB = 100.0
WINDOW = 11
SIGMA = 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
GRID = 4  # pixels: the period of the last pixel shuffle, and of most faults of networks with strides; 2 is within
BLOCK = 64


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


def grid_excess(sr: np.ndarray, hr: np.ndarray) -> float:
    """Tell by how many dB a grid of period 4 or 2 lifts the spectrum where it lies; about 0 without a grid.

    sr, hr: (H, W) planes of 8-bit code values, both sides at least 8. Compared are, at the frequencies (i/4, j/4) and
    the highest over them, how far a spectrum stands out of its surroundings there, in terms of the original's: a
    result that is merely blurred or noisy gives nothing.
    """
    side = min(BLOCK, *(length // GRID * GRID for length in hr.shape))
    spectra = [_spectrum(plane, side) for plane in (sr, hr)]
    lifts = []
    for place in np.ndindex(GRID, GRID):
        if not any(place):
            continue
        (peak_sr, around_sr), (peak_hr, around_hr) = (_peak(spectrum, place) for spectrum in spectra)
        above_sr, above_hr = max(0.0, peak_sr - around_sr), max(0.0, peak_hr - around_hr)
        lifts.append(10 * np.log10((around_hr + above_sr + 1e-9) / (around_hr + above_hr + 1e-9)))
    return float(max(lifts))


def _spectrum(plane: np.ndarray, side: int) -> np.ndarray:
    """Average the power spectra of half-overlapping blocks (Welch), (side, side)."""
    window = np.hanning(side + 1)[:side]
    blocks = np.lib.stride_tricks.sliding_window_view(plane, (side, side))[:: side // 2, :: side // 2]
    blocks = blocks.reshape(-1, side, side)  # (rows, columns, side, side) -> (blocks, side, side)
    blocks = (blocks - blocks.mean(axis=(1, 2), keepdims=True)) * np.outer(window, window)
    return (np.abs(np.fft.fft2(blocks)) ** 2).mean(axis=0)


def _peak(spectrum: np.ndarray, place: tuple[int, ...]) -> tuple[float, float]:
    """Give the power at (i/4, j/4), and the median of what lies two to five bins from it."""
    side = len(spectrum)
    rows, columns = np.mgrid[-5:6, -5:6]
    near = spectrum[(place[0] * side // GRID + rows) % side, (place[1] * side // GRID + columns) % side]
    return float(near[5, 5]), float(np.median(near[np.maximum(abs(rows), abs(columns)) >= 2]))


def _blur(plane: np.ndarray) -> np.ndarray:
    """Average (H, W) with the Gaussian window: (H-10, W-10)."""
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for _ in range(2):  # down the columns, then along the rows
        length = plane.shape[0] - WINDOW + 1
        plane = np.sum([weight * plane[i : i + length] for i, weight in enumerate(weights)], axis=0).T
    return plane
