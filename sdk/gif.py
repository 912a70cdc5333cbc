"""Animated GIF: take a file apart into still pictures, and write one frame by frame.

https://www.w3.org/Graphics/GIF/spec-gif89a.txt; Pillow decodes and encodes the pictures.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from . import pixels
from .composing import CLEAR, KEEP, Part, changed

EXTENSION, CONTROL, PICTURE, END = b"!", b"\xf9", b",", b";"
TABLE, INTERLACED, SIZE = 0x80, 0x40, 0x07  # bits of the flags
MAX_DELAY = 65535


@dataclass(frozen=True)
class Control:
    """What stands before a picture: how it is disposed of, how long it stays, which colour is transparent."""

    disposal: int = KEEP
    milliseconds: float = 0.0
    transparent: bytes | None = None


def read_parts(stream: BinaryIO) -> Iterator[Part]:
    """Take a GIF apart, one picture after the other.

    Raises: ValueError if it ends too early or is no GIF.
    """
    stream.seek(0)
    head = _take(stream, 13)
    table = _read_table(stream, head[10])
    control: Control | None = None
    while True:
        kind = stream.read(1)
        if kind == b"" and control:
            raise ValueError("the file ends before a frame that was announced")
        if kind in (END, b""):  # some files lack the end
            return
        if kind == EXTENSION:
            label, data = _take(stream, 1), b"".join(_blocks(stream))
            if label == CONTROL and len(data) >= 4:
                flags, delay = struct.unpack_from("<BH", data)
                control = Control(flags >> 2 & 7 or KEEP, delay * 10.0, data[3:4] if flags & 1 else None)
        elif kind == PICTURE:
            left, top, width, height, flags = struct.unpack("<HHHHB", _take(stream, 9))
            local = _read_table(stream, flags)
            code = _take(stream, 1)
            data = b"".join(bytes((len(block),)) + block for block in _blocks(stream))
            flags = (flags & (TABLE | SIZE) if local else head[10] & (TABLE | SIZE)) | flags & INTERLACED
            control = control or Control()
            yield Part(
                data=b"GIF89a"
                + struct.pack("<HHBBB", width, height, flags & ~INTERLACED, 0, 0)
                + (local or table)
                + (b"" if control.transparent is None else b"!\xf9\x04\x01\0\0" + control.transparent + b"\0")
                + PICTURE
                + struct.pack("<HHHHB", 0, 0, width, height, flags & INTERLACED)
                + code
                + data
                + b"\0"
                + END,
                size=(width, height),
                left=left,
                top=top,
                over=True,
                disposal=control.disposal,
                milliseconds=control.milliseconds,
            )
            control = None
        # Anything else is skipped, as browsers and Pillow do: stray ends of blocks are common.


def _take(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ValueError("the file ends inside a frame")
    return data


def _read_table(stream: BinaryIO, flags: int) -> bytes:
    return _take(stream, 3 << (flags & SIZE) + 1) if flags & TABLE else b""


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    while size := _take(stream, 1)[0]:
        yield _take(stream, size)


def write(stream: BinaryIO, frames: Iterator[tuple[np.ndarray, float]], *, plays: int) -> None:
    """Write what changes from frame to frame; where something vanishes, all is cleared before the next.

    frames: ((H, W, 4) uint8 RGBA, milliseconds). plays: 0 is for ever. Times are rounded to 10 ms, without drift.
    """
    from PIL import GifImagePlugin

    canvas: np.ndarray | None = None  # what is seen before a frame is drawn, None for nothing
    elapsed = written = 0.0
    following = next(frames, None)
    first = True
    while following is not None:
        frame, milliseconds = following
        following = next(frames, None)
        image = _visible_or_not(frame)
        vanishes = following is not None and bool((image > _visible_or_not(following[0]))[:, :, 3].any())
        top, bottom, left, right = changed(None if vanishes else canvas, image)
        picture, transparent = pixels.to_palette(image[top:bottom, left:right])
        if first:
            info = {"duration": 1, "loop": None if plays == 1 else min(max(plays - 1, 0), MAX_DELAY)}
            stream.write(b"".join(GifImagePlugin.getheader(picture.copy(), info=info)[0]))
            first = False
        elapsed += milliseconds / 10
        delay = min(max(round(elapsed - written), 0), MAX_DELAY)
        written += delay
        options: dict[str, Any] = {} if transparent is None else {"transparency": transparent}
        options |= {"duration": 10 * delay, "disposal": CLEAR if vanishes else KEEP, "include_color_table": True}
        stream.write(b"".join(GifImagePlugin.getdata(picture, (left, top), **options)))
        canvas = None if vanishes else image
    stream.write(END)


def _visible_or_not(image: np.ndarray) -> np.ndarray:
    """Make every pixel opaque, or transparent and black."""
    visible = image[:, :, 3:] >= pixels.OPAQUE_FROM
    opaque = np.concatenate((image[:, :, :3], np.full_like(visible, 255, np.uint8)), axis=2)
    return np.where(visible, opaque, np.uint8(0))
