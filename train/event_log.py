"""Write a run's news for TensorBoard, as an option beside the run's own log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import ResourceError
from .plots import number, validation_of


class EventLog:
    """TensorBoard events of a run: train/*, validation/*, learning_rate, images_per_second, and panels.

    Raises: ResourceError if TensorBoard is not installed or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, done_steps: int = 0):
        """Open the log. done_steps: where the run goes on; what an older process wrote after that is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            raise ResourceError("TensorBoard is not installed: pip install tensorboard") from exc
        self._folder = folder
        try:
            # TensorBoard hides what stands at this step and later in older files of the folder.
            self._writer = SummaryWriter(str(folder), purge_step=done_steps + 1, flush_secs=30)
        except OSError as exc:
            raise self._full(exc) from exc

    def add(self, entry: dict[str, Any]) -> None:
        """Add an entry of the run's log, see train.run_folder.read_log; what is missing or no number is left out."""
        step = number(entry.get("done_steps"))
        if step != step:
            return
        terms = entry["terms"] if isinstance(entry.get("terms"), dict) else {}
        values = {f"train/{name}": number(value) for name, value in terms.items()}
        values |= {f"validation/{name}": value for name, value in validation_of(entry).items()}
        values |= {name: number(entry.get(name)) for name in ("learning_rate", "images_per_second", "skipped")}
        try:
            for tag, value in values.items():
                if value == value:
                    self._writer.add_scalar(tag, value, int(step))
        except OSError as exc:
            raise self._full(exc) from exc

    def add_panel(self, path: Path) -> None:
        """Add a panel, a PNG whose name is its step.

        Raises: ResourceError if it cannot be read or written.
        """
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image("panel", pixels, int(path.stem), dataformats="HWC")
        except OSError as exc:
            raise self._full(exc) from exc

    def close(self) -> None:
        """Write what is left and close the file."""
        try:
            self._writer.close()
        except OSError as exc:
            raise self._full(exc) from exc

    def _full(self, exc: OSError) -> ResourceError:
        return ResourceError(f"{self._folder}: events cannot be written ({exc.strerror or exc}); free space")
