"""Super-resolution in production: `from sdk import Upscaler`."""

from __future__ import annotations

from .bundle import Bundle
from .device_arrays import DeviceArray
from .errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    ImageError,
    OptionError,
    OutOfMemory,
    OutputError,
    SRError,
)
from .stats import Stats
from .upscaler import Upscaler
from .version import __version__

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "Bundle",
    "BundleError",
    "DeviceArray",
    "ImageError",
    "OptionError",
    "OutOfMemory",
    "OutputError",
    "SRError",
    "Stats",
    "Upscaler",
    "__version__",
]
