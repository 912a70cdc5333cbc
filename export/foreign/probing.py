"""Find out by running it what a foreign network takes and gives: layouts, range of values, scale and stride."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from sdk import tiling
from sdk.errors import BackendError

from ..errors import ExportError
from .reading import ForeignGraph
from .session import Session, run_values

LOG = logging.getLogger(__name__)
MAX_SCALE = 16  # of a bundle
STRIDES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FIRST_SIZES = ((48, 96), (64, 128))  # one of them is on the grid of any of these strides
WHITES = (1, 255)
MAX_BRIGHTNESS_ERROR = 0.05  # of white: trained networks stay within a hundredth, a wrong range is off by several
CLEAR_CHOICE = 3  # so many times smaller is the error of the right range, if both are small
FLAT = ((0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))  # where networks divide by zero
STEP = 0.5 / 255  # half a code value: a difference that shows
MAX_SHIFT_ERROR = 0.25 / 255
CONTEXTS = (96, 192, 384)  # pixels on both sides together of what is compared
CORE = 16  # side of what is compared
PRODUCTS = {"MatMul", "Gemm", "Einsum", "Softmax"}  # what attention is made of
MAX_GROWTH = 3  # of their results, of a picture twice as high: pixels grow by 2, pairs of pixels by 4

# (N, h, w, 3) float32, 0 to 1 -> (N, h*scale, w*scale, 3) float32, about 0 to 1.
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Findings:
    """What a network takes and gives.

    input_layout, output_layout: "NCHW" or "NHWC". white: 1 or 255, what white is to it. brightness_error: largest
    change of a smooth picture, of white. scale; stride: LR pixels, as in a bundle.
    """

    input_layout: str
    output_layout: str
    scale: int
    white: int
    brightness_error: float
    stride: int


def probe(foreign: ForeignGraph, session: Session, *, white: int | None = None) -> Findings:
    """Probe a network, which the session runs.

    white: 1 or 255 if that is known, None to find it out.
    Raises: ExportError if it does not behave as a super-resolution network for pictures of any size.
    """
    findings, size = _find_layouts(session, foreign.layouts, foreign.size)
    _check_growth(foreign.model, findings, size)
    findings = _find_range(session, findings, size, white)
    run = as_pictures(session, findings)
    _check_steadiness(run, size)
    for colour in FLAT:  # raises for NaN
        run(np.broadcast_to(np.array(colour, np.float32), (1, *size, 3)))
    return replace(findings, stride=_find_stride(run, findings.scale))


def as_pictures(session: Session, findings: Findings) -> Run:
    """Give what runs NHWC pictures from 0 to 1, whatever the network takes. Raises: ExportError for NaN or infinity."""

    def run(batch: np.ndarray) -> np.ndarray:
        result = _run(session, findings, batch)
        if not np.isfinite(result).all():
            raise ExportError(f"a picture of {_times(batch.shape[1:3])} gives NaN or infinite values")
        return result

    return run


def _run(session: Session, findings: Findings, batch: np.ndarray) -> np.ndarray:
    batch = batch.astype(np.float32) * np.float32(findings.white)
    if findings.input_layout == "NCHW":
        batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))  # (N, h, w, 3) -> (N, 3, h, w)
    result = session.run(batch)
    if findings.output_layout == "NCHW" and result.ndim == 4:
        result = result.transpose(0, 2, 3, 1)  # (N, 3, h, w) -> (N, h, w, 3)
    return result / np.float32(findings.white)


def _find_layouts(session: Session, layouts: Sequence[str], size: tuple[int, int]) -> tuple[Findings, tuple[int, int]]:
    """Find the layouts and the scale, and a size that runs."""
    failures = []
    for height, width in FIRST_SIZES:
        for layout in layouts:
            shape = (1, 3, height, width) if layout == "NCHW" else (1, height, width, 3)
            try:
                result = session.run(np.full(shape, 0.5, np.float32)).shape
            except BackendError as exc:
                failures.append(str(exc))
                continue
            for output, sides in (("NCHW", result[2:]), ("NHWC", result[1:3])):
                scale = sides[0] // height if len(result) == 4 else 0
                channels = result[1] if output == "NCHW" else result[-1]
                if channels == 3 and 1 <= scale <= MAX_SCALE and sides == (height * scale, width * scale):
                    return Findings(layout, output, scale, 1, 0.0, 1), (height, width)
            failures.append(f"a picture of {height} x {width} gives a result of {_times(result)}")
    if any(size):
        fixed = _times("any" if side == 0 else str(side) for side in size)
        raise ExportError(
            f"was exported for pictures of {fixed} alone, and runs no others: export it with free height and width "
            f"({failures[0][:300]})"
        )
    raise ExportError(f"not a super-resolution network for RGB pictures of any size: {failures[0][:300]}")


def _check_growth(model: onnx.ModelProto, findings: Findings, size: tuple[int, int]) -> None:
    """Refuse attention over all pixels by its matrices, before a larger picture makes them fill the memory."""
    names = [name for node in model.graph.node if node.op_type in PRODUCTS for name in node.output]
    if not names:
        return
    kind = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    height, width = size
    lengths = []
    for grown in (height, 2 * height):
        shape = (1, 3, grown, width) if findings.input_layout == "NCHW" else (1, grown, width, 3)
        lengths.append([value.size for value in run_values(model, names, np.full(shape, 0.5, kind)).values()])
    if any(large > MAX_GROWTH * small for small, large in zip(*lengths, strict=True)):
        raise ExportError("compares each pixel with all others (attention), so that it cannot be tiled")


def _find_range(session: Session, findings: Findings, size: tuple[int, int], white: int | None) -> Findings:
    """Find the range of values in which smooth pictures keep their brightness."""
    tried = {
        value: _brightness_error(session, replace(findings, white=value), size)
        for value in ([white] if white else WHITES)
    }
    LOG.info("brightness errors by range: %s", tried)
    if not any(np.isfinite(error) for error in tried.values()):
        raise ExportError("gives NaN or infinite values")
    fitting = sorted((value for value in tried if tried[value] <= MAX_BRIGHTNESS_ERROR), key=tried.__getitem__)
    if white:
        other = next(value for value in WHITES if value != white)
        other_error = _brightness_error(session, replace(findings, white=other), size)
        if white not in fitting and other_error <= MAX_BRIGHTNESS_ERROR:
            raise ExportError(
                f"keeps the brightness of pictures from 0 to {other}, and changes it by {tried[white]:.0%} from 0 to "
                f"{white}: --value-range {white} is wrong"
            )
        fitting = [white]  # said by one who knows
    if not fitting:
        errors = " and ".join(f"{error:.0%} in the range 0-{value}" for value, error in tried.items())
        raise ExportError(
            f"not a super-resolution network: smooth pictures change by {errors}; if it is meant to, give the range "
            "with --value-range"
        )
    best = replace(findings, white=fitting[0], brightness_error=round(tried[fitting[0]], 5))
    if len(fitting) == 1:
        return best
    noise = _noise(size)[None]
    results = [as_pictures(session, replace(findings, white=value))(noise) for value in WHITES]
    if np.abs(results[0] - results[1]).max() <= STEP:
        return replace(best, white=1)  # it makes no difference
    if tried[fitting[0]] * CLEAR_CHOICE > tried[fitting[1]]:
        raise ExportError(
            "keeps the brightness of pictures from 0 to 1 as from 0 to 255: give the range with --value-range"
        )
    return best


def _brightness_error(session: Session, findings: Findings, size: tuple[int, int]) -> float:
    """Give the largest mean change of smooth pictures, of white, away from their borders; infinite for NaN."""
    height, width = size
    scale = findings.scale
    worst = 0.0
    for picture in _smooth_pictures(size):
        result = _run(session, findings, picture[None])[0].reshape(height, scale, width, scale, 3)
        inner = np.s_[height // 4 : -height // 4, width // 4 : -width // 4]
        with np.errstate(invalid="ignore"):
            error = float(np.abs(result.mean(axis=(1, 3)) - picture)[inner].mean())
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def _smooth_pictures(size: tuple[int, int]) -> list[np.ndarray]:
    """Draw greys, pale colours and a slow gradient, (h, w, 3) float32 from 0 to 1: what any training has seen."""
    pale = ((0.6, 0.5, 0.4), (0.4, 0.5, 0.6))
    colours = [*((grey,) * 3 for grey in (0.1, 0.3, 0.5, 0.7, 0.9)), *pale]
    flat = [np.broadcast_to(np.array(colour, np.float32), (*size, 3)) for colour in colours]
    columns = np.linspace(0.1, 0.9, size[1], dtype=np.float32)
    return [*flat, np.broadcast_to(columns[None, :, None], (*size, 3))]


def _noise(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).random((*size, 3), np.float32)


def _check_steadiness(run: Run, size: tuple[int, int]) -> None:
    """Require the same result each time, and for each picture of a batch what it gives alone."""
    pictures = np.stack([_noise(size), _smooth_pictures(size)[-1]])
    alone = [run(picture[None])[0] for picture in pictures]
    if np.abs(run(pictures[:1])[0] - alone[0]).max() > STEP:
        raise ExportError("gives another result each time")
    try:
        together = run(pictures)
    except BackendError as exc:
        raise ExportError(f"runs one picture at a time alone: export it with a free batch ({str(exc)[:300]})") from exc
    if together.shape != (2, *alone[0].shape) or np.abs(together - alone).max() > STEP:
        raise ExportError("gives other results for several pictures at once: export it with a free batch")


def _find_stride(run: Run, scale: int) -> int:
    """Find the smallest grid on which all sizes run, and a shift of the picture shifts the result."""
    sizes_run = False
    for stride in STRIDES:
        if _sizes_run(run, stride, scale):
            sizes_run = True
            if _shifts_along(run, stride, scale):
                return stride
    if not sizes_run:
        raise ExportError(f"does not run on pictures of all sizes that are multiples of {STRIDES[-1]}")
    raise ExportError(
        f"no shift of the picture by up to {STRIDES[-1]} pixels shifts the result likewise: the network looks at the "
        "whole picture, or at places in it, and cannot be tiled"
    )


def _shifts_along(run: Run, shift: int, scale: int) -> bool:
    """Tell whether a shift of the picture shifts the result, far enough from the borders that do not shift."""
    error = np.inf
    for context in CONTEXTS:
        before, error = error, _shift_error(run, shift, scale, context)
        LOG.info("shift by %d px, %d px of context: %.3f code values", shift, context, error * 255)
        if error <= MAX_SHIFT_ERROR:
            return True
        if error > before / 2:  # it is not the borders, whose influence falls with their distance
            return False
    return False


def _sizes_run(run: Run, stride: int, scale: int) -> bool:
    """Tell whether pictures of few strides run, and give results `scale` times as large."""
    for rows, columns in ((1, 1), (2, 3), (5, 1)):
        size = (rows * stride, columns * stride)
        try:
            result = run(_noise(size)[None])
        except BackendError:
            return False
        if result.shape != (1, size[0] * scale, size[1] * scale, 3):
            return False
    return True


def _shift_error(run: Run, shift: int, scale: int, context: int) -> float:
    """Give the largest change, of white, in the middle of what two windows of a picture share, down and across."""
    side = tiling.round_up(context + CORE, shift)
    picture = _noise((side + 2 * shift, side))
    upper, lower = picture[:-shift], picture[shift:]  # they share a square
    middle = slice((side - CORE) // 2 * scale, (side + CORE) // 2 * scale)
    worst = 0.0
    for axes in ((0, 1, 2), (1, 0, 2)):
        before, after = (run(window.transpose(axes)[None])[0].transpose(axes) for window in (upper, lower))
        error = np.abs(before[shift * scale :] - after[: -shift * scale])[middle, middle]
        worst = max(worst, float(error.max()))
    return worst


def _times(sides: Iterable[object]) -> str:
    return " x ".join(map(str, sides))
