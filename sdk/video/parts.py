"""Encoded segments of a clip, kept in a folder until the clip is complete, so that an interrupted call can go on.

`NUMBER.packets` are the encoder's packets one after the other; `NUMBER.json` lists them, is written last, and makes the
segment count. A segment that is damaged is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import ImageError, OutputError
from . import ffmpeg
from .clip import Clip
from .colour import to_yuv
from .decode import Frame
from .encoding import Encoding, configure
from .folder import name_target, new_file, open_file, open_folder, remove_others

LOG = logging.getLogger(__name__)
SEGMENT = 240  # frames: what an interruption can cost at most, against a key frame more every so often
MAX_LISTING_BYTES = 1 << 20  # some 60 bytes a frame are usual
INT64 = range(-(2**63), 2**63)


@contextlib.contextmanager
def open_parts(folder: Path, target: Path, clip: Clip, encoding: Encoding, headers: str) -> Iterator[Parts]:
    """Open the folder for one process at a time, and remove it at the end, with those of other settings.

    It stays if the block fails after a segment is complete, unless the source is what is damaged.
    target: the result. headers: of the encoder, in hex; segments with others are made again. Raises: OutputError.
    """
    with open_folder(folder):
        parts = Parts(folder, clip, encoding, headers)
        try:
            name_target(folder, target)
            yield parts
        except BaseException as exc:
            if isinstance(exc, ImageError) or not parts.segments:
                parts.remove()
            else:
                LOG.warning("the frames done so far are kept in %s; the same call goes on from there", folder)
            raise
        parts.remove()
    remove_others(folder, target)


class Parts:
    """The segments in a folder. segments: number -> list of a complete one, as in its file."""

    def __init__(self, folder: Path, clip: Clip, encoding: Encoding, headers: str):
        self.folder, self.clip, self.encoding, self.headers = folder, clip, encoding, headers
        self.segments: dict[int, dict[str, Any]] = {}
        for number in range(math.ceil(clip.frames / SEGMENT)):
            if listing := self._read(number):
                self.segments[number] = listing

    @property
    def frames(self) -> int:
        """Frames in the complete segments."""
        return sum(len(listing["packets"]) for listing in self.segments.values())

    def is_done(self, index: int) -> bool:
        """Tell whether a frame is in a complete segment."""
        return index // SEGMENT in self.segments

    def add(self, frames: Iterable[Frame]) -> None:
        """Encode all frames that are not done, given in order. Raises: OutputError; what `frames` raises passes."""
        for number, group in itertools.groupby(frames, key=lambda frame: frame.index // SEGMENT):
            self._write(number, group)

    def packets(self) -> Iterator[Any]:
        """Yield all packets of the clip in the order of decoding. Raises: OutputError if a segment was changed.

        Every segment's encoder counted its own decoding times, which may overlap those of its neighbour: they are made
        anew, each the pts of the frame shown `delay` frames earlier.
        """
        numbers = sorted(self.segments)
        listings = [self.segments[number]["packets"] for number in numbers]
        delay = max(_reordering([pts for pts, *_ in listing]) for listing in listings)
        shown = sorted(pts for listing in listings for pts, *_ in listing)
        dts = iter([pts - (shown[delay] - shown[0]) for pts in shown[:delay]] + shown)
        for number, listing in zip(numbers, listings):
            digest = hashlib.sha256()
            with open_file(self._path(number, "packets")) as stream:
                for pts, duration, size, is_keyframe in listing:
                    data = stream.read(size)
                    digest.update(data)
                    packet = ffmpeg.load().Packet(data)
                    packet.pts, packet.dts, packet.duration = pts, next(dts), duration
                    packet.time_base, packet.is_keyframe = self.clip.time_base, is_keyframe
                    yield packet
            if digest.hexdigest() != self.segments[number]["sha256"]:
                raise OutputError(f"{self._path(number, 'packets')}: was changed while the segments were joined")

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.segments.clear()

    def _write(self, number: int, frames: Iterator[Frame]) -> None:
        """Encode a segment: packets first, then the list that makes it count."""
        av = ffmpeg.load()
        encoder = av.codec.CodecContext.create(self.encoding.library, "w")
        configure(encoder, self.clip, self.encoding)
        reformatter = av.video.reformatter.VideoReformatter()
        packets: list[tuple[int, int, int, bool]] = []
        digest, count = hashlib.sha256(), 0
        with contextlib.ExitStack() as stack:
            with ffmpeg.writing(self.folder):
                stream = stack.enter_context(new_file(self._path(number, "packets")))

            def encode(picture: Any) -> None:
                with ffmpeg.writing(self.folder):
                    for packet in encoder.encode(picture):
                        data = bytes(packet)
                        stream.write(data)
                        digest.update(data)
                        packets.append((packet.pts, packet.duration or 0, len(data), packet.is_keyframe))

            for frame in frames:
                picture = to_yuv(frame.pixels, self.clip.colour, self.encoding.pixel_format, reformatter)
                picture.pts, picture.duration, picture.time_base = frame.pts, frame.duration, self.clip.time_base
                encode(picture)
                count += 1
            encode(None)
            with ffmpeg.writing(self.folder):
                stream.flush()
                os.fsync(stream.fileno())
        if len(packets) != count or (encoder.extradata or b"").hex() != self.headers:
            raise OutputError(f"{self.encoding.library} gave {len(packets)} packets for {count} frames")
        listing = {"packets": packets, "sha256": digest.hexdigest(), "headers": self.headers}
        with files.new_file(self._path(number, "json"), overwrite=True) as target:
            target.write(json.dumps(listing).encode())
        self.segments[number] = listing

    def _read(self, number: int) -> dict[str, Any] | None:
        """Read the list of a segment; None if it, or the segment's packets, are not as they were written."""
        try:
            with open_file(self._path(number, "json")) as stream:
                listing = json.loads(stream.read(MAX_LISTING_BYTES))  # a longer one is cut, and no JSON any more
            if listing["headers"] != self.headers or not self._fits(number, listing["packets"]):
                return None
            left, digest = sum(size for _, _, size, _ in listing["packets"]), hashlib.sha256()
            with open_file(self._path(number, "packets")) as stream:
                if os.fstat(stream.fileno()).st_size != left:
                    return None
                while block := stream.read(1 << 20):
                    digest.update(block)
            return listing if listing["sha256"] == digest.hexdigest() else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _fits(self, number: int, packets: Any) -> bool:
        """Tell whether a list is of packets that a segment of this clip can have. Raises: ValueError, TypeError."""
        for pts, duration, size, is_keyframe in packets:
            if not (type(pts) is type(duration) is type(size) is int and type(is_keyframe) is bool):
                return False
            if not (pts in INT64 and duration in INT64 and duration >= 0 and size > 0):
                return False
        shown, known = sorted(pts for pts, *_ in packets), self.clip.pts
        if not 0 < len(set(shown)) == len(packets) <= SEGMENT:
            return False
        if not known.size:
            return True
        first = int(np.searchsorted(known, shown[0]))
        end = first + len(shown)
        is_full = len(shown) == SEGMENT or end == len(known)
        # Later than by its number if the decoder leaves out the first frames.
        return is_full and first >= number * SEGMENT and np.array_equal(known[first:end], shown)

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"


def _reordering(pts: list[int]) -> int:
    """Count by how many places packets come at most later than they are shown."""
    rank = {value: place for place, value in enumerate(sorted(pts))}
    return max(place - rank[value] for place, value in enumerate(pts))
