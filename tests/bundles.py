"""Tiny model bundles for tests, laid out as `sr-export` writes them: a blur, an identity and a strided U-Net.

`shared(kind)` builds each once a session; tests that change one copy it first.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from sdk.backends import Request, open_backend
from sdk.bundle import FORMAT, MANIFEST, VERSION, Graph, HaloRow, Manifest, Parity, Stage, hash_file

SCALE = 2
ENDS = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
KINDS = (("fp32", "uint8"), ("fp32", "float32"), ("fp16", "uint8"))
BF16 = Parity("openvino", "bf16", 60.0, 2.0)
# A 3x3 kernel that fp16 holds exactly.
BLUR = np.outer([1, 2, 1], [1, 2, 1]) / 16
IDENTITY = np.outer([0, 1, 0], [0, 1, 0])


@functools.cache
def shared(kind: str) -> Path:
    """Give the folder of a bundle that lives as long as the process: "blur", "identity" or "unet"."""
    folder = Path(tempfile.mkdtemp(prefix="sr-sdk-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return BUILDERS[kind](folder / kind)


def copy(kind: str, folder: Path) -> Path:
    """Copy a shared bundle into a folder, to be changed by a test."""
    return Path(shutil.copytree(shared(kind), folder / kind))


def build_blur(folder: Path) -> Path:
    """Write a x2 model that blurs with a 3x3 kernel: stride 1, exact with 1 pixel of context."""
    return _build(folder, _kernel_weights(BLUR), _kernel_network, stride=1)


def build_identity(folder: Path) -> Path:
    """Write a x2 model that repeats pixels: stride 1, exact without context."""
    return _build(folder, _kernel_weights(IDENTITY), _kernel_network, stride=1)


def build_unet(folder: Path) -> Path:
    """Write a x2 model with three downsamplings and random weights that carry far: stride 8."""
    rng = np.random.default_rng(7)
    shapes = {
        "down1": (8, 3), "down2": (12, 8), "down3": (16, 12), "middle1": (16, 16), "middle2": (16, 16),
        "up3": (48, 16), "up2": (32, 12), "head": (48, 8),
    }  # fmt: skip
    weights = {}
    for name, (outputs, inputs) in shapes.items():
        gain = 0.25 if name == "head" else 1.3
        weights[name] = rng.normal(0, gain / np.sqrt(9 * inputs), (outputs, inputs, 3, 3))
    return _build(folder, weights, _unet_network, stride=8)


BUILDERS: dict[str, Callable[[Path], Path]] = {"blur": build_blur, "identity": build_identity, "unet": build_unet}


class GraphBuilder:
    """Collects the nodes of one graph; each method gives the name of its result."""

    def __init__(self, *, half: bool):
        self.half = half
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.used_weights: list[str] = []

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        output = output or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, *values: float) -> str:
        name = f"constant{len(self.constants)}"
        shape = () if len(values) == 1 else (len(values),)
        self.constants.append(helper.make_tensor(name, TensorProto.FLOAT, shape, values))
        return name

    def conv(self, x: str, weight: str, *, stride: int = 1, group: int = 1, relu: bool = True) -> str:
        self.used_weights.append(weight)
        if not self.half:
            weight = self.node("Cast", weight, to=TensorProto.FLOAT)
        pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [stride, stride], "group": group}
        x = self.node("Conv", x, weight, **pads)
        return self.node("Relu", x) if relu else x

    def shuffle(self, x: str, factor: int) -> str:
        return self.node("DepthToSpace", x, blocksize=factor, mode="CRD")


def _kernel_weights(kernel: np.ndarray) -> dict[str, np.ndarray]:
    return {"kernel": np.broadcast_to(kernel, (12, 1, 3, 3))}


def _kernel_network(graph: GraphBuilder, x: str) -> str:
    return graph.shuffle(graph.conv(x, "kernel", group=3, relu=False), 2)


def _unet_network(graph: GraphBuilder, x: str) -> str:
    first = graph.conv(x, "down1", stride=2)
    second = graph.conv(first, "down2", stride=2)
    y = graph.conv(second, "down3", stride=2)
    y = graph.conv(graph.conv(y, "middle1"), "middle2")
    y = graph.node("Add", second, graph.shuffle(graph.conv(y, "up3"), 2))
    y = graph.node("Add", first, graph.shuffle(graph.conv(y, "up2"), 2))
    y = graph.shuffle(graph.conv(y, "head", relu=False), 4)
    if graph.half:
        x = graph.node("Cast", x, to=TensorProto.FLOAT)
        y = graph.node("Cast", y, to=TensorProto.FLOAT)
    sizes = graph.constant(1, 1, SCALE, SCALE)
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    skip = graph.node("Resize", x, "", sizes, **nearest)
    return graph.node("Add", skip, y)


def _build(
    folder: Path, weights: dict[str, np.ndarray], network: Callable[[GraphBuilder, str], str], *, stride: int
) -> Path:
    folder.mkdir()
    places = {}
    with open(folder / "main.weights", "wb") as file:
        for name, values in weights.items():
            file.write(b"\0" * (-file.tell() % 64))
            data = np.ascontiguousarray(values, "<f2").tobytes()
            places[name] = (values.shape, file.tell(), len(data))
            file.write(data)
    graphs = []
    for precision, ends in KINDS:
        path = folder / f"main.{precision}.{ends}.onnx"
        onnx.save(_model(network, places, precision=precision, ends=ends), path)
        onnx.checker.check_model(str(path))
        graphs.append(Graph(hash_file(path), precision, ends))
    draft = Stage(
        name="main", training_size=64, opset=17, stride=stride, activation_bytes=256,
        weights=hash_file(folder / "main.weights"), graphs=tuple(graphs), halo=(HaloRow(0, 0.0),), parity=(BF16,),
    )  # fmt: skip
    stage = Stage(**vars(draft) | {"halo": measure_halo(folder, draft)})
    write_manifest(folder, stage)
    return folder


def write_manifest(folder: Path, *stages: Stage) -> None:
    """Write the manifest of a bundle's folder."""
    manifest = Manifest(
        format=FORMAT, version=VERSION, name=folder.name, scale=SCALE, channels=3, input_layout="NHWC",
        output_layout="NHWC", stages=stages, training={"recipe": "none"}, licence="Apache-2.0", notice="For tests.",
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _model(
    network: Callable[[GraphBuilder, str], str],
    places: dict[str, tuple[tuple[int, ...], int, int]],
    *,
    precision: str,
    ends: str,
) -> onnx.ModelProto:
    graph = GraphBuilder(half=precision == "fp16")
    x = graph.node("Cast", "picture", to=TensorProto.FLOAT) if ends == "uint8" else "picture"
    x = graph.node("Transpose", x, perm=[0, 3, 1, 2])
    if ends == "uint8":
        x = graph.node("Mul", x, graph.constant(1 / 255))
    if graph.half:
        x = graph.node("Cast", x, to=TensorProto.FLOAT16)
    y = network(graph, x)
    if graph.half:
        y = graph.node("Cast", y, to=TensorProto.FLOAT)
    y = graph.node("Clip", y, graph.constant(0), graph.constant(1))
    if ends == "uint8":
        y = graph.node("Add", graph.node("Mul", y, graph.constant(255)), graph.constant(0.5))
        y = graph.node("Transpose", graph.node("Floor", y), perm=[0, 2, 3, 1])
        graph.node("Cast", y, to=TensorProto.UINT8, output="result")
    else:
        graph.node("Transpose", y, perm=[0, 2, 3, 1], output="result")
    initializers = list(graph.constants)
    for name in dict.fromkeys(graph.used_weights):
        shape, offset, length = places[name]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "main.weights"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    picture = helper.make_tensor_value_info("picture", ENDS[ends], ["batch", "height", "width", 3])
    result = helper.make_tensor_value_info("result", ENDS[ends], ["batch", "height_out", "width_out", 3])
    body = helper.make_graph(graph.nodes, "main", [picture], [result], initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure_halo(folder: Path, stage: Stage) -> tuple[HaloRow, ...]:
    """Compare every tile of one stride, at every place of a noise picture, with the whole picture's result."""
    stride, side = stage.stride, 20 * stage.stride
    picture = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    backend = open_backend("onnxruntime", Request(folder, stage, SCALE, "uint8", "cpu", "fp32"))
    whole = backend.run(picture[None])[0].astype(np.int16)
    rows: list[HaloRow] = []
    while not (len(rows) >= 2 and rows[-1].error <= rows[-2].error <= 1):
        context = len(rows) * stride
        span = stride + 2 * context
        corners = [(t, c) for t in range(0, side - span + 1, stride) for c in range(0, side - span + 1, stride)]
        results = backend.run(np.stack([picture[t : t + span, c : c + span] for t, c in corners]))
        inner = slice(context * SCALE, (context + stride) * SCALE)
        error = 0
        for (top, left), result in zip(corners, results, strict=True):
            above, beside = (slice((at + context) * SCALE, (at + context + stride) * SCALE) for at in (top, left))
            error = max(error, int(abs(whole[above, beside] - result[inner, inner]).max()))
        rows.append(HaloRow(context, float(error)))
    backend.close()
    return tuple(rows)
