"""Pictures larger than memory: libvips decodes and encodes band by band, the Upscaler works on what is between.

Memory holds two rows of windows of the result. An interlaced PNG or progressive JPEG is decoded whole, by its nature;
a picture that has to be turned goes through a nameless file beside the target, uncompressed.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from . import files, opening, png, resize, tiff, vips
from .errors import ImageError, OptionError, OutputError, SRError
from .opening import Metadata
from .stats import Meter, Progress

if TYPE_CHECKING:
    from .jobs import Options
    from .upscaler import Upscaler

LOG = logging.getLogger(__name__)
LARGE_BYTES = 512 << 20  # of a result; up to here, holding it is faster
BAND_BYTES = 2 << 20  # decoded at once
BIG_TIFF_BYTES = 15 << 28  # uncompressed; a TIFF that might pass 4 GiB is a BigTIFF
# Pillow's formats that need not be held whole to be read, and those to be written, with libvips' saver.
READABLE = ("PNG", "JPEG", "MPO", "TIFF")
SAVERS = {"PNG": "pngsave_target", "JPEG": "jpegsave_target", "TIFF": "tiffsave_target"}
# Pillow's mode -> channels, of what libvips decodes to the same values.
CHANNELS = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1, "I;16B": 1}
FORMATS = {"uchar": np.dtype(np.uint8), "ushort": np.dtype(np.uint16)}  # libvips' pixels -> ours
SUBSAMPLE = {"4:4:4": "off", "4:2:0": "on"}
JPEG_START, JFIF = b"\xff\xd8", b"JFIF\0\1\1\0\0\1\0\1\0\0"  # version 1.1, no resolution, no thumbnail
ICC_PART = 65519  # bytes of a profile that a JPEG marker holds


@dataclass(frozen=True)
class Header:
    """What is known of a source before it is decoded.

    kind: Pillow's name of the format. size: (height, width) of the picture as it is seen, its orientation applied.
    notes: what the user should know.
    """

    kind: str
    size: tuple[int, int]
    channels: int
    dtype: np.dtype
    orientation: int
    metadata: Metadata
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of the picture, decoded."""
        return self.size[0] * self.size[1] * self.channels * self.dtype.itemsize


def is_large(source: Path, target: Path, *, scale: int, max_pixels: int | None = None) -> bool:
    """Tell whether a file is better streamed: a result beyond LARGE_BYTES, in formats that can be.

    No for what is not a picture, has more than max_pixels, is animated, or is stored in a way that only `files.read`
    knows (CMYK and the like).
    """
    if files.FORMATS.get(target.suffix.lower()) not in SAVERS:
        return False
    try:
        header = read_header(source, max_pixels=max_pixels)
    except SRError:
        return False
    return header.bytes * scale**2 > LARGE_BYTES


def enlarge(
    upscaler: Upscaler, source: Path, target: Path, options: Options, *, progress: Progress | None = None
) -> None:
    """Enlarge one file by the model's scale, band by band; metadata and orientation as `files` does.

    Raises: ImageError if the source is damaged or of a kind that is not streamed; OutputError; OptionError for another
    factor or size, or JPEG in 4:2:2; BackendUnavailable without pyvips; BackendError. No partial file stays.
    """
    meter = Meter(progress)
    options = replace(options, quality=files.check_quality(options.quality))
    files.check_subsampling(options.subsampling)
    files.check_output(target, overwrite=options.overwrite)
    kind = files.FORMATS[target.suffix.lower()]
    if kind not in SAVERS:
        raise OutputError(f"{target}: {kind} cannot be written in bands; write {', '.join(SAVERS)}")
    if kind == "JPEG" and options.subsampling not in SUBSAMPLE:
        raise OptionError(f"subsampling {options.subsampling!r}: of pictures this large, one of {', '.join(SUBSAMPLE)}")
    header = read_header(source, max_pixels=options.max_pixels)
    for note in header.notes:
        LOG.warning("%s: %s", source, note)
    result = replace(
        header,
        size=(header.size[0] * upscaler.scale, header.size[1] * upscaler.scale),
        metadata=files.fit_metadata(target, header.metadata, channels=header.channels),
    )
    wanted = resize.target_size(header.size, scale=upscaler.scale, factor=options.factor, size_wanted=options.size)
    if wanted != result.size:
        raise OptionError(
            f"{source}: a picture this large becomes {upscaler.scale} times as large, {result.size} and not {wanted}; "
            "leave out factor and size"
        )
    files.check_format(target, np.broadcast_to(header.dtype.type(0), (*result.size, result.channels)), scale=1)
    pyvips = vips.import_vips(f"{source}: a picture of {header.size[1]} x {header.size[0]} pixels")
    rows = meter.each(_turn(_decode(pyvips, source, header), header, target.parent), "decode")
    bands = upscaler.upscale_bands_metered(rows, header.size, options.tile, meter=meter)
    kept = pyvips.cache_get_max()
    try:
        with files.new_file(target, overwrite=options.overwrite) as stream:
            _encode(pyvips, stream, bands, result, target, options, meter)
        next(bands, None)  # its end counts the pixels, and comes after the last band
    finally:  # libvips remembers operations, and with them the rows that they hold
        pyvips.cache_set_max(0)
        pyvips.cache_set_max(kept)
    upscaler.record(meter.stats())  # tells on_picture, which finds the file in its place


