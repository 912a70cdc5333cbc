"""sr-serve as it is started: what it says, what it refuses, and how it ends."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import bundles
import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")

import serving
from serving import decoded, encoded, photo, until

from sdk.bundle import DEFAULT_MODEL, shipped_models
from sdk.serve import cli

ROOT = Path(__file__).parent.parent


def refused(*arguments: str, state: Path, model: Path | None = None) -> str:
    """Start a server that does not come up; give what it says, one sentence."""
    given = ["--port", "0", "--state", str(state), "--model", str(model or bundles.shared("blur"))]
    command = [sys.executable, "-m", "sdk.serve.cli", *given, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=serving.WAIT_S)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("Error"))


def test_it_says_where_it_is_and_ends_when_told(tmp_path):
    with serving.Command(tmp_path / "state") as command:
        until(lambda: httpx.get(f"{command.address}/readyz").status_code == 200)
        assert f"page: {command.address} API: {command.address}/docs" in command.log
        assert httpx.post(f"{command.address}/v1/upscale", content=encoded(photo())).status_code == 200
        assert "api-keys" not in command.log  # nobody else can reach it
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(serving.WAIT_S) == 0
        assert "Traceback" not in command.log


def test_a_second_signal_does_not_wait_for_the_clients(tmp_path):
    with serving.Command(tmp_path / "state", "--transfer-timeout", "1000") as command:
        host, port = command.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            until(lambda: "sr_requests_receiving 1.0" in httpx.get(f"{command.address}/metrics").text)
            command.process.send_signal(signal.SIGINT)
            until(lambda: not _answers(command.address))
            assert command.process.poll() is None
            command.process.send_signal(signal.SIGINT)
            assert command.process.wait(serving.WAIT_S) == 0


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refused("--port", str(port), state=tmp_path / "state")
    where = f"127.0.0.1 port {port} cannot be listened on (Address already in use)"
    assert told == f"Error: {where}: --host and --port choose others"


def test_what_cannot_be_started_with_is_told(tmp_path):
    state, twin = tmp_path / "state", bundles.copy("blur", tmp_path)
    assert "neither a folder with a manifest.json nor a shipped model" in refused("--model", "nothing", state=state)
    assert "two models have one name: blur, blur" in refused("--model", str(twin), state=state)
    assert "--api-keys /nowhere: cannot be read" in refused("--api-keys", "/nowhere", state=state)
    (tmp_path / "keys").write_text("# none\n\n")
    assert "holds no key" in refused("--api-keys", str(tmp_path / "keys"), state=state)
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    assert "it is not text" in refused("--api-keys", str(tmp_path / "keys"), state=state)
    (tmp_path / "keys").write_text("schl\u00fcssel\n", encoding="utf-8")
    assert "printable ASCII" in refused("--api-keys", str(tmp_path / "keys"), state=state)
    (tmp_path / "file").write_text("")
    assert "jobs cannot be kept there" in refused(state=tmp_path / "file")
    assert "backend 'abacus': one of auto" in refused("--backend", "abacus", state=state)
    (twin / "main.fp32.uint8.onnx").write_bytes(b"")
    assert "Error" in refused(state=state, model=twin)


def test_what_else_stands_in_the_folder_is_left_alone(tmp_path):
    state = tmp_path / "mine"
    (state / "work").mkdir(parents=True)
    (state / "work" / "precious.txt").write_text("mine")
    with serving.Command(state):
        assert (state / "work" / "precious.txt").read_text() == "mine"


def test_one_server_for_one_folder(tmp_path):
    with serving.Command(tmp_path / "state"):
        assert "another sr-serve keeps its jobs there" in refused(state=tmp_path / "state")


def test_whoever_listens_to_everybody_is_warned_unless_there_are_keys(tmp_path):
    with serving.Command(tmp_path / "state", "--host", "0.0.0.0") as command:
        assert "--api-keys FILE lets only some" in command.log
    (tmp_path / "keys").write_text("\ufeff  # ours\n secret \n", encoding="utf-8")
    with serving.Command(tmp_path / "other", "--host", "0.0.0.0", "--api-keys", str(tmp_path / "keys")) as command:
        assert "WARNING" not in command.log
        address = command.address.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_the_listener_knows_its_protocol():
    with cli.listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP, "asyncio leaves Nagle's algorithm on, which costs 40 ms a request"


def test_without_flags_the_shipped_models_are_served(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    seen = []
    monkeypatch.setattr(cli, "_run", lambda listener, state, options: seen.append((listener, state, options)))
    monkeypatch.setattr(cli, "listen", lambda host, port: (host, port))
    monkeypatch.setattr(cli, "_is_loopback", lambda listener: listener[0] == "127.0.0.1")
    done = CliRunner().invoke(cli.main, [])
    assert done.exit_code == 0, done.output
    listener, state, options = seen[0]
    assert listener == ("127.0.0.1", 8000)
    assert state == tmp_path / "state" / "sr-sdk" / "serve"
    assert options == cli.Options()
    server = serving.Server(state, options, on_failure=print)
    names = [facts["name"] for facts in server.models.describe()]
    assert names[0] == DEFAULT_MODEL
    assert set(names) == set(shipped_models())
    server.store.close()


def test_the_extra_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "fastapi" else name)
    done = CliRunner().invoke(cli.main, ["--state", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output == "Error: sr-serve needs fastapi: pip install 'sr-sdk[serve]'\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_commands_of_the_readme_work(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = (found for found in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "curl" in found)
    Image.fromarray(photo()).save(tmp_path / "photo.jpg")
    server = serving.make_server(tmp_path / "state", models=())
    with serving.running(server) as address:
        assert "http://127.0.0.1:8000" in block
        script = block.replace("http://127.0.0.1:8000", address)
        done = subprocess.run(
            ["sh", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=serving.WAIT_S
        )
    assert done.returncode == 0, done.stderr
    for name, shape in (("large.png", (48, 60, 3)), ("large.webp", (96, 120, 3)), ("larger.png", (72, 90, 3))):
        assert decoded((tmp_path / name).read_bytes()).shape == shape
    assert "event: done" in done.stdout
