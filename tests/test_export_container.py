"""The container recipe, read and, as far as that goes without Docker, run: nobody has built the image here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sdk.cli import main as sr_upscale

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "export" / "container"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_instructions() -> list[tuple[str, str]]:
    """Give (instruction, its text) of each line of the Dockerfile, continued lines joined, comments left out."""
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


INSTRUCTIONS = read_instructions()


def texts(instruction: str) -> list[str]:
    return [text for name, text in INSTRUCTIONS if name == instruction]


def settings(instruction: str) -> dict[str, str]:
    """Give the NAME=value pairs of ENV, ARG or LABEL."""
    return dict(pair.split("=", 1) for text in texts(instruction) for pair in shlex.split(text))


def copies() -> list[tuple[list[str], str]]:
    """Give (sources in the repository, target) of each COPY."""
    words = [[word for word in text.split() if not word.startswith("--")] for text in texts("COPY")]
    return [(sources, target) for *sources, target in words]


def is_sent(path: str, patterns: list[str]) -> bool:
    """Tell whether a file or folder of the repository reaches the build: the last pattern that fits decides."""
    sent = True
    for pattern in patterns:
        name = pattern.removeprefix("!").removeprefix("**/")
        if any(fnmatch(part, name) for part in (path.split("/") if "**/" in pattern else [path, path.split("/")[0]])):
            sent = pattern.startswith("!")
    return sent


def test_every_copied_file_exists_and_is_sent_to_the_build():
    lines = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    sources = [source for found, _ in copies() for source in found]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists() and is_sent(source, patterns), source
    assert not is_sent("sdk/__pycache__", patterns)
    for path in (".git", ".venv", "runs", "demo", "build", "tests"):
        assert not is_sent(path, patterns), path


def test_extras_exist_and_hold_one_onnxruntime():
    extras = settings("ARG")["EXTRAS"].split(",")
    assert {"gpu", "tensorrt"} <= set(extras) <= set(PROJECT["optional-dependencies"]) - {"cpu"}
    named = re.findall(r"EXTRAS=([a-z,]+)", (FOLDER / "Dockerfile").read_text(encoding="utf-8"))
    assert {extra for names in named for extra in names.split(",")} <= set(PROJECT["optional-dependencies"])


def test_variables_are_those_that_the_sdk_reads():
    read = {
        name
        for path in (ROOT / "sdk").rglob("*.py")
        for name in re.findall(r'environ\.get\(\s*"(SR_[A-Z_]+)"', path.read_text(encoding="utf-8"))
    }
    ours = {name: value for name, value in settings("ENV").items() if name.startswith("SR_")}
    assert ours.pop("SR_EXTRAS") == "${EXTRAS}"  # for the entry point
    assert ours == {"SR_ENGINE_DIR": "/engines", "SR_CACHE_DIR": "/cache"} and set(ours) <= read
    assert set(json.loads(texts("VOLUME")[0])) == {*ours.values(), "/state"}
    (folders,) = re.findall(r"install --directory --mode 1777 (.*)", "\n".join(texts("RUN")))
    assert set(folders.split()) == {*ours.values(), "/state", "/models", "/in", "/out"}


def test_it_runs_as_a_user_without_rights_from_a_pinned_base():
    assert texts("USER") == ["10001"]  # a number, which Kubernetes can tell from root
    order = [name for name, _ in INSTRUCTIONS]
    assert order.index("USER") > max(index for index, name in enumerate(order) if name in ("RUN", "COPY"))
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", settings("ARG")["BASE"])
    labels = settings("LABEL")
    assert labels["org.opencontainers.image.title"] == PROJECT["name"]
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]


def test_commands_exist():
    ([entry],), (command,) = map(json.loads, texts("ENTRYPOINT")), map(json.loads, texts("CMD"))
    placed = {target: sources for sources, target in copies()}
    assert placed[f"/usr/local/bin/{entry}"] == ["export/container/entrypoint.sh"]
    assert sr_upscale.make_context("sr-upscale", command).params["output"] == "/out"
    (health,) = texts("HEALTHCHECK")
    program, *options = json.loads(health.split("CMD", 1)[1])
    assert program in PROJECT["scripts"] and options == ["--version"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build the wheel from what the Dockerfile copies, and install it without its dependencies."""
    folder = tmp_path_factory.mktemp("container")
    source, wheels, target = (folder / name for name in ("src", "wheels", "site"))
    source.mkdir()
    for sources, place in copies():
        for name in sources if not place.startswith("/") else []:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / place)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


