"""What degrade.py does with Pillow, on a device and for a whole batch: the same pixels, for the same draws.

Resizing and blurring are products with one matrix for the columns and one for the rows. Pillow computes both in
integers. Float64 holds those exactly, so that no result depends on the order of a sum, or on what else is in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .degrade import Damages, Round, SeededNoise
from .device_jpeg import compress

Box = tuple[float, float, float, float]  # left, top, right, bottom
# How far each filter reaches, in pixels of the smaller picture.
REACHES = {Image.Resampling.BOX: 0.5, Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0}
RESIZE_BITS, BLUR_BITS = 22, 24  # of Pillow's fixed-point weights
BLUR_PASSES = 3
LUMA = (19595, 38470, 7471)  # of 65536


@dataclass(frozen=True)
class Canvas:
    """Pictures of several sizes in one tensor.

    pixels: (N, 3, H, W) float64 RGB, whole code values from 0 to 255; what lies right of a picture and below is noise.
    sizes: (height, width) of each.
    """

    pixels: Tensor
    sizes: tuple[tuple[int, int], ...]


def apply_damages(canvas: Canvas, damages: Sequence[Damages]) -> Canvas:
    """Do to each picture what was drawn for it."""
    canvas = _with_holes(_with_texts(canvas, damages), damages)
    for rounds in zip(*(each.rounds for each in damages), strict=True):
        canvas = _after_round(canvas, rounds)
    return canvas


def _after_round(canvas: Canvas, rounds: Sequence[Round]) -> Canvas:
    canvas = blur(canvas, [each.blur_sigma or 0.0 for each in rounds])
    boxes = [(0.0, 0.0, float(width), float(height)) for height, width in canvas.sizes]
    canvas = resize(canvas, boxes, [each.size for each in rounds], [each.resampling for each in rounds])
    canvas = _noisy(canvas, [each.noise for each in rounds])
    if any(each.grey for each in rounds):
        luma = (canvas.pixels * _column(canvas, LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        luma = torch.floor((luma + 2**15) / 2**16)
        canvas = _where(canvas, [each.grey for each in rounds], luma.expand_as(canvas.pixels))
    qualities = [each.jpeg_quality for each in rounds]
    if any(quality is not None for quality in qualities):
        pixels = compress(canvas.pixels, canvas.sizes, [100 if quality is None else quality for quality in qualities])
        canvas = _where(canvas, [quality is not None for quality in qualities], pixels)
    return canvas


def _column(canvas: Canvas, values: Sequence[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Put one value for each picture on the device: (N, 1, 1)."""
    return torch.tensor(values, dtype=dtype, device=canvas.pixels.device).view(-1, 1, 1)


def _where(canvas: Canvas, chosen: Sequence[bool], pixels: Tensor) -> Canvas:
    """Take other pixels for the chosen pictures."""
    return replace(canvas, pixels=torch.where(_column(canvas, chosen, torch.bool)[..., None], pixels, canvas.pixels))


# Texts and holes


def _with_texts(canvas: Canvas, damages: Sequence[Damages]) -> Canvas:
    pixels = canvas.pixels
    for place in range(max(len(each.texts) for each in damages)):
        masks = np.zeros((len(damages), 1, *pixels.shape[2:]), np.uint8)
        colours = np.zeros((len(damages), 3, 1, 1))
        for index, each in enumerate(damages):
            if place < len(each.texts):
                height, width = canvas.sizes[index]
                masks[index, 0, :height, :width] = each.texts[place].mask
                colours[index, :, 0, 0] = each.texts[place].colour
        mask = torch.from_numpy(masks).to(pixels.device).double()
        mixed = pixels * (255 - mask) + torch.from_numpy(colours).to(pixels.device) * mask + 128
        pixels = torch.floor((torch.floor(mixed / 256) + mixed) / 256)  # Pillow's way to divide by 255
    return replace(canvas, pixels=pixels)


