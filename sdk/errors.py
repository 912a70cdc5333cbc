"""Every error that the SDK raises on purpose.

SRError
  ImageError          not a picture, or one whose dtype, shape or values are not supported
  BundleError         a model folder that is missing, corrupt or of an unknown version
  OptionError         an argument out of range; also a ValueError
  BackendError        an engine failed while running
    BackendUnavailable  an engine that is not installed, or a device that is not there
    OutOfMemory         the engine ran out of memory
  OutputError         a result that cannot be written, or would overwrite a file unasked
"""


class SRError(Exception):
    """Base of all errors of the SDK."""


class ImageError(SRError):
    """The input is not a picture that can be enlarged."""


class BundleError(SRError):
    """A model bundle is missing, corrupt, or of a version that this SDK does not know."""


class OptionError(SRError, ValueError):
    """An argument is not one of the allowed values."""


class BackendError(SRError):
    """An inference engine failed."""


class BackendUnavailable(BackendError):
    """The engine is not installed, or the device it was asked for is not there."""


class OutOfMemory(BackendError):
    """The engine ran out of memory."""


class OutputError(SRError):
    """A result cannot be written."""