def read_header(path: Path, *, max_pixels: int | None) -> Header:
    """Read what stands before the pixels. Raises: ImageError if the picture is not one that can be streamed."""
    with opening.told(path), opening.opened(path, max_pixels=max_pixels) as image:
        kind, depth = str(image.format), opening.depth(image)
        moving = kind == "PNG" and getattr(image, "n_frames", 1) > 1
        # TIFF: a palette may become grey, and colour multiplied with alpha stays so.
        layouts = str([arguments for _, _, _, arguments in image.tile])
        odd = "transparency" in image.info or "RGBa" in layouts or (image.mode == "I" and kind != "PNG")
        channels = CHANNELS.get(image.mode)
        if kind == "PNG" and image.mode in ("P", "I"):
            odd, channels = False, 1 if image.mode == "I" else 4 if "transparency" in image.info else 3
        if "LA;16B" in layouts:  # which Pillow makes RGBA of
            channels = 2
        if kind not in READABLE or moving or odd or channels is None or depth not in (8, 16):
            raise ImageError(
                f"{kind} {image.mode} of {depth} bits cannot be read in bands; convert it to grey or RGB in 8 or 16 "
                "bits, as PNG, JPEG or TIFF"
            )
        notes = []
        if kind in ("TIFF", "MPO") and image.is_animated:  # to count pages takes the square of their number
            notes.append("several pages, only the first is read")
        if image.info.get("interlace") or image.info.get("progressive"):
            notes.append("is interlaced or progressive and is decoded whole: this takes memory")
        if opening.has_odd_gamma(image):
            notes.append(files.ODD_GAMMA)
        if kind == "PNG" and "exif" not in image.info and (block := png.find_exif(path)):
            image.info["exif"] = block
        exif = Image.Image.getexif(image)  # not the plug-in's own, which would decode a PNG to look behind its pixels
        orientation = _orientation(exif)
        if kind == "TIFF" and exif.get(opening.ORIENTATION, 1) not in range(1, 9):
            raise ImageError("a TIFF with an unknown orientation cannot be read in bands; convert it")
        # Newer Pillows give the size of a TIFF as it will be turned.
        width, height = (image.tag_v2[256], image.tag_v2[257]) if kind == "TIFF" else image.size
        return Header(
            kind,
            size=(width, height) if orientation in opening.SWAPPED else (height, width),
            channels=channels,
            dtype=np.dtype(np.uint16 if depth == 16 else np.uint8),
            orientation=orientation,
            metadata=Metadata(image.info.get("icc_profile") or None, opening.pack_exif(exif)),
            notes=tuple(notes),
        )


def _orientation(exif: Image.Exif) -> int:
    """Give the orientation as an int; also one that is stored as another kind of number, as `opening.turn` takes it."""
    found = exif.get(opening.ORIENTATION)
    return next((value for value in range(1, 9) if value == found), 1)


def _decode(pyvips: Any, path: Path, header: Header) -> Iterator[np.ndarray]:
    """Give (rows, W, C) bands from top to bottom of the picture as it is stored."""
    height, width = header.size[::-1] if header.orientation in opening.SWAPPED else header.size
    rows = _band_rows(width, header)
    with opening.told(path), vips.opened(pyvips, path, header.kind) as image:
        found = image.height, image.width, FORMATS.get(image.format)
        if found != (height, width, header.dtype) or image.bands < header.channels:
            raise ImageError(f"libvips reads {image}, {(height, width)} of {header.dtype} were expected; convert it")
        region = pyvips.Region.new(image)
        for top in range(0, height, rows):
            data = region.fetch(0, top, width, min(rows, height - top))
            band = np.frombuffer(data, header.dtype).reshape(-1, width, image.bands)
            yield band[:, :, : header.channels]  # without samples that nobody knows the meaning of


def _turn(bands: Iterator[np.ndarray], header: Header, folder: Path) -> Iterator[np.ndarray]:
    """Apply an orientation to bands; where it changes the order of rows, through a temporary file in a folder."""
    parts = (opening.turn(band, header.orientation) for band in bands)
    if header.orientation <= 2:  # a mirror image comes row by row too
        yield from parts
        return
    with tempfile.TemporaryFile(dir=folder) as store:
        places = []
        for part in parts:
            places.append((store.tell(), part.shape))
            store.write(part.data)
        if header.orientation in (3, 4, 6, 7):
            places.reverse()

        def read(offset: int, shape: tuple[int, ...], top: int, bottom: int) -> np.ndarray:
            row_bytes = shape[1] * shape[2] * header.dtype.itemsize
            store.seek(offset + top * row_bytes)
            data = store.read((min(bottom, shape[0]) - top) * row_bytes)
            return np.frombuffer(data, header.dtype).reshape(-1, *shape[1:])

        if header.orientation not in opening.SWAPPED:
            for offset, shape in places:
                yield read(offset, shape, 0, shape[0])
            return
        rows = _band_rows(header.size[1], header)
        for top in range(0, header.size[0], rows):  # rows become columns, so bands stand side by side
            yield np.concatenate([read(offset, shape, top, top + rows) for offset, shape in places], axis=1)


