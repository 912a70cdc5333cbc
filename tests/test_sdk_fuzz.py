"""Damaged files end in a picture or an error of ours: never in another exception, a crash, a hang, or much memory.

Pictures are read in a process of their own, which has little memory and a watchdog. `python tests/test_sdk_fuzz.py
KIND FOLDER COUNT SEED` runs more of them, or one seed again.
"""

from __future__ import annotations

import copy
import faulthandler
import io
import json
import logging
import os
import resource
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnx
import pytest
from PIL import Image, features

from sdk import Bundle, BundleError, SRError, animation, bundle, files, onnx_locations, opening, png

MAX_PIXELS = 1 << 20
ADDRESS_SPACE = 4 << 30  # of the process: decoders reserve more than they use
MAX_GROWTH_MIB = 80  # four pictures of MAX_PIXELS in float32; 11 is what was seen
SECONDS = 10  # for one file, on a busy machine; all of them take milliseconds
TRAPS = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x01", b"\xff\xff\xff\x7f", b"\x80\0\0\0")


def colours(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def written(folder: Path, suffix: str, image: np.ndarray) -> bytes:
    path = folder / f"source{suffix}"
    files.write(path, image, files.Metadata(exif=tags()), quality=80, overwrite=True)
    return path.read_bytes()


def tags() -> bytes:
    block = Image.Exif()
    block[0x0112], block[0x013B] = 6, "A. Painter"
    block.get_ifd(0x8825)[1] = "N"
    return block.tobytes()


def animated(folder: Path, suffix: str) -> bytes:
    frames = [animation.Frame(colours(9 + n // 9, 12, 4) & np.uint8(192 + n), 30) for n in range(4)]
    source = animation.Animation(folder, (9, 12), 4, 2, files.Metadata(), "GIF")
    animation.write(folder / f"source{suffix}", frames, like=source, overwrite=True, quality=80)
    return (folder / f"source{suffix}").read_bytes()


def sources(kind: str, folder: Path) -> list[bytes]:
    """Encode small pictures of a format: several layouts, with EXIF where it has that."""
    rgb, rgba, grey = (Image.fromarray(colours(12, 10, c).squeeze()) for c in (3, 4, 1))
    extra = {"exif": tags(), "icc_profile": bytes(200)}
    deep = (colours(12, 10, 4).astype(np.uint16) << 8) + 77
    return {
        "png": lambda: [
            encoded(rgb, "PNG", **extra), encoded(rgba, "PNG"), encoded(rgb.quantize(7), "PNG", transparency=3)
        ],
        "png16": lambda: [written(folder, ".png", deep[..., :c]) for c in (1, 2, 3, 4)],
        "jpeg": lambda: [
            encoded(rgb, "JPEG", **extra), encoded(grey, "JPEG", progressive=True), encoded(rgb.convert("CMYK"), "JPEG")
        ],
        "webp": lambda: [
            encoded(rgb, "WEBP", **extra), encoded(rgba, "WEBP", lossless=True), animated(folder, ".webp")
        ],
        "tiff": lambda: [
            encoded(rgb, "TIFF", **extra), encoded(grey, "TIFF", compression="tiff_lzw"),
            encoded(rgba, "TIFF", compression="packbits"), encoded(grey.convert("1"), "TIFF", compression="group4"),
            encoded(rgb, "TIFF", compression="jpeg"),
        ],
        "tiff16": lambda: [written(folder, ".tif", deep[..., :c]) for c in (1, 2, 3, 4)]
        + [written(folder, ".tif", deep[..., :3] / np.float32(65535))],
        "gif": lambda: [animated(folder, ".gif"), encoded(grey, "GIF"), encoded(rgb, "GIF", interlace=1)],
        "apng": lambda: [animated(folder, ".png")],
        "avif": lambda: [encoded(rgb, "AVIF", **extra), encoded(rgba, "AVIF"), animated(folder, ".avif")],
        "other": lambda: [
            encoded(rgb, "BMP"), encoded(rgb, "PPM"), encoded(rgba, "TGA"), encoded(rgba, "ICO", sizes=[(10, 12)])
        ] + ([encoded(rgb, "JPEG2000")] if features.check("jpg_2000") else []),
    }[kind]()  # fmt: skip


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a few places of a file, most of them where headers and tables are, or cut it short."""
    mutant = bytearray(data)
    for _ in range(int(rng.integers(1, 8))):
        at = int(rng.integers(len(mutant)))
        at = at % 160 if rng.random() < 0.5 else at
        action = int(rng.integers(6))
        if action <= 1:
            mutant[at] = int(rng.integers(256))
        elif action == 2:
            mutant[at] ^= 1 << int(rng.integers(8))
        elif action == 3:
            mutant[at : at + 4] = TRAPS[int(rng.integers(len(TRAPS)))]
        elif action == 4:
            del mutant[at : at + int(rng.integers(1, 20))]
        else:
            mutant[at:at] = mutant[at : at + int(rng.integers(1, 40))]
        if len(mutant) < 4:
            break
    if rng.random() < 0.15:
        del mutant[int(rng.integers(len(mutant))) :]
    return mended(mutant) if data.startswith(png.SIGNATURE) and rng.random() < 0.8 else bytes(mutant)


def mended(data: bytearray) -> bytes:
    """Make the checks of PNG's chunks right again, so that damage goes deeper than those."""
    position = len(png.SIGNATURE)
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 <= len(data):
            data[end : end + 4] = zlib.crc32(data[position + 4 : end]).to_bytes(4, "big")
        position = end + 4
    return bytes(data)


def use(path: Path, target: Path) -> bool:
    """Read a file in every way there is, and write what came of it; tell whether anything did."""
    good = False
    for read in (read_still, read_animation):
        try:
            image, metadata = read(path)
        except SRError as exc:
            assert "\n" not in str(exc) and len(str(exc)) < 1000
            continue
        if image is None:
            continue
        good = True
        assert image.dtype in (np.uint8, np.uint16, np.float32) and image.size, (image.dtype, image.shape)
        assert image.shape[0] * image.shape[1] <= MAX_PIXELS
        try:
            files.write(target, image[:32, :32], metadata, quality=80, overwrite=True)
        except SRError as exc:
            assert "\n" not in str(exc)
    return good


def read_still(path: Path) -> tuple[np.ndarray, files.Metadata]:
    return files.read(path, max_pixels=MAX_PIXELS)


def read_animation(path: Path) -> tuple[np.ndarray | None, files.Metadata]:
    found = animation.read(path, max_pixels=MAX_PIXELS)
    image = None
    for frame in islice(found.frames(), 20) if found else ():
        assert frame.image.shape == (*found.size, 4)
        image = frame.image
    return image, found.metadata if found else files.Metadata()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(kind: str, folder: Path, count: int, seed: int) -> None:
    """Read `count` damaged files of a format from `seed` on, in this process; report in JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")  # Pillow's own, about damaged EXIF and the like
    logging.disable()
    os.fsync = lambda descriptor: None  # thousands of them take longer than all the rest
    originals = sources(kind, folder)
    path = folder / "mutant"
    for data in originals:
        path.write_bytes(data)
        assert use(path, folder / "out.tif")
    before, good = peak_mib(), 0
    for number in range(seed, seed + count):
        path.write_bytes(
            damage(originals[number % len(originals)], np.random.default_rng((number, sum(kind.encode()))))
        )
        (folder / "seed").write_text(str(number))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        good += use(path, folder / ("out.tif" if number % 2 else "out.png"))
    faulthandler.cancel_dump_traceback_later()
    leftovers = [entry.name for entry in folder.iterdir() if entry.name.endswith(".part")]
    print(json.dumps({"good": good, "growth_mib": round(peak_mib() - before, 1), "leftovers": leftovers}))


COUNTS = {
    "png": 700, "png16": 300, "jpeg": 700, "webp": 600, "tiff": 700, "tiff16": 400, "gif": 600, "apng": 300,
    "avif": 200, "other": 300,
}  # fmt: skip


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_pictures_end_in_a_picture_or_an_error_of_ours(tmp_path: Path, kind: str) -> None:
    if kind == "avif" and not opening.has_avif():
        pytest.skip("this Pillow was built without AVIF")
    if kind.endswith("16"):
        pytest.importorskip("pyvips")
    command = [sys.executable, "-X", "faulthandler", __file__, kind, str(tmp_path), str(COUNTS[kind]), "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    seed = (tmp_path / "seed").read_text() if (tmp_path / "seed").exists() else "none"
    assert done.returncode == 0, f"seed {seed} of {kind}: exit {done.returncode}\n{done.stderr[-4000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    assert 0 < report["good"] < COUNTS[kind]  # the damage is neither nothing nor everything
    assert report["growth_mib"] < MAX_GROWTH_MIB and report["leftovers"] == []


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path of every field and list item of JSON."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from walk(item, (*path, key))


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 7.5, 1e308, -1e308, 1e-320, 10**30, -(10**30), 2**31, 2**63, 10**4000,
    float("nan"), float("inf"), -float("inf"), "", "x", "x" * 10_000, "\ud800", "\0", "\x1b[2J", "null", "NHWC",
    "fp32", [], {}, [None], [[]], {"a": 1}, {"__class__": "x"}, nested(900), [0] * 1000,
    "..", ".", "/etc/passwd", "../x", "a/b", "a\\b", "C:x", "C:\\x", "x:y", "NUL", "con.onnx", "COM1", "x.", "x ", "~",
    "file:///etc/passwd",
]  # fmt: skip


@pytest.fixture(scope="module")
def unhashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.copy("blur", tmp_path_factory.mktemp("fuzz"))


def loads(folder: Path, text: str) -> bool:
    """Load a bundle with another manifest: whole and sound, or a BundleError of one line."""
    (folder / bundle.MANIFEST).write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        loaded = Bundle.load(folder)
    except BundleError as exc:
        assert "\n" not in str(exc) and len(str(exc)) < 1000, str(exc)[:200]
        str(exc).encode()
        return False
    manifest = loaded.manifest
    manifest.to_json().encode()
    repr(manifest).encode()  # printable: no half of a surrogate pair
    assert manifest.stages and all(
        (folder / file.name).is_file() for stage in manifest.stages for file in stage.files()
    )
    assert all(Path(file.name).name == file.name for stage in manifest.stages for file in stage.files())
    return True


def test_manifests_with_any_field_wrong_are_whole_or_refused(unhashed: Path) -> None:
    original = json.loads((bundles.shared("blur") / bundle.MANIFEST).read_text(encoding="utf-8"))
    for path in walk(original):
        for value in WRONG:
            values = copy.deepcopy(original)
            container = values
            for key in path[:-1]:
                container = container[key]
            container[path[-1]] = value
            loads(unhashed, json.dumps(values))


def test_damaged_manifests_are_whole_or_refused(unhashed: Path) -> None:
    text = (bundles.shared("blur") / bundle.MANIFEST).read_text(encoding="utf-8")
    good = 0
    for seed in range(1500):
        mutant = damage(text.encode(), np.random.default_rng(seed))
        good += loads(unhashed, mutant.decode("utf-8", "replace"))
    assert good < 1500


def test_fields_that_come_twice_are_refused(unhashed: Path) -> None:
    """Readers of JSON differ in which of the two they take."""
    text = (bundles.shared("blur") / bundle.MANIFEST).read_text(encoding="utf-8")
    assert loads(unhashed, text)
    assert not loads(unhashed, text.replace('"scale": 2,', '"scale": 4,\n  "scale": 2,'))
    assert not loads(unhashed, text.replace('"recipe"', '"a": 1, "a": 2, "recipe"'))


WINDOWS = [
    "C:x",
    "x:y",
    "NUL",
    "nul.onnx",
    "con",
    "COM1.weights",
    "lpt9.x",
    "aux .x",
    "x.",
    "x ",
    "a*b",
    "a?",
    'a"',
    "a|b",
]


@pytest.mark.parametrize("name", WINDOWS)
def test_file_names_that_windows_takes_for_something_else_are_refused(unhashed: Path, name: str) -> None:
    text = (bundles.shared("blur") / bundle.MANIFEST).read_text(encoding="utf-8")
    (unhashed / bundle.MANIFEST).write_text(text.replace("main.weights", json.dumps(name)[1:-1]), encoding="utf-8")
    with pytest.raises(BundleError, match="not a bare name"):
        Bundle.load(unhashed)


def test_graphs_of_any_size_are_not_read(unhashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (bundles.shared("blur") / bundle.MANIFEST).read_text(encoding="utf-8")
    assert loads(unhashed, text)
    monkeypatch.setattr(onnx_locations, "MAX_GRAPH_BYTES", 100)
    with pytest.raises(BundleError, match="larger than 100 bytes"):
        Bundle.load(unhashed)


def external_locations(message: Any) -> Iterator[str]:
    """Give every location of external data in a parsed message, by protobuf's own description of it."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield from (entry.value for entry in message.external_data if entry.key == "location")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from external_locations(item)


def test_damaged_graphs_never_reach_outside(tmp_path: Path) -> None:
    """Whatever passes names no file outside, as protobuf's own parser sees it."""
    source = (bundles.shared("unet") / "main.fp32.uint8.onnx").read_bytes()
    tensors = source.index(b"main.weights")
    path, passed = tmp_path / "graph.onnx", 0
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        data = bytearray(damage(source, rng) if seed % 2 else source)
        if seed % 3 and len(data) > tensors + 12:  # inside a location, and in the tags around it
            at = tensors + int(rng.integers(-12, 14))
            data[at] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            onnx_locations.check_locations(path, {"main.weights"})
        except BundleError as exc:
            assert "\n" not in str(exc) and len(str(exc)) < 1000
            continue
        try:
            parsed = onnx.ModelProto.FromString(bytes(data))
        except Exception:  # protobuf's DecodeError: no engine opens it
            continue
        passed += 1
        assert set(external_locations(parsed)) <= {"main.weights"}, seed
    assert passed > 50


if __name__ == "__main__":
    fuzz(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
