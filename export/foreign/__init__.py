"""Other people's ONNX files as bundles: read with suspicion, probed, wrapped, measured."""

from .importing import import_onnx

__all__ = ["import_onnx"]
