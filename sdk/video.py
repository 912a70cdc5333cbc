"""Video: frames are decoded, enlarged in batches and encoded; timestamps, sound and subtitles stay (PyAV).

Encoded frames are kept in segments in a hidden folder beside the result, `.sr-KEY.parts`, until the clip is complete:
`NUMBER.packets`, the encoder's packets one after the other, and `NUMBER.json`, which lists them and is written last.
A call that was interrupted, even by SIGKILL, is continued by the same call: KEY is made of the source's path, size and
time of change, of the model and of the settings, so that nothing else is ever mixed in. A segment that is damaged is
made again. The folder is removed when the result stands, when the source turns out damaged, and on errors before the
first segment was complete; otherwise it stays for the next call (delete it if there will be none).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from . import pipeline
from .errors import BackendUnavailable, ImageError, OptionError, OutputError

if TYPE_CHECKING:
    from .upscaler import Upscaler

LOG = logging.getLogger(__name__)
# What is written, with FFmpeg's names: containers whose video needs no in-band headers. What may be read.
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
SUFFIXES = {*CONTAINERS, ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv"}
SEGMENT = 240  # frames: what an interruption can cost at most, against a key frame more every so often
# Codec -> FFmpeg's encoder, its options, its largest crf. Open GOPs would tie a segment's frames to its neighbours.
ENCODERS: dict[str, tuple[str, dict[str, str], int]] = {
    "h264": ("libx264", {"preset": "medium"}, 51),
    "hevc": ("libx265", {"preset": "medium", "x265-params": "open-gop=0:log-level=error"}, 51),
    "vp9": ("libvpx-vp9", {"deadline": "good", "cpu-used": "2", "row-mt": "1", "b": "0"}, 63),
}
# Codecs with one packet for every picture shown: a packet without its frame is a loss.
ONE_TO_ONE = {"h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg", "prores", "ffv1", "dnxhd", "mpeg1video", "mpeg2video"}
# ITU-T H.273, table 4: matrix coefficients -> the weights of red and blue in luma.
MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114)}
MATRICES |= {7: (0.212, 0.087), 9: (0.2627, 0.0593)}
BT709, UNSPECIFIED, BT601 = 1, 2, 6
LIMITED, FULL = 1, 2
BAND = 64  # rows converted at once, so that float32 copies of a frame stay small
# What a frame may carry that is not in the result.
LOST = {
    "A53_CC": "closed captions inside the video",
    "MASTERING_DISPLAY_METADATA": "HDR10 mastering metadata",
    "CONTENT_LIGHT_LEVEL": "HDR10 light levels",
    "DYNAMIC_HDR_PLUS": "HDR10+ metadata",
    "DOVI_METADATA": "Dolby Vision metadata",
}


@dataclass(frozen=True)
class VideoProgress:
    """How far a clip is. frames: done, with those of an earlier call; total: expected; fps: of this call, 0 at first;
    eta_s: seconds left without the final remux, None at first."""

    frames: int
    total: int
    fps: float
    eta_s: float | None


@dataclass(frozen=True)
class VideoReport:
    """What was written. size: (height, width); resumed: frames taken from an earlier call; left_out: streams of the
    source, and metadata of its frames, that are not in the result."""

    frames: int
    size: tuple[int, int]
    codec: str
    pixel_format: str
    resumed: int
    seconds: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Clip:
    """What is known of a source before its frames are run.

    size: (height, width) as stored; transpose, flip_rows, flip_columns: what turns it upright, in this order.
    pts: of the frames to be shown, in time_base, rising; empty where packets do not tell. chroma: like "420".
    matrix, primaries, transfer: code points of H.273; bits: 8 or 10.
    """

    path: Path
    stream: int
    codec: str
    size: tuple[int, int]
    frames: int
    pts: np.ndarray = field(repr=False)
    time_base: Fraction
    rate: Fraction
    aspect: Fraction | None
    transpose: bool
    flip_rows: bool
    flip_columns: bool
    bits: int
    chroma: str
    matrix: int
    full_range: bool
    primaries: int
    transfer: int
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Encoding:
    """How a result is encoded. size: (height, width)."""

    codec: str
    library: str
    options: dict[str, str]
    pixel_format: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Frame:
    """A decoded frame: pts and duration in the clip's time_base; pixels (H, W, 3) uint8 or uint16 RGB, upright."""

    index: int
    pts: int
    duration: int
    pixels: np.ndarray


