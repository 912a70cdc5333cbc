"""Files on object storage and other hosts, named by URLs, through fsspec: listed, fetched, and put there whole."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import BackendUnavailable, ImageError, OptionError, OutputError
from .inputs import is_picture
from .opening import one_line


def is_url(text: str) -> bool:
    """Tell a URL from the name of a file."""
    return "://" in text


def base_name(url: str) -> str:
    """Give the last part of a URL's path; of http, without what follows a question mark."""
    return (urlsplit(url).path if url.startswith(("http://", "https://")) else url).rsplit("/", 1)[-1]


def expand(url: str) -> list[str]:
    """List the pictures that a URL means: a file, a folder (not those inside it), or a glob.

    Raises: ImageError if it cannot be read, OutputError if there are none.
    """
    with _told(url, ImageError):
        system, path = _open(url)
        if system.isfile(path):  # first: names may hold what globs are made of
            found = [path]
        elif system.isdir(path):
            found = [name for name in system.find(path, maxdepth=1) if is_picture(name)]
        else:
            found = [name for name in system.glob(path) if is_picture(name)] if set(path) & set("*?[") else []
    if not found:
        raise OutputError(f"{url}: no such file, or no pictures in it")
    return sorted(str(system.unstrip_protocol(name)) for name in found)


def names(url: str) -> set[str]:
    """List the names of the files in a folder; none if it is not there. Raises: OutputError if it cannot be read."""
    with _told(url, OutputError):
        system, path = _open(url)
        system.invalidate_cache()
        if not system.exists(path):
            return set()
        return {name.rsplit("/", 1)[-1] for name in system.find(path, maxdepth=1)}


def exists(url: str) -> bool:
    """Tell whether a file is there. Raises: OutputError if that cannot be told."""
    with _told(url, OutputError):
        system, path = _open(url)
        system.invalidate_cache()
        return bool(system.exists(path))


def fetch(url: str, path: Path) -> None:
    """Bring a file to the disk. Raises: ImageError."""
    with _told(url, ImageError):
        system, there = _open(url)
        system.get_file(there, str(path))


def store(path: Path, url: str) -> None:
    """Put a file there; its name appears when it is whole. Raises: OutputError."""
    with _told(url, OutputError):
        system, there = _open(url)
        folder, _, name = there.rpartition("/")
        system.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.sr-{secrets.token_hex(8)}.part-{name}"
        try:
            system.put_file(str(path), temporary)
            system.mv(temporary, there)
        except BaseException:
            with suppress(Exception):  # whatever the storage raises now, the first error is the one to tell
                system.rm_file(temporary)
            raise


def _open(url: str) -> tuple[Any, str]:
    """Give the file system of a URL, and the path in it. Raises: BackendUnavailable without fsspec."""
    try:
        import fsspec
    except ImportError as exc:
        raise BackendUnavailable(f"{url}: URLs need fsspec: pip install 'sr-sdk[ray]'") from exc
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as exc:  # s3fs, gcsfs and others are packages of their own
        raise BackendUnavailable(f"{url}: {one_line(exc)}") from exc
    except ValueError as exc:
        raise OptionError(f"{url}: {one_line(exc)}") from exc
    return system, str(path)


@contextmanager
def _told(url: str, error: type[ImageError] | type[OutputError]) -> Iterator[None]:
    """Turn whatever a storage raises into an error of one line that names the URL."""
    try:
        yield
    except (BackendUnavailable, OptionError):
        raise
    except Exception as exc:  # each storage has errors of its own
        raise error(f"{url}: {one_line(exc) or type(exc).__name__}") from exc
