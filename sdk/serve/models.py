"""The models of a server, an Upscaler each, and how they carry an order out."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import jobs
from ..bundle import Bundle
from ..errors import BackendUnavailable, ImageError, OptionError, OutOfMemory, OutputError, SRError
from ..stats import Stats
from ..upscaler import Upscaler
from .orders import Failure, Order, Stopped, Watch

AVIF_TIMES = 8  # as long as others, at least


@dataclass(frozen=True)
class Limits:
    """Of pictures, in pixels: of a source or of its frames, and of a result.

    Of AVIF an eighth, whose encoder takes a second or more for a megapixel and cannot be stopped.
    """

    source_pixels: int
    result_pixels: int


class Models:
    """The Upscalers of a server, opened when they are first needed.

    wanted: shipped names or bundle folders; the first is the default. options: of Upscaler, the same for all.
    folder: where sources and results of the work under way stand.
    Raises: BundleError; OptionError if two have one name.
    Thread-safe.
    """

    def __init__(self, wanted: Sequence[str | Path], options: Mapping[str, Any], *, limits: Limits, folder: Path):
        bundles = [Bundle.load(model) for model in wanted]
        self._bundles = {bundle.manifest.name: bundle for bundle in bundles}
        if len(self._bundles) < len(bundles):
            raise OptionError(f"two models have one name: {', '.join(bundle.manifest.name for bundle in bundles)}")
        self.default = bundles[0].manifest.name
        self._options, self._limits, self._folder = options, limits, folder
        self._opening = {name: threading.Lock() for name in self._bundles}
        self._opened: dict[str, Upscaler] = {}

    def check(self, order: Order) -> None:
        """Refuse an order that no model can carry out. Raises: Failure."""
        if order.model is not None and order.model not in self._bundles:
            raise Failure(422, f"model {order.model!r}: this server has {', '.join(self._bundles)}")

    def upscaler(self, name: str | None) -> Upscaler:
        """Give the Upscaler of a known model. Raises: SRError if it cannot be opened."""
        name = name or self.default
        with self._opening[name]:
            if name not in self._opened:
                self._opened[name] = Upscaler(self._bundles[name].folder, **self._options)
            return self._opened[name]

    def new_file(self, suffix: str) -> Path:
        """Name a file for work under way; no part of the name comes from a client."""
        return self._folder / f"{secrets.token_hex(16)}.{suffix}"

    def enlarge(self, order: Order, source: Path, watch: Watch) -> Path:
        """Carry out an order on a file that holds what a client sent; give the file of the result.

        Raises: Failure; Stopped.
        """
        target = self.new_file(order.format)
        options = jobs.Options(
            quality=order.quality,
            factor=order.factor,
            max_pixels=self._limits.source_pixels,
            max_result_pixels=self._limits.result_pixels // (AVIF_TIMES if order.format == "avif" else 1),
        )
        with _failures({source: "the picture", target: "the result"}):
            watch(0.0)
            jobs.run_file(self.upscaler(order.model), jobs.Job(source, target), options, progress=watch)
        if watch.is_stopped:
            target.unlink()
            raise Stopped
        return target

    def describe(self) -> list[dict[str, Any]]:
        """List what /v1/models tells, the default first."""
        return [
            {
                "name": name,
                "scale": bundle.manifest.scale,
                "summary": str(bundle.manifest.training.get("summary", "")),
                "default": name == self.default,
                "licence": bundle.manifest.licence,
                "notice": bundle.manifest.notice,
            }
            for name, bundle in self._bundles.items()
        ]

    def stats(self) -> dict[str, Stats]:
        """Give the totals of each model that has been opened."""
        return {name: upscaler.stats for name, upscaler in list(self._opened.items())}

    def close(self) -> None:
        """Free the engines."""
        for upscaler in self._opened.values():
            upscaler.close()


@contextmanager
def _failures(names: Mapping[Path, str]) -> Iterator[None]:
    """Turn errors of the SDK into what a client is told, without the names of the server's files."""
    try:
        yield
    except SRError as exc:
        message = str(exc)
        for path, name in names.items():
            message = message.replace(str(path), name)
        raise Failure(_status(exc), message) from exc


def _status(exc: SRError) -> int:
    if isinstance(exc, OutputError):  # of the system: a full disk; otherwise a format that cannot hold the picture
        return 507 if isinstance(exc.__cause__, OSError) else 422
    if isinstance(exc, (ImageError, OptionError)):
        return 422
    return 503 if isinstance(exc, (OutOfMemory, BackendUnavailable)) else 500