def is_video(path: Path) -> bool:
    """Tell by its suffix whether a file is taken for a video."""
    return path.suffix.lower() in SUFFIXES


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a destination before any work is done for it.

    Raises: OutputError if the container is unknown, the folder is missing, or the file exists and may not be replaced.
    """
    if path.suffix.lower() not in CONTAINERS:
        raise OutputError(f"{path}: unknown container {path.suffix!r}: one of {', '.join(CONTAINERS)}")
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if os.path.isdir(path):
        raise OutputError(f"{path}: is a folder")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or allow overwriting")


def upscale_video(
    upscaler: Upscaler,
    src: str | Path,
    dst: str | Path,
    *,
    overwrite: bool = False,
    crf: int = 16,
    codec: str = "auto",
    progress: Callable[[VideoProgress], None] | None = None,
) -> VideoReport:
    """Enlarge every frame of a video; sound, subtitles, chapters, metadata and timestamps are copied.

    crf: the encoder's quality, 0 (best) to 51, or 63 for vp9. codec: "h264", "hevc", "vp9", or "auto": vp9 in WebM,
    else h264, and hevc for more than 8 bits. progress: called in this thread after each batch.
    Matrix and range of the source are used and kept; an untagged source counts as BT.709 from 720 rows on, else as
    BT.601, limited, and the result says so. More than 8 bits run in 16 and come out as 10. Rotated clips come out
    upright. An interrupted call is continued by the same call (see the module).
    Raises: ImageError if the source is no video, damaged, truncated, interlaced or has alpha; OutputError if the result
    cannot be written or its container cannot hold a stream; OptionError; BackendError if the engine fails;
    BackendUnavailable without PyAV. No partial result stays at dst.
    """
    _av()
    src, dst = Path(src), Path(dst)
    started = time.monotonic()
    check_output(dst, overwrite=overwrite)
    clip = probe(src)
    encoding = _choose_encoding(clip, dst, scale=upscaler.scale, codec=codec, crf=crf)
    folder = dst.parent / f".sr-{_key(upscaler, clip, encoding)}.parts"
    temporary = dst.with_name(f".sr-{secrets.token_hex(8)}.part")
    try:
        with _writing(dst):
            folder.mkdir(exist_ok=True)
            extradata, left_out = _mux(clip, encoding, dst, temporary, None)  # what cannot be stored fails here
            for item in left_out:
                LOG.warning("%s: not copied: %s", src, item)
            parts = Parts(folder, clip, encoding, extradata)
        resumed = sum(parts.done.values())
        if resumed:
            LOG.info("%s: going on with %d of %d frames done", src, resumed, clip.frames)
        frames = _enlarge(upscaler, clip, parts, dst, progress)
        with _writing(dst):
            _mux(clip, encoding, dst, temporary, parts)
            written = _count_frames(temporary)
            if not frames == sum(parts.done.values()) == written:
                shutil.rmtree(folder)  # going on from it would end here again
                raise OutputError(f"{dst}: {frames} frames were decoded and {written} written; nothing is kept")
            _publish(temporary, dst, overwrite=overwrite)
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException as exc:
        if isinstance(exc, ImageError) or not any(folder.glob("*.json")):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            LOG.warning("%s: the frames done so far are kept in %s; the same call goes on from there", dst, folder)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    return VideoReport(
        frames, encoding.size, encoding.codec, encoding.pixel_format, resumed, seconds, left_out + clip.lost
    )


def _av() -> Any:
    try:
        import av
    except ImportError as exc:
        raise BackendUnavailable("video needs PyAV: pip install 'sr-sdk[video]'") from exc
    return av


# Reading


def probe(path: Path) -> Clip:
    """Read what is to be known before the frames are run: all packets once, and the first frame.

    Raises: ImageError if the file is missing, has no video, is truncated, or holds what cannot be enlarged.
    """
    with _reading(path), _opened(path) as (container, stream):
        pts, frames = _scan(path, container, stream)
    with _reading(path), _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise ImageError(f"{path}: none of its {frames} frames can be decoded")
        kept = {side.type.name: side for side in first.side_data}
        matrix, full_range = _colour(path, first)
        if "DOVI_METADATA" in kept and first.colorspace == UNSPECIFIED:
            raise ImageError(f"{path}: Dolby Vision without a base in known colours (profile 5) is not supported")
        transpose, flip_rows, flip_columns = _orientation(path, kept.get("DISPLAYMATRIX"))
        aspect = stream.sample_aspect_ratio or None
        lost = tuple(text for name, text in LOST.items() if name in kept)
        for text in lost:
            LOG.warning("%s: not kept: %s", path, text)
        bits = max(component.bits for component in first.format.components)
        if bits > 10:
            LOG.warning("%s: its %d bits come out as 10", path, bits)
        # Subsampling that no encoder here has comes out as the next finer one.
        across, down = first.format.chroma_width(64), first.format.chroma_height(64)
        chroma = "420" if down < 64 and across < 64 else "422" if across < 64 else "444"
        return Clip(
            path=path,
            stream=stream.index,
            codec=stream.codec_context.name,
            size=(first.height, first.width),
            frames=frames,
            pts=pts,
            time_base=stream.time_base,
            rate=stream.average_rate or stream.guessed_rate or Fraction(25),
            aspect=1 / aspect if aspect and transpose else aspect,
            transpose=transpose,
            flip_rows=flip_rows,
            flip_columns=flip_columns,
            bits=10 if bits > 8 else 8,
            chroma="420" if len(first.format.components) == 1 else chroma,
            matrix=matrix,
            full_range=full_range,
            primaries=first.color_primaries,
            transfer=first.color_trc,
            lost=lost,
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video and give its container and its video stream, set to tell errors instead of hiding them."""
    av = _av()
    with av.open(str(path), metadata_errors="replace") as container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            raise ImageError(f"{path}: has no video that can be decoded")
        stream = streams[0]
        if stream.metadata.get("alpha_mode") == "1":
            raise ImageError(f"{path}: video with alpha is not supported; flatten it first")
        # A decoder fills damaged areas with a guess, and drops frames whose references are missing, by default.
        stream.codec_context.options = {"err_detect": "explode"}
        stream.codec_context.flags |= av.codec.context.Flags.output_corrupt
        yield container, stream


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of the system and of FFmpeg into ImageError."""
    try:
        yield
    except (_av().error.FFmpegError, OSError) as exc:
        raise ImageError(f"{path}: not a video, or damaged ({exc.strerror or exc})") from exc


def _scan(path: Path, container: Any, stream: Any) -> tuple[np.ndarray, int]:
    """Read all packets without decoding: give the rising pts of the frames to be shown, and their number.

    Raises: ImageError if the file ends before its headers say; FFmpeg reads such a file to its end and is content.
    """
    pts: list[int | None] = []
    packets, end_s = 0, 0.0
    for packet in container.demux():
        if packet.size == 0:
            continue
        at = packet.pts if packet.pts is not None else packet.dts
        if at is not None:
            end_s = max(end_s, float((at + (packet.duration or 0)) * packet.time_base))
        if packet.is_corrupt:
            raise ImageError(f"{path}: truncated or damaged at {_seconds(at, packet.time_base)}")
        if packet.stream.index == stream.index:
            packets += 1
            if not packet.is_discard:  # hidden by an edit list
                pts.append(packet.pts)
    promised_s = (container.duration or 0) / 1e6
    if container.format.name.startswith("mov"):
        is_cut = packets < len(stream.index_entries)
    elif container.format.name.startswith("matroska"):
        is_cut = _missing_bytes(path) > 0
    else:
        is_cut = end_s < promised_s - 1  # durations in headers are rough, and hold the padding of sound
    if is_cut:
        text = f"it ends at {end_s:.2f} s, after {packets} frames; its header promises {promised_s:.2f} s"
        raise ImageError(f"{path}: truncated: {text}; if it is whole, remux it (ffmpeg -i IN -c copy OUT.mkv)")
    if not pts:
        raise ImageError(f"{path}: its video stream is empty")
    known = [value for value in pts if value is not None]
    complete = len(known) == len(pts) and stream.codec_context.name in ONE_TO_ONE
    return np.array(sorted(known) if complete else [], np.int64), len(pts)


def _missing_bytes(path: Path) -> int:
    """Compare the size that a Matroska file gives for itself with the file's (RFC 8794, 9559); 0 for other formats."""

    def number(at: int) -> tuple[int, int, bool]:
        length = 9 - head[at].bit_length()
        value = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
        return at + length, value, value == (1 << 7 * length) - 1

    with open(path, "rb") as stream:
        head = stream.read(4096)
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return 0
    at, size, _ = number(4)
    if head[at + size : at + size + 4] != b"\x18\x53\x80\x67":
        return 0
    at, size, unknown = number(at + size + 4)
    return 0 if unknown else at + size - path.stat().st_size


