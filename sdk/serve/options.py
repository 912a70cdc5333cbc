"""What a server may be told when it starts; every default stands here."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Options:
    """Of a server.

    models: shipped names or bundle folders, the first is the default one; none means all that are shipped.
    backend, device, precision, batch, memory_mib: of every Upscaler; None is automatic.
    workers, job_workers: requests and jobs worked on at once. places: requests under way, waiting ones among them.
    max_body_mib: of what a client sends; max_pixels, max_result_pixels: of a picture and of a result, or a frame of it.
    transfer_s: for a body to come in, or a result to go out. request_s: for a request, its waiting included; job_s: for
    the work on a job. grace_s: for what is under way at the end. keep_h: hours that the result of a job is kept.
    max_state_mib: of all jobs. keys: one of them is needed, if there are some.
    """

    models: tuple[str, ...] = ()
    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    batch: int | None = None
    memory_mib: int | None = None
    workers: int = 3
    job_workers: int = 2
    places: int = 64
    max_body_mib: int = 64
    max_pixels: int = 50_000_000
    max_result_pixels: int = 200_000_000
    transfer_s: float = 120
    request_s: float = 120
    job_s: float = 3600
    grace_s: int = 30
    keep_h: float = 24
    max_state_mib: int = 4096
    keys: tuple[str, ...] = ()
