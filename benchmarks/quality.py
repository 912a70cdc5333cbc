"""Score models and interpolation on folders of pictures, by the protocol of the super-resolution papers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdk import Bundle, ImageError, Upscaler

from .lpips_like import MIN_SIDE, Distance, load_distance
from .metrics import WINDOW, colour_drift, grid_excess, luma, psnr, ssim
from .pictures import BICUBIC, BILINEAR, enlarge, find_pictures, read_picture
from .result import check_writable, model_facts, result_head
from .sheet import draw_sheet, write_sheet

PROTOCOL = (
    "HR is cropped to a multiple of the scale; LR is its reduction by PIL's bicubic. Results are uint8. PSNR-Y and "
    "SSIM-Y: on Y (BT.601 limited range, unrounded) with `scale` pixels shaved off each side; PSNR ends at 100 dB; "
    "SSIM with an 11x11 Gaussian of sigma 1.5, valid positions, K1 0.01, K2 0.03, L 255. LPIPS-like (SqueezeNet): "
    "the LPIPS v0.1 form on whole RGB pictures; not LPIPS, whose SqueezeNet weights may differ. Colour drift: the "
    "largest difference of a channel's mean, in 8-bit code values. Grid: by how many dB a grid of period 4 or 2 lifts "
    "the spectrum of Y above the original's there (benchmarks/metrics.py). Every figure of a set is the mean over its "
    "pictures."
)

Method = Callable[[np.ndarray], np.ndarray]
Track = Callable[[Sequence[Path], str], AbstractContextManager[Iterable[Path]]]


@dataclass(frozen=True)
class Settings:
    """What is scored. models: shipped names or folders, None for the default one.

    weights: folder of the perceptual distance; None: SR_WEIGHTS_DIR, and without that the figure is left out. sheet:
    PNG file for patches of all methods, one for each scale: "-x2" and the like are added to its name.
    """

    folders: tuple[Path, ...]
    models: tuple[str | None, ...] = (None,)
    backend: str = "auto"
    precision: str = "auto"
    weights: str | None = None
    sheet: Path | None = None


def run_quality(settings: Settings, *, track: Track = lambda paths, label: nullcontext(paths)) -> dict[str, Any]:
    """Score every model, bicubic and bilinear.

    track: wraps the pictures of a folder, to show how far it is.
    Returns: the JSON form: facts, and one row for each folder and method.
    Raises: SRError for a missing model, a folder without pictures, or a picture that is unreadable or too small.
    """
    for folder in settings.folders:
        find_pictures(folder)  # a wrong folder is told before anything is loaded
    distance, missing = load_distance(settings.weights)
    head = result_head("quality", protocol=PROTOCOL)
    models: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    by_scale: dict[int, dict[str, Method]] = {}
    with ExitStack() as stack:
        for model in settings.models:
            upscaler = stack.enter_context(Upscaler(model, backend=settings.backend, precision=settings.precision))
            methods = by_scale.setdefault(upscaler.scale, interpolations(upscaler.scale))
            bundle = Bundle.load(model)
            name = _free_name(bundle.manifest.name, methods)
            methods[name] = upscaler.upscale
            engine = {key: upscaler.info[key] for key in ("backend", "engine", "device", "precision")}
            models.append({"method": name} | model_facts(bundle) | engine)
        if settings.sheet:
            check_writable(settings.sheet)
        for folder in settings.folders:
            for scale, methods in by_scale.items():
                rows += evaluate(folder, scale=scale, methods=methods, distance=distance, track=track)
        if sheet := settings.sheet:
            for scale, methods in by_scale.items():
                shown = {name: method for name, method in methods.items() if name != "bilinear"}
                drawn = draw_sheet(settings.folders, scale=scale, methods=shown, prepare=read_pair)
                write_sheet(drawn, sheet.with_name(f"{sheet.stem}-x{scale}.png"))
    return head | {"models": models, "lpips_like_missing": missing, "rows": rows}


def interpolations(scale: int) -> dict[str, Method]:
    """Give the methods that every model is shown beside."""
    return {
        "bilinear": partial(enlarge, scale=scale, resample=BILINEAR),
        "bicubic": partial(enlarge, scale=scale, resample=BICUBIC),
    }


def evaluate(
    folder: Path,
    *,
    scale: int,
    methods: Mapping[str, Method],
    distance: Distance | None = None,
    track: Track = lambda paths, label: nullcontext(paths),
) -> list[dict[str, Any]]:
    """Score methods on every picture of a folder: a row for each method, with means and each picture's scores."""
    dataset = folder.resolve().name
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    with track(find_pictures(folder), f"{dataset} x{scale}") as paths:
        for path in paths:
            lr, hr = read_pair(path, scale)
            for name, method in methods.items():
                scores[name].append({"file": path.name, **score(method(lr), hr, scale=scale, distance=distance)})
    return [
        {"dataset": dataset, "scale": scale, "method": name, "means": _means(pictures), "pictures": pictures}
        for name, pictures in scores.items()
    ]


def read_pair(path: Path, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Give LR and HR of a file, as the protocol makes them. Raises: ImageError."""
    hr = crop_to_scale(read_picture(path), scale, name=str(path))
    return reduce(hr, scale), hr


def crop_to_scale(picture: np.ndarray, scale: int, *, name: str) -> np.ndarray:
    """Cut (H, W, 3) at right and bottom to multiples of the scale.

    Raises: ImageError if less than SSIM's window is left inside the shaved border, or than LPIPS-like can pool.
    """
    height, width = (side // scale * scale for side in picture.shape[:2])
    smallest = max(WINDOW + 2 * scale, MIN_SIDE)
    if min(height, width) < smallest:
        raise ImageError(f"{name}: {width}x{height} pixels, at least {smallest}x{smallest} are needed")
    return picture[:height, :width]


def reduce(hr: np.ndarray, scale: int) -> np.ndarray:
    """Make the protocol's LR: (H, W, 3) uint8 -> (H/scale, W/scale, 3) uint8."""
    return np.asarray(Image.fromarray(hr).resize((hr.shape[1] // scale, hr.shape[0] // scale), BICUBIC))


def score(sr: np.ndarray, hr: np.ndarray, *, scale: int, distance: Distance | None = None) -> dict[str, float]:
    """Compare a result with its original, both (H, W, 3) uint8 RGB; `distance` adds "lpips_like"."""
    y_sr, y_hr = (luma(image)[scale:-scale, scale:-scale] for image in (sr, hr))
    scores = {"psnr_y_db": psnr(y_sr, y_hr), "ssim_y": ssim(y_sr, y_hr)}
    if distance is not None:
        scores["lpips_like"] = distance(sr, hr)
    return scores | {"colour_drift": colour_drift(sr, hr), "grid_db": grid_excess(y_sr, y_hr)}


def _means(pictures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: float(np.mean([picture[key] for picture in pictures])) for key in pictures[0] if key != "file"}


def _free_name(name: str, taken: Mapping[str, Method]) -> str:
    """Number a model that is called as one before it."""
    names = [name, *(f"{name} #{number}" for number in range(2, len(taken) + 2))]
    return next(candidate for candidate in names if candidate not in taken)
