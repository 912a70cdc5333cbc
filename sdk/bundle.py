"""Model bundles: a folder with manifest.json, ONNX graphs and one weights file for each resolution stage.

The format is specified in the README ("The bundle"); standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from .errors import BundleError, OptionError
from .onnx_locations import check_locations

FORMAT = "sr-sdk-bundle"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_NAME, MAX_TOLD = 100, 300  # characters of a name, and of what a message repeats
# What Windows takes for a device, whatever the suffix.
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}
MODELS_DIR = Path(__file__).parent / "models"
# Precision of a graph -> the option of sr-export that writes it.
EXPORT_OPTIONS = {"fp32": "", "fp16": " with --fp16", "int8": " with --int8 CALIB_DIR"}
DEFAULT_MODEL = "fast-x2"


@dataclass(frozen=True)
class File:
    """A file of the bundle: a bare name inside its folder, its size and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of a stage.

    precision: "fp32", "fp16" or "int8", of the arithmetic inside.
    ends: "uint8" (0-255) or "float32" (0-1), of input and output.
    islands: names of the network's modules that compute in fp32 all the same; int8 graphs quantise convolutions only.
    """

    file: File
    precision: str
    ends: str
    islands: tuple[str, ...] = ()


@dataclass(frozen=True)
class HaloRow:
    """context: LR pixels around a tile; error: largest difference from the untiled result, 8-bit code values."""

    context: int
    error: float


@dataclass(frozen=True)
class Parity:
    """How an engine's output compares with fp32 on real pictures: PSNR in dB, largest difference in code values."""

    engine: str
    precision: str
    psnr_db: float
    max_error: float


@dataclass(frozen=True)
class Stage:
    """One set of weights, trained up to HR crops of `training_size` pixels.

    stride: LR pixels; tiles start and end on this grid.
    activation_bytes: peak memory of the fp32 graph's activations for each LR pixel of a window.
    halo: measured, rising context; none if each pixel depends on the whole picture, which therefore is never cut.
    parity: measured at export, for the precisions that the exporting machine has.
    """

    name: str
    training_size: int
    opset: int
    stride: int
    activation_bytes: int
    weights: File
    graphs: tuple[Graph, ...]
    halo: tuple[HaloRow, ...]
    parity: tuple[Parity, ...]

    def files(self) -> list[File]:
        """List the weights file and the graphs' files."""
        return [self.weights, *(graph.file for graph in self.graphs)]

    def graph(self, *, precision: str, ends: str) -> Graph:
        """Find a graph.

        Raises: BundleError if the bundle lacks it.
        """
        for graph in self.graphs:
            if (graph.precision, graph.ends) == (precision, ends):
                return graph
        raise BundleError(self.lack_of(precision=precision, ends=ends))

    def has_graph(self, *, precision: str, ends: str) -> bool:
        """Tell whether the bundle has a graph."""
        return any((graph.precision, graph.ends) == (precision, ends) for graph in self.graphs)

    def lack_of(self, *, precision: str, ends: str) -> str:
        """Word the message about a graph that is not there: what is, and the option that makes it."""
        have = ", ".join(f"{graph.precision}/{graph.ends}" for graph in self.graphs)
        option = EXPORT_OPTIONS.get(precision, "")
        return f"stage {self.name} has no {precision} graph with {ends} ends (it has {have}); export it again{option}"

    def context(self, *, error: float) -> int:
        """Give the smallest measured context whose error is at most `error` code values.

        Raises: BundleError if none is that exact.
        """
        if not self.halo:
            raise BundleError(f"stage {self.name}: looks at the whole picture, so that it cannot run in tiles")
        for row in self.halo:
            if row.error <= error:
                return row.context
        best = min(row.error for row in self.halo)
        raise BundleError(f"stage {self.name}: no measured halo reaches {error} code values (best {best})")


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds. `training` is free-form: recipe, data, steps, figures, commit."""

    format: str
    version: int
    name: str
    scale: int
    channels: int
    input_layout: str
    output_layout: str
    stages: tuple[Stage, ...]
    training: dict[str, Any]
    licence: str
    notice: str

    def to_json(self) -> str:
        """Serialise, two spaces of indentation, keys in the order of the fields, newline at the end."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk."""

    folder: Path
    manifest: Manifest = field(repr=False)

    @classmethod
    def load(cls, model: str | Path | None = None) -> Bundle:
        """Open a bundle by shipped name or folder; None is the default model.

        Raises: BundleError if it is missing, malformed, of an unknown version, any file's size or hash is wrong, or a
        graph refers to a file that the manifest does not list.
        """
        folder = find_bundle(model)
        manifest = read_manifest(folder / MANIFEST)
        listed = [file for stage in manifest.stages for file in stage.files()]
        for file in listed:
            _check_file(folder / file.name, file)
        names = {file.name for file in listed}
        for stage in manifest.stages:
            for graph in stage.graphs:
                check_locations(folder / graph.file.name, names)
        return cls(folder, manifest)

    def stage(self, name: str = "auto") -> Stage:
        """Find a resolution stage; "auto" is the last one trained.

        Raises: OptionError for an unknown name.
        """
        stages = self.manifest.stages
        if name == "auto":
            return stages[-1]
        for stage in stages:
            if stage.name == name:
                return stage
        raise OptionError(f"stage {name!r}: this bundle has {', '.join(s.name for s in stages)}, or 'auto'")


