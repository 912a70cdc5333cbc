"""What `import sdk` takes, and what it gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sdk

BLOCKED = ["torch", "torchvision", "onnx", "onnxruntime", "openvino", "click", "matplotlib", "safetensors"]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_no_engine_no_torch_no_cli_library() -> None:
    code = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None
import sdk, sdk.bundle, sdk.pipeline, sdk.compare, sdk.backends.onnxruntime, sdk.backends.openvino
print(sdk.Upscaler.__name__)
"""
    assert run(code) == "Upscaler"


def test_import_takes_none_of_them_when_they_are_there() -> None:
    code = f"import sys, sdk; print([name for name in {BLOCKED} if name in sys.modules])"
    assert run(code) == "[]"


def test_public_names_are_pinned() -> None:
    assert sorted(sdk.__all__) == [
        "BackendError", "BackendUnavailable", "Bundle", "BundleError", "ImageError", "OptionError", "OutOfMemory",
        "OutputError", "SRError", "Stats", "Upscaler", "__version__",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in sdk.__all__ if name.endswith(("Error", "Unavailable", "Memory"))])
def test_errors_form_one_tree(name: str) -> None:
    assert issubclass(getattr(sdk, name), sdk.SRError)


def test_option_errors_are_value_errors() -> None:
    assert issubclass(sdk.OptionError, ValueError)
    assert issubclass(sdk.BackendUnavailable, sdk.BackendError) and issubclass(sdk.OutOfMemory, sdk.BackendError)
