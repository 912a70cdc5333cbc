"""Pictures for every test: seeded and synthetic, so that tests need nothing outside the repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

MakePhoto = Callable[..., np.ndarray]


def _draw_photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw a picture with the statistics of a photograph: soft light, hard edges, fine texture.

    Returns: (height, width, 3) uint8 RGB; the same for the same arguments.
    """
    rng = np.random.default_rng((height, width, seed))
    light = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    image = light.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for index in range(12):
        left, right = sorted(int(value) for value in rng.integers(0, width, 2))
        top, bottom = sorted(int(value) for value in rng.integers(0, height, 2))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if index % 2 else draw.rectangle)((left, top, right, bottom), fill=colour)
    image = image.filter(ImageFilter.GaussianBlur(0.5))
    texture = rng.normal(0, 4, (height, width, 1))
    return np.clip(np.asarray(image) + texture, 0, 255).astype(np.uint8)


@pytest.fixture
def make_photo() -> MakePhoto:
    """Give `make_photo(height, width, seed)`, which draws (height, width, 3) uint8 RGB."""
    return _draw_photo


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """Write six photographs of several sizes, PNG and JPEG, the shortest side 96 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, (height, width) in enumerate([(96, 128), (128, 96), (112, 112), (130, 101), (96, 160), (120, 97)]):
        image = Image.fromarray(_draw_photo(height, width, index))
        if index % 2:
            image.save(folder / f"photo{index}.jpg", quality=95, subsampling=0)
        else:
            image.save(folder / f"photo{index}.png")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PyTorch's sums have one order."""
    import torch  # which most tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
