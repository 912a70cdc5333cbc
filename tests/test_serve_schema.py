"""The API against its own OpenAPI document, by a tool that makes up requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import httpx
import serving

# Starlette tells in Allow the methods of the first route of a path; and not all bytes are a picture.
LEFT_OUT = "allow_header_conformance,positive_data_acceptance"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving.running(serving.make_server(tmp_path_factory.mktemp("state"), keys=("secret",))) as found:
        yield found


def test_the_api_is_what_its_document_says(address, tmp_path):
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{address}/openapi.json", "--seed", "1"]
    command += ["-H", "Authorization: Bearer secret", "--max-examples", "10", "--exclude-checks", LEFT_OUT]
    command += ["--generation-database", "none", "--no-color", "--report-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr


def test_the_document_names_the_models_and_needs_no_key(address):
    document = httpx.get(f"{address}/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert set(document["paths"]) == {
        "/v1/upscale", "/v1/models", "/v1/jobs", "/v1/jobs/{name}", "/v1/jobs/{name}/events", "/v1/jobs/{name}/result",
        "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    parameters = {entry["name"]: entry["schema"] for entry in document["paths"]["/v1/upscale"]["post"]["parameters"]}
    assert parameters["model"]["enum"] == ["blur"]
    assert set(parameters) == {"model", "factor", "format", "quality"}
    assert "bearer" in json.dumps(document["components"]["securitySchemes"])
