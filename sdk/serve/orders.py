"""What a client may ask for, what becomes of it, and how it is told of a failure."""

from __future__ import annotations

import threading
import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..resize import MAX_FACTOR

# Format of a result -> its content type.
MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "jpg": "image/jpeg",
    "avif": "image/avif",
    "tiff": "image/tiff",
    "tif": "image/tiff",
    "gif": "image/gif",
    "bmp": "image/bmp",
}


class Order(BaseModel):
    """How a picture is to be enlarged and written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, max_length=100, description="Name of a model; without it, the server's first one.")
    factor: float | None = Field(
        None,
        gt=0,
        le=MAX_FACTOR,
        allow_inf_nan=False,
        description="How much larger each side becomes; without it, the model's own factor.",
    )
    format: Literal["png", "jpeg", "jpg", "webp", "avif", "tiff", "tif", "gif", "bmp"] = Field(
        "png", description="Of the result; animations stay animated in png (APNG), webp, avif and gif."
    )
    quality: int = Field(95, ge=1, le=100, description="Of jpeg, webp and avif.")

    @property
    def media_type(self) -> str:
        """The content type of the result."""
        return MEDIA_TYPES[self.format]


class Failure(Exception):
    """What a client is told instead of a result: an HTTP status and a sentence."""

    def __init__(self, status: int, message: str, *, retry_after_s: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


class Stopped(Exception):
    """The work was stopped because nobody waits for it any more."""


class Watch:
    """How far a piece of work is, and whether it shall end; given to Upscaler as `progress`.

    limit_s: from now. advice: for whoever sent what takes longer. Thread-safe.
    """

    def __init__(self, limit_s: float, *, advice: str = "send a smaller picture"):
        self.limit_s, self._advice = limit_s, advice
        self.share = 0.0
        self._ends = time.monotonic() + limit_s
        self._stop = threading.Event()

    def stop(self) -> None:
        """Have the work end at its next batch of windows."""
        self._stop.set()

    @property
    def left_s(self) -> float:
        """How long the work may still take."""
        return max(0.0, self._ends - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for the work any more, or its time is up."""
        return self.is_stopped or time.monotonic() > self._ends

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` has been called."""
        return self._stop.is_set()

    def too_late(self) -> Failure:
        """Word what is told when the time is up."""
        return Failure(504, f"not done within {self.limit_s:g} s: {self._advice}")

    def __call__(self, share: float) -> None:
        """Take note of the share that is done. Raises: Stopped, or Failure if the time is up."""
        self.share = share
        if self.is_stopped:
            raise Stopped
        if time.monotonic() > self._ends:
            raise self.too_late()
