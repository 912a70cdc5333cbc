"""Turn somebody else's ONNX file into a bundle: read, probe, wrap, check, measure, describe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sdk import tiling
from sdk.backends import Request, open_backend
from sdk.bundle import FORMAT, MANIFEST, VERSION, Bundle, Graph, HaloRow, Manifest, Parity, Stage, hash_file
from sdk.errors import BackendUnavailable

from .. import verify
from ..bundle_writer import NOTICE
from ..errors import ExportError
from ..folders import new_folder, refuse_existing
from ..parity import MAX_FLOAT_ERROR, check_parity, on_grid, read_pictures
from ..to_onnx import OPSET
from . import wrapping
from .converting import convert
from .probing import MAX_BRIGHTNESS_ERROR, WHITES, Findings, Run, as_pictures, probe
from .reading import ForeignGraph, read
from .session import Session

ENDS = ("uint8", "float32")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
SKIPPED = "parity with PyTorch skipped: an ONNX file does not hold the network it was made of"
MAX_HALF_ERROR = 4  # code values between a graph that rounds to fp16 and the same in fp32


def import_onnx(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    scale: int | None = None,
    bgr: bool = False,
    value_range: int | None = None,
    licence: str = "",
    summary: str = "",
    pictures: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Import a super-resolution network into the folder `out`, which must not exist.

    name: of the one stage. scale: that it must have. bgr: the network takes and gives blue first, which no probe can
    tell. value_range: 1 or 255, what white is to it, if probing does not tell. summary: what the model is for, in a
    line. pictures: real ones, to check and measure on.
    Raises: ExportError, or another SRError, if it is no network for RGB pictures of any size that can be tiled, an
    engine differs from ONNX Runtime, or `out` cannot be written.
    """
    path, out, name = Path(path), Path(out), name or "foreign"
    refuse_existing(out)
    if not re.fullmatch(NAME, name):
        raise ExportError(f"name {name[:80]!r}: up to 64 letters, digits, dots, dashes and underscores")
    if value_range not in (None, *WHITES):
        raise ExportError(f"value range {value_range}: 1 (0 to 1) or 255 (0 to 255)")
    foreign = read(path)
    report(f"{path.name}: probing")
    try:
        session = Session(foreign.model)
        findings = probe(foreign, session, white=value_range)
        if scale not in (None, findings.scale):
            raise ExportError(f"--scale {scale}: this network enlarges by {findings.scale}")
        network = convert(foreign.model)
        run = as_pictures(Session(network), findings)
        _check_conversion(run, as_pictures(session, findings), foreign, findings)
    except ExportError as exc:
        raise ExportError(f"{path}: {exc}") from exc
    if findings.brightness_error > MAX_BRIGHTNESS_ERROR:
        report(f"{path.name}: smooth pictures change by {findings.brightness_error:.0%} in the range that was given")
    report(
        f"{path.name}: x{findings.scale}, {findings.input_layout} to {findings.output_layout}, "
        f"values 0-{findings.white}, stride {findings.stride}, opset {foreign.opset}, {foreign.precision}; "
        + ("blue first, as told" if bgr else "red first, which no probe can tell (--bgr: blue first)")
    )
    with new_folder(out) as folder:
        stage = _build_stage(network, findings, folder, name=name, bgr=bgr)
        report(f"stage {name}: {SKIPPED}")
        references = _references(run, stage, bgr=bgr, pictures=pictures)
        parity = _check_engines(stage, folder, findings.scale, references, report)
        report(f"stage {name}: measuring the halo, which may take minutes")
        stage = replace(stage, parity=parity, halo=_measure_halo(path, stage, folder, findings.scale, pictures))
        report(f"stage {name}: exact with {stage.context(error=1)} px of context")
        training = _facts(foreign, findings, bgr=bgr) | ({"summary": summary} if summary else {})
        manifest = Manifest(
            format=FORMAT, version=VERSION, name=out.name, scale=findings.scale, channels=3,
            input_layout="NHWC", output_layout="NHWC", stages=(stage,), training=training,
            licence=licence or "not stated", notice=NOTICE,
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        Bundle.load(folder)  # what is written must be what can be read
    return manifest


def _check_conversion(converted: Run, original: Run, foreign: ForeignGraph, findings: Findings) -> None:
    """Hold the converted network against the one in the file: converters of opsets have their mistakes."""
    limit = MAX_HALF_ERROR / 255 if foreign.precision == "fp16" else MAX_FLOAT_ERROR
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (2, 3), (5, 3)):
        picture = rng.random((1, rows * findings.stride, columns * findings.stride, 3), np.float32)
        error = float(np.abs(converted(picture) - original(picture)).max())
        if not error <= limit:
            raise ExportError(
                f"opset {foreign.opset} in {foreign.precision} became another network at opset {OPSET} in fp32 (off by "
                f"{error:.2g} of 1, {limit:.2g} is allowed): export the model in fp32 with opset_version={OPSET}"
            )


def _build_stage(network: onnx.ModelProto, findings: Findings, folder: Path, *, name: str, bgr: bool) -> Stage:
    """Write weights and graphs; halo and parity are still to be measured."""
    weights = wrapping.write_weights(folder / f"{name}.weights", network)
    graphs, activations = [], 0
    for ends in ENDS:
        model = wrapping.wrap(network, findings, ends=ends, bgr=bgr)
        if ends == "uint8":
            activations = wrapping.count_activation_bytes(model, stride=findings.stride)
        wrapping.share_weights(model, weights)
        file = folder / f"{name}.fp32.{ends}.onnx"
        onnx.save(model, file)
        onnx.checker.check_model(str(file))
        graphs.append(Graph(hash_file(file), "fp32", ends))
    return Stage(
        name=name, training_size=0, opset=OPSET, stride=findings.stride, activation_bytes=activations,
        weights=hash_file(folder / weights.name), graphs=tuple(graphs), halo=(HaloRow(0, 0.0),), parity=(),
    )  # fmt: skip


