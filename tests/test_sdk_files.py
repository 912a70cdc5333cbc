"""Picture files: metadata kept, damage told, nothing half-written."""

from __future__ import annotations

import errno
import io
import logging
import os
import struct
import zlib
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image, ImageCms

from sdk import ImageError, OptionError, OutputError, SRError, Upscaler, files

pytest.importorskip("onnxruntime")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ARTIST, MAKE, ORIENTATION = 0x013B, 0x010F, 0x0112
GPS, GPS_LATITUDE_REF = 0x8825, 1
EXPOSURE, TAKEN = 0x8769, 0x9003


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def upscaler():
    with Upscaler(bundles.shared("identity"), backend="onnxruntime") as upscaler:
        yield upscaler


def photo(height: int = 6, width: int = 9, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def doubled(image: np.ndarray) -> np.ndarray:
    return image.repeat(2, axis=0).repeat(2, axis=1)


def exif(**tags: int) -> Image.Exif:
    block = Image.Exif()
    block[ARTIST], block[MAKE] = "A. Painter", "Camera"
    block.get_ifd(GPS)[GPS_LATITUDE_REF] = "N"
    block.get_ifd(EXPOSURE)[TAKEN] = "2024:01:02 03:04:05"
    for name, value in tags.items():
        block[globals()[name]] = value
    return block


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


def png(depth: int, colour_type: int, raw: bytes, size: tuple[int, int] = (4, 4)) -> bytes:
    """Encode a PNG by hand: 16-bit colour, or a header that promises anything."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", sorted(files.FORMATS))
def test_every_format_goes_in_and_out(upscaler: Upscaler, tmp_path: Path, suffix: str) -> None:
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix.upper()}"
    flat = np.full((8, 12, 3), (40, 90, 160), np.uint8)
    Image.fromarray(flat).save(source, quality=100) if suffix != ".bmp" else Image.fromarray(flat).save(source)
    upscaler.upscale_file(source, target)
    with Image.open(target) as result:
        assert result.format == files.FORMATS[suffix] and result.size == (24, 16) and result.mode == "RGB"
        assert abs(np.asarray(result).astype(int) - flat[0, 0]).max() <= 3  # JPEG and WebP lose that much
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_reset(upscaler: Upscaler, tmp_path: Path, orientation: int) -> None:
    image = photo()
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(image).save(source, exif=exif(ORIENTATION=orientation))
    upscaler.upscale_file(source, target)
    turns = {
        1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1], 5: image.transpose(1, 0, 2),
        6: np.rot90(image, -1), 7: np.rot90(image, 2).transpose(1, 0, 2), 8: np.rot90(image),
    }  # fmt: skip
    with Image.open(target) as result:
        np.testing.assert_array_equal(np.asarray(result), doubled(turns[orientation]))
        tags = result.getexif()
    assert tags.get(ORIENTATION, 1) == 1
    assert tags[ARTIST] == "A. Painter" and tags[MAKE] == "Camera"
    assert tags.get_ifd(GPS)[GPS_LATITUDE_REF] == "N"


@pytest.mark.parametrize("source_suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("target_suffix", [".png", ".jpg", ".webp", ".tif"])
def test_profile_and_exif_are_kept_between_formats(
    upscaler: Upscaler, tmp_path: Path, source_suffix: str, target_suffix: str
) -> None:
    source, target = tmp_path / f"in{source_suffix}", tmp_path / f"out{target_suffix}"
    Image.fromarray(photo(40, 30)).save(source, exif=exif(ORIENTATION=6).tobytes(), icc_profile=SRGB)
    upscaler.upscale_file(source, target)
    with Image.open(target) as result:
        result.load()
        assert result.size == (80, 60)
        assert result.info["icc_profile"] == SRGB
        tags = result.getexif()
        assert tags[ARTIST] == "A. Painter" and tags.get(ORIENTATION, 1) == 1
        assert tags.get_ifd(GPS)[GPS_LATITUDE_REF] == "N"
        assert tags.get_ifd(EXPOSURE)[TAKEN] == "2024:01:02 03:04:05"
        # The layout of a TIFF file is not passed on as facts about the picture.
        assert target_suffix == ".tif" or not files.LAYOUT_TAGS & set(tags)


def test_exif_tables_of_compressed_tiff_are_kept(tmp_path: Path) -> None:
    """Pillow reads such files, but cannot write them: a GPS table is appended by hand."""
    source = tmp_path / "in.tif"
    Image.fromarray(photo()).save(source, compression="tiff_lzw")
    data = source.read_bytes()
    assert data[:4] == b"II*\0"
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    entries = [data[first + 2 + 12 * n : first + 14 + 12 * n] for n in range(count)]
    gps = struct.pack("<HHHI4sI", 1, GPS_LATITUDE_REF, 2, 2, b"N\0\0\0", 0)
    entries.append(struct.pack("<HHII", GPS, 4, 1, len(data)))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    table = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    source.write_bytes(data[:4] + struct.pack("<I", len(data) + len(gps)) + data[8:] + gps + table)
    image, metadata = files.read(source)
    np.testing.assert_array_equal(image, photo())
    kept = Image.Exif()
    kept.load(metadata.exif)
    assert kept.get_ifd(GPS)[GPS_LATITUDE_REF] == "N"


def test_a_profile_of_another_colour_space_is_dropped(
    upscaler: Upscaler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = tmp_path / "in.jpg", tmp_path / "out.png"
    cmyk = SRGB[:16] + b"CMYK" + SRGB[20:]
    Image.fromarray(photo(8, 8, 4), "CMYK").save(source, icc_profile=cmyk)
    upscaler.upscale_file(source, target)
    with Image.open(target) as result:
        assert result.mode == "RGB" and "icc_profile" not in result.info
    assert "ICC" in caplog.text


def test_16_bit_grey_files_stay_16_bit(upscaler: Upscaler, tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for suffix in (".png", ".tif"):
        source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
        Image.fromarray(ramp).save(source)
        upscaler.upscale_file(source, target)
        result, _ = files.read(target)
        assert result.dtype == np.uint16 and len(np.unique(result)) == 4096
        np.testing.assert_array_equal(result, doubled(ramp))


@pytest.mark.parametrize("colour_type,channels", [(2, 3), (6, 4)])
def test_16_bit_colour_is_not_reduced_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, colour_type: int, channels: int
) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png(16, colour_type, (b"\0" + b"\x12\x34" * 4 * channels) * 4))
    with caplog.at_level(logging.WARNING):
        image, _ = files.read(path)
    assert image.dtype == np.uint8 and "16-bit" in caplog.text


def test_only_the_first_frame_is_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.fromarray(np.full((6, 6, 3), level, np.uint8)) for level in (10, 200, 90)]
    for suffix in (".tif", ".png", ".webp"):
        path = tmp_path / f"frames{suffix}"
        options = {"lossless": True} if suffix == ".webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        caplog.clear()
        image, _ = files.read(path)
        assert (image == 10).all() and "3 frames" in caplog.text


@pytest.mark.parametrize(
    "name", ["empty.png", "text.png", "folder.png", "missing.png", "null\0.png", "x" * 300 + ".png"]
)
def test_what_is_no_picture_is_told_in_one_line(upscaler: Upscaler, tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    if name == "empty.png":
        source.touch()
    elif name == "text.png":
        source.write_text("not a picture")
    elif name == "folder.png":
        source.mkdir()
    with pytest.raises(ImageError) as caught:
        upscaler.upscale_file(source, tmp_path / "out.png")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.png").exists() and leftovers(tmp_path) == []


def test_truncated_pictures_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(photo(64, 64))
    for suffix in (".png", ".jpg", ".webp", ".tif", ".bmp"):
        whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
        image.save(whole)
        for share in (0.1, 0.5, 0.9):
            cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
            with pytest.raises(ImageError):
                files.read(cut)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(8, 2, b"\0", size=(60_000, 60_000)))
    with pytest.raises(ImageError, match="too large"):
        files.read(path)


def test_formats_that_start_programs_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "script.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="known format"):
        files.read(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about damaged EXIF and the like
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_mutated_files_end_in_a_picture_or_an_error_of_ours(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(sum(kind.encode()))
    sources = []
    for picture in (Image.fromarray(photo(12, 10)), Image.fromarray(photo(9, 9, 1)[:, :, 0])):
        stream = io.BytesIO()
        extra = {} if kind == "BMP" else {"exif": exif(ORIENTATION=6), "icc_profile": SRGB[:200]}
        picture.save(stream, kind, **extra)
        sources.append(stream.getvalue())
    path = tmp_path / "mutant"
    read = 0
    for index in range(400):
        data = bytearray(sources[index % 2])
        for _ in range(int(rng.integers(1, 8))):
            at = int(rng.integers(len(data)))
            # Headers and tables hold the traps: half of the damage goes there.
            at = at % 120 if rng.random() < 0.5 else at
            action = rng.integers(3)
            if action == 0:
                data[at] = int(rng.integers(256))
            elif action == 1:
                data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x01"])
            else:
                del data[at : at + int(rng.integers(1, 20))]
            if len(data) < 2:
                break
        path.write_bytes(data)
        try:
            image, metadata = files.read(path)
        except SRError as exc:
            assert "\n" not in str(exc)
            continue
        read += 1
        assert image.dtype in (np.uint8, np.uint16, np.float32)
        try:
            files.write(tmp_path / "out.png", image[:64, :64], metadata, quality=95, overwrite=True)
        except SRError:
            continue
    assert read > 0
    assert leftovers(tmp_path) == []


def test_existing_files_are_not_overwritten_unasked(upscaler: Upscaler, tmp_path: Path) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(photo()).save(source)
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        upscaler.upscale_file(source, target)
    assert target.read_bytes() == b"precious"
    upscaler.upscale_file(source, target, overwrite=True)
    assert files.read(target)[0].shape == (12, 18, 3)


def test_a_dangling_link_counts_as_existing(upscaler: Upscaler, tmp_path: Path) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(photo()).save(source)
    target.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(OutputError, match="exists"):
        upscaler.upscale_file(source, target)


@pytest.mark.parametrize(
    "name,words",
    [
        ("out.xyz", "unknown format"),
        ("out", "unknown format"),
        ("missing/out.png", "does not exist"),
        ("folder.png", "is a folder"),
        ("x" * 300 + ".png", "cannot be written"),
        ("null\0.png", "cannot be written"),
        ("in.png/out.png", "does not exist"),
    ],
)
def test_unwritable_destinations(upscaler: Upscaler, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.png").mkdir()
    source = tmp_path / "in.png"
    Image.fromarray(photo()).save(source)
    with pytest.raises(OutputError, match=words) as caught:
        upscaler.upscale_file(source, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "in.png"]


def test_long_names_of_any_alphabet_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("\N{CAMERA}" * 62 + ".png")
    files.write(target, photo(), files.Metadata(), quality=95, overwrite=False)
    assert target.exists()


@pytest.mark.parametrize("quality", [0, 101, -1, "high", None, 9.5])
def test_quality_is_checked(upscaler: Upscaler, tmp_path: Path, quality: object) -> None:
    Image.fromarray(photo()).save(tmp_path / "in.png")
    with pytest.raises(OptionError, match="quality"):
        upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.jpg", quality=quality)


@pytest.mark.parametrize(
    "name,image",
    [
        ("a.jpg", photo(4, 4, 4)),
        ("a.bmp", photo(4, 4, 2)),
        ("a.jpg", np.zeros((4, 4), np.uint16)),
        ("a.png", np.zeros((4, 4, 3), np.uint16)),
        ("a.png", np.zeros((4, 4), np.float32)),
        ("a.webp", np.zeros((1, 16384), np.uint8)),
        ("a.jpg", np.zeros((65501, 1), np.uint8)),
    ],
    ids=str,
)
def test_formats_refuse_what_they_cannot_hold(tmp_path: Path, name: str, image: np.ndarray) -> None:
    with pytest.raises(OutputError):
        files.write(tmp_path / name, image, files.Metadata(), quality=95, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_the_format_is_refused_before_the_work(upscaler: Upscaler, tmp_path: Path) -> None:
    Image.fromarray(photo(4, 4, 4)).save(tmp_path / "in.png")
    before = upscaler.stats.tiles
    with pytest.raises(OutputError, match="alpha"):
        upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.jpg")
    assert upscaler.stats.tiles == before


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_channels_survive_lossless_formats(tmp_path: Path, suffix: str, channels: int) -> None:
    image = photo(8, 8, channels)
    files.write(tmp_path / f"a{suffix}", image, files.Metadata(icc_profile=SRGB), quality=100, overwrite=False)
    result, metadata = files.read(tmp_path / f"a{suffix}")
    if suffix != ".webp":
        np.testing.assert_array_equal(result.reshape(image.shape), image)
    # An RGB profile belongs to RGB pictures; WebP has no others.
    assert (metadata.icc_profile == SRGB) == (channels >= 3 or suffix == ".webp")


class Disk:
    """A file that takes a few bytes and then is full."""

    def __init__(self, stream, room: int):
        self._stream, self._room = stream, room

    def write(self, data: bytes) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._stream.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str):
        if name == "fileno":  # so that Pillow's encoders go through write()
            raise AttributeError(name)
        return getattr(self._stream, name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("room", [0, 60])
def test_a_full_disk_leaves_nothing(
    upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, room: int
) -> None:
    source, target = tmp_path / "in.png", tmp_path / f"out{suffix}"
    Image.fromarray(photo()).save(source)
    target.write_bytes(b"precious")
    opened = open
    monkeypatch.setattr(files, "open", lambda *a, **k: Disk(opened(*a, **k), room), raising=False)
    with pytest.raises(OutputError, match="No space left"):
        upscaler.upscale_file(source, target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", target.name]
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.EACCES, "Permission denied"), MemoryError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure) -> None:
    def fail(*arguments: object) -> None:
        raise failure

    monkeypatch.setattr(files.os, "replace", fail)
    expected = KeyboardInterrupt if failure is KeyboardInterrupt else OutputError
    with pytest.raises(expected):
        files.write(tmp_path / "a.png", photo(), files.Metadata(), quality=95, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_exif_that_cannot_be_written_again_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photo()).save(path, exif=exif())

    def fail(*arguments: object) -> bytes:
        raise struct.error("damaged")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    image, metadata = files.read(path)
    assert image.shape == (6, 9, 3) and metadata.exif is None and "EXIF" in caplog.text
