"""The import arrows of the architecture, held by reading every file's imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"sdk", "train", "export", "benchmarks"}
# folder -> our folders that it may import.
ALLOWED = {
    "sdk": set(),
    "train": set(),
    "export": {"sdk", "train"},
    "benchmarks": {"sdk", "train"},
}
# Outside engines' own files and the command, the runtime stands on these alone.
RUNTIME = {"numpy", "PIL"}
# File, or folder of files, -> what it may import besides, where it is used.
OPTIONAL = {
    "sdk/backends/onnxruntime.py": {"onnxruntime"},
    "sdk/backends/openvino.py": {"openvino"},
    "sdk/backends/tensorrt.py": {"tensorrt"},
    "sdk/backends/folding.py": {"onnx"},
    "sdk/vips.py": {"pyvips"},
    "sdk/video": {"av"},
    "sdk/cluster.py": {"ray"},
    "sdk/cluster_worker.py": {"ray"},
    "sdk/remote.py": {"fsspec"},
    "sdk/cli.py": {"click"},
    "sdk/serve": {"click", "fastapi", "fastapi_offline", "starlette", "pydantic", "prometheus_client", "uvicorn"},
}
# Commands, which nobody imports: what they stand on is imported first.
COMMANDS = ("sdk/cli.py", "sdk/serve/")
TORCH_FREE_BENCHMARKS = {"cli", "demo", "report", "machine"}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """List the first names of all absolute imports of a file, or of those that run when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folders_import_only_what_the_architecture_allows(folder):
    for path in sources(folder):
        # A folder's own names are imported relatively, so even they do not appear here.
        assert imports(path) & OURS <= ALLOWED[folder], path


def test_export_takes_only_documented_parts_of_training():
    allowed = {"checkpoint", "errors", "feature_nets", "models", "recipe", "run_folder", "stages", "validation"}
    for path in sources("export"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("train"):
                assert node.module.split(".")[1] in allowed, (path, node.module)


def optional(name: str) -> set[str]:
    """Give what a file may import besides the runtime's two packages."""
    return set().union(*(names for place, names in OPTIONAL.items() if name.startswith(place)))


def test_the_runtime_stands_on_numpy_and_pillow():
    for path in sources("sdk"):
        name = path.relative_to(ROOT).as_posix()
        third_party = imports(path) - set(sys.stdlib_module_names) - RUNTIME
        assert third_party <= optional(name), name


def test_optional_packages_are_imported_only_when_used():
    for path in sources("sdk"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(COMMANDS):
            assert not imports(path, top_level=True) & optional(name), name


def test_the_runtime_knows_nothing_of_its_commands():
    for path in sources("sdk"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(COMMANDS):
            assert not re.search(r"from \.+(cli|serve)\b|from \.+ import .*\b(cli|serve)\b", path.read_text()), name


def test_benchmarks_import_torch_and_train_only_inside_functions():
    for path in sources("benchmarks"):
        if path.stem in TORCH_FREE_BENCHMARKS:
            assert not imports(path, top_level=True) & {"torch", "train"}, path


def test_sdk_imports_with_training_and_engines_blocked():
    blocked = ["torch", "torchvision", "onnx", "onnxruntime", "openvino", "tensorrt", "pyvips", "av"]
    blocked += ["click", "safetensors", "matplotlib", "fastapi", "pydantic"]
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport sdk; sdk.Upscaler; sdk.Bundle"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_no_file_is_a_drawer_for_everything(folder):
    assert not {path.stem for path in sources(folder)} & {"utils", "helpers", "common", "misc"}
