"""Initialise convolutions: ICNR, so that one before PixelShuffle starts as nearest interpolation, and zero bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def icnr_(weight: Tensor, *, factor: int) -> Tensor:
    """Fill `weight` in place with Kaiming values so that all factor*factor sub-pixels of a channel are equal.

    weight: (C * factor**2, in, kh, kw), the convolution in front of nn.PixelShuffle(factor).
    Returns: weight.
    Source: Aitken et al., "Checkerboard artifact free sub-pixel convolution", arXiv 1707.02937.
    """
    kernel = torch.empty(weight.shape[0] // factor**2, *weight.shape[1:], dtype=weight.dtype)
    nn.init.kaiming_normal_(kernel)
    weight.copy_(kernel.repeat_interleave(factor**2, dim=0))
    return weight


@torch.no_grad()
def nearest_(weight: Tensor, *, factor: int) -> Tensor:
    """Fill `weight` in place so that PixelShuffle behind it repeats each input pixel factor*factor times.

    This is ICNR of the identity: growing a network by such a layer changes nothing but the size.
    weight: (C * factor**2, C, k, k) with odd k.
    Returns: weight.
    """
    kernel = nn.init.dirac_(torch.empty(weight.shape[0] // factor**2, *weight.shape[1:], dtype=weight.dtype))
    weight.copy_(kernel.repeat_interleave(factor**2, dim=0))
    return weight


def zero_bias_(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Set the bias of a convolution that has one to zero."""
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
