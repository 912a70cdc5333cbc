"""TensorRT on a real GPU; numpy, pillow, pytest and tensorrt with PyCUDA or cuda-python are enough."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sdk import BackendUnavailable, Upscaler
from sdk.backends.tensorrt import engine_dir

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SR_ENGINE_DIR", raising=False)
        patch.setenv("SR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def on_gpu(precision: str) -> Upscaler:
    try:
        return Upscaler("fast-x2", backend="tensorrt", device="cuda:0", precision=precision)
    except BackendUnavailable as exc:
        pytest.skip(str(exc))


def photo(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Draw something smooth with edges: noise would be half precision's hardest case."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(16, axis=0).repeat(16, axis=1)[:height, :width])


def test_half_precision_is_near_and_tiles_are_exact() -> None:
    with on_gpu("fp32") as full, on_gpu("fp16") as half:
        for size in ((96, 120), (1, 1), (500, 333)):
            image = photo(*size)
            whole = full.upscale(image).astype(int)
            error = half.upscale(image) - whole
            assert np.square(error).mean() < 255**2 / 10**5, "50 dB"
            for _ in range(6):  # the later ones as CUDA graphs
                assert abs(full.upscale(image, tile=128) - whole).max() <= 1


def test_threads() -> None:
    images = [photo(64 + 16 * (seed % 3), 80, seed=seed) for seed in range(48)]
    with on_gpu("fp16") as upscaler, ThreadPoolExecutor(8) as pool:
        alone = [upscaler.upscale(image) for image in images]
        for got, want in zip(pool.map(upscaler.upscale, images), alone):
            np.testing.assert_array_equal(got, want)


def test_engines_are_kept_and_damaged_ones_built_anew() -> None:
    on_gpu("fp16").close()

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in engine_dir().glob("*-fp16-*.engine")}

    before = stamps()
    on_gpu("fp16").close()
    assert stamps() == before and len(before) == 1
    (path,) = before
    path.write_bytes(path.read_bytes()[:-1])
    on_gpu("fp16").close()
    assert stamps() != before
