"""Colour: decoded frames to RGB pixels and back. The matrix is ours; swscale resamples chroma and changes layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ImageError
from . import ffmpeg

# ITU-T H.273, table 4: matrix coefficients -> the weights of red and blue in luma.
MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114)}
MATRICES |= {7: (0.212, 0.087), 9: (0.2627, 0.0593)}
BT709, UNSPECIFIED, RESERVED, BT601 = 1, 2, 3, 6
LIMITED, FULL = 1, 2
BAND = 64  # rows converted at once, so that float32 copies of a frame stay small
# libswscale's SWS_BICUBIC, FULL_CHR_H_INT, FULL_CHR_H_INP, ACCURATE_RND and BITEXACT; PyAV names all from 18 on.
RESAMPLING = 0x4 | 0x2000 | 0x4000 | 0x40000 | 0x80000


@dataclass(frozen=True)
class Colour:
    """What code values mean. matrix, primaries, transfer: code points of H.273; bits: 8 or 10."""

    matrix: int
    full_range: bool
    primaries: int
    transfer: int
    bits: int


def read_colour(frame: Any, *, name: str) -> Colour:
    """Give a frame's colour: as tagged, else the usual guess by height; RGB becomes BT.709, more than 8 bits 10.

    name: of the frame, for messages. Raises: ImageError if it has alpha or a matrix that is not supported.
    """
    if any(component.is_alpha for component in frame.format.components):
        raise ImageError(f"{name}: video with alpha ({frame.format.name}) is not supported; flatten it first")
    matrix = frame.colorspace
    if frame.format.is_rgb:
        matrix = BT709
    elif matrix in (0, UNSPECIFIED, RESERVED):  # 0 would be RGB
        matrix = BT709 if frame.height >= 720 else BT601
    if matrix not in MATRICES:
        raise ImageError(f"{name}: its YUV matrix (H.273 number {matrix}) is not supported")
    full_range = frame.color_range == FULL or frame.format.name.startswith("yuvj")
    bits = 10 if max(component.bits for component in frame.format.components) > 8 else 8
    return Colour(matrix, full_range and not frame.format.is_rgb, frame.color_primaries, frame.color_trc, bits)


def to_rgb(frame: Any, colour: Colour, reformatter: Any) -> np.ndarray:
    """Turn a decoded frame into (H, W, 3) RGB: uint8, or uint16 over its whole range for more than 8 bits.

    swscale's own matrix would be off by a code value in full range and in 16 bits.
    """
    deep = colour.bits > 8
    if frame.format.is_rgb:
        return np.asarray(reformatter.reformat(frame, format="rgb48le" if deep else "rgb24").to_ndarray())
    planes = _resample(frame, _full_chroma(colour), reformatter)
    top = 65535 if deep else 255
    weights, offsets = _weights(colour)
    inverse = np.linalg.inv(weights) * top
    return _transform(np.stack(plane_views(planes), axis=-1), inverse, -inverse @ offsets, top=top)


def to_yuv(pixels: np.ndarray, colour: Colour, pixel_format: str, reformatter: Any) -> Any:
    """Turn (H, W, 3) uint8 or uint16 RGB into a frame of a YUV format of the colour's depth."""
    weights, offsets = _weights(colour)
    codes = _transform(pixels, weights / np.iinfo(pixels.dtype).max, offsets, top=2**colour.bits - 1)
    frame = ffmpeg.load().VideoFrame(pixels.shape[1], pixels.shape[0], _full_chroma(colour))
    for channel, view in enumerate(plane_views(frame)):
        view[:] = codes[:, :, channel]
    if frame.format.name != pixel_format:
        frame = _resample(frame, pixel_format, reformatter)
    frame.colorspace, frame.color_range = colour.matrix, FULL if colour.full_range else LIMITED
    return frame


def plane_views(frame: Any) -> list[np.ndarray]:
    """Give the planes of a planar frame as (height, width) arrays that share its memory, without the rows' padding."""
    dtype = np.dtype(np.uint16 if frame.format.components[0].bits > 8 else np.uint8)
    return [
        np.frombuffer(plane, dtype).reshape(plane.height, plane.line_size // dtype.itemsize)[:, : plane.width]
        for plane in frame.planes
    ]


def _full_chroma(colour: Colour) -> str:
    return "yuv444p10le" if colour.bits > 8 else "yuv444p"


def _resample(frame: Any, pixel_format: str, reformatter: Any) -> Any:
    frame.color_range = FULL  # the same on both sides, so that swscale does not touch the values
    return reformatter.reformat(frame, format=pixel_format, interpolation=RESAMPLING, dst_color_range=FULL)


def _weights(colour: Colour) -> tuple[np.ndarray, np.ndarray]:
    """Give (3, 3) weights and (3,) offsets that take RGB in [0, 1] to code values of Y, Cb, Cr (H.273, 8.3)."""
    red, blue = MATRICES[colour.matrix]
    luma = np.array([red, 1 - red - blue, blue])
    differences = [(np.eye(3)[2] - luma) / (2 - 2 * blue), (np.eye(3)[0] - luma) / (2 - 2 * red)]
    middle, step = 2 ** (colour.bits - 1), 2 ** (colour.bits - 8)
    gains = np.full(3, 2**colour.bits - 1) if colour.full_range else np.array([219, 224, 224]) * step
    offsets = np.array([0 if colour.full_range else 16 * step, middle, middle])
    return np.array([luma, *differences]) * gains[:, None], offsets


def _transform(pixels: np.ndarray, weights: np.ndarray, offsets: np.ndarray, *, top: int) -> np.ndarray:
    """Apply weights and offsets to (H, W, 3) pixels, round, and clip to [0, top]; the dtype stays."""
    weights, offsets = weights.T.astype(np.float32), offsets.astype(np.float32)
    result = np.empty(pixels.shape, pixels.dtype)
    for first in range(0, len(pixels), BAND):
        band = pixels[first : first + BAND].astype(np.float32) @ weights + offsets
        result[first : first + BAND] = np.clip(np.rint(band, out=band), 0, top, out=band)
    return result