def _with_holes(canvas: Canvas, damages: Sequence[Damages]) -> Canvas:
    pixels = canvas.pixels
    y, x = (torch.arange(side, device=pixels.device) for side in pixels.shape[2:])
    for place in range(max(len(each.holes) for each in damages)):
        holes = [each.holes[place] if place < len(each.holes) else None for each in damages]
        # An absent one is empty: its last row lies above its first.
        ends = [(hole.top, hole.bottom, hole.left, hole.right) if hole else (0, -1, 0, -1) for hole in holes]
        top, bottom, left, right = torch.tensor(ends, device=pixels.device).T[..., None]  # each (N, 1)
        rows, columns = (y >= top) & (y <= bottom), (x >= left) & (x <= right)
        colours = _column(canvas, [hole.colour if hole else (0, 0, 0) for hole in holes]).view(-1, 3, 1, 1)
        pixels = torch.where((rows[:, :, None] & columns[:, None, :])[:, None], colours, pixels)
    return replace(canvas, pixels=pixels)


# Filters


def resize(
    canvas: Canvas, boxes: Sequence[Box], sizes: Sequence[tuple[int, int]], resampling: Sequence[Image.Resampling]
) -> Canvas:
    """Resize the part of each picture in its box to (height, width), as Image.resize does.

    Columns first, always. Pillow 13 begins with the rows where that is faster, and is then up to 1 code value apart.
    """
    height, width = (max(sides) for sides in zip(*sizes))
    across = [(box[0], box[2], old[1], new[1]) for box, old, new in zip(boxes, canvas.sizes, sizes)]
    down = [(box[1], box[3], old[0], new[0]) for box, old, new in zip(boxes, canvas.sizes, sizes)]
    reaches = _column(canvas, [REACHES[each] for each in resampling])
    columns = _resize_weights(_column(canvas, across).view(-1, 4), reaches, width, canvas.pixels.shape[3])
    rows = _resize_weights(_column(canvas, down).view(-1, 4), reaches, height, canvas.pixels.shape[2])
    pixels = _rounded(canvas.pixels @ columns.mT[:, None], RESIZE_BITS)
    return Canvas(_rounded(rows[:, None] @ pixels, RESIZE_BITS), tuple(sizes))


def _resize_weights(ends: Tensor, reaches: Tensor, rows: int, columns: int) -> Tensor:
    """Make the matrices that resize one side.

    ends: (N, 4), where a box begins and ends, the side and the new side. reaches: (N, 1, 1), a value of REACHES.
    Returns: (N, rows, columns), whole numbers; the weights of each new pixel add up to about 2^RESIZE_BITS.
    """
    first, last = ends[:, 0].float(), ends[:, 1].float()  # Pillow keeps them so
    start, length, old, new = (
        values.double().view(-1, 1, 1) for values in (first, last - first, ends[:, 2], ends[:, 3])
    )  # fmt: skip
    ratio = length / new
    stretch = ratio.clamp(min=1)  # a reduction's filter reaches further: antialiasing
    y = torch.arange(rows, dtype=torch.float64, device=ends.device).view(1, -1, 1)
    x = torch.arange(columns, dtype=torch.float64, device=ends.device).view(1, 1, -1)
    centre = start + (y + 0.5) * ratio
    low = torch.floor(centre - reaches * stretch + 0.5)
    high = torch.minimum(torch.floor(centre + reaches * stretch + 0.5), old)
    distance = (x - centre + 0.5) / stretch
    weights = torch.where((x >= low) & (x < high) & (y < new), _filter(distance, reaches), 0.0)
    weights = weights / weights.sum(dim=2, keepdim=True).where(y < new, 1.0)
    return torch.sign(weights) * torch.floor(weights.abs() * 2**RESIZE_BITS + 0.5)


def _filter(distance: Tensor, reaches: Tensor) -> Tensor:
    """Give the box, the triangle or the bicubic with a = -0.5, whichever has that reach."""
    x = distance.abs()
    box = ((distance > -0.5) & (distance <= 0.5)).double()
    triangle = (1 - x).clamp(min=0)
    bicubic = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5) * (x < 2)
    return torch.where(reaches < 1, box, torch.where(reaches < 2, triangle, bicubic))


