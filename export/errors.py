"""The error of exporting; it belongs to the SDK's tree, as export stands on the SDK."""

from sdk.errors import SRError


class ExportError(SRError):
    """A run cannot be exported, or its export does not match PyTorch."""


def printable(text: str) -> str:
    """Put a message on one line, without what gives orders to the terminal: files of others may name things so."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
