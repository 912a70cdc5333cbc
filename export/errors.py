"""The error of exporting; it belongs to the SDK's tree, as export stands on the SDK."""

from sdk.errors import SRError


class ExportError(SRError):
    """A run cannot be exported, or its export does not match PyTorch."""