def _decode(clip: Clip, is_done: Callable[[int], bool]) -> Generator[Frame | None, None, None]:
    """Decode all frames in order; those that are done already come as None.

    Raises: ImageError that says at which frame the source broke.
    """
    av = _av()
    reformatter = av.video.reformatter.VideoReformatter()
    index, last, skipped = -1, None, 0
    with _reading(clip.path), _opened(clip.path) as (container, stream):
        try:
            for index, frame in enumerate(container.decode(stream)):
                where = f"{clip.path}: frame {index} ({_seconds(frame.pts, clip.time_base)})"
                if frame.is_corrupt:
                    raise ImageError(f"{where} is damaged")
                if frame.interlaced_frame:
                    raise ImageError(f"{where} is interlaced; deinterlace first (ffmpeg -i IN -vf bwdif -crf 0 OUT)")
                if (frame.height, frame.width) != clip.size:
                    raise ImageError(f"{where} is {frame.width}x{frame.height}, the first one {clip.size[::-1]}")
                if frame.pts is None or (last is not None and frame.pts <= last):
                    raise ImageError(f"{where} has no later timestamp than the one before; remux the file first")
                if index == 0 and clip.pts.size:
                    skipped = bisect_left(clip.pts, frame.pts)
                    if skipped:
                        LOG.warning("%s: the first %d frames need ones before the beginning", clip.path, skipped)
                if clip.pts.size and (index + skipped >= clip.pts.size or frame.pts != clip.pts[index + skipped]):
                    raise ImageError(f"{where} does not follow the one before: a frame between them is damaged")
                last = frame.pts
                if is_done(index):
                    yield None
                else:
                    yield Frame(index, frame.pts, frame.duration or 0, _to_rgb(frame, clip, reformatter))
        except av.error.FFmpegError as exc:
            after = "" if last is None else f" ({_seconds(last, clip.time_base)})"
            raise ImageError(f"{clip.path}: damaged after frame {index}{after}: {exc.strerror}") from exc
    if clip.pts.size and index + 1 + skipped != clip.pts.size:
        raise ImageError(f"{clip.path}: only {index + 1} of {clip.pts.size - skipped} frames can be decoded")


