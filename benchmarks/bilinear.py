"""Bilinear interpolation as a model bundle, so that it can be timed on the engines that run the networks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdk.bundle import FORMAT, MANIFEST, VERSION, Graph, HaloRow, Manifest, Stage, hash_file
from sdk.errors import BackendUnavailable

OPSET = 17


@contextmanager
def bilinear_bundle(scale: int) -> Iterator[Path]:
    """Give the folder of a bundle whose network is one Resize, for as long as it is needed.

    Raises: BackendUnavailable without onnx.
    """
    with tempfile.TemporaryDirectory(prefix="sr-bench-") as parent:
        folder = Path(parent) / f"bilinear-x{scale}"
        folder.mkdir()
        weights = folder / "main.weights"  # every bundle has some
        weights.write_bytes(b"\0")
        graphs = tuple(_write(folder, precision, scale) for precision in ("fp32", "fp16"))
        stage = Stage(
            name="main", training_size=0, opset=OPSET, stride=1, activation_bytes=3 * 4 * (1 + 2 * scale**2),
            weights=hash_file(weights), graphs=graphs, halo=(HaloRow(1, 0.0),), parity=(),
        )  # fmt: skip
        manifest = Manifest(
            format=FORMAT, version=VERSION, name=folder.name, scale=scale, channels=3, input_layout="NHWC",
            output_layout="NHWC", stages=(stage,), training={}, licence="Apache-2.0", notice="Interpolation.",
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        yield folder


def _write(folder: Path, precision: str, scale: int) -> Graph:
    """Write the graph (N, h, w, 3) uint8 -> the same, `scale` times as large, rounded half up."""
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as exc:
        raise BackendUnavailable("onnx is not installed; install sr-sdk[export]") from exc
    inside = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT

    def step(kind: str, source: str, result: str, *more: str, **attributes: Any) -> Any:
        return helper.make_node(kind, [source, *more], [result], name=result, **attributes)

    nodes = [
        step("Cast", "picture", "levels", to=inside),
        step("Transpose", "levels", "planes", perm=[0, 3, 1, 2]),
        step("Resize", "planes", "large", "", "scales", mode="linear", coordinate_transformation_mode="half_pixel"),
        step("Cast", "large", "float", to=TensorProto.FLOAT),
        step("Add", "float", "above", "half"),
        step("Floor", "above", "whole"),
        step("Transpose", "whole", "pixels", perm=[0, 2, 3, 1]),
        step("Cast", "pixels", "result", to=TensorProto.UINT8),
    ]
    constants = [
        helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, scale, scale]),
        helper.make_tensor("half", TensorProto.FLOAT, [], [0.5]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, ["batch", *sides, 3])
        for name, sides in (("picture", ("height", "width")), ("result", ("height_out", "width_out")))
    ]
    graph = helper.make_graph(nodes, "bilinear", ends[:1], ends[1:], constants)
    path = folder / f"main.{precision}.uint8.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8), path)
    return Graph(hash_file(path), precision, "uint8")