def _rounded(sums: Tensor, bits: int) -> Tensor:
    """Turn sums of fixed-point products into code values."""
    return torch.floor((sums + 2 ** (bits - 1)) / 2**bits).clamp(0, 255)


def blur(canvas: Canvas, sigmas: Sequence[float]) -> Canvas:
    """Blur each picture as ImageFilter.GaussianBlur does: three times a box, along rows and then along columns."""
    if not any(sigmas):
        return canvas
    reaches = _column(canvas, [_box(sigma) for sigma in sigmas]).view(-1, 3)
    heights, widths = (_column(canvas, sides) for sides in zip(*canvas.sizes))
    columns, rows = (
        _blur_weights(reaches, sides, length) for sides, length in zip((widths, heights), canvas.pixels.shape[:1:-1])
    )
    pixels = canvas.pixels
    for _ in range(BLUR_PASSES):
        pixels = _rounded(pixels @ columns.mT[:, None], BLUR_BITS)
    for _ in range(BLUR_PASSES):
        pixels = _rounded(rows[:, None] @ pixels, BLUR_BITS)
    return replace(canvas, pixels=pixels)


def _box(sigma: float) -> tuple[int, int, int]:
    """Give the box whose repetition is a Gaussian: its whole radius, and the weights within it and one pixel beyond.

    Source: Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering" (2011);
    in float32, as in Pillow.
    """
    one, variance = np.float32(1), np.float32(sigma) * np.float32(sigma) / np.float32(BLUR_PASSES)
    length = np.float32(np.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(np.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + one) * (whole * (whole + one) - 3 * variance)
    part /= 6 * (variance - (whole + one) * (whole + one))
    inside = int(np.float32(2**BLUR_BITS) / ((whole + part) * 2 + one))
    return int(whole), inside, (2**BLUR_BITS - (2 * int(whole) + 1) * inside) // 2


def _blur_weights(boxes: Tensor, sides: Tensor, length: int) -> Tensor:
    """Make the matrices of a box blur along one side, beyond which a picture's last pixels are repeated.

    boxes: (N, 3), see _box. sides: (N, 1, 1). Returns: (N, length, length).
    """
    radius, inside, beyond = (values.view(-1, 1, 1) for values in boxes.T)
    place = torch.arange(length, dtype=torch.float64, device=boxes.device)
    distance = place.view(1, 1, -1) - place.view(1, -1, 1)  # (1, row, column)
    # All the weight up to a column, which at the last one is the whole; a column's own is the difference.
    upto = inside * (distance + radius + 1).minimum(2 * radius + 1).clamp(min=0)
    upto = upto + beyond * (distance >= -radius - 1) + beyond * (distance >= radius + 1)
    whole = (2 * radius + 1) * inside + 2 * beyond
    upto = torch.where(place.view(1, 1, -1) >= sides - 1, whole, upto)
    return upto.diff(dim=2, prepend=torch.zeros_like(upto[:, :, :1]))


# Noise


def _noisy(canvas: Canvas, noises: Sequence[np.ndarray | SeededNoise | None]) -> Canvas:
    """Add noise, drawn before or made here of a seed; the latter is the same on every device of one kind."""
    pixels = canvas.pixels.clone() if any(noise is not None for noise in noises) else canvas.pixels
    generator = torch.Generator(pixels.device)
    for picture, (height, width), noise in zip(pixels, canvas.sizes, noises, strict=True):
        if noise is None:
            continue
        part = picture[:, :height, :width]
        if isinstance(noise, SeededNoise):
            generator.manual_seed(noise.seed)
            field = noise.sigma * torch.randn(part.shape, generator=generator, device=part.device)
        else:
            field = torch.from_numpy(noise).to(part.device).permute(2, 0, 1)
        part.add_(field).round_().clamp_(0, 255)
    return replace(canvas, pixels=pixels)