def shipped_models() -> list[str]:
    """List the models inside the package."""
    return sorted(path.parent.name for path in MODELS_DIR.glob(f"*/{MANIFEST}"))


def find_bundle(model: str | Path | None) -> Path:
    """Give the folder of a shipped name or path.

    Raises: BundleError that lists the shipped names.
    """
    if model is None:
        model = DEFAULT_MODEL
    if not isinstance(model, (str, os.PathLike)):
        raise BundleError(f"model {model!r}: the name of a shipped model or a folder")
    if isinstance(model, str) and model in shipped_models():
        return MODELS_DIR / model
    folder = Path(model)
    if os.path.isfile(folder / MANIFEST):  # unlike Path.is_file, False for names that the system refuses
        return folder
    raise BundleError(
        f"model {str(model)!r}: neither a folder with a {MANIFEST} nor a shipped model ({', '.join(shipped_models())})"
    )


def read_manifest(path: Path) -> Manifest:
    """Parse and check a manifest.

    Raises: BundleError with the field at fault.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_twins)
    except (OSError, ValueError, RecursionError) as exc:
        raise BundleError(f"{path}: not readable as JSON ({str(exc)[:MAX_TOLD]})") from exc
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{path}: not a model bundle (format is not {FORMAT!r})")
    if values.get("version") != VERSION:
        raise BundleError(
            f"{path}: format version {_shown(values.get('version'))}, this SDK reads {VERSION}; "
            "update sr-sdk or export again"
        )
    manifest = _parse(Manifest, values, str(path))
    _check_manifest(manifest, str(path))
    return manifest


def hash_file(path: Path) -> File:
    """Describe a file of a bundle."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            digest = hashlib.sha256(stream.read())
    return File(path.name, path.stat().st_size, digest.hexdigest())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object whose fields come once each: readers of JSON differ in which of two they take."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a field comes twice")
    return values


