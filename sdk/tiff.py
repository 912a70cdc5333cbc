"""Write TIFF of any depth, compressed and with the tables of EXIF; Pillow can do one of these at a time.

Pillow encodes the directory; the pixels are tiles, deflated, as TIFF 6.0 and its technical notes specify them.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .opening import Metadata

TILE = 256
MAX_BYTES = (1 << 32) - 1
EXPOSURE, GPS, INTEROPERABILITY = SUB_TABLES = (0x8769, 0x8825, 0xA005)  # of EXIF; the last lies within the first
ICC_PROFILE, UNDEFINED, LONG, LONG8 = 34675, 7, 4, 16
INVENTED = {274, 282, 283, 296}  # orientation and resolution, which libvips writes whether they are known or not
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
    _put_metadata(directory, metadata)
    for tag, value in tags.items():
        directory[tag] = value
    directory.tagtype[324] = directory.tagtype[325] = LONG
    start = stream.tell() + stream.tell() % 2  # a directory begins at an even place
    stream.seek(start)
    stream.write(directory.tobytes(start))
    stream.seek(4)
    stream.write(struct.pack("<I", start))


def add_metadata(path: Path, metadata: Metadata) -> None:
    """Give a TIFF of one directory, as libvips wrote it, a new one at its end, with metadata that libvips lacks."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    with open(path, "r+b") as stream:
        head = _read_head(stream)
        big = len(head) == 16
        old, new = ImageFileDirectory_v2(head), ImageFileDirectory_v2(head)
        stream.seek(old.next)
        old.load(stream)
        _put_metadata(new, metadata)
        for tag in set(old) - INVENTED:
            new.tagtype[tag] = old.tagtype[tag]
            new[tag] = old[tag]
        start = stream.seek(0, os.SEEK_END)
        start = stream.seek(start + start % 2)
        data = new.tobytes(start)
        if big:  # Pillow writes the places of tables in 64 bits and calls them LONG
            for tag in SUB_TABLES:
                data = data.replace(struct.pack("<HHQ", tag, LONG, 1), struct.pack("<HHQ", tag, LONG8, 1))
        stream.write(data)
        stream.seek(8 if big else 4)
        stream.write(struct.pack("<Q" if big else "<I", start))


def read_exif(stream: BinaryIO) -> Image.Exif:
    """Read the tags of a TIFF or BigTIFF as EXIF, whether Pillow knows its layout or not."""
    head = _read_head(stream)
    exif = Image.Exif()
    exif.endian, exif.bigtiff = "<" if head[:2] == b"II" else ">", len(head) == 16
    form = exif.endian + ("8xQ" if exif.bigtiff else "4xI")
    exif.load_from_fp(stream, struct.unpack(form, head)[0])
    return exif


def _read_head(stream: BinaryIO) -> bytes:
    head = stream.read(8)
    return head + stream.read(8) if 43 in head[2:4] else head


def _put_metadata(directory: Any, metadata: Metadata) -> None:
    """Put EXIF, with its tables, and the ICC profile into a directory of Pillow's."""
    exif = Image.Exif()
    exif.load(metadata.exif or b"")
    for tag in exif:
        value = exif.get_ifd(tag) if tag in SUB_TABLES else exif[tag]
        if tag == EXPOSURE and INTEROPERABILITY in value:  # where Pillow gives the place in the source
            value = value | {INTEROPERABILITY: exif.get_ifd(INTEROPERABILITY)}
        directory[tag] = value
        if tag in SUB_TABLES:
            directory.tagtype[tag] = LONG
    if metadata.icc_profile:
        directory[ICC_PROFILE] = metadata.icc_profile
        directory.tagtype[ICC_PROFILE] = UNDEFINED


def _encode(tile: np.ndarray, *, difference: bool) -> bytes:
    """Fill a tile up to its full size with its last row and column, and deflate it, as differences along rows."""
    tile = np.pad(tile, ((0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0)), "edge")
    if difference:
        tile = np.concatenate((tile[:, :1], tile[:, 1:] - tile[:, :-1]), axis=1)
    return zlib.compress(tile.astype(tile.dtype.newbyteorder("<"), copy=False).tobytes())
