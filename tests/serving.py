"""Servers for tests: in this process, where a test can reach in, or as the command, where it can be killed."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import bundles
import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from sdk.errors import SRError
from sdk.serve import models as serve_models
from sdk.serve.app import build_app
from sdk.serve.cli import listen
from sdk.serve.connections import protocol
from sdk.serve.options import Options
from sdk.serve.server import Server

WAIT_S = 60


def make_server(state: Path, **options: object) -> Server:
    """Make a server of the blurring model on ONNX Runtime."""
    wanted = {"models": (str(bundles.shared("blur")),), "backend": "onnxruntime", "device": "cpu"} | options

    def fail(exc: SRError) -> None:
        raise exc

    return Server(state, Options(**wanted), on_failure=fail)


@contextmanager
def running(server: Server, *, port: int = 0) -> Iterator[str]:
    """Run a server in a thread; give its address when it is ready."""
    with listen("127.0.0.1", port) as listener:
        config = uvicorn.Config(
            build_app(server), http=protocol(100), log_level="warning", lifespan="on", timeout_graceful_shutdown=5
        )
        runner = uvicorn.Server(config)
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.warmed.is_set() or not thread.is_alive())
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            runner.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()


@contextmanager
def client(server: Server) -> Iterator[httpx.Client]:
    """Run a server, and give a client of it."""
    with running(server) as address, httpx.Client(base_url=address, timeout=WAIT_S) as made:
        yield made


class Command:
    """sr-serve as a process of its own."""

    def __init__(self, state: Path, *options: str):
        self._log = state.with_name(f"{state.name}.log").open("a")
        command = [sys.executable, "-m", "sdk.serve.cli", "--port", "0", "--state", str(state)]
        command += ["--model", str(bundles.shared("blur")), "--backend", "onnxruntime", "--device", "cpu", *options]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        started = self._log.tell()
        self.process = subprocess.Popen(command, stderr=self._log, stdout=self._log, env=environment)
        until(lambda: "/docs" in self.log[started:] or self.process.poll() is not None)
        found = re.search(r"http://[0-9.]+:[0-9]+", self.log[started:])
        assert found, self.log
        self.address = found[0]

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    def kill(self) -> None:
        """End it as the system does when memory runs out."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def end(self) -> int:
        """Ask it to end; give its exit status."""
        self.process.terminate()
        return self.process.wait(WAIT_S)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self._log.close()


def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens in another thread or process."""
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


def photo(height: int = 24, width: int = 30, channels: int = 3, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def left_files(server: Server) -> list[str]:
    return [path.name for path in server.models.new_file("x").parent.iterdir()]


class Slow:
    """Takes the place of the work: goes on until it is let go or stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun, self.go, self.ended = threading.Semaphore(0), threading.Event(), threading.Event()
        run_file = serve_models.jobs.run_file

        def slow(upscaler, job, options, *, progress):
            self.begun.release()
            try:
                while not self.go.wait(0.01):
                    progress(0.5)
            except BaseException:
                self.ended.set()
                raise
            run_file(upscaler, job, options, progress=progress)

        monkeypatch.setattr(serve_models.jobs, "run_file", slow)
