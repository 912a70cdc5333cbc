"""What saving as JPEG does to pictures, on a device and for a whole batch.

As Pillow's libjpeg does it: baseline, the standard's quantisation tables, chroma halved on both sides (4:2:0) and
enlarged again with "fancy upsampling". libjpeg computes in integers; float64 holds them exactly, and gives the same
pixels. Source: ITU-T T.81, and libjpeg-turbo's jccolor.c, jcsample.c, jfdctint.c, jcdctmgr.c, jidctint.c, jdsample.c.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# RGB -> Y, Cb, Cr, of 65536.
TO_YCC = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
# libjpeg's accurate cosine transform ("islow"), a wave in each row, times sqrt(8) * 2^13; its inverse is the transpose.
# The entries are sums of rounded constants: some are 1 off what they would be if they were rounded themselves.
DCT = (
    (8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363),
    (10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703),
    (9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633),
    (8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437),
    (4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433),
    (2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260),
)


def compress(pixels: Tensor, sizes: Sequence[tuple[int, int]], qualities: Sequence[int]) -> Tensor:
    """Save and read pictures of several sizes.

    pixels: (N, 3, H, W) float64 RGB, whole code values; only (height, width) of `sizes` at the top left count.
    qualities: from 0 to 100, as Pillow takes them.
    Returns: the same shape; what lies beyond a picture's size means nothing.
    """
    height, width = pixels.shape[2:]
    bounds = torch.tensor(sizes, device=pixels.device)
    # Blocks of 16 are filled with the last row and column.
    y, cb, cr = _to_ycc(_repeated(pixels, bounds, -(-height // 16) * 16, -(-width // 16) * 16)).split(1, dim=1)
    factors = torch.tensor([_table_factor(quality) for quality in qualities], device=pixels.device)
    y = _quantised(y, LUMA_TABLE, factors)
    chroma = _halved(torch.cat((cb, cr), dim=1))
    # libjpeg fills up on the right before it halves, at the bottom after.
    filled = torch.stack(((bounds[:, 0] + 1) // 2, torch.full_like(bounds[:, 1], chroma.shape[3])), dim=1)
    chroma = _quantised(_repeated(chroma, filled, *chroma.shape[2:]), CHROMA_TABLE, factors)
    return _to_rgb(torch.cat((y, _doubled(chroma, (bounds + 1) // 2)), dim=1))[:, :, :height, :width]


def _repeated(pixels: Tensor, bounds: Tensor, height: int, width: int, *, first: int = 0) -> Tensor:
    """Cut or fill pictures to (height, width) from row and column `first` on, each with its own last pixels.

    bounds: (N, 2), the height and width of each.
    """
    rows, columns = (
        torch.arange(first, first + length, device=pixels.device).clamp(min=0).minimum(bound[:, None] - 1)
        for length, bound in zip((height, width), bounds.T)
    )
    place = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return pixels[place, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (N, h, w, C) -> (N, C, h, w)


def _to_ycc(rgb: Tensor) -> Tensor:
    weights = torch.tensor(TO_YCC, dtype=rgb.dtype, device=rgb.device)
    # libjpeg rounds halves of Y upwards, those of Cb and Cr downwards.
    offsets = torch.tensor((2**15, 2**23 + 2**15 - 1, 2**23 + 2**15 - 1), dtype=rgb.dtype, device=rgb.device)
    return torch.floor((torch.einsum("oc,nchw->nohw", weights, rgb) + offsets.view(3, 1, 1)) / 2**16)


def _to_rgb(ycc: Tensor) -> Tensor:
    y, cb, cr = (ycc - ycc.new_tensor((0, 128, 128)).view(3, 1, 1)).unbind(dim=1)
    red = y + torch.floor((91881 * cr + 2**15) / 2**16)
    green = y + torch.floor((-22554 * cb - 46802 * cr + 2**15) / 2**16)
    blue = y + torch.floor((116130 * cb + 2**15) / 2**16)
    return torch.stack((red, green, blue), dim=1).clamp(0, 255)


def _halved(chroma: Tensor) -> Tensor:
    """Average 2x2 pixels; halves are rounded downwards and upwards in turns."""
    count, channels, height, width = chroma.shape
    sums = chroma.reshape(count, channels, height // 2, 2, width // 2, 2).sum(dim=(3, 5))
    return torch.floor((sums + 1 + torch.arange(width // 2, device=chroma.device) % 2) / 4)


def _doubled(chroma: Tensor, bounds: Tensor) -> Tensor:
    """Enlarge by linear interpolation between pixel centres, rounded as libjpeg's fancy upsampling does."""
    count, channels, height, width = chroma.shape
    around = _repeated(chroma, bounds, height + 2, width + 2, first=-1)
    near = 3 * around[:, :, 1:-1]
    rows = torch.stack((near + around[:, :, :-2], near + around[:, :, 2:]), dim=3)
    rows = rows.reshape(count, channels, 2 * height, width + 2)
    near = 3 * rows[..., 1:-1]
    columns = torch.stack((near + rows[..., :-2] + 8, near + rows[..., 2:] + 7), dim=4)
    return torch.floor(columns.reshape(count, channels, 2 * height, 2 * width) / 16)


def _table_factor(quality: int) -> int:
    """Turn a quality into a factor of the tables, in per cent."""
    quality = min(max(quality, 1), 100)
    return 5000 // quality if quality < 50 else 200 - 2 * quality


def _quantised(planes: Tensor, table: Sequence[Sequence[int]], factors: Tensor) -> Tensor:
    """Round the cosine transform of each 8x8 block to multiples of the table times a picture's factor.

    planes: (N, C, H, W). factors: (N), in per cent. Returns: the same shape, whole code values.
    """
    count, channels, height, width = planes.shape
    steps = (torch.tensor(table, device=planes.device) * factors.view(-1, 1, 1) + 50) // 100
    steps = steps.clamp(1, 255).to(planes.dtype).view(count, 1, 1, 8, 1, 8)
    dct = torch.tensor(DCT, dtype=planes.dtype, device=planes.device)
    # (N, C, H, W) -> (N, C, H/8, 8, W/8, 8)
    blocks = (planes - 128).reshape(count, channels, height // 8, 8, width // 8, 8)
    waves = _scaled(torch.einsum("nchywx,vx->nchywv", blocks, dct), 11)
    waves = _scaled(torch.einsum("nchywv,uy->nchuwv", waves, dct), 15)  # eight times the transform
    waves = torch.sign(waves) * torch.floor((waves.abs() + 4 * steps) / (8 * steps)) * steps
    blocks = _scaled(torch.einsum("nchuwv,uy->nchywv", waves, dct), 11)
    blocks = _scaled(torch.einsum("nchywv,vx->nchywx", blocks, dct), 18)
    return (blocks.reshape(planes.shape) + 128).clamp(0, 255)


def _scaled(sums: Tensor, bits: int) -> Tensor:
    """Divide by 2^bits and round to whole numbers."""
    return torch.floor((sums + 2 ** (bits - 1)) / 2**bits)
