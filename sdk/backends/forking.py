"""Let a forked child end although the engines of its parent have no threads in it.

An engine that is freed waits for its threads. A fork has none of them, so a child would wait for ever: when it lets go
of the objects that it inherited, and at its exit, when the engine's library cleans up after itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from typing import TypeVar

Engine = TypeVar("Engine")
_living: list[weakref.ref[object]] = []


def spared(engine: Engine) -> Engine:
    """Remember an object of an engine, which it returns: a child that is forked while it lives never frees it."""
    _living[:] = [*(reference for reference in _living if reference() is not None), weakref.ref(engine)]
    return engine


def _spare() -> None:
    """In a child: make the inherited objects immortal, and end without the clean-up of C libraries."""
    engines = [engine for reference in _living if (engine := reference()) is not None]
    for engine in engines:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
    if engines and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "on_exit"):  # of glibc; it runs before what the libraries have registered
            libc.on_exit(libc._exit, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_spare)
