"""A plain U-Net with transposed convolutions, the first design of the third seed (SEEDS E)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutions import ConvolutionPair
from .icnr import zero_bias_
from .interpolated import InterpolatedNetwork


class TransposeUNet(InterpolatedNetwork):
    """U-Net that adds detail to the interpolated picture: max pooling down, 2x2 transposed convolutions up.

    channels: of the first level; each of the other `levels` has twice as many as the one above.
    Input: (N, 3, h, w) float RGB in [0, 1], h*scale and w*scale multiples of 2**(levels - 1).
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped; at the start the interpolated picture.
    Source: Ronneberger et al., arXiv 1505.04597, with padded convolutions; SEEDS, system E.
    """

    def __init__(self, scales: tuple[int, ...] = (2,), *, channels: int = 64, levels: int = 4):
        super().__init__(scales, grid=2 ** (levels - 1))
        widths = [channels * 2**level for level in range(levels)]
        self.down = nn.ModuleList(ConvolutionPair(i, o) for i, o in zip([3, *widths], widths))
        above = list(reversed(widths[:-1]))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(width * 2, width, 2, stride=2) for width in above)
        self.up = nn.ModuleList(ConvolutionPair(width * 2, width) for width in above)
        self.last = nn.Conv2d(channels, 3, 1)
        nn.init.zeros_(self.last.weight)  # training starts from plain interpolation
        zero_bias_(self.last)

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        picture = self.interpolate(lr, scale)
        x = picture
        skips: list[Tensor] = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            skips.append(x)
        for enlarge, block, skip in zip(self.enlarge, self.up, reversed(skips[:-1])):
            x = block(torch.cat((enlarge(x), skip), dim=1))
        return picture + self.last(x)


def build_unet_transpose(
    *, scales: tuple[int, ...], weights: object, channels: int = 64, levels: int = 4
) -> TransposeUNet:
    """Build a TransposeUNet; it starts from no pretrained weights."""
    return TransposeUNet(scales, channels=channels, levels=levels)
