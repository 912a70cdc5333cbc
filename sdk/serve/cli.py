"""sr-serve: super-resolution over HTTP, with a page for people."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

import click

from ..errors import BackendUnavailable, OptionError, OutputError, SRError
from ..version import __version__
from .options import Options

NEEDED = ("fastapi", "uvicorn", "multipart", "prometheus_client", "fastapi_offline")
SECONDS = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(min=1)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 takes any that is free.")
@click.option(
    "--model",
    "models",
    multiple=True,
    show_default="all that are shipped",
    help="A shipped model or a bundle folder; may be repeated, the first is the default.",
)
@click.option("--backend", default=Options.backend, help="auto, tensorrt, onnxruntime or openvino.")
@click.option("--device", default=Options.device, help="auto, cpu, cuda:N or cuda:N,M.")
@click.option("--precision", default=Options.precision, help="auto, fp32, fp16, bf16 or int8.")
@click.option("--batch", type=COUNT, show_default="what the engine likes", help="Windows run at once.")
@click.option("--memory", "memory_mib", type=COUNT, show_default="automatic", help="MiB for an engine's activations.")
@click.option("--workers", type=COUNT, default=Options.workers, help="Requests worked on at once.")
@click.option("--job-workers", type=COUNT, default=Options.job_workers, help="Jobs worked on at once.")
@click.option("--queue", "places", type=COUNT, default=Options.places, help="Requests under way; others get a 429.")
@click.option(
    "--max-body", "max_body_mib", type=COUNT, default=Options.max_body_mib, help="MiB that a client may send."
)
@click.option("--max-pixels", type=COUNT, default=Options.max_pixels, help="Of a picture.")
@click.option("--max-result-pixels", type=COUNT, default=Options.max_result_pixels, help="Of a result.")
@click.option(
    "--transfer-timeout",
    "transfer_s",
    type=SECONDS,
    default=Options.transfer_s,
    help="s for a body to come in, and for a result to go out.",
)
@click.option(
    "--timeout", "request_s", type=SECONDS, default=Options.request_s, help="s for a request, waiting included."
)
@click.option("--job-timeout", "job_s", type=SECONDS, default=Options.job_s, help="s for the work on a job.")
@click.option("--grace", "grace_s", type=click.IntRange(min=0), default=Options.grace_s, help="s for what is under way "
              "when the server is told to end.")  # fmt: skip
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    show_default="~/.local/state/sr-sdk/serve",
    help="Folder of the jobs and of the work under way.",
)
@click.option("--keep", "keep_h", type=SECONDS, default=Options.keep_h, help="Hours that the result of a job is kept.")
@click.option("--max-state", "max_state_mib", type=COUNT, default=Options.max_state_mib, help="MiB of all jobs.")
@click.option("--api-keys", type=click.Path(path_type=Path), help="A file with an API key on each line.")
@click.version_option(__version__)
def main(host: str, port: int, state: Path | None, api_keys: Path | None, **options: Any) -> None:
    """Serve super-resolution over HTTP: a page for people at /, an API below /v1, its documentation at /docs."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise BackendUnavailable(f"sr-serve needs {', '.join(missing)}: pip install 'sr-sdk[serve]'")
        keys = _read_keys(api_keys) if api_keys else ()
        listener = listen(host, port)
        if not keys and not _is_loopback(listener):
            logging.warning("whoever reaches this machine may use the server: --api-keys FILE lets only some")
        failure = _run(listener, state or _state_folder(), Options(**options, keys=keys))
    except SRError as exc:
        raise click.ClickException(str(exc)) from exc
    if failure:
        raise click.ClickException(str(failure)) from failure


def _run(listener: socket.socket, state: Path, options: Options) -> SRError | None:
    """Serve until a signal comes, or the default model turns out not to work; give that error."""
    import uvicorn

    from .app import build_app
    from .connections import connection_limit, protocol
    from .server import Server

    failures: list[SRError] = []

    def give_up(exc: SRError) -> None:
        failures.append(exc)
        serving.should_exit = True

    server = Server(state, options, on_failure=give_up)

    class Draining(uvicorn.Server):
        """Tells the server of a signal at once: events end, no other job begins, /readyz says no."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            server.drain()
            super().handle_exit(sig, frame)

    serving = Draining(
        uvicorn.Config(
            build_app(server),
            http=protocol(connection_limit()),
            log_level="warning",
            timeout_graceful_shutdown=options.grace_s,
            lifespan="on",
        )
    )
    names = ", ".join(facts["name"] for facts in server.models.describe())
    logging.info("models: %s", names)
    logging.info("page: %s API: %s/docs", *(2 * [_address(listener)]))
    # uvicorn passes the signal on when it has ended; what it asked for has been done by then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    serving.run(sockets=[listener])
    if not server.is_still:
        logging.warning("work that could not be stopped is given up; its jobs are done by the next server")
        logging.shutdown()
        os._exit(1 if failures else 0)  # it would be waited for
    return failures[0] if failures else None


def listen(host: str, port: int) -> socket.socket:
    """Take a port. Raises: OutputError if it is taken, or the address is not of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Told the protocol, so that asyncio sends small answers at once, and not with the next acknowledgement.
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
        return listener
    except OSError as exc:
        raise OutputError(
            f"{host} port {port} cannot be listened on ({exc.strerror}): --host and --port choose others"
        ) from exc


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _state_folder() -> Path:
    """Give the folder for what must outlive the server. Raises: OptionError for a user without a home folder."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sr-sdk" / "serve"
    raise OptionError("there is no home folder for the jobs: --state FOLDER names another")


def _read_keys(path: Path) -> tuple[str, ...]:
    """Read API keys, one a line; empty lines and those that begin with # are none. Raises: OptionError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is not text"
        raise OptionError(f"--api-keys {path}: cannot be read ({reason})") from exc
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise OptionError(f"--api-keys {path}: keys are of printable ASCII characters, which any client can send")
    if not keys:
        raise OptionError(f"--api-keys {path}: holds no key; write one on each line")
    return keys


if __name__ == "__main__":
    main()
