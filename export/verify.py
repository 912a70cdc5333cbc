"""Measure an exported graph: parity with PyTorch, the halo, the memory of its activations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image

from sdk import tiling
from sdk.bundle import HaloRow
from train.models import Network

from .errors import ExportError
from .to_onnx import DeployGraph

LOG = logging.getLogger(__name__)
PICTURES = Path(__file__).parent / "pictures"
MAX_FP32_ERROR = 1  # code values against PyTorch
MIN_PSNR_DB = {"fp16": 50.0, "bf16": 45.0}


@dataclass(frozen=True)
class Difference:
    """Of two 8-bit pictures: PSNR in dB (inf when equal), largest error in code values, and where (row, column)."""

    psnr_db: float
    max_error: int
    place: tuple[int, int]


def compare(result: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare (H, W, 3) uint8 pictures of one shape."""
    error = np.abs(result.astype(np.int16) - reference)
    mse = float(np.mean(error.astype(np.float64) ** 2))
    row, column, _ = np.unravel_index(int(error.argmax()), error.shape)
    return Difference(
        float(10 * np.log10(255**2 / mse)) if mse else float("inf"), int(error.max()), (int(row), int(column))
    )


def read_pictures(folder: Path | None, *, largest: int) -> list[tuple[str, np.ndarray]]:
    """Read real pictures (name, (H, W, 3) uint8), cropped in the middle to at most `largest` pixels a side.

    Raises: ExportError if the folder holds none.
    """
    from sdk import files

    folder = folder or PICTURES
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in files.FORMATS) if folder.is_dir() else []
    if not paths:
        raise ExportError(f"{folder}: no pictures to check the export on; give a folder with --pictures")
    result = []
    for path in paths:
        array = np.asarray(Image.fromarray(files.read(path)[0]).convert("RGB"))
        top, left = (max(0, (side - largest) // 2) for side in array.shape[:2])
        result.append((path.name, np.ascontiguousarray(array[top : top + largest, left : left + largest])))
    return result


@torch.no_grad()
def run_torch(network: Network, batch: np.ndarray, *, scale: int) -> np.ndarray:
    """Run the deploy graph in PyTorch, in the network's own precision, on uint8 or float32 NHWC on the grid."""
    graph = DeployGraph(network, scale=scale, ends=str(batch.dtype)).eval()
    return graph(torch.from_numpy(batch)).numpy()


def check_parity(
    run: Callable[[np.ndarray], np.ndarray],
    references: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    precision: str,
    where: str,
) -> Difference:
    """Hold an engine against PyTorch fp32 on (name, picture, reference) triples.

    run: (1, h, w, 3) uint8 -> (1, h*scale, w*scale, 3) uint8. fp32 may differ by 1 code value anywhere; the others
    must reach MIN_PSNR_DB on every picture. where: names stage and engine in the message.
    Returns: the lowest PSNR and the largest error of all. Raises: ExportError that names precision, picture and place.
    """
    differences = []
    for name, picture, reference in references:
        difference = compare(run(picture[None])[0], reference)
        if precision == "fp32":
            bad = difference.max_error > MAX_FP32_ERROR
            limit = f"at most {MAX_FP32_ERROR} code value"
        else:
            bad = not difference.psnr_db >= MIN_PSNR_DB[precision]
            limit = f"at least {MIN_PSNR_DB[precision]} dB"
        if bad:
            raise ExportError(
                f"{where}, {precision}: {name} differs from PyTorch by {difference.max_error} code values at "
                f"{difference.place}, {difference.psnr_db:.1f} dB ({limit} is allowed)"
            )
        differences.append(difference)
    by_error = max(differences, key=lambda difference: difference.max_error)
    return replace(by_error, psnr_db=min(difference.psnr_db for difference in differences))


def on_grid(picture: np.ndarray, stride: int) -> np.ndarray:
    """Mirror-pad a picture to the stride grid."""
    height, width = (tiling.round_up(side, stride) for side in picture.shape[:2])
    return tiling.pad_to(picture, (height, width))


def measure_halo(
    run: Callable[[np.ndarray], np.ndarray], pictures: Sequence[np.ndarray], *, stride: int, scale: int
) -> tuple[HaloRow, ...]:
    """Find the smallest context with which no pixel of a tiled picture is off by more than 1 code value.

    run: (1, h, w, 3) uint8 -> (1, h*scale, w*scale, 3) uint8. pictures: real ones; hard synthetic ones are added.
    For each context the pictures are cut by the runtime's own plan into tiles of four strides, and every pixel is
    compared with the picture run whole. The context is doubled until it is enough, then halved in on; each one
    measured is a row of the result.
    Returns: rows of rising context. The error never rises with it: a worse one further on replaces those before.
    Raises: ExportError if no context up to the pictures' size is enough.
    """
    sources = [*pictures, *_hard_pictures(pictures)]
    sources = [on_grid(source, stride) for source in sources]
    wholes = [run(source[None])[0] for source in sources]
    smallest = min(max(source.shape[:2]) for source in sources)

    def measure(context: int) -> int:
        halo = context * stride
        window = (4 + 2 * context) * stride
        worst = 0
        for source, whole in zip(sources, wholes, strict=True):
            plan = tiling.plan(source.shape[:2], window=(window, window), halo=halo, stride=stride)
            tiled = np.empty_like(whole)
            for place in plan.windows:
                tiling.place(tiled, run(tiling.gather(source, [place])), [place], scale=scale)
            worst = max(worst, compare(tiled, whole).max_error)
        LOG.info("halo %d px: largest difference %d", halo, worst)
        return worst

    errors = {0: measure(0)}
    while errors[max(errors)] > 1:
        context = max(errors)
        wider = max(1, 2 * context)
        if (4 + 2 * wider) * stride >= smallest:  # one window would be the whole picture, which tells nothing
            raise ExportError(
                f"tiles still differ by {errors[context]} code values with a context of {context * stride} px; "
                f"larger pictures than {smallest} px are needed to measure the halo (--pictures)"
            )
        errors[wider] = measure(wider)
    enough = max(errors)
    while enough and (short := max(context for context in errors if context < enough)) + 1 < enough:
        middle = (short + enough) // 2
        errors[middle] = measure(middle)
        enough = middle if errors[middle] <= 1 else enough
    contexts = sorted(errors)
    return tuple(
        HaloRow(context * stride, float(max(errors[c] for c in contexts if c >= context))) for context in contexts
    )


def _hard_pictures(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Make what reaches furthest through a network: noise, a checkerboard, black and white pixels, dithered photos."""
    rng = np.random.default_rng(0)
    height, width = pictures[0].shape[:2]
    rows, columns = np.indices((height, width))
    checkerboard = ((rows + columns) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    specks = rng.choice(np.array([0, 255], np.uint8), (height, width, 1)).repeat(3, axis=2)
    dithered = [np.asarray(Image.fromarray(picture).convert("1").convert("RGB")) for picture in pictures]
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return [noise, checkerboard, specks, *dithered]


def activation_bytes(model: onnx.ModelProto, *, window: int) -> int:
    """Count the peak memory of live activations for each LR pixel, at one square window.

    Follows the nodes in order and frees a tensor after its last use, as an engine's planner does.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for dimension, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, (1, window, window, 3), strict=True):
        dimension.dim_value = size
    for dimension in fixed.graph.output[0].type.tensor_type.shape.dim:
        dimension.Clear()
    fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    graph = fixed.graph
    sizes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = [dimension.dim_value for dimension in kind.shape.dim]
        sizes[value.name] = int(np.prod(shape)) * onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    constants = {tensor.name for tensor in graph.initializer}
    last_use = {name: index for index, node in enumerate(graph.node) for name in node.input}
    live = peak = sizes[graph.input[0].name]
    for index, node in enumerate(graph.node):
        if all(name in constants for name in node.input):  # a weight's cast, folded at load
            constants.update(node.output)
            continue
        live += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, live)
        live -= sum(sizes.get(n, 0) for n in {*node.input} - constants if last_use[n] == index)
    return -(-peak // window**2)
