"""Memory that an activity takes of a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sdk.backends.cuda import open_device
from sdk.errors import BackendError

INTERVAL_S = 0.002


@contextmanager
def watch_device(device: str) -> Iterator[Callable[[], float | None]]:
    """Look how much memory of a device is free for as long as the context lasts.

    device: "cuda:N", or another that is not looked at. Gives a function: by how many MiB it was less at the worst than
    at the beginning, whoever took them; None for another device, or without the library that tells.
    """
    gpu = None
    if device.startswith("cuda:"):
        with suppress(BackendError):  # PyTorch runs without the SDK's library
            gpu = open_device(int(device.removeprefix("cuda:")))
    if gpu is None:
        yield lambda: None
        return
    with gpu.current():
        before = least = gpu.free_bytes()
    is_over = threading.Event()

    def look() -> None:
        nonlocal least
        with gpu.current():
            while not is_over.wait(INTERVAL_S):
                least = min(least, gpu.free_bytes())

    thread = threading.Thread(target=look, name="sr-device-memory", daemon=True)
    thread.start()
    try:
        yield lambda: (before - least) / 2**20
    finally:
        is_over.set()
        thread.join()
