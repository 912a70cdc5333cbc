"""What the wheel holds, and what the extras may pull in."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=~!;\[ ]", requirement)[0] for requirement in requirements}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_base_installation_is_three_packages():
    assert names(PROJECT["dependencies"]) == {"numpy", "pillow", "click"}


def test_the_two_onnxruntimes_never_meet():
    extras = {extra: names(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}
    both = {"onnxruntime", "onnxruntime-gpu"}
    assert all(len(packages & both) <= 1 for packages in extras.values())
    for extra in ("train", "export", "dev"):
        assert not extras[extra] & both, extra


def test_the_wheel_has_exactly_our_top_levels(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sdk", "train", "export", "benchmarks"}


def test_the_wheel_carries_models_recipes_pictures_and_types(wheel):
    files = set(wheel.namelist())
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sdk" / "models").glob("*/*")}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "train" / "recipes").glob("*.toml")}
    pictures = {path.relative_to(ROOT).as_posix() for path in (ROOT / "export" / "pictures").glob("*")}
    assert "sdk/models/fast-x2/manifest.json" in shipped
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sdk" / "serve" / "page").glob("*")}
    assert "sdk/serve/page/index.html" in page
    assert shipped | recipes | pictures | page | {"sdk/py.typed"} <= files


def test_the_wheel_holds_every_module_and_no_test(wheel):
    files = set(wheel.namelist())
    for folder in ("sdk", "train", "export", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in files
    assert not [name for name in files if Path(name).name.startswith("test_")]


def test_the_commands_exist(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    assert {line.split(" =")[0] for line in text.splitlines() if "=" in line} == {
        "sr-train",
        "sr-export",
        "sr-upscale",
        "sr-bench",
        "sr-serve",
    }


def test_the_shipped_models_are_small():
    folders = [path for path in (ROOT / "sdk" / "models").iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000, folder.name
