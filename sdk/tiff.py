"""Write TIFF of any depth, compressed and with the tables of EXIF; Pillow can do one of these at a time.

Pillow encodes the directory; the pixels are tiles, deflated, as TIFF 6.0 and its technical notes specify them.
"""

from __future__ import annotations

import errno
import struct
import zlib
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .opening import Metadata

TILE = 256
MAX_BYTES = (1 << 32) - 1
SUB_TABLES = (0x8769, 0x8825, 0xA005)  # of EXIF: exposure, GPS, interoperability
ICC_PROFILE, UNDEFINED, LONG = 34675, 7, 4
DEFLATE, HORIZONTAL, UNASSOCIATED_ALPHA, FLOAT = 8, 2, 2, 3


def write(stream: BinaryIO, image: np.ndarray, metadata: Metadata) -> None:
    """Write one picture.

    stream: seekable, at its beginning. image: (H, W, C) uint8, uint16 or float32 with 1 to 4 channels.
    Raises: OSError if the file would be larger than TIFF can be.
    """
    from PIL import TiffImagePlugin  # some milliseconds

    height, width, channels = image.shape
    whole = np.issubdtype(image.dtype, np.integer)
    stream.write(b"II*\0" + bytes(4))
    offsets, lengths = [], []
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            data = _encode(image[top : top + TILE, left : left + TILE], difference=whole)
            offsets.append(stream.tell())
            lengths.append(len(data))
            if offsets[-1] + len(data) > MAX_BYTES:
                raise OSError(errno.EFBIG, "TIFF holds at most 4 GiB; write PNG")
            stream.write(data)
    tags: dict[int, Any] = {
        256: width,
        257: height,
        258: (8 * image.dtype.itemsize,) * channels,
        259: DEFLATE,
        262: 2 if channels >= 3 else 1,  # photometric: RGB, or black is zero
        277: channels,
        284: 1,  # planes: interleaved
        322: TILE,
        323: TILE,
        324: tuple(offsets),
        325: tuple(lengths),
    }
    if whole:
        tags[317] = HORIZONTAL
    else:
        tags[339] = (FLOAT,) * channels
    if channels in (2, 4):
        tags[338] = UNASSOCIATED_ALPHA
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    if metadata.exif:
        exif = Image.Exif()
        exif.load(metadata.exif)
        for tag in exif:
            if tag in SUB_TABLES:
                directory[tag] = exif.get_ifd(tag)
                directory.tagtype[tag] = LONG
            else:
                directory[tag] = exif[tag]
    for tag, value in tags.items():
        directory[tag] = value
    if metadata.icc_profile:
        directory[ICC_PROFILE] = metadata.icc_profile
        directory.tagtype[ICC_PROFILE] = UNDEFINED
    directory.tagtype[324] = directory.tagtype[325] = LONG
    start = stream.tell() + stream.tell() % 2  # a directory begins at an even place
    stream.seek(start)
    stream.write(directory.tobytes(start))
    stream.seek(4)
    stream.write(struct.pack("<I", start))


def _encode(tile: np.ndarray, *, difference: bool) -> bytes:
    """Fill a tile up to its full size with its last row and column, and deflate it, as differences along rows."""
    tile = np.pad(tile, ((0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0)), "edge")
    if difference:
        tile = np.concatenate((tile[:, :1], tile[:, 1:] - tile[:, :-1]), axis=1)
    return zlib.compress(tile.astype(tile.dtype.newbyteorder("<"), copy=False).tobytes())
