"""Tiles as the SDK cuts them, and as other tools do: what each costs, and how far it is from the untiled result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdk import Bundle, Upscaler
from sdk.errors import BackendUnavailable, OptionError

from . import plain
from .contestants import Runner
from .metrics import psnr
from .pictures import draw_picture, fit_picture, read_picture
from .result import first_line, model_facts, result_head
from .timing import summarise, take_turns

PAD = 10  # pixels; Real-ESRGAN's default tile_pad (xinntao/Real-ESRGAN, inference_realesrgan.py)
PROTOCOL = (
    "One picture, one network, one engine in fp32; contestants take turns as in `latency`. Whole: the picture in "
    "one piece, which the others are held against. SDK: Upscaler as it is, or with tiles of that side and seams "
    "exact or fast. {pad} px around: tiles of that side with {pad} more pixels around each, cut off from the result "
    "and pasted, as Real-ESRGAN does with its defaults; windows are padded to the network's grid by repeating their "
    "edge. Error: largest difference of a pixel from the whole result, code values of 255; off: share of the pixels "
    "with a difference above 1. Peer: a checkpoint that spandrel loads, on PyTorch in fp32."
)


@dataclass(frozen=True)
class Settings:
    """What is cut. size: of the LR picture, (height, width); picture: file that it is made from, None: a drawn one.

    models: bundles; None is the shipped one. tile: side in LR pixels. peers: checkpoints for spandrel, tiled the other
    way only.
    """

    models: tuple[str | None, ...] = (None,)
    size: tuple[int, int] = (768, 1024)
    tile: int = 256
    repeats: int = 5
    picture: Path | None = None
    peers: tuple[Path, ...] = ()


def run_tiling(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Time each way of cutting, and hold its result against the untiled one.

    Returns: the JSON form: facts, and one row for each network and way.
    Raises: BackendUnavailable without OpenVINO, or spandrel for a peer; OptionError for a peer that it cannot load.
    """
    bundles = [Bundle.load(model) for model in settings.models]
    head = result_head("tiling", protocol=PROTOCOL.format(pad=PAD)) | {
        "models": [model_facts(bundle) for bundle in bundles],
        "size": list(settings.size),
        "tile": settings.tile,
        "repeats": settings.repeats,
        "picture": "drawn" if settings.picture is None else settings.picture.name,
    }
    if settings.picture is None:
        lr = draw_picture(settings.size)
    else:
        lr = fit_picture(read_picture(settings.picture), settings.size)
    rows: list[dict[str, Any]] = []
    for bundle in bundles:
        progress(bundle.manifest.name)
        with ExitStack() as stack:
            turns = _open_model(bundle, settings.tile, stack)
            rows += _rows(bundle.manifest.name, turns, lr, settings, scale=bundle.manifest.scale)
    for peer in settings.peers:
        run, scale = open_peer(peer)
        progress(peer.name)
        turns = {"whole": run, f"{PAD} px around": partial(tile_padded, run=run, tile=settings.tile, scale=scale)}
        rows += _rows(peer.name, turns, lr, settings, scale=scale)
    return head | {"rows": rows}


def _open_model(bundle: Bundle, tile: int, stack: ExitStack) -> dict[str, Runner]:
    """Make every way of cutting ready for a bundle; `stack` closes them."""
    whole = plain.open_openvino(bundle, precision="fp32")
    turns: dict[str, Runner] = {"whole": whole}
    for seams in ("exact", "fast"):
        upscaler = stack.enter_context(Upscaler(bundle.folder, backend="openvino", precision="fp32", seams=seams))
        halo = upscaler.info["halo"]
        if seams == "exact":
            turns["SDK, as it cuts by itself"] = upscaler.upscale
        turns[f"SDK, {seams}, halo {halo} px"] = partial(upscaler.upscale, tile=tile)
    return turns | {f"{PAD} px around": partial(tile_padded, run=whole, tile=tile, scale=bundle.manifest.scale)}


def tile_padded(lr: np.ndarray, *, run: Runner, tile: int, scale: int, pad: int = PAD) -> np.ndarray:
    """Enlarge in tiles with a fixed number of pixels around each, as Real-ESRGAN's RealESRGANer.tile_process does.

    lr: (h, w, 3) uint8. run: enlarges a picture of any size. Returns: (h*scale, w*scale, 3) uint8.
    """
    height, width = lr.shape[:2]
    result = np.empty((height * scale, width * scale, 3), np.uint8)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            first_row, first_column = max(0, top - pad), max(0, left - pad)
            window = lr[first_row : min(bottom + pad, height), first_column : min(right + pad, width)]
            large = run(np.ascontiguousarray(window))
            y, x = (top - first_row) * scale, (left - first_column) * scale
            kept = large[y : y + (bottom - top) * scale, x : x + (right - left) * scale]
            result[top * scale : bottom * scale, left * scale : right * scale] = kept
    return result


def open_peer(path: Path) -> tuple[Runner, int]:
    """Load a checkpoint with spandrel; give what enlarges (h, w, 3) uint8, and its scale.

    Raises: BackendUnavailable without spandrel; OptionError for what it does not know, or is no x1 to x8 RGB network.
    """
    try:
        import torch
        from spandrel import ImageModelDescriptor, ModelLoader
    except ImportError as exc:
        raise BackendUnavailable(f"{exc.name} is not installed; install sr-sdk[peers,train]") from exc
    try:
        found = ModelLoader().load_from_file(path)
    except Exception as exc:  # spandrel and torch raise nearly anything for a file that is none
        raise OptionError(f"{path}: spandrel cannot load it ({first_line(exc)})") from exc
    if not isinstance(found, ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise OptionError(f"{path}: not a network from RGB to RGB")
    network = found.eval()

    @torch.inference_mode()
    def run(lr: np.ndarray) -> np.ndarray:
        x = torch.tensor(lr).permute(2, 0, 1)[None].float() / 255  # a copy, as torch takes no read-only array
        y = (network(x).clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(y[0].permute(1, 2, 0).numpy())  # (1, 3, H, W) -> (H, W, 3)

    return run, int(network.scale)


def _rows(
    network: str, turns: dict[str, Runner], lr: np.ndarray, settings: Settings, *, scale: int
) -> Iterator[dict[str, Any]]:
    samples = take_turns({way: partial(run, lr) for way, run in turns.items()}, repeats=settings.repeats)
    expected = turns["whole"](lr).astype(np.int16)
    output_mp = lr.shape[0] * lr.shape[1] * scale**2 / 1e6
    for way, times_ms in samples.items():
        result, timing = turns[way](lr), summarise(times_ms)
        error = np.abs(result - expected).max(axis=2)
        yield {
            "network": network,
            "way": way,
            "median_ms": round(timing.median_ms, 3),
            "min_ms": round(timing.min_ms, 3),
            "max_ms": round(timing.max_ms, 3),
            "output_mp_per_s": round(output_mp / timing.median_ms * 1e3, 3),
            "error": int(error.max()),
            "off_percent": round(100 * float((error > 1).mean()), 3),
            "psnr_db": None if way == "whole" else round(psnr(result, expected.astype(np.uint8)), 2),
        }
