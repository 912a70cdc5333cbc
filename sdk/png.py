"""PNG chunks: what Pillow's encoder lacks, 16-bit colour and animations written frame by frame."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from . import opening
from .composing import CLEAR, KEEP, RESTORE, Part, changed
from .opening import Metadata

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey + alpha, RGB, RGBA
BAND_BYTES = 1 << 22  # encoded at once
UP = 2  # the filter that stores the difference from the row above
DISPOSALS = (KEEP, CLEAR, RESTORE)
MAX_DELAY = 65535


def write_chunk(stream: BinaryIO, kind: bytes, data: bytes) -> None:
    """Write one chunk: length, kind, data, CRC."""
    stream.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def read_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Give (kind, data) of each chunk of a PNG.

    Raises: ValueError if the file ends too early, or a chunk does not agree with its CRC.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(len(SIGNATURE))
    while head := stream.read(8):
        length = int.from_bytes(head[:4], "big")
        if len(head) < 8 or length > size - stream.tell() - 4:  # not asked of read(), which would take the memory
            raise ValueError("the file ends inside a frame")
        data, check = stream.read(length), stream.read(4)
        if zlib.crc32(head[4:] + data) != int.from_bytes(check, "big"):
            raise ValueError(f"wrong CRC in {head[4:]!r}")
        yield head[4:], data


def find_exif(path: Path) -> bytes | None:
    """Read EXIF wherever it stands in a PNG; it is not checked, and nothing is decoded, as Pillow would for it."""
    with opening.open_source(path) as stream:
        stream.seek(len(SIGNATURE))
        while len(head := stream.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return b"Exif\0\0" + stream.read(length)
            stream.seek(length + 4, os.SEEK_CUR)
    return None


def read_times(stream: BinaryIO) -> list[float]:
    """Give the milliseconds of each frame of an APNG, however many its header tells; decodes and checks nothing."""
    times = []
    stream.seek(len(SIGNATURE))
    while len(head := stream.read(8)) == 8:
        following = stream.tell() + int.from_bytes(head[:4], "big") + 4
        if head[4:] == b"fcTL" and len(control := stream.read(26)) == 26:
            times.append(_milliseconds(*struct.unpack_from(">HH", control, 20)))
        stream.seek(following)
    return times


def _milliseconds(delay: int, divisor: int) -> float:
    return 1000 * delay / (divisor or 100)


def read_parts(stream: BinaryIO) -> Iterator[Part]:
    """Take an APNG apart, one frame after the other, without a still picture that stands before the animation.

    https://www.w3.org/TR/png-3/#apng-frame-based-animation
    Raises: ValueError or struct.error if it is damaged, also if its chunks are not in their order.
    """
    sequence = 0
    header, palette = b"", []
    control: tuple[int, ...] | None = None
    data = bytearray()
    for kind, content in read_chunks(stream):
        if kind == b"IHDR":
            header = content
        if kind in (b"fcTL", b"fdAT"):
            if content[:4] != struct.pack(">I", sequence):
                raise ValueError("chunks of frames are missing, double or in another order")
            sequence += 1
        if kind in (b"PLTE", b"tRNS"):
            palette.append((kind, content))
        elif kind in (b"fcTL", b"IEND"):
            if control:
                yield _part(header, palette, control, bytes(data))
            data.clear()
            control = struct.unpack(">IIIIIHHBB", content) if kind == b"fcTL" else None
        elif control and kind in (b"IDAT", b"fdAT"):
            data += content if kind == b"IDAT" else content[4:]


def _part(header: bytes, palette: list[tuple[bytes, bytes]], control: tuple[int, ...], data: bytes) -> Part:
    _, width, height, left, top, delay, divisor, disposal, blend = control
    stream = io.BytesIO()
    stream.write(SIGNATURE)
    write_chunk(stream, b"IHDR", struct.pack(">II", width, height) + header[8:])
    for kind, content in palette:
        write_chunk(stream, kind, content)
    write_chunk(stream, b"IDAT", data)
    write_chunk(stream, b"IEND", b"")
    return Part(
        data=stream.getvalue(),
        size=(width, height),
        left=left,
        top=top,
        over=blend == 1,
        disposal=DISPOSALS[disposal],
        milliseconds=_milliseconds(delay, divisor),
    )


def write_animation(
    stream: BinaryIO, frames: Iterator[tuple[np.ndarray, float]], *, count: int, plays: int, metadata: Metadata
) -> None:
    """Write the changed part of each frame.

    frames: `count` of ((H, W, 4) uint8 RGBA, milliseconds). plays: 0 is for ever.
    """
    canvas: np.ndarray | None = None
    sequence = 0
    for image, milliseconds in frames:
        top, bottom, left, right = changed(canvas, image)
        encoded = io.BytesIO()
        kept = {"icc_profile": metadata.icc_profile, "exif": metadata.exif} if canvas is None else {}
        options = {key: value for key, value in kept.items() if value}
        Image.fromarray(image[top:bottom, left:right]).save(encoded, "PNG", **options)
        chunks = list(read_chunks(encoded))
        if canvas is None:
            stream.write(SIGNATURE)
            for kind, data in chunks:
                if kind not in (b"IDAT", b"IEND"):
                    write_chunk(stream, kind, data)
            write_chunk(stream, b"acTL", struct.pack(">II", count, plays))
        delay = Fraction(milliseconds / 1000).limit_denominator(MAX_DELAY)
        if delay.numerator > MAX_DELAY:
            delay = Fraction(min(round(delay), MAX_DELAY))
        place = (right - left, bottom - top, left, top, delay.numerator, delay.denominator, 0, 0)  # keep; no blending
        write_chunk(stream, b"fcTL", struct.pack(">IIIIIHHBB", sequence, *place))
        sequence += 1
        for data in (data for kind, data in chunks if kind == b"IDAT"):
            if canvas is None:
                write_chunk(stream, b"IDAT", data)
            else:
                write_chunk(stream, b"fdAT", struct.pack(">I", sequence) + data)
                sequence += 1
        canvas = image
    write_chunk(stream, b"IEND", b"")


def write_deep(stream: BinaryIO, image: np.ndarray, metadata: Metadata) -> None:
    """Write a picture in 16 bits: (H, W, C) uint16 with 1 to 4 channels.

    https://www.w3.org/TR/png-3/
    """
    height, width, channels = image.shape
    write_head(stream, image.shape, image.dtype, metadata)
    encoder = zlib.compressobj()
    above = np.zeros(width * channels * 2, np.uint8)
    rows = max(1, BAND_BYTES // above.size)
    for top in range(0, height, rows):
        band = image[top : top + rows].astype(">u2", order="C").view(np.uint8).reshape(-1, above.size)
        filtered = np.empty((len(band), 1 + above.size), np.uint8)
        filtered[:, 0] = UP
        filtered[0, 1:] = band[0] - above
        filtered[1:, 1:] = band[1:] - band[:-1]
        above = band[-1]
        if data := encoder.compress(filtered.tobytes()):
            write_chunk(stream, b"IDAT", data)
    write_chunk(stream, b"IDAT", encoder.flush())
    write_chunk(stream, b"IEND", b"")


def write_stored(stream: BinaryIO, bands: Iterable[np.ndarray], shape: tuple[int, int, int], dtype: np.dtype) -> None:
    """Write a picture of (H, W, C) uint8 or uint16 uncompressed, as its bands of rows come."""
    write_head(stream, shape, dtype, Metadata())
    stored = zlib.compressobj(0)
    rows = max(1, BAND_BYTES // (shape[1] * shape[2] * dtype.itemsize))
    for band in bands:
        for top in range(0, len(band), rows):
            part = band[top : top + rows].astype(dtype.newbyteorder(">"), order="C")
            lines = np.zeros((len(part), 1 + part[0].nbytes), np.uint8)  # 0: no filter
            lines[:, 1:] = part.view(np.uint8).reshape(len(part), -1)
            write_chunk(stream, b"IDAT", stored.compress(lines.data))
    write_chunk(stream, b"IDAT", stored.flush())
    write_chunk(stream, b"IEND", b"")


def write_head(stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, metadata: Metadata) -> None:
    """Write all that stands before the pixels of a picture of (H, W, C) uint8 or uint16."""
    height, width, channels = shape
    stream.write(SIGNATURE)
    kinds = (8 * dtype.itemsize, COLOUR_TYPES[channels], 0, 0, 0)
    write_chunk(stream, b"IHDR", struct.pack(">IIBBBBB", width, height, *kinds))
    if metadata.icc_profile:
        write_chunk(stream, b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata.icc_profile))
    if metadata.exif:
        write_chunk(stream, b"eXIf", metadata.exif.removeprefix(b"Exif\0\0"))
