"""What `import sdk` takes, and what it gives."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image

import sdk

SDK = Path(sdk.__file__).parent

BLOCKED = ["torch", "torchvision", "onnx", "onnxruntime", "openvino", "click", "matplotlib", "safetensors"]


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
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
        "BackendError", "BackendUnavailable", "Bundle", "BundleError", "DeviceArray", "ImageError", "OptionError",
        "OutOfMemory", "OutputError", "SRError", "Stats", "Upscaler", "__version__",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in sdk.__all__ if name.endswith(("Error", "Unavailable", "Memory"))])
def test_errors_form_one_tree(name: str) -> None:
    assert issubclass(getattr(sdk, name), sdk.SRError)


def test_option_errors_are_value_errors() -> None:
    assert issubclass(sdk.OptionError, ValueError)
    assert issubclass(sdk.BackendUnavailable, sdk.BackendError) and issubclass(sdk.OutOfMemory, sdk.BackendError)


# As in an environment where nothing is installed but numpy, Pillow, one engine and what that needs.
LEAN = """
import importlib.metadata, re, sys

engine, folder, source, target = sys.argv[1:]
needs = [need for need in importlib.metadata.requires(engine) or [] if "extra ==" not in need]
wanted = {"numpy", "pillow", "sr-sdk", engine, *(re.match("[A-Za-z0-9._-]+", need)[0].lower() for need in needs)}
for top, owners in importlib.metadata.packages_distributions().items():
    if not {owner.lower() for owner in owners} & wanted:
        sys.modules[top] = None
assert sys.modules["click"] is None

from sdk import Upscaler

with Upscaler(folder, backend=engine) as upscaler:
    upscaler.upscale_file(source, target)
    (result,) = upscaler.upscale_many([source])
print(result.shape)
"""


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_numpy_pillow_and_one_engine_are_enough(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(engine)
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "in.png")
    places = [str(bundles.shared("blur")), str(tmp_path / "in.png"), str(tmp_path / "out.jpg")]
    assert run(LEAN, engine, *places) == "(16, 24, 3)"
    assert (tmp_path / "out.jpg").exists()


def test_nothing_of_the_runtime_unpickles() -> None:
    """Neither by itself nor through numpy, whose `load` does so unless it is told not to."""
    unpickling = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "torch", "copyreg"}
    for path in SDK.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
                assert node.attr not in ("load", "fromregex", "loadtxt"), path
            assert not {name.partition(".")[0] for name in names} & unpickling, path
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called not in ("eval", "exec", "__import__"), path


def test_pickled_models_are_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return open, (str(tmp_path / "went off"), "w")

    (tmp_path / "model").mkdir()
    for name in ("model.pth", "manifest.json"):
        (tmp_path / "model" / name).write_bytes(pickle.dumps(Bomb()))
        for path in (tmp_path / "model" / name, tmp_path / "model"):
            with pytest.raises(sdk.BundleError):
                sdk.Upscaler(path)
    assert not (tmp_path / "went off").exists()


def test_a_dark_16_bit_picture_is_a_16_bit_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values would all fit into 8 bits: depth is a matter of the dtype alone."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    dark = np.arange(200, dtype=np.uint16).reshape(10, 20)
    with sdk.Upscaler(bundles.shared("identity"), backend="onnxruntime") as upscaler:
        for image in (dark, dark[:, :, None].repeat(3, axis=2), dark // 200):
            result = upscaler.upscale(image)
            assert result.dtype == np.uint16
            np.testing.assert_array_equal(result, image.repeat(2, axis=0).repeat(2, axis=1))
        assert upscaler.upscale(dark.astype(np.uint8)).dtype == np.uint8
