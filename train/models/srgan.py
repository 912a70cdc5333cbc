"""The generator of SRGAN, alone known as SRResNet (SEEDS D)."""

from __future__ import annotations

from torch import Tensor, nn

from .folding import merged
from .icnr import icnr_, zero_bias_
from .network import Network


def _norm_convolution(channels: int) -> nn.Sequential:
    """3x3 convolution and batch norm, whose shift takes the place of a bias."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


class NormBlock(nn.Module):
    """3x3, BN, PReLU, 3x3, BN, added to its input; no activation behind the sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.first: nn.Module = _norm_convolution(channels)
        self.activation = nn.PReLU()
        self.second: nn.Module = _norm_convolution(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.activation(self.first(x)))


class ShuffleUp(nn.Module):
    """3x3 convolution to four times the channels, PixelShuffle(2), PReLU: (N, C, h, w) -> (N, C, 2h, 2w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * 4, 3, padding=1)
        icnr_(self.conv.weight, factor=2)
        zero_bias_(self.conv)
        self.shuffle = nn.PixelShuffle(2)
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shuffle(self.conv(x)))


class SRGANGenerator(Network):
    """Enlarge by 2 or 4 with residual blocks at the input's size; 1,547,350 parameters for x4.

    Input: (N, 3, h, w) float RGB in [0, 1], any size.
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped.
    Source: Ledig et al., arXiv 1609.04802; SEEDS, system D.
    """

    def __init__(self, scale: int = 4, *, channels: int = 64, blocks: int = 16):
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"the SRGAN generator enlarges by 2 or 4, not {scale}")
        self.scales = (scale,)
        self.head = nn.Conv2d(3, channels, 9, padding=4)
        self.activation = nn.PReLU()
        self.blocks = nn.ModuleList(NormBlock(channels) for _ in range(blocks))
        self.trunk_end: nn.Module = _norm_convolution(channels)
        self.enlarge = nn.Sequential(*(ShuffleUp(channels) for _ in range(scale // 2)))
        self.tail = nn.Conv2d(channels, 3, 9, padding=4)

    def stride(self, scale: int) -> int:
        """Give the grid in LR pixels: any size."""
        return 1

    def fold(self) -> None:
        """Merge every batch norm into the convolution before it, in place."""
        super().fold()
        self.trunk_end = _folded(self.trunk_end)
        for block in self.blocks:
            assert isinstance(block, NormBlock)
            block.first, block.second = _folded(block.first), _folded(block.second)

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        if scale not in self.scales:
            raise ValueError(f"this network enlarges by {self.scales[0]}, not {scale}")
        first = self.activation(self.head(lr))
        x = first
        for block in self.blocks:
            x = block(x)
        return self.tail(self.enlarge(first + self.trunk_end(x)))


def _folded(pair: nn.Module) -> nn.Conv2d:
    assert isinstance(pair, nn.Sequential)
    return merged(pair[0], pair[1])


def build_srgan(*, scales: tuple[int, ...], weights: object, channels: int = 64, blocks: int = 16) -> SRGANGenerator:
    """Build the generator; it serves one scale and starts from no pretrained weights."""
    if len(scales) != 1:
        raise ValueError(f"one scale for each network, got {list(scales)}")
    return SRGANGenerator(scales[0], channels=channels, blocks=blocks)
