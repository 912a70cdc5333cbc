"""Which files a command means: arguments that are files, folders and globs, and where their results go."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import files
from .errors import ImageError, OptionError, OutputError
from .jobs import Job

# Read, but not written: in a folder of results they become PNG.
READ_ONLY = {
    ".jpe", ".jfif", ".mpo", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf",
    ".jpx", ".tga", ".icb", ".vda", ".vst", ".ico",
}  # fmt: skip


def plan_jobs(
    inputs: tuple[str, ...], output: str, *, suffix: str | None = None, panels: bool = False
) -> tuple[list[Job], Path | None]:
    """Pair every input picture with its output files, and give the output folder if one is needed.

    Raises: OptionError if an input or the output is empty; OutputError if an input matches nothing, or two results
    would become one file; ImageError for a folder that cannot be read.
    """
    sources, several = expand(inputs)
    if not output:
        raise OptionError("-o is empty: a file or a folder is needed")
    is_folder = several or os.path.isdir(output) or output.endswith((os.sep, os.altsep or os.sep))
    folder = Path(output) if is_folder else None
    jobs = []
    for source in sources:
        target = folder / result_name(source.name, suffix) if folder else Path(output)
        if suffix and not folder:
            target = target.with_suffix(f".{suffix}")
        jobs.append(Job(source, target, target.with_name(f"{target.stem}.compare.png") if panels else None))
    refuse_twins((job.source, target) for job in jobs for target in job.targets)
    return jobs, folder


def refuse_twins(results: Iterable[tuple[Path | str, Path | str]]) -> None:
    """Take (source, result) pairs; a str is a URL. Raises: OutputError if two results are one file."""
    taken: dict[str, Path | str] = {}
    for source, target in results:
        key = _key(target) if isinstance(target, Path) else target
        if key in taken:
            raise OutputError(f"{taken[key]} and {source} would both become {target}")
        taken[key] = source


def make_folder(folder: Path | str) -> None:
    """Make a folder of results, unless it is there. Raises: OutputError."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"{folder}: a folder is needed, and it cannot be made ({exc.strerror})") from exc


def result_name(name: str, suffix: str | None) -> str:
    """Name the result of a picture in a folder of results. suffix: of the format that is wanted, without a dot."""
    if suffix:
        return str(Path(name).with_suffix(f".{suffix}"))
    return str(Path(name).with_suffix(".png")) if Path(name).suffix.lower() in READ_ONLY else name


def is_picture(name: str) -> bool:
    """Tell by its name whether a file of a folder is a picture."""
    return os.path.splitext(name)[1].lower() in READ_ONLY.union(files.FORMATS)


def _key(path: Path) -> str:
    """Give what is equal for the names of one file: on Windows, and on most disks of a Mac, case does not count."""
    name = os.path.normcase(path)
    return name.lower() if sys.platform == "darwin" else name


def expand(inputs: Sequence[str]) -> tuple[list[Path], bool]:
    """List the files that the arguments mean, and tell whether they name more than one plain file."""
    sources: list[Path] = []
    several = len(inputs) > 1
    for text in inputs:
        if not text:  # of a shell variable that is not set; the system would take it for the folder we are in
            raise OptionError("an empty IN: name a file, a folder or a glob")
        path = Path(text)
        if os.path.isdir(path):
            found = _pictures(path)
            several = True
        elif os.path.exists(path):
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(text, recursive=True) if os.path.isfile(match))
            several = several or glob.has_magic(text)
        if not found:
            raise OutputError(f"{text}: no such file, or no pictures in it")
        sources.extend(found)
    return sources, several


def _pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder, by name. Raises: ImageError if it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if is_picture(path.name) and path.is_file())
    except OSError as exc:
        raise ImageError(f"{folder}: the folder cannot be read ({exc.strerror})") from exc
