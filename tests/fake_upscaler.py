"""A model for benchmark tests, that repeats pixels."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *, scale: int) -> None:
    """Let a benchmark find a model "fake" of a scale, whatever it is asked for."""
    stage = SimpleNamespace(name="96", weights=SimpleNamespace(sha256="0" * 64))
    manifest = SimpleNamespace(name="fake", scale=scale, training={"parameters": 7})
    loaded = SimpleNamespace(manifest=manifest, stage=lambda name: stage)
    monkeypatch.setattr(module, "Upscaler", lambda model=None, **options: FakeUpscaler(scale))
    monkeypatch.setattr(module, "Bundle", SimpleNamespace(load=lambda model: loaded))


class FakeUpscaler:
    """Stands in for sdk.Upscaler."""

    info = {"backend": "fake", "engine": "fake 1", "device": "cpu", "precision": "fp32"}

    def __init__(self, scale: int):
        self.scale = scale

    def __enter__(self) -> FakeUpscaler:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def upscale(self, image: np.ndarray) -> np.ndarray:
        return image.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
