"""Which files are taken for videos, and which are written."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import OutputError

# What is written, with FFmpeg's names: containers whose video needs no in-band headers.
WRITTEN = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
READ = {*WRITTEN, ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv"}


def is_video(path: Path) -> bool:
    """Tell by its suffix whether a file is taken for a video."""
    return path.suffix.lower() in READ


def written_format(path: Path) -> str:
    """Give FFmpeg's name of the container that a suffix stands for. Raises: OutputError if it is not written."""
    if path.suffix.lower() not in WRITTEN:
        raise OutputError(f"{path}: unknown container {path.suffix!r}: one of {', '.join(WRITTEN)}")
    return WRITTEN[path.suffix.lower()]


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a destination before any work is done for it.

    Raises: OutputError if the container is unknown, the folder is missing, or the file exists and may not be replaced.
    """
    written_format(path)
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if os.path.isdir(path):
        raise OutputError(f"{path}: is a folder")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or allow overwriting")
