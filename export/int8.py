"""INT8 graphs: convolutions of 8-bit values, calibrated on pictures and held against fp32.

Q/DQ pairs stand before convolutions alone and all zero points are 0: what TensorRT takes, and NVIDIA advises. What
convolutions give, and the sums of residual blocks, stay in floating point.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from PIL import Image

from sdk.backends.folding import fold_casts
from train.validation import psnr_y

from .errors import ExportError
from .parity import MIN_PSNR_DB, compare, find_pictures, on_grid, read_rgb
from .to_onnx import WEIGHT_PREFIX, quiet

Run = Callable[[np.ndarray], np.ndarray]

MAX_LOST_DB = 0.2  # of PSNR-Y on real pictures
MAX_FLOAT_SHARE = 0.5  # of the convolutions: with more of them in float the graph is not worth its name
WINDOW = 128  # pixels a side, what is calibrated on
MAX_WINDOWS = 64
WINDOWS_A_SIDE = 3  # that are cut out of one picture
PICTURE_CHANNELS = 3
QUANTISERS = ("QuantizeLinear", "DequantizeLinear")


def find_photographs(folder: Path) -> list[Path]:
    """List the pictures of a folder by name.

    Raises: ExportError if it holds none.
    """
    paths = find_pictures(folder)
    if not paths:
        what = "holds no pictures" if folder.is_dir() else "is not a folder"
        raise ExportError(f"{folder}: {what}; --int8 takes a folder of photographs to calibrate on")
    return paths


def read_calibration(folder: Path, *, scale: int, stride: int) -> list[np.ndarray]:
    """Cut windows out of the photographs of a folder, reduced by the scale: (1, h, w, 3) uint8 on the stride grid.

    At most MAX_WINDOWS, evenly from all pictures by name.
    Raises: ExportError if the folder holds no pictures; ImageError if one cannot be read.
    """
    windows = []
    for path in _evenly(find_photographs(folder), MAX_WINDOWS):
        lr = reduce(read_rgb(path), scale)
        windows += _evenly(_cut(on_grid(lr, stride), max(stride, WINDOW // stride * stride)), WINDOWS_A_SIDE**2)
    return _evenly(windows, MAX_WINDOWS)


def _evenly(items: list[Any], most: int) -> list[Any]:
    return items[:: -(-len(items) // most)]


def _cut(picture: np.ndarray, side: int) -> list[np.ndarray]:
    """Cut a picture into windows; one that is smaller is one window."""
    height, width = (max(side, length // side * side) for length in picture.shape[:2])
    corners = [(top, left) for top in range(0, height, side) for left in range(0, width, side)]
    return [picture[None, top : top + side, left : left + side] for top, left in corners]


def reduce(hr: np.ndarray, scale: int) -> np.ndarray:
    """Reduce a photograph by PIL's bicubic, its sides cut to multiples of the scale first."""
    height, width = (max(1, side // scale) for side in hr.shape[:2])
    image = Image.fromarray(hr[: height * scale, : width * scale])
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Quality:
    """Lowest PSNR against fp32, and the mean PSNR-Y that is lost against photographs, both in dB."""

    psnr_db: float
    lost_db: float

    @property
    def is_enough(self) -> bool:
        """Tell whether both gates are passed."""
        return self.psnr_db >= MIN_PSNR_DB["int8"] and self.lost_db <= MAX_LOST_DB

    def __str__(self) -> str:
        return f"{self.psnr_db:.1f} dB, {self.lost_db:.2f} dB of PSNR-Y lost"


class Yardstick:
    """What an INT8 graph is held against."""

    def __init__(self, run: Run, references: Sequence[tuple[str, np.ndarray, np.ndarray]], *, scale: int, stride: int):
        """Reduce the reference pictures, and enlarge them again in fp32.

        run: in fp32, (1, h, w, 3) uint8 -> (1, h*scale, w*scale, 3) uint8. references: (name, picture, fp32 result).
        """
        self.references = [(picture, result) for _, picture, result in references]
        self._scale = scale
        self._originals = []
        for _, photograph, _ in references:
            # Sides that are reduced onto the stride grid: what is padded would be scored.
            height, width = (side // (scale * stride) * scale * stride for side in photograph.shape[:2])
            hr = photograph[:height, :width]
            if min(height, width) > 2 * scale:  # something is left inside the shaved border
                lr = reduce(hr, scale)
                self._originals.append((lr, hr, self._score(run, lr, hr)))
        if not self._originals:
            raise ExportError("int8: every picture is too small to measure on; give larger ones with --pictures")

    def measure(self, run: Run) -> Quality:
        """Compare a graph with fp32, and both with the photographs."""
        psnr = min(compare(run(picture[None])[0], result).psnr_db for picture, result in self.references)
        lost = [before - self._score(run, lr, hr) for lr, hr, before in self._originals]
        return Quality(psnr, float(np.mean(lost)))

    def _score(self, run: Run, lr: np.ndarray, hr: np.ndarray) -> float:
        return min(100.0, psnr_y(run(lr[None])[0], hr, shave=self._scale))


def quantise(
    source: Path, target: Path, *, windows: Sequence[np.ndarray], yardstick: Yardstick
) -> tuple[tuple[str, ...], Quality]:
    """Write the INT8 graph of an fp32 graph with 8-bit ends, whole in one file.

    Convolutions that read the picture stay in float: 8 symmetric bits would halve its 256 values. If the result is
    not good enough, those that cost most alone follow, one after the other.
    windows: (1, h, w, 3) uint8 to calibrate on.
    Returns: the names of the modules left in float, and what the graph reaches.
    Raises: ExportError if more than MAX_FLOAT_SHARE of the convolutions would have to stay in float, or all.
    """
    plain = onnx.load(source)
    fold_casts(plain)
    convolutions = {node.name: node for node in plain.graph.node if node.op_type == "Conv"}
    weights = {tensor.name: tensor for tensor in plain.graph.initializer}
    names = [name for name, node in convolutions.items() if _channels(node, weights[node.input[1]]) > PICTURE_CHANNELS]
    if not names:
        raise ExportError("int8: the network has no convolutions to quantise; export without --int8")
    with tempfile.TemporaryDirectory(prefix="sr-export-") as folder:
        full = _quantise_all(plain, names, windows, Path(folder))

        def measure(chosen: Sequence[str], judge: Callable[[Run], Any]) -> Any:
            return _run_trial(_restrict(full, plain, chosen), Path(folder), judge)

        quality = measure(names, yardstick.measure)
        if not quality.is_enough:
            names, quality = _drop_costliest(names, quality, measure, yardstick, most=len(convolutions))
    model = _restrict(full, plain, names)
    _check(model, names)
    onnx.save(model, target)
    islands = (node.input[1] for name, node in convolutions.items() if name not in names)
    return tuple(name.removeprefix(WEIGHT_PREFIX).removesuffix(".weight") for name in islands), quality


def _channels(convolution: onnx.NodeProto, weights: onnx.TensorProto) -> int:
    """Count the channels that a convolution reads."""
    groups = [attribute.i for attribute in convolution.attribute if attribute.name == "group"]
    return weights.dims[1] * (groups[0] if groups else 1)


def _drop_costliest(
    names: list[str], quality: Quality, measure: Callable[..., Any], yardstick: Yardstick, *, most: int
) -> tuple[list[str], Quality]:
    """Leave out convolutions, those that cost most when they alone are in 8 bits first, until it is enough."""
    picture, result = yardstick.references[0]

    def cost(run: Run) -> float:
        return -compare(run(picture[None])[0], result).psnr_db

    costs = {name: measure([name], cost) for name in names}
    kept = sorted(names, key=lambda name: costs[name])
    first = quality
    while not quality.is_enough:
        kept = kept[:-1]
        if len(kept) < (1 - MAX_FLOAT_SHARE) * most:
            raise ExportError(
                f"int8: {quality} with {most - len(kept) - 1} of {most} convolutions in float, {first} with the "
                f"fewest; at least {MIN_PSNR_DB['int8']} dB and at most {MAX_LOST_DB} dB lost are wanted. Calibrate "
                "on pictures like those that will be enlarged, or export without --int8"
            )
        quality = measure(kept, yardstick.measure)
    return [name for name in names if name in kept], quality


def _quantise_all(
    plain: onnx.ModelProto, names: Sequence[str], windows: Sequence[np.ndarray], folder: Path
) -> onnx.ModelProto:
    """Let ONNX Runtime's tool calibrate and quantise convolutions.

    Raises: ExportError if it is not installed.
    """
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    except ImportError as exc:
        raise ExportError("int8 is calibrated with onnxruntime: pip install 'sr-sdk[export,cpu]'") from exc
    onnx.save(plain, folder / "plain.onnx")
    with quiet("root"):  # it advises to optimise the graph first, which would rename what is in it
        quantize_static(
            str(folder / "plain.onnx"),
            str(folder / "full.onnx"),
            _Windows(windows, plain.graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=list(names),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["Conv"],
                "QuantizeBias": False,
            },
        )
    return onnx.load(folder / "full.onnx")


class _Windows:
    """Feeds windows to ONNX Runtime's calibration, which takes None for the end."""

    def __init__(self, windows: Sequence[np.ndarray], name: str):
        self._windows, self._name = iter(windows), name

    def get_next(self) -> dict[str, np.ndarray] | None:
        window = next(self._windows, None)
        return None if window is None else {self._name: window}


def _restrict(full: onnx.ModelProto, plain: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Feed 8-bit values to the chosen convolutions only, and nothing else but the values as they were.

    The tool puts a Q/DQ pair into a tensor, for all its readers, and old versions of it quantise biases to 32 bits,
    which TensorRT does not take.
    """
    model = copy.deepcopy(full)
    graph = model.graph
    constants = {tensor.name for tensor in plain.graph.initializer}
    for node in [node for node in graph.node if node.output[0] in constants]:
        graph.node.remove(node)
    inputs = {node.name: list(node.input) for node in plain.graph.node}
    for node in graph.node:
        if node.op_type not in QUANTISERS:
            kept = 2 if node.name in names else 0  # a convolution's values and weights
            node.input[:] = [*node.input[:kept], *inputs[node.name][kept:]]
    while True:
        used = {name for node in graph.node for name in node.input} | {graph.output[0].name}
        unused = [node for node in graph.node if node.output[0] not in used]
        if not unused:
            break
        for node in unused:
            graph.node.remove(node)
    tensors = {tensor.name: tensor for tensor in (*plain.graph.initializer, *graph.initializer)}
    del graph.initializer[:]
    graph.initializer.extend(tensors[name] for name in sorted(tensors.keys() & used))
    del graph.value_info[:], model.metadata_props[:]
    return model


def _run_trial(model: onnx.ModelProto, folder: Path, judge: Callable[[Run], Any]) -> Any:
    """Judge a graph as ONNX Runtime computes it: of 8-bit values, exactly."""
    import onnxruntime

    from sdk.backends.onnxruntime import OnnxRuntimeBackend

    path = folder / "trial.onnx"
    onnx.save(model, path)
    backend = OnnxRuntimeBackend(onnxruntime, str(path), precision="int8")
    result = judge(backend.run)
    backend.close()
    return result


def _check(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Check what the tool made: 8-bit symmetric inputs of all the chosen convolutions, in the opset asked for."""
    onnx.checker.check_model(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type in QUANTISERS:
            zero = tensors[node.input[2]]
            if zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any():
                raise ExportError(f"int8: {node.name} has a zero point other than 0; use a newer onnxruntime")
        elif node.name in names:
            kinds = [makers[name].op_type if name in makers else "" for name in node.input[:2]]
            if kinds != ["DequantizeLinear"] * 2:
                raise ExportError(f"int8: {node.name} was not quantised; use a newer onnxruntime")
