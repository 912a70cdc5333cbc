"""Which device a process computes on."""

from __future__ import annotations

import pytest

from train.devices import choose_device
from train.errors import ResourceError, TrainError


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(TrainError, match=f"device {name}: "):
        choose_device(name)


@pytest.mark.parametrize(("name", "rank", "expected"), [
    ("auto", None, "cuda"), ("auto", "1", "cuda:1"), ("cuda", "1", "cuda:1"), ("cuda:0", "1", "cuda:0"),
    ("cpu", "1", "cpu"), ("auto", "2", None), ("cuda", "2", None),
])  # fmt: skip
def test_every_process_has_its_gpu(
    name: str, rank: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    if expected is None:  # the third of three processes, and two GPUs: never the CPU beside them
        with pytest.raises(ResourceError, match="PyTorch sees 2 CUDA devices here"):
            choose_device(name)
    else:
        assert str(choose_device(name)) == expected