def _seconds(pts: int | None, time_base: Fraction) -> str:
    return "time unknown" if pts is None else f"{float(pts * time_base):.3f} s"


def _orientation(path: Path, matrix: Any) -> tuple[bool, bool, bool]:
    """Turn a display matrix into (transpose, flip rows, flip columns).

    matrix: nine int32 [a b u c d v x y w] with x' = a x + c y, y' = b x + d y, or None.
    """
    if matrix is None:
        return False, False, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    if b == c == 0 and a and d:
        return False, d < 0, a < 0
    if a == d == 0 and b and c:
        return True, b < 0, c < 0
    raise ImageError(f"{path}: turned by an angle that is not a multiple of 90 degrees")


# Colour


def _colour(path: Path, frame: Any) -> tuple[int, bool]:
    """Give the matrix and whether the range is full: as tagged, else the usual guess by height; RGB becomes BT.709."""
    if any(component.is_alpha for component in frame.format.components):
        raise ImageError(f"{path}: video with alpha ({frame.format.name}) is not supported; flatten it first")
    if frame.format.is_rgb:
        return BT709, False
    matrix = frame.colorspace
    if matrix in (UNSPECIFIED, 0, 3):  # 3 is reserved; 0 would be RGB
        matrix = BT709 if frame.height >= 720 else BT601
    if matrix not in MATRICES:
        raise ImageError(f"{path}: its YUV matrix (H.273 number {matrix}) is not supported")
    return matrix, frame.color_range == FULL or frame.format.name.startswith("yuvj")


