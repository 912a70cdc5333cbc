"""What networks share that work on the interpolated picture."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .network import Network

FACTORS = (1, 2, 4)


def enlarge(picture: Tensor, factor: int) -> Tensor:
    """Interpolate (N, C, h, w) to (N, C, h*factor, w*factor), bilinearly."""
    if factor == 1:
        return picture
    return F.interpolate(picture, scale_factor=float(factor), mode="bilinear", align_corners=False)


class InterpolatedNetwork(Network):
    """Base of networks that see the picture interpolated; one such network serves several scales.

    grid: multiple, in output pixels, of which heights and widths must be.
    own_factor: what the network itself enlarges by, after the interpolation.
    """

    def __init__(self, scales: tuple[int, ...], *, grid: int, own_factor: int = 1):
        super().__init__()
        known = [factor * own_factor for factor in FACTORS]
        if any(scale not in known for scale in scales):
            raise ValueError(f"scales are {', '.join(map(str, known))}, not {list(scales)}")
        self.scales = scales
        self.grid = grid
        self.own_factor = own_factor

    def stride(self, scale: int) -> int:
        """Give the grid in LR pixels."""
        return max(1, self.grid // scale)

    def interpolate(self, lr: Tensor, scale: int) -> Tensor:
        """Interpolate (N, 3, h, w) to the size at which the network works: output / own_factor.

        Raises: ValueError for a scale that interpolation by 1, 2 or 4 does not lead to.
        """
        factor, rest = divmod(scale, self.own_factor)
        if rest or factor not in FACTORS:
            raise ValueError(f"this network enlarges by {', '.join(map(str, self.scales))}, not {scale}")
        return enlarge(lr, factor)
