"""Export of trained runs: PyTorch -> ONNX, checked, as a bundle for the SDK."""
