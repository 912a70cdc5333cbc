"""Loss terms. Pictures are (N, 3, H, W) float RGB in [0, 1]; every term is a mean, so sizes do not weigh."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import RecipeError
from .feature_nets import IMAGENET_STD, FeatureNet, build_feature_net
from .recipe import LossConfig


def charbonnier(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + 1e-6): L1 that is smooth at zero. Source: Lai et al., arXiv 1704.03915."""
    return ((sr - hr).square() + 1e-6).sqrt().mean()


def l1_normalised(sr: Tensor, hr: Tensor) -> Tensor:
    """L1 between ImageNet-normalised pictures (the mean cancels): the base term of SEEDS A."""
    std = torch.tensor(IMAGENET_STD, device=sr.device).view(1, 3, 1, 1)
    return ((sr - hr).abs() / std).mean()


def negative_psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """1 - PSNR / 100 dB, the mean over pictures: 0 at 100 dB, the most that is counted, and never negative.

    PSNR = 10 log10(max^2 / MSE) with max 1. The division keeps the gradient, which grows with 1 / MSE, near that of L1:
    3 times as large at 30 dB.
    """
    mse = (sr - hr).square().mean(dim=(1, 2, 3))
    return 1 + 0.1 * torch.log10(mse + 1e-10).mean()


SSIM_SIDE, SSIM_SIGMA = 11, 1.5