def _weights(matrix: int, full_range: bool, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Give (3, 3) weights and (3,) offsets that take RGB in [0, 1] to code values of Y, Cb, Cr (ITU-T H.273, 8.3)."""
    red, blue = MATRICES[matrix]
    luma = np.array([red, 1 - red - blue, blue])
    differences = [(np.eye(3)[2] - luma) / (2 - 2 * blue), (np.eye(3)[0] - luma) / (2 - 2 * red)]
    middle, step = 2 ** (bits - 1), 2 ** (bits - 8)
    gains = np.full(3, 2**bits - 1) if full_range else np.array([219, 224, 224]) * step
    offsets = np.array([0, middle, middle]) if full_range else np.array([16 * step, middle, middle])
    return np.array([luma, *differences]) * gains[:, None], offsets


def _transform(pixels: np.ndarray, weights: np.ndarray, offsets: np.ndarray, *, top: int) -> np.ndarray:
    """Apply weights and offsets to (H, W, 3) pixels, round, and clip to [0, top]; the dtype stays."""
    result = np.empty(pixels.shape, pixels.dtype)
    for first in range(0, len(pixels), BAND):
        band = pixels[first : first + BAND].astype(np.float32) @ weights.T.astype(np.float32)
        band += offsets.astype(np.float32)
        result[first : first + BAND] = np.clip(np.rint(band, out=band), 0, top, out=band)
    return result


def _to_rgb(frame: Any, clip: Clip, reformatter: Any) -> np.ndarray:
    """Turn a decoded frame into upright (H, W, 3) RGB: uint8, or uint16 where the clip has more than 8 bits.

    swscale resamples chroma and changes layouts; the matrix is ours: swscale's is off by a code value in full range and
    in 16 bits.
    """
    deep = clip.bits > 8
    interpolation = _interpolation()
    if frame.format.is_rgb:
        pixels = reformatter.reformat(frame, format="rgb48le" if deep else "rgb24").to_ndarray()
    else:
        matrix, full_range = _colour(clip.path, frame)
        frame.color_range = FULL  # the same on both sides: swscale shall not touch the values
        planes = reformatter.reformat(
            frame, format="yuv444p10le" if deep else "yuv444p", interpolation=interpolation, dst_color_range=FULL
        )
        weights, offsets = _weights(matrix, full_range, clip.bits)
        top = 65535 if deep else 255
        inverse = np.linalg.inv(weights) * top
        pixels = np.stack(_views(planes, np.uint16 if deep else np.uint8), axis=-1)
        pixels = _transform(pixels, inverse, -inverse @ offsets, top=top)
    if clip.transpose:
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[:: -1 if clip.flip_rows else 1, :: -1 if clip.flip_columns else 1]
    return np.ascontiguousarray(pixels)


def _to_yuv(pixels: np.ndarray, clip: Clip, encoding: Encoding, reformatter: Any) -> Any:
    """Turn (H, W, 3) RGB into a frame as the encoder takes it."""
    weights, offsets = _weights(clip.matrix, clip.full_range, clip.bits)
    weights = weights / (255 if pixels.dtype == np.uint8 else 65535)
    codes = _transform(pixels, weights, offsets, top=2**clip.bits - 1)
    name = "yuv444p10le" if clip.bits > 8 else "yuv444p"
    frame = _av().VideoFrame(pixels.shape[1], pixels.shape[0], name)
    for channel, view in enumerate(_views(frame, pixels.dtype)):
        view[:] = codes[:, :, channel]
    frame.color_range = FULL
    if encoding.pixel_format != name:
        frame = reformatter.reformat(
            frame, format=encoding.pixel_format, interpolation=_interpolation(), dst_color_range=FULL
        )
    frame.color_range = FULL if clip.full_range else LIMITED
    frame.colorspace = clip.matrix
    return frame


def _views(frame: Any, dtype: Any) -> list[np.ndarray]:
    """Give the planes of a planar frame as (height, width) arrays that share its memory, without the rows' padding."""
    size = np.dtype(dtype).itemsize
    return [
        np.frombuffer(plane, dtype).reshape(plane.height, plane.line_size // size)[:, : plane.width]
        for plane in frame.planes
    ]


def _interpolation() -> Any:
    flags = _av().video.reformatter.Interpolation
    return flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT | flags.FULL_CHR_H_INP | flags.BITEXACT


# Enlarging


def _enlarge(
    upscaler: Upscaler, clip: Clip, parts: Parts, dst: Path, progress: Callable[[VideoProgress], None] | None
) -> int:
    """Run decoder, engine and encoder at the same time, until all segments are complete; give the number of frames."""
    height, width = parts.encoding.size
    # Bounded by memory too: a few batches are on their way at once.
    batch = max(1, min(int(upscaler.info["batch"]), 2**26 // (height * width)))
    stop = threading.Event()
    started, computed, frames = time.monotonic(), 0, 0
    batches = _batches(_decode(clip, parts.is_done), batch)

    def decode(_: int) -> list[Frame | None] | None:
        return None if stop.is_set() else next(batches, None)

    def compute(taken: list[Frame | None] | None) -> tuple[int, list[Frame]] | None:
        if taken is None:
            return None
        new = [frame for frame in taken if frame is not None]
        large = upscaler.upscale_batch([frame.pixels for frame in new]) if new else []
        done = [Frame(frame.index, frame.pts, frame.duration, pixels) for frame, pixels in zip(new, large)]
        return len(taken), done

    def encode(_: int, result: tuple[int, list[Frame]] | None) -> tuple[int, int] | None:
        if result is None:
            return None
        for frame in result[1]:
            if stop.is_set():
                break
            with _writing(dst):
                parts.add(frame)
        return result[0], len(result[1])

    results = pipeline.overlap(itertools.count(), decode=decode, compute=compute, encode=encode)
    try:
        for _, result in results:
            if isinstance(result, Exception):
                raise result
            if result is None:
                break
            frames, computed = frames + result[0], computed + result[1]
            if progress:
                fps = computed / max(time.monotonic() - started, 1e-9)
                left = max(0, clip.frames - frames)
                progress(VideoProgress(frames, clip.frames, fps, left / fps if fps else None))
        stop.set()
        results.close()
        with _writing(dst):
            parts.finish()
    finally:
        stop.set()
        results.close()
        batches.close()
        parts.abandon()
    return frames


def _batches(frames: Generator[Frame | None, None, None], size: int) -> Generator[list[Frame | None], None, None]:
    """Group frames; those done already (None) fill a batch too, so that progress is told while they pass."""
    with contextlib.closing(frames):
        while batch := list(itertools.islice(frames, size)):
            yield batch


# Writing


def _choose_encoding(clip: Clip, dst: Path, *, scale: int, codec: str, crf: int) -> Encoding:
    """Decide codec and pixel format. Raises: OptionError; OutputError if the codec cannot hold the clip."""
    if codec != "auto" and codec not in ENCODERS:
        raise OptionError(f"codec {codec!r}: auto or one of {', '.join(ENCODERS)}")
    if codec == "auto":
        codec = "vp9" if dst.suffix.lower() == ".webm" else "hevc" if clip.bits > 8 else "h264"
    library, options, largest = ENCODERS[codec]
    if not isinstance(crf, int) or isinstance(crf, bool) or not 0 <= crf <= largest:
        raise OptionError(f"crf {crf!r}: a number from 0 to {largest} for {codec}")
    if codec == "vp9" and clip.aspect not in (None, 1) and CONTAINERS[dst.suffix.lower()] in ("matroska", "webm"):
        # VP9 has no field for it, and PyAV no way to set the container's.
        raise OutputError(
            f"{dst}: vp9 here holds square pixels only, not {clip.aspect}; use codec h264 and an .mkv file"
        )
    height, width = (side * scale for side in (clip.size[::-1] if clip.transpose else clip.size))
    chroma = clip.chroma if not clip.transpose or clip.chroma == "420" else "444"
    if codec != "vp9" and ((chroma == "420" and height % 2) or (chroma != "444" and width % 2)):
        chroma = "444"  # these encoders take odd sizes only with full chroma
    pixel_format = f"yuv{chroma}p" + ("10le" if clip.bits > 8 else "")
    av = _av()
    try:
        formats = [each.name for each in av.codec.Codec(library, "w").video_formats or ()]
    except av.codec.codec.UnknownCodecError as exc:
        raise BackendUnavailable(f"this build of PyAV has no {library}; choose another codec") from exc
    if pixel_format not in formats:
        raise OutputError(f"{dst}: {library} here has no {pixel_format}; use codec hevc and an .mkv or .mp4 file")
    return Encoding(codec, library, {**options, "crf": str(crf)}, pixel_format, (height, width))


def _key(upscaler: Upscaler, clip: Clip, encoding: Encoding) -> str:
    """Name everything that the encoded frames depend on."""
    status = clip.path.stat()
    # How frames are cut follows the free memory, and changes at most 1 code value.
    info = {name: value for name, value in upscaler.info.items() if name not in ("one_piece_pixels", "batch")}
    manifest = getattr(getattr(upscaler, "_bundle", None), "manifest", None)  # holds the hash of every model file
    source = [str(clip.path.resolve()), status.st_size, status.st_mtime_ns]
    text = repr([1, SEGMENT, source, sorted(info.items()), manifest, encoding])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _configure(context: Any, clip: Clip, encoding: Encoding) -> None:
    """Set up an encoder: the same for every segment and for the stream of the result, which shares their headers."""
    flags = _av().codec.context.Flags
    context.height, context.width = encoding.size
    context.pix_fmt = encoding.pixel_format
    context.time_base, context.framerate = clip.time_base, clip.rate
    if clip.aspect:
        context.sample_aspect_ratio = clip.aspect
    context.colorspace, context.color_range = clip.matrix, FULL if clip.full_range else LIMITED
    context.color_primaries, context.color_trc = clip.primaries, clip.transfer
    context.thread_type = "AUTO"  # PyAV's default cuts every frame into slices
    context.flags |= flags.global_header | flags.frame_duration
    context.options = dict(encoding.options)


class Parts:
    """The encoded segments of a clip in their folder, written by one thread.

    done: segment number -> frames, of complete segments. extradata: headers that every segment must share, in hex.
    """

    def __init__(self, folder: Path, clip: Clip, encoding: Encoding, extradata: str):
        self.folder, self.clip, self.encoding, self.extradata = folder, clip, encoding, extradata
        self.done: dict[int, int] = {}
        self._reformatter = _av().video.reformatter.VideoReformatter()
        self._number: int | None = None
        self._encoder: Any = None
        self._file: BinaryIO | None = None
        for path in folder.glob("*.json"):
            if path.stem.isdecimal() and (listing := self._check(int(path.stem))):
                self.done[int(path.stem)] = len(listing["packets"])

    def is_done(self, index: int) -> bool:
        """Tell whether a frame is in a segment that is complete."""
        return index // SEGMENT in self.done

    def add(self, frame: Frame) -> None:
        """Encode a frame; the first one of a segment completes the one before."""
        if frame.index // SEGMENT != self._number:
            self.finish()
            self._number = frame.index // SEGMENT
            self._packets: list[tuple[int, int, int, bool]] = []
            self._hash = hashlib.sha256()
            self._file = open(self._path("part"), "wb")  # noqa: SIM115 - closed by finish or abandon
            self._encoder = _av().codec.CodecContext.create(self.encoding.library, "w")
            _configure(self._encoder, self.clip, self.encoding)
            self._frames = 0
        picture = _to_yuv(frame.pixels, self.clip, self.encoding, self._reformatter)
        picture.pts, picture.duration, picture.time_base = frame.pts, frame.duration, self.clip.time_base
        self._frames += 1
        self._write(self._encoder.encode(picture))

    def finish(self) -> None:
        """Complete the segment being written, if there is one: packets first, then the list that makes it count."""
        if self._number is None or self._file is None:
            return
        self._write(self._encoder.encode(None))
        if len(self._packets) != self._frames or (self._encoder.extradata or b"").hex() != self.extradata:
            raise OutputError(f"{self.encoding.library} gave {len(self._packets)} packets for {self._frames} frames")
        _close_synced(self._file)
        os.replace(self._path("part"), self._path("packets"))
        listing = {"packets": self._packets, "sha256": self._hash.hexdigest(), "extradata": self.extradata}
        with open(self._path("part"), "wb") as stream:
            stream.write(json.dumps(listing).encode())
            _close_synced(stream)
        os.replace(self._path("part"), self._path("json"))
        self.done[self._number] = self._frames
        self._number, self._file, self._encoder = None, None, None

    def abandon(self) -> None:
        """Drop the segment being written, if there is one."""
        if self._file is not None and self._number is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                self._path("part").unlink(missing_ok=True)
        self._number, self._file, self._encoder = None, None, None

    def packets(self) -> Iterator[Any]:
        """Yield all packets of the clip in the order of decoding.

        Every segment's encoder counted its own decoding times, which may overlap those of its neighbour: they are made
        anew, each the pts of the frame shown `delay` frames earlier.
        """
        listings = [self._check(number) for number in range(len(self.done))]
        if None in listings:
            raise OutputError(f"{self.folder}: segments are missing or were changed while they were joined")
        delay = max(_reordering([packet[0] for packet in listing["packets"]]) for listing in listings if listing)
        times: deque[int] = deque()
        for number, listing in enumerate(listings):
            assert listing is not None
            shown = sorted(packet[0] for packet in listing["packets"])
            if number == 0:
                times.extend(pts - (shown[delay] - shown[0]) for pts in shown[:delay])
            times.extend(shown)
            with open(self.folder / f"{number:06d}.packets", "rb") as stream:
                for pts, duration, size, is_keyframe in listing["packets"]:
                    packet = _av().Packet(size)
                    packet.update(stream.read(size))
                    packet.pts, packet.dts, packet.duration = pts, times.popleft(), duration
                    packet.time_base, packet.is_keyframe = self.clip.time_base, is_keyframe
                    yield packet

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._number:06d}.{suffix}"

    def _write(self, packets: list[Any]) -> None:
        assert self._file is not None
        for packet in packets:
            data = bytes(packet)
            self._file.write(data)
            self._hash.update(data)
            self._packets.append((packet.pts, packet.duration or 0, len(data), packet.is_keyframe))

    def _check(self, number: int) -> dict[str, Any] | None:
        """Read the list of a segment; None if it, or the segment's packets, are not as they were written."""
        try:
            listing = json.loads((self.folder / f"{number:06d}.json").read_bytes())
            with open(self.folder / f"{number:06d}.packets", "rb") as stream:
                digest = hashlib.sha256()
                while block := stream.read(1 << 20):
                    digest.update(block)
            whole = listing["sha256"] == digest.hexdigest() and listing["extradata"] == self.extradata
            return listing if whole and listing["packets"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _reordering(pts: list[int]) -> int:
    """Count by how many places packets come at most later than they are shown."""
    rank = {value: place for place, value in enumerate(sorted(pts))}
    return max(place - rank[value] for place, value in enumerate(pts))


def _mux(
    clip: Clip, encoding: Encoding, dst: Path, temporary: Path, parts: Parts | None
) -> tuple[str, tuple[str, ...]]:
    """Write the result's container: the segments' packets, and those of all other streams of the source.

    parts: None writes the headers alone, to learn early what the container cannot hold.
    Returns: the encoder's headers in hex, and the streams that are left out. Raises: OutputError.
    """
    av = _av()
    # MP4 keeps the start of a stream in ticks of the whole film, 1 ms by default: too coarse for most time bases.
    ticks = clip.time_base.denominator * -(-1000 // clip.time_base.denominator)
    options = {"movie_timescale": str(ticks)} if CONTAINERS[dst.suffix.lower()] in ("mp4", "mov") else {}
    with (
        _opened(clip.path) as (source, _),
        av.open(str(temporary), "w", format=CONTAINERS[dst.suffix.lower()], container_options=options) as out,
    ):
        video, copied, left_out = _add_streams(out, source, clip, encoding, dst)
        brands = ("major_brand", "minor_version", "compatible_brands", "encoder")
        out.metadata.update({key: value for key, value in source.metadata.items() if key.lower() not in brands})
        out.set_chapters(source.chapters())
        try:
            out.start_encoding()
        except (av.error.FFmpegError, ValueError) as exc:
            names = ", ".join(_describe(source.streams[index]) for index in copied) or "these settings"
            raise OutputError(f"{dst}: the container refuses {names} ({exc}); write an .mkv file") from exc
        extradata = (video.codec_context.extradata or b"").hex()
        if parts is not None:
            ours = parts.packets()
            upcoming = next(ours, None)
            for packet in _source_packets(clip.path, source, list(copied)):
                at = packet.dts if packet.dts is not None else packet.pts or 0
                while upcoming is not None and upcoming.dts * clip.time_base <= at * packet.time_base:
                    upcoming.stream = video
                    out.mux(upcoming)
                    upcoming = next(ours, None)
                packet.stream = copied[packet.stream.index]
                out.mux(packet)
            for packet in itertools.chain([upcoming] if upcoming else [], ours):
                packet.stream = video
                out.mux(packet)
    with open(temporary, "rb+") as stream:
        _close_synced(stream)
    return extradata, left_out


def _source_packets(path: Path, source: Any, streams: list[int]) -> Iterator[Any]:
    """Read the packets of some streams of the source. Raises: ImageError, so that its errors are told from ours."""
    if streams:
        with _reading(path):
            for packet in source.demux([source.streams[index] for index in streams]):
                if packet.size:
                    yield packet


def _add_streams(
    out: Any, source: Any, clip: Clip, encoding: Encoding, dst: Path
) -> tuple[Any, dict[int, Any], tuple[str, ...]]:
    """Add the enlarged video, and a copy of every stream that the container can hold, in the source's order.

    Raises: OutputError for sound or subtitles that it cannot hold; covers, fonts and data are left out instead.
    """
    av = _av()
    suffix, video, copied, left_out = dst.suffix.lower(), None, {}, []
    for stream in source.streams:
        if stream.index == clip.stream:
            try:
                video = out.add_stream(encoding.library, rate=clip.rate)
            except ValueError as exc:
                raise OutputError(f"{dst}: {suffix} files do not hold {encoding.codec}; write an .mkv file") from exc
            _configure(video.codec_context, clip, encoding)
            video.time_base = clip.time_base
            if encoding.codec == "hevc" and suffix != ".mkv":
                video.codec_context.codec_tag = "hvc1"  # Apple's players know no other
            stale = ("encoder", "duration", "rotate", "bps", "number_of_", "_statistics")  # of the source's frames
            kept = {key: value for key, value in stream.metadata.items() if not key.lower().startswith(stale)}
            video.metadata.update(kept)
            video.disposition = stream.disposition
            continue
        is_cover = stream.type == "video" and stream.disposition & av.stream.Disposition.attached_pic
        wanted = stream.type in ("audio", "subtitle")
        optional = (is_cover and suffix in (".mp4", ".m4v")) or (stream.type == "attachment" and suffix == ".mkv")
        if stream.type == "data" and stream.name == "bin_data" and source.chapters():
            continue  # the chapters' titles, as MP4 stores them
        if not wanted and not optional:
            left_out.append(_describe(stream))
            continue
        try:
            copy = out.add_stream_from_template(stream, opaque=True)
        except (av.error.FFmpegError, ValueError) as exc:
            if wanted:
                able = _able_containers(stream)
                advice = f"write {' or '.join(able)}" if able else "remove it from the source"
                raise OutputError(f"{dst}: {suffix} files cannot hold {_describe(stream)}; {advice}") from exc
            left_out.append(_describe(stream))
            continue
        copy.metadata.update(stream.metadata)
        copy.disposition = stream.disposition
        copied[stream.index] = copy
    return video, copied, tuple(left_out)


def _describe(stream: Any) -> str:
    name = stream.codec_context.name if stream.codec_context else stream.name
    return f"stream {stream.index} ({stream.type}, {name or 'unknown codec'})"


def _able_containers(stream: Any) -> list[str]:
    """List the suffixes whose containers hold a copy of a stream."""
    av, able = _av(), []
    for suffix in (".mkv", ".mp4", ".mov", ".webm"):
        with av.open(os.devnull, "w", format=CONTAINERS[suffix]) as out, contextlib.suppress(ValueError):
            out.add_stream_from_template(stream, opaque=True)
            able.append(suffix)
    return able


def _count_frames(path: Path) -> int:
    """Count the video packets of a finished file, as a reader finds them."""
    with _opened(path) as (container, stream):
        return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))


def _publish(temporary: Path, dst: Path, *, overwrite: bool) -> None:
    """Give a finished file its name; without overwrite, a file that appeared meanwhile stays."""
    if overwrite:
        os.replace(temporary, dst)
        return
    try:
        os.link(temporary, dst)  # fails where the name exists, which a rename does not
    except OSError:
        if os.path.lexists(dst):
            raise OutputError(f"{dst}: was made by someone else meanwhile; choose another name") from None
        os.rename(temporary, dst)  # a file system without links


def _close_synced(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors of the system and of FFmpeg into OutputError."""
    try:
        yield
    except (_av().error.FFmpegError, OSError) as exc:
        raise OutputError(f"{path}: cannot be written ({exc.strerror or exc})") from exc
