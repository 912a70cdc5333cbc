"""Measure an exported graph: parity with PyTorch, the halo, the memory of its activations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import torch
from PIL import Image, ImageDraw, ImageFont

from sdk import tiling
from sdk.bundle import HaloRow
from train.models import Network

from .errors import ExportError
from .parity import compare
from .to_onnx import DeployGraph

LOG = logging.getLogger(__name__)
FIRST_SIDE, MAX_SIDE = 288, 1152  # of the pictures that the halo is measured on; time grows with the square
MIN_TILE = 32  # pixels: tiles of fewer are many, and no harder


@torch.no_grad()
def run_torch(network: Network, batch: np.ndarray, *, scale: int) -> np.ndarray:
    """Run the deploy graph in PyTorch, in the network's own precision, on uint8 or float32 NHWC on the grid."""
    graph = DeployGraph(network, scale=scale, ends=str(batch.dtype)).eval()
    return graph(torch.from_numpy(batch)).numpy()


def measure_halo(
    run: Callable[[np.ndarray], np.ndarray], pictures: Sequence[np.ndarray], *, stride: int, scale: int
) -> tuple[HaloRow, ...]:
    """Find the smallest context with which no pixel of a tiled picture is off by more than 1 code value.

    run: (1, h, w, 3) uint8 -> (1, h*scale, w*scale, 3) uint8. pictures: real ones; hard synthetic ones are added.
    Each picture is run whole and with its upper left or lower right cut away: the error at each distance from such a
    cut says how much context the network wants. The smallest that seems enough is then proved: all pictures are cut
    by the runtime's own plan, and every pixel is compared. Pictures of few strides come first, twice as large ones
    if three contexts do not fit into them.
    Returns: rows of rising context, whose error never rises.
    Raises: ExportError if no context below a third of MAX_SIDE is enough.
    """
    side = tiling.round_up(FIRST_SIDE, stride)
    while side <= MAX_SIDE:
        sources = _hard_sources(pictures, side)
        wholes = [run(source[None])[0] for source in sources]
        errors = _errors_by_distance(run, sources, wholes, stride=stride, scale=scale)
        context = next((c for c, error in enumerate(errors) if error <= 1), side)
        while 3 * context * stride < side:
            proved = _tiled_error(run, sources, wholes, context=context, stride=stride, scale=scale)
            errors[context] = max(errors[context], proved)
            LOG.info("halo %d px: largest difference %d", context * stride, errors[context])
            if errors[context] <= 1:
                return tuple(HaloRow(c * stride, float(max(errors[c : context + 1]))) for c in range(context + 1))
            context += 1
        LOG.info("pictures of %d px are too small to measure the halo", side)
        side *= 2
    raise ExportError(
        f"no context up to a third of {MAX_SIDE} px keeps tiles within 1 code value; this network cannot be tiled"
    )


def _hard_sources(pictures: Sequence[np.ndarray], side: int) -> list[np.ndarray]:
    """Crop or mirror real pictures to a square, and add what reaches furthest through a network.

    These are noise, a checkerboard, black and white pixels, and the real pictures dithered, and with flat rectangles
    and words on them, for which networks that repair look around.
    """
    rng = np.random.default_rng(0)
    real = [tiling.pad_to(picture[:side, :side], (side, side)) for picture in pictures]
    rows, columns = np.indices((side, side))
    checkerboard = ((rows + columns) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    specks = rng.choice(np.array([0, 255], np.uint8), (side, side, 1)).repeat(3, axis=2)
    noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    dithered = [np.asarray(Image.fromarray(picture).convert("1").convert("RGB")) for picture in real]
    return [*real, noise, checkerboard, specks, *dithered, *(_deface(picture, rng) for picture in real)]


def _deface(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay flat rectangles of up to a fifth of the side, and words, over a square picture."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    side = len(picture)
    for _ in range(24):
        left, top = (int(each) for each in rng.integers(0, side, 2))
        across, down = (int(each) for each in rng.integers(2, side // 5, 2))
        draw.rectangle((left, top, left + across, top + down), fill=_colour(rng))
    for _ in range(12):
        word = "".join(rng.choice(list("abcdehkmnstuwxyzABEGHRSW0358#%&"), 8))
        place = (int(rng.integers(-side // 4, side)), int(rng.integers(0, side)))
        draw.text(place, word, fill=_colour(rng), font=ImageFont.load_default(size=int(rng.integers(10, side // 6))))
    return np.asarray(image)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _errors_by_distance(
    run: Callable[[np.ndarray], np.ndarray],
    sources: Sequence[np.ndarray],
    wholes: Sequence[np.ndarray],
    *,
    stride: int,
    scale: int,
) -> list[int]:
    """Give the largest difference at a distance of at least c strides from a cut, for c = 0, 1, ...

    The cuts take a quarter of both sides away, once at the upper left and once at the lower right.
    """
    side = len(sources[0])
    cut = side // 4 // stride * stride
    kept = side - cut
    # Distance of each row of the upper left cut's result from the cut; of each pixel, the nearer of its two cuts.
    axis = np.arange(kept * scale) // (stride * scale)
    distance = np.minimum(axis[:, None], axis[None, :])
    errors = np.zeros(kept // stride, np.int64)
    for source, whole in zip(sources, wholes, strict=True):
        corners = (
            (run(source[None, cut:, cut:])[0], whole[cut * scale :, cut * scale :], distance),
            (run(source[None, :kept, :kept])[0], whole[: kept * scale, : kept * scale], distance[::-1, ::-1]),
        )
        for result, reference, away in corners:
            np.maximum.at(errors, away, np.abs(result.astype(np.int16) - reference).max(axis=2))
    return [int(error) for error in np.maximum.accumulate(errors[::-1])[::-1]]


def _tiled_error(
    run: Callable[[np.ndarray], np.ndarray],
    sources: Sequence[np.ndarray],
    wholes: Sequence[np.ndarray],
    *,
    context: int,
    stride: int,
    scale: int,
) -> int:
    """Give the largest difference between whole pictures and the runtime's own tiles.

    They are one context wide, and four strides and MIN_TILE pixels at least.
    """
    overlap = tiling.Overlap(context * stride, stride)
    side = max(4, context, -(-MIN_TILE // stride)) * stride + overlap.width
    worst = 0
    for source, whole in zip(sources, wholes, strict=True):
        plan = tiling.plan(source.shape[:2], window=(side, side), overlap=overlap)
        for rows in plan.rows:
            strip = np.empty_like(whole[rows.keep_start * scale : rows.keep_stop * scale])
            for columns in plan.columns:
                place = [(0, columns)]
                result = run(tiling.gather(source[None, rows.start : rows.stop], place))
                tiling.place(strip[None], result, place, rows=rows, scale=scale)
            worst = max(worst, compare(strip, whole[rows.keep_start * scale : rows.keep_stop * scale]).max_error)
    return worst


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