def ssim_loss(sr: Tensor, hr: Tensor) -> Tensor:
    """1 - SSIM, the mean over all channels and 11x11 windows (Gaussian, sigma 1.5) that lie inside the picture.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004).
    """
    offsets = torch.arange(SSIM_SIDE, device=sr.device, dtype=torch.float32) - SSIM_SIDE // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    with torch.autocast(sr.device.type, enabled=False):  # variances are small differences of large squares
        # (N, C, H, W) -> (N*C, 1, H, W): every channel on its own
        x, y = (picture.float().flatten(0, 1).unsqueeze(1) for picture in (sr, hr))

        def mean(z: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(z, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

        mean_x, mean_y = mean(x), mean(y)
        variance_x, variance_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
        covariance = mean(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        likeness = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
        return 1 - (likeness * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "l1_normalised": l1_normalised,
    "mse": F.mse_loss,
    "charbonnier": charbonnier,
    "psnr": negative_psnr,
    "ssim": ssim_loss,
}


def unit_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over places of the squared distance between feature vectors, (N, C, H, W), that are scaled to length 1.

    The form of LPIPS without its weights: Zhang et al., arXiv 1801.03924.
    """
    return (F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)).square().sum(dim=1).mean()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "mse": F.mse_loss, "unit": unit_distance}

LOG_SIDE, LOG_SIGMA = 15, 1.5


def laplacian_of_gaussian(device: torch.device | None = None) -> Tensor:
    """Give the 15x15 Laplacian of a Gaussian, sigma 1.5, scaled so that its largest gain is 1; it sums to 0.

    Its gain at frequency w is w^2 exp(-w^2 sigma^2 / 2), at most 2 / (e sigma^2).
    """
    offsets = torch.arange(LOG_SIDE, device=device, dtype=torch.float64) - LOG_SIDE // 2
    squares = offsets.square()[:, None] + offsets.square()[None, :]
    gaussian = torch.exp(-squares / (2 * LOG_SIGMA**2)) / (2 * math.pi * LOG_SIGMA**2)
    kernel = (squares - 2 * LOG_SIGMA**2) / LOG_SIGMA**4 * gaussian
    return ((kernel - kernel.mean()) / (2 / (math.e * LOG_SIGMA**2))).float()


def hfen(sr: Tensor, hr: Tensor) -> Tensor:
    """High-frequency error: mean square of the Laplacian of Gaussian of the difference, inside the picture.

    With the filter's largest gain divided out it is at most about the mean squared error.
    Source: Ravishankar and Bresler, IEEE TMI 30 (2011), who take the norm; the square and the gain: SEEDS F.
    """
    with torch.autocast(sr.device.type, enabled=False):
        # (N, C, H, W) -> (N*C, 1, H, W): every channel on its own
        difference = (sr.float() - hr.float()).flatten(0, 1).unsqueeze(1)
        return (
            F.conv2d(difference, laplacian_of_gaussian().to(sr.device).view(1, 1, LOG_SIDE, LOG_SIDE)).square().mean()
        )


def luma(picture: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W): BT.601 limited-range Y without its offset, in units of 255."""
    weights = torch.tensor((65.481, 128.553, 24.966), device=picture.device).view(1, 3, 1, 1) / 255
    return (picture * weights).sum(dim=1, keepdim=True)


def block_colour(sr: Tensor, hr: Tensor) -> Tensor:
    """L1 between the means of 16x16 blocks: brightness and hue, without detail."""
    return F.l1_loss(F.avg_pool2d(sr, 16), F.avg_pool2d(hr, 16))


GRID, GRID_BLOCK = 4, 32  # pixels: the period of the fast tier's last pixel shuffle


def grid(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute difference between the 4x4 places of a pixel shuffle, each averaged over blocks of 32x32.

    An error that repeats every 4 (or 2) pixels stays in these averages, any other leaves them. Deep features reward
    such a pattern as if it were texture.
    """
    block = min(GRID_BLOCK, *(side // GRID * GRID for side in sr.shape[2:]))
    height, width = (side // block * block for side in sr.shape[2:])
    difference = sr[:, :, :height, :width] - hr[:, :, :height, :width]
    repeats = block // GRID
    # (N, C, H, W) -> (N, C, H/32, 8, 4, W/32, 8, 4): the means over 8x8 repeats
    split = difference.unflatten(3, (-1, repeats, GRID)).unflatten(2, (-1, repeats, GRID))
    places = split.mean(dim=(3, 6))  # (N, C, H/32, 4, W/32, 4)
    return (places - places.mean(dim=(3, 5), keepdim=True)).abs().mean()


def gram_matrix(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, C): F F^T / (C H W), as in fastai's style term."""
    n, c, h, w = features.shape
    flat = features.reshape(n, c, h * w)
    return flat @ flat.transpose(1, 2) / (c * h * w)


def _shifted(sr: Tensor, hr: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Cut the same rows and columns, at random fewer than `most`, off top and left of both while a gradient is wanted.

    A feature network's strides weigh some rows more than others: at a fixed place they would become a grid.
    """
    if most <= 1 or not sr.requires_grad:
        return sr, hr
    top, left = torch.randint(most, (2,)).tolist()
    return sr[:, :, top:, left:], hr[:, :, top:, left:]


class CombinedLoss(nn.Module):
    """Weighted sum of the terms that a LossConfig switches on.

    sum_i w_i L1(f_i) + sum_i w_i^2 * style * L1(G_i) is the perceptual part of SEEDS A.
    forward takes SR and HR, (N, 3, H, W) float in [0, 1], and returns the total and each weighted term by name; the
    teacher's term, which takes LR as well, is added in a step (Learner.losses).
    """

    def __init__(self, config: LossConfig, *, weights: Path | str | None = None):
        super().__init__()
        if config.pixel not in PIXEL_LOSSES:
            raise RecipeError(f"loss.pixel: one of {', '.join(PIXEL_LOSSES)}, not {config.pixel!r}")
        if config.feature_distance not in DISTANCES:
            raise RecipeError(f"loss.feature_distance: one of {', '.join(DISTANCES)}, not {config.feature_distance!r}")
        others = [config.luma_weight, config.colour_weight, config.grid_weight, config.hfen_weight]
        is_perceptual = config.feature_net and (config.feature_weight and any(config.feature_weights))
        if not any((config.pixel_weight, *others, config.teacher_weight, is_perceptual)):
            raise RecipeError("loss: every term is switched off")
        if config.luma_weight and config.pixel == "l1_normalised":
            raise RecipeError("loss.luma_weight: l1_normalised is for three channels; take another loss.pixel")
        self.config = config
        self.features: FeatureNet | None = None
        if config.feature_net:
            self.features = build_feature_net(config.feature_net, layers=config.feature_layers, weights=weights)
            if len(self.features.taps) != len(config.feature_weights):
                raise RecipeError(
                    f"loss.feature_weights: {len(self.features.taps)} layers need as many weights, "
                    f"got {len(config.feature_weights)}"
                )

    def forward(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.pixel_weight:
            terms["pixel"] = config.pixel_weight * PIXEL_LOSSES[config.pixel](sr, hr)
        if config.luma_weight:
            terms["luma"] = config.luma_weight * PIXEL_LOSSES[config.pixel](luma(sr), luma(hr))
        if config.colour_weight:
            terms["colour"] = config.colour_weight * block_colour(sr, hr)
        if config.grid_weight:
            terms["grid"] = config.grid_weight * grid(sr, hr)
        if config.hfen_weight:
            terms["hfen"] = config.hfen_weight * hfen(sr, hr)
        if self.features is not None:
            distance = DISTANCES[config.feature_distance]
            sr, hr = _shifted(sr, hr, config.feature_shift)
            with torch.no_grad():
                targets = self.features(hr)
            triples = list(zip(config.feature_weights, self.features(sr), targets, strict=True))
            distances = [w * distance(a.float(), b.float()) for w, a, b in triples]
            terms["features"] = config.feature_weight * torch.stack(distances).sum()
            if config.style_weight:
                with torch.autocast(sr.device.type, enabled=False):  # it would round the products again
                    grams = [w**2 * F.l1_loss(gram_matrix(a.float()), gram_matrix(b.float())) for w, a, b in triples]
                terms["style"] = config.feature_weight * config.style_weight * torch.stack(grams).sum()
        return sum(terms.values(), sr.new_zeros(())), terms
