"""Samples in batches, prepared by other processes; what is in a batch depends on the number of its step alone."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

# Signals that the parent saves at; SIGHUP is a terminal that was closed, and unknown on Windows.
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Steps(Sampler[list[int]]):
    """The sample indices of the steps `first` to `last` - 1; of each batch, the part of one of `count` processes."""

    def __init__(self, first: int, last: int, *, batch: int, rank: int = 0, count: int = 1):
        self.first, self.last, self.batch = first, last, batch
        self.part = range(batch)[rank * batch // count : (rank + 1) * batch // count]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield [step * self.batch + place for place in self.part]


class Made(Dataset[Any]):
    """What a function makes of an index."""

    def __init__(self, make: Callable[[int], Any]):
        self.make = make

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Outlive a signal sent to the whole process group: the parent saves, however long its step, and ends its workers.

    The second SIGTERM counts: it is also how a parent that leaves in mid-epoch ends workers that do not end themselves.
    """
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def batches(
    dataset: Dataset[Any],
    steps: Steps,
    *,
    workers: int,
    pin: bool = False,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Generator[Any, None, None]:
    """Yield the batches of steps: samples of LR and HR as (N, 3, h, w) and (N, 3, H, W), others as `collate` says.

    pin: in page-locked memory, for a GPU.
    """
    # fork shares the decoded pictures with the workers; the start methods that pickle would copy them.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin,
        collate_fn=collate,
    )
    yield from loader