def run_entry_point(installed: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.pathsep.join([str(installed / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": str(installed),
        "SR_CACHE_DIR": str(tmp_path / "cache"),
        "SR_ENGINE_DIR": str(tmp_path / "engines"),
        "TMPDIR": str(tmp_path),
    }
    command = ["sh", str(FOLDER / "entrypoint.sh"), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


needs_shell = pytest.mark.skipif(not shutil.which("sh"), reason="no POSIX shell")


@needs_shell
def test_the_wheel_of_the_copied_files_warms_up(installed, tmp_path):
    done = run_entry_point(installed, tmp_path, "warm", "--device", "cpu", "--backend", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "model fast-x2" in done.stderr and "backend onnxruntime" in done.stderr and "device cpu" in done.stderr
    (large,) = tmp_path.glob("*/large.png")
    with Image.open(large) as picture:
        assert picture.size == (128, 128)


@needs_shell
def test_a_warm_up_that_cannot_work_fails(installed, tmp_path):
    done = run_entry_point(installed, tmp_path, "warm", "--model", "/models/none")
    assert done.returncode == 1 and "/models/none" in done.stderr


@needs_shell
def test_everything_else_is_for_sr_upscale(installed, tmp_path, photo_folder):
    arguments = [str(photo_folder), "-o", str(tmp_path / "out"), "--device", "cpu", "--backend", "onnxruntime"]
    done = run_entry_point(installed, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in photo_folder.iterdir()}
    done = run_entry_point(installed, tmp_path, "--version")
    assert done.returncode == 0 and "version" in done.stdout


@needs_shell
def test_serve_starts_the_server_for_everybody_who_reaches_the_container(tmp_path):
    program = tmp_path / "bin" / "sr-serve"  # one that tells of its arguments
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$*"\n')
    program.chmod(0o755)
    done = run_entry_point(tmp_path, tmp_path, "serve", "--port", "9")
    assert done.stdout.split() == ["--host", "0.0.0.0", "--state", "/state", "--port", "9"]
    assert texts("EXPOSE") == ["8000"]


def test_the_manifests_for_kubernetes_fit_the_server():
    cli = pytest.importorskip("sdk.serve.cli")
    service, stateful = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = stateful["spec"]["template"]
    assert service["spec"]["selector"] == stateful["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    verb, *arguments = container["args"]
    assert verb == "serve"
    options = cli.main.make_context("sr-serve", ["--host", "0.0.0.0", "--state", "/state", *arguments]).params
    assert options["port"] == container["ports"][0]["containerPort"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > options["grace_s"]
    assert str(pod["spec"]["securityContext"]["runAsUser"]) == texts("USER")[0]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    claims = {claim["metadata"]["name"] for claim in stateful["spec"]["volumeClaimTemplates"]}
    assert set(mounted.values()) == volumes | claims
    assert set(json.loads(texts("VOLUME")[0])) | {"/tmp"} <= set(mounted)  # nothing else can be written
    assert os.path.dirname(options["api_keys"]) in mounted
    source = (ROOT / "sdk" / "serve" / "app.py").read_text(encoding="utf-8")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        found = container[probe]["httpGet"]
        assert f'@router.get("{found["path"]}"' in source
        assert found["port"] in {port["name"] for port in container["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
