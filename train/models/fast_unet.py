"""The fast tier: a conv-only three-level U-Net whose trunk works at a fraction of the output size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .icnr import icnr_, zero_bias_
from .interpolated import enlarge
from .network import Network


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to their input; no normalisation."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(self.conv1.weight)
        zero_bias_(self.conv1)
        # A tenth of He's scale keeps a deep stack near the identity at the start, in place of a norm.
        nn.init.kaiming_normal_(self.conv2.weight)
        self.conv2.weight.data.mul_(0.1)
        zero_bias_(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Up(nn.Module):
    """1x1 convolution and PixelShuffle: (N, 2c, h, w) -> (N, c, 2h, 2w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * 2, 1)
        self.shuffle = nn.PixelShuffle(2)
        icnr_(self.conv.weight, factor=2)
        zero_bias_(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x))


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(count)))


class FastUNet(Network):
    """Enlarge by 1, 2 or 4 with a residual U-Net over PixelUnshuffle(cell/scale) of the input.

    channels: width of the first level; the next two have twice and four times as many.
    blocks: residual blocks at each level (on both sides for the first two).
    cell: a pixel of the trunk covers cell x cell pixels of the output; half of it costs four times as much.
    Input: (N, 3, h, w) float RGB in [0, 1], h and w multiples of `stride`.
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped.
    Source: SEEDS, system H.
    """

    def __init__(self, scale: int = 2, *, channels: int = 32, blocks: tuple[int, int, int] = (2, 2, 2), cell: int = 4):
        super().__init__()
        if scale not in (1, 2, 4):
            raise ValueError(f"FastUNet enlarges by 1, 2 or 4, not {scale}")
        if cell < scale or cell % scale:
            raise ValueError(f"a cell is a multiple of the scale, {scale}, not {cell}")
        self.scales, self.cell = (scale,), cell
        unshuffle = cell // scale
        c = channels
        # PixelUnshuffle(r) and a 3x3 convolution, written as one convolution of 3r x 3r with stride r:
        # the same function and parameters, and one node in the deployed graph.
        self.head = nn.Conv2d(3, c, 3 * unshuffle, stride=unshuffle, padding=unshuffle)
        self.encoder1 = _blocks(c, blocks[0])
        self.down1 = nn.Conv2d(c, c * 2, 2, stride=2)
        self.encoder2 = _blocks(c * 2, blocks[1])
        self.down2 = nn.Conv2d(c * 2, c * 4, 2, stride=2)
        self.bottom = _blocks(c * 4, blocks[2])
        self.up2 = Up(c * 4)
        self.decoder2 = _blocks(c * 2, blocks[1])
        self.up1 = Up(c * 2)
        self.decoder1 = _blocks(c, blocks[0])
        self.tail = nn.Conv2d(c, 3 * cell**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(cell)
        for conv in (self.head, self.down1, self.down2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            zero_bias_(conv)
        nn.init.zeros_(self.tail.weight)  # training starts from plain interpolation
        zero_bias_(self.tail)

    def stride(self, scale: int) -> int:
        """Give the grid, in LR pixels: three levels, so two halvings below the trunk."""
        return 4 * self.cell // scale

    def hidden_weights(self) -> list[Tensor]:
        """Every convolution but the ones that meet pixels."""
        ends = (self.head, self.tail)
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d) and m not in ends]
        return [convolution.weight for convolution in convolutions]

    @torch.no_grad()
    def grow(self, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """See Network.grow: for fewer channels or blocks, and another scale.

        The smaller one's channels are the first ones, and read no others. Of another scale and the same cell it
        computes what that one made of the picture enlarged by repetition, or reduced by means; of another scale and
        the cell that goes with it, the detail that that one adds to an interpolation, enlarged or reduced alike.
        """
        own = {key: value.clone() for key, value in self.state_dict().items()}
        ends = ("head.weight", "tail.weight")
        if any(key not in weights or weights[key].ndim != own[key].ndim for key in ends):
            return None
        keeps_input = weights["head.weight"].shape[2:] == own["head.weight"].shape[2:]
        for key, value in own.items():
            old = weights.get(key)
            if old is not None and key == "head.weight":
                old = _resample(old, value.shape[-1])
            if old is not None and key.startswith("tail.") and len(old) != len(value):  # of another cell
                old = _resample_cell(old, self.cell) if keeps_input else None
                if old is None:
                    return None
            if old is None:
                if ".conv2." not in key:
                    continue  # of a new block, which adds nothing yet
                value.zero_()
            elif old.ndim != value.ndim or any(small > large for small, large in zip(old.shape, value.shape)):
                return None
            else:
                value[: len(old)] = 0
                value[tuple(slice(size) for size in old.shape)] = old
        return own if weights.keys() <= own.keys() else None

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        if scale not in self.scales:
            raise ValueError(f"this network enlarges by {self.scales[0]}, not {scale}")
        level1 = self.encoder1(self.head(lr))  # (N, c, H/cell, W/cell) of the output size H x W
        level2 = self.encoder2(self.down1(level1))
        level3 = self.bottom(self.down2(level2))
        level2 = self.decoder2(self.up2(level3) + level2)
        level1 = self.decoder1(self.up1(level2) + level1)
        detail = self.shuffle(self.tail(level1))
        return enlarge(lr, scale) + detail


def _resample(kernel: Tensor, size: int) -> Tensor | None:
    """Turn the head's kernel for one size of input pixels into that for another; None if neither divides the other.

    kernel: (c, 3, k, k), k = 3 * unshuffle. Returns: (c, 3, size, size).
    """
    old = kernel.shape[-1]
    if old % size == 0:
        return F.avg_pool2d(kernel, old // size) * (old // size) ** 2
    if size % old == 0:
        factor = size // old
        return kernel.repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor**2
    return None


def _resample_cell(rows: Tensor, cell: int) -> Tensor | None:
    """Turn the tail's weight or bias for one cell into that for another; None if neither divides the other.

    rows: (3 * old**2, ...), in the order of PixelShuffle. Returns: (3 * cell**2, ...).
    """
    old = math.isqrt(len(rows) // 3)
    if len(rows) != 3 * old**2:
        return None
    grid = rows.reshape(3, old, old, -1)
    if cell % old == 0:
        grid = grid.repeat_interleave(cell // old, 1).repeat_interleave(cell // old, 2)
    elif old % cell == 0:
        grid = grid.reshape(3, cell, old // cell, cell, old // cell, -1).mean((2, 4))
    else:
        return None
    return grid.reshape(-1, *rows.shape[1:])


def build_fast_unet(
    *,
    scales: tuple[int, ...],
    weights: object,
    channels: int = 32,
    blocks: tuple[int, int, int] = (2, 2, 2),
    cell: int = 4,
) -> FastUNet:
    """Build a FastUNet; it serves one scale and starts from no pretrained weights."""
    if len(scales) != 1:
        raise ValueError(f"one scale for each network, got {list(scales)}")
    return FastUNet(scales[0], channels=channels, blocks=blocks, cell=cell)