# (name, (h, w, 3) uint8, what the network itself makes of it: float32 from 0 to 1, clamped)
Reference = tuple[str, np.ndarray, np.ndarray]


def _references(run: Run, stage: Stage, *, bgr: bool, pictures: Path | None) -> list[Reference]:
    """Run the bare network on real pictures, and on the smallest one that the stride allows."""
    order = slice(None, None, -1 if bgr else 1)
    sources = [(name, on_grid(picture, stage.stride)) for name, picture in read_pictures(pictures, largest=256)]
    name, first = sources[0]
    sources.append((f"{stage.stride} x {stage.stride} of {name}", first[: stage.stride, : stage.stride]))
    references = []
    for name, picture in sources:
        result = run(np.ascontiguousarray(picture[None, ..., order]) / np.float32(255))[0][..., order]
        references.append((name, picture, np.clip(result, 0, 1)))
    return references


def _check_engines(
    stage: Stage, folder: Path, scale: int, references: Sequence[Reference], report: Callable[[str], None]
) -> tuple[Parity, ...]:
    """Hold ONNX Runtime against the bare network, which it runs too, and OpenVINO against ONNX Runtime.

    Returns: the rows of OpenVINO; bf16 below its bar is left out, and the runtime stays with fp32.
    """
    request = Request(folder, stage, scale, "uint8", "cpu", "fp32")
    rounded = [(name, picture, np.floor(y * 255 + 0.5).astype(np.uint8)) for name, picture, y in references]
    with closing(open_backend("onnxruntime", request)) as backend:
        where = f"stage {stage.name} on {backend.engine}"
        check_parity(backend.run, rounded, precision="fp32", where=where, of="the bare network")
        rounded = [(name, picture, backend.run(picture[None])[0]) for name, picture, _ in rounded]
    _check_float_graph(request, "onnxruntime", references)
    rows: list[Parity] = []
    for precision in ("fp32", "bf16"):
        try:
            backend = open_backend("openvino", replace(request, precision=precision))
        except BackendUnavailable as exc:
            report(f"stage {stage.name}: openvino {precision} not checked: {exc}")
            continue
        where = f"stage {stage.name} on {backend.engine}"
        try:
            with closing(backend):
                # The last picture may be one pixel, whose dB say nothing.
                held = rounded if precision == "fp32" else rounded[:-1]
                worst = check_parity(backend.run, held, precision=precision, where=where, of="ONNX Runtime fp32")
        except ExportError as exc:
            if precision != "bf16":
                raise
            report(f"{exc}; bf16 will not be used")
            continue
        rows.append(Parity(backend.engine, precision, round(min(worst.psnr_db, 999.0), 2), float(worst.max_error)))
        report(f"{where}, {precision}: {worst.psnr_db:.1f} dB, at most {worst.max_error} from ONNX Runtime fp32")
        if precision == "fp32":
            _check_float_graph(request, "openvino", references)
    return tuple(rows)


def _check_float_graph(request: Request, engine: str, references: Sequence[Reference]) -> None:
    """Hold the graph of 16-bit and float pictures against the bare network: a quarter of an 8-bit code value."""
    with closing(open_backend(engine, replace(request, ends="float32"))) as backend:
        for name, picture, expected in references:
            error = float(np.abs(backend.run(picture[None] / np.float32(255))[0] - expected).max())
            if not error <= MAX_FLOAT_ERROR:
                raise ExportError(
                    f"{name}: the float graph on {engine} is off by {error:.2g} of 1, {MAX_FLOAT_ERROR:.2g} is allowed"
                )


def _measure_halo(path: Path, stage: Stage, folder: Path, scale: int, pictures: Path | None) -> tuple[HaloRow, ...]:
    sources = [picture for _, picture in read_pictures(pictures, largest=verify.MAX_SIDE)]
    with closing(open_backend("onnxruntime", Request(folder, stage, scale, "uint8", "cpu", "fp32"))) as backend:
        try:
            return verify.measure_halo(backend.run, [*sources, _framed(sources[0])], stride=stage.stride, scale=scale)
        except ExportError as exc:
            raise ExportError(
                f"{path}: {exc}: attention, normalisation or pooling over the picture makes each pixel depend on all"
            ) from exc


def _framed(picture: np.ndarray) -> np.ndarray:
    """Put a wide white frame around a picture: without it, whatever is averaged over the whole is another."""
    side = verify.FIRST_SIDE
    framed = tiling.pad_to(picture[:side, :side], (side, side)).copy()
    frame = side // 4
    framed[:frame], framed[-frame:], framed[:, :frame], framed[:, -frame:] = 255, 255, 255, 255
    return framed


def _facts(foreign: ForeignGraph, findings: Findings, *, bgr: bool) -> dict[str, Any]:
    """Give the manifest's facts on where the network comes from; how it was trained is not known."""
    return {
        "source": {
            "files": [asdict(file) for file in foreign.files],
            "opset": foreign.opset,
            "precision": foreign.precision,
            "fixed_size": list(foreign.size),
        },
        "probed": asdict(findings),
        "told": {"bgr": bgr},
        "parity": f"{SKIPPED}; rows compare with ONNX Runtime in fp32",
    }