def _shown(value: Any) -> str:
    """Give the beginning of a value, for a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge number"  # which Python would refuse to spell out
    return f"{value!r:.80}"


def _is_bare(name: str) -> bool:
    """Tell whether a file name stays inside its folder, on every system."""
    stem = name.partition(".")[0].rstrip().lower()
    return (
        0 < len(name) <= MAX_TOLD
        and name.isprintable()
        and not set(name) & set('/\\:*?"<>|')
        and not name.endswith((".", " "))  # Windows drops them; these are "." and ".." too
        and stem not in DEVICES
    )


def _check_file(path: Path, expected: File) -> None:
    if not os.path.isfile(path):
        raise BundleError(f"{path}: named in the manifest but not there; copy the bundle again")
    try:
        # The size first: a wrong file is refused before gigabytes are hashed.
        size = path.stat().st_size
        if size != expected.bytes:
            raise BundleError(f"{path}: {size} bytes, the manifest says {expected.bytes}; copy the bundle again")
        if hash_file(path).sha256 != expected.sha256:
            raise BundleError(f"{path}: SHA-256 differs from the manifest; copy the bundle again")
    except OSError as exc:
        raise BundleError(f"{path}: named in the manifest but not readable ({exc.strerror})") from exc


def _check_manifest(manifest: Manifest, where: str) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise BundleError(f"{where}: {what[:MAX_TOLD]}")

    for name in (manifest.name, *(stage.name for stage in manifest.stages)):
        require(len(name) <= MAX_NAME and name.isprintable(), f"name {name[:MAX_NAME]!r} is too long or not printable")
    require(1 <= manifest.scale <= 16, f"scale {manifest.scale} is not in 1..16")
    require(manifest.channels == 3, f"channels {manifest.channels}: this SDK runs RGB models")
    for layout in (manifest.input_layout, manifest.output_layout):
        require(layout == "NHWC", f"layout {layout!r} is not 'NHWC'")
    require(len(manifest.stages) > 0, "no stages")
    names = [stage.name for stage in manifest.stages]
    require(len(set(names)) == len(names), f"stages have equal names: {names}")
    for stage in manifest.stages:
        require(1 <= stage.stride <= 1024, f"stage {stage.name}: stride {stage.stride} is not in 1..1024")
        require(0 < stage.activation_bytes < 1 << 32, f"stage {stage.name}: activation_bytes out of range")
        require(len(stage.graphs) > 0, f"stage {stage.name}: no graphs")
        contexts = [row.context for row in stage.halo]
        require(contexts == sorted(set(contexts)), f"stage {stage.name}: halo contexts do not rise")
        require(
            all(0 <= c <= 1 << 16 and c % stage.stride == 0 for c in contexts),
            f"stage {stage.name}: halo contexts are not multiples of the stride {stage.stride}",
        )
        require(all(row.error >= 0 for row in stage.halo), f"stage {stage.name}: negative halo error")
        for file in stage.files():
            require(_is_bare(file.name), f"file name {file.name[:MAX_NAME]!r} is not a bare name inside the bundle")
        for graph in stage.graphs:
            require(graph.precision in EXPORT_OPTIONS, f"{graph.file.name}: precision {graph.precision!r}")
            require(graph.ends in ("uint8", "float32"), f"{graph.file.name}: ends {graph.ends!r}")
            require(graph.precision != "fp32" or not graph.islands, f"{graph.file.name}: islands in an fp32 graph")
            for name in graph.islands:
                require(
                    0 < len(name) <= MAX_NAME and name.isprintable(),
                    f"{graph.file.name}: island {name[:MAX_NAME]!r} is empty, too long or not printable",
                )
    try:
        text = json.dumps(asdict(manifest), ensure_ascii=False)
    except RecursionError as exc:
        raise BundleError(f"{where}: training is nested too deeply") from exc
    require(not any("\ud800" <= character <= "\udfff" for character in text), "a text holds half of a surrogate pair")


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Build frozen dataclasses from JSON values; unknown, missing or mistyped fields are errors."""
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, got {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        names = [item.name for item in fields(kind)]
        wrong = sorted(set(names) ^ set(value))
        if wrong:
            raise BundleError(f"{where}: missing or unknown fields: {', '.join(map(repr, wrong))[:MAX_TOLD]}")
        return kind(**{name: _parse(hints[name], value[name], f"{where}: {name}") for name in names})
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where}: expected a list, got {type(value).__name__}")
        item = typing.get_args(kind)[0]
        return tuple(_parse(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin is dict:
        kind = dict
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise BundleError(f"{where}: expected {kind.__name__}, got {_shown(value)}")
    if kind is int and abs(value) >= 1 << 53:  # beyond it readers of JSON differ
        raise BundleError(f"{where}: {_shown(value)} is out of range")
    return value