def _band_rows(width: int, header: Header) -> int:
    return max(1, BAND_BYTES // (width * header.channels * header.dtype.itemsize))


def _encode(
    pyvips: Any,
    stream: BinaryIO,
    bands: Iterator[np.ndarray],
    result: Header,
    target: Path,
    options: Options,
    meter: Meter,
) -> None:
    """Write bands as they come; a thread encodes, so that this one can compute, and be interrupted."""

    def timed() -> Iterator[np.ndarray]:
        for band in bands:
            with meter.part("encode"):  # by who takes the band
                yield band

    encoded, feed = os.pipe()
    with ThreadPoolExecutor(1, "sr-encode") as pool:
        kind = files.FORMATS[target.suffix.lower()]
        saved = pool.submit(_save, pyvips, encoded, stream, result, kind, options)
        with suppress(BrokenPipeError), open(feed, "wb") as pipe:  # broken: the thread knows why, or has all pixels
            # The one format that libvips' wheel takes from a pipe without holding it.
            png.write_stored(pipe, timed(), (*result.size, result.channels), result.dtype)
        with files.encoding(target), meter.part("encode"):
            saved.result()


def _save(pyvips: Any, encoded: int, stream: BinaryIO, result: Header, kind: str, options: Options) -> None:
    """Encode the PNG that comes out of a pipe, and close that."""
    failed: list[Exception] = []

    def guarded(call: Any) -> Any:
        def run(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except Exception as exc:  # libvips cannot pass it on
                failed.append(exc)
                return -1

        return run

    saver_options: dict[str, dict[str, Any]] = {
        "PNG": {"compression": 6, "filter": "up"},
        "JPEG": {"Q": options.quality, "subsample_mode": SUBSAMPLE.get(options.subsampling)},
        "TIFF": {
            "compression": "deflate", "predictor": "horizontal", "bigtiff": result.bytes > BIG_TIFF_BYTES,
            "tile": True, "tile_width": tiff.TILE, "tile_height": tiff.TILE,
        },
    }  # fmt: skip
    write = stream.write if kind == "TIFF" else _with_head(stream.write, kind, result)
    try:
        source, target = pyvips.SourceCustom(), pyvips.TargetCustom()
        source.on_read(lambda count: os.read(encoded, count))
        target.on_write(guarded(write))
        target.on_seek(guarded(stream.seek))
        image = pyvips.Image.pngload_source(source, fail_on="error", access="sequential")
        getattr(image, SAVERS[kind])(target, strip=True, **saver_options[kind])
    except pyvips.Error as exc:
        if failed:
            raise failed[0] from exc
        raise
    finally:
        os.close(encoded)
    if kind == "TIFF":
        stream.flush()
        tiff.add_metadata(Path(stream.name), result.metadata)


def _with_head(write: Callable[[bytes], int], kind: str, result: Header) -> Callable[[bytes], int]:
    """Give a `write` for libvips that puts our head of a PNG or JPEG in the place of its own.

    libvips adds to EXIF what it thinks must be there, and a resolution of its own.
    """
    head = _png_head(result) if kind == "PNG" else _jpeg_head(result.metadata)
    seen = b""

    def replace_head(data: bytes) -> int:
        nonlocal head, seen
        if not head:
            return write(data)
        seen += data
        end = seen.find(b"IDAT") - 4 if kind == "PNG" else len(JPEG_START)
        if 0 <= end <= len(seen):
            write(head + seen[end:])
            head = b""
        return len(data)

    return replace_head


def _png_head(result: Header) -> bytes:
    stream = io.BytesIO()
    png.write_head(stream, (*result.size, result.channels), result.dtype, result.metadata)
    return stream.getvalue()


def _jpeg_head(metadata: Metadata) -> bytes:
    """Give what stands at the beginning of a JPEG: JFIF, EXIF and the ICC profile, each in markers of its own."""
    profile = metadata.icc_profile or b""
    parts = [profile[start : start + ICC_PART] for start in range(0, len(profile), ICC_PART)]
    markers = [(b"\xff\xe0", JFIF), (b"\xff\xe1", metadata.exif or b"")]
    markers += [(b"\xff\xe2", b"ICC_PROFILE\0" + bytes((n, len(parts))) + part) for n, part in enumerate(parts, 1)]
    return JPEG_START + b"".join(mark + (2 + len(data)).to_bytes(2, "big") + data for mark, data in markers if data)
