"""Batch norms in eval mode as plain weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval


def merged(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    """Merge a batch norm in eval mode into the convolution before it."""
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(conv, norm)


class Affine(nn.Module):
    """A batch norm in eval mode as one scale and shift for each channel."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        self.scale = nn.Parameter(scale.view(1, -1, 1, 1))
        self.shift = nn.Parameter((norm.bias.detach() - norm.running_mean * scale).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift
