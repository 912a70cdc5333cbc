"""Picture files: metadata kept, damage told, nothing half-written."""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import struct
import sys
import threading
import zlib
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from sdk import BackendUnavailable, ImageError, OptionError, OutputError, Upscaler, animation, files, opening

pytest.importorskip("onnxruntime")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ARTIST, MAKE, ORIENTATION = 0x013B, 0x010F, 0x0112
AVIF = pytest.mark.skipif(not opening.has_avif(), reason="this Pillow was built without AVIF")
GPS, GPS_LATITUDE_REF = 0x8825, 1
EXPOSURE, TAKEN, MAKER_NOTE, INTEROPERABILITY = 0x8769, 0x9003, 0x927C, 0xA005
# Of a JPEG's EXIF, where some programs leave them: strips, order of bits, a fourth sample, floating point.
LAYOUT = {273: 8, 278: 20, 279: 1200, 266: 2, 338: 2, 339: (3, 3, 3)}


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
    block[GPS], block[EXPOSURE] = {GPS_LATITUDE_REF: "N"}, {TAKEN: "2024:01:02 03:04:05"}
    for name, value in tags.items():
        block[globals()[name]] = value
    return block


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


def png(depth: int, colour_type: int, raw: bytes, size: tuple[int, int] = (4, 4), *, interlaced: bool = False) -> bytes:
    """Encode a PNG by hand: 16-bit colour, or a header that promises anything."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [pytest.param(s, marks=AVIF if s == ".avif" else ()) for s in sorted(files.FORMATS)])
def test_every_format_goes_in_and_out(upscaler: Upscaler, tmp_path: Path, suffix: str) -> None:
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix.upper()}"
    flat = np.full((8, 12, 3), (40, 90, 160), np.uint8)
    Image.fromarray(flat).save(source, **({} if suffix in (".bmp", ".gif") else {"quality": 100}))
    upscaler.upscale_file(source, target)
    with Image.open(target) as result:
        assert result.format == files.FORMATS[suffix] and result.size == (24, 16)
        assert result.mode == ("P" if suffix == ".gif" else "RGB")
        assert (
            abs(np.asarray(result.convert("RGB")).astype(int) - flat[0, 0]).max() <= 3
        )  # JPEG, WebP and AVIF lose that much
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


@pytest.mark.parametrize("source_suffix", [".png", ".jpg", ".webp", ".tif", pytest.param(".avif", marks=AVIF)])
@pytest.mark.parametrize("target_suffix", [".png", ".jpg", ".webp", ".tif", pytest.param(".avif", marks=AVIF)])
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
        assert target_suffix == ".tif" or not opening.LAYOUT_TAGS & set(tags)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_tables_within_tables_are_kept_and_layout_is_not(upscaler: Upscaler, tmp_path: Path, suffix: str) -> None:
    block = exif()
    block[EXPOSURE] = {TAKEN: "2024:01:02 03:04:05", INTEROPERABILITY: {1: "R98"}}
    for tag, value in LAYOUT.items():
        block[tag] = value
    source, target = tmp_path / "in.jpg", tmp_path / f"out{suffix}"
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(source, exif=block, quality=100)
    upscaler.upscale_file(source, target)
    assert abs(files.read(target)[0].astype(int) - 200).max() <= 2
    with Image.open(target) as result:
        tags = result.getexif()
        assert suffix == ".tif" or not opening.LAYOUT_TAGS & set(tags)
        assert tags.get_ifd(EXPOSURE)[TAKEN] == "2024:01:02 03:04:05"
        assert tags.get_ifd(INTEROPERABILITY) == {1: "R98"}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_layers_of_photoshop_are_not_copied(upscaler: Upscaler, tmp_path: Path, suffix: str) -> None:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[37724], tags[ARTIST] = b"Adobe Photoshop Document Data Block\0" + bytes(100_000), "A. Painter"
    tags.tagtype[37724] = 7
    Image.fromarray(photo()).save(tmp_path / "in.tif", tiffinfo=tags)
    upscaler.upscale_file(tmp_path / "in.tif", tmp_path / f"out{suffix}")
    with Image.open(tmp_path / f"out{suffix}") as result:
        assert 37724 not in result.getexif() and result.getexif()[ARTIST] == "A. Painter"


def test_exif_too_long_for_jpeg_is_dropped_and_said(
    upscaler: Upscaler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block = exif()
    block[EXPOSURE] = {MAKER_NOTE: bytes(70_000)}
    Image.fromarray(photo()).save(tmp_path / "in.png", exif=block)
    upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.png")
    assert len(files.read(tmp_path / "out.png")[1].exif) > 70_000 and "EXIF" not in caplog.text
    upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.jpg")
    assert files.read(tmp_path / "out.jpg")[1].exif is None and "out.jpg: the EXIF data are longer" in caplog.text


@pytest.mark.parametrize("suffix", [".bmp", ".gif"])
def test_formats_without_a_profile_get_srgb(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    pyvips = pytest.importorskip("pyvips", reason="its Display P3 profile is taken")
    profile, image = pyvips.Operation.call("profile_load", "p3"), photo(4, 4)
    expected = ImageCms.profileToProfile(
        Image.fromarray(image), ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=0x2000,
    )  # fmt: skip
    path = tmp_path / f"a{suffix}"
    for given, wanted in ((profile, np.asarray(expected)), (SRGB, image), (None, image)):
        files.write(path, image, files.Metadata(given), quality=95, overwrite=True)
        np.testing.assert_array_equal(files.read(path)[0], wanted)
    assert abs(np.asarray(expected).astype(int) - image).max() > 10 and caplog.text == ""
    for shown, given in ((image, SRGB[:16] + b"CMYK" + SRGB[20:]), (image, bytes(200)), (image[:, :, :1], profile)):
        caplog.clear()
        files.write(path, shown, files.Metadata(given), quality=95, overwrite=True)
        np.testing.assert_array_equal(files.read(path)[0].reshape(4, 4, -1)[..., : shown.shape[2]], shown)
        assert "ICC profile" in caplog.text and f"a{suffix}" in caplog.text


@pytest.mark.parametrize("gamma,said", [(45455, False), (100_000, True)])
def test_a_gamma_of_png_that_is_lost_is_told(
    tmp_path: Path, gamma: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    chunk = b"gAMA" + struct.pack(">I", gamma)
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for options in ({}, {"icc_profile": SRGB}):
        data = encode(Image.fromarray(photo()), "PNG", **options)
        (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
        caplog.clear()
        np.testing.assert_array_equal(files.read(tmp_path / "a.png")[0], photo())
        assert ("a.png: its PNG gamma" in caplog.text) == (said and not options)


def test_a_transparent_value_of_1_bit_is_kept(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    for value in (0, 1):
        picture.save(tmp_path / "a.png", transparency=value)
        alpha = files.read(tmp_path / "a.png")[0][:, :, 3]
        np.testing.assert_array_equal(alpha, np.array([[0, 255], [255, 0]]) if value == 0 else [[255, 0], [0, 255]])


def test_bytes_are_read_as_files_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pyvips")
    for suffix, image in ((".png", photo()), (".jpg", photo()), (".png", deep_photo(3)), (".tif", deep_photo(2))):
        path = tmp_path / f"a{suffix}"
        files.write(path, image, files.Metadata(SRGB, exif(ORIENTATION=6).tobytes()), quality=95, overwrite=True)
        (expected, metadata), (result, same) = files.read(path), files.read_bytes(path.read_bytes())
        np.testing.assert_array_equal(result, expected)
        assert same == metadata and metadata.exif
        with pytest.raises(ImageError, match=r"^the picture: too large"):
            files.read_bytes(path.read_bytes(), max_pixels=10)
        with pytest.raises(ImageError, match=r"^upload 7: (?!the picture)"):
            files.read_bytes(path.read_bytes()[:-200], name="upload 7")
    for data in (b"", b"no picture", bytes(100)):
        with pytest.raises(ImageError, match="known format"):
            files.read_bytes(data)


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}], ids=str)
def test_a_tiff_unknown_to_pillow_keeps_its_metadata(tmp_path: Path, options: dict[str, bool]) -> None:
    pyvips = pytest.importorskip("pyvips")
    image = deep_photo(2)
    picture = pyvips.Image.new_from_array(image).copy(interpretation="grey16")
    picture.set_type(pyvips.GValue.gint_type, "orientation", 6)
    picture.set_type(pyvips.GValue.gstr_type, "image-description", "a ramp")
    picture.write_to_file(str(tmp_path / "a.tif"), **options)
    result, metadata = files.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(result, np.rot90(image, -1))
    tags = Image.Exif()
    tags.load(metadata.exif)
    assert tags[0x010E] == "a ramp" and not opening.LAYOUT_TAGS & set(tags)


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


def deep_photo(channels: int) -> np.ndarray:
    """A 16-bit picture of 4096 levels and more in each channel, most of which 8 bits cannot tell apart."""
    ramp = np.arange(15, 65536, 16, dtype=np.uint16).reshape(64, 64)  # nowhere 0: nothing is bled under it
    return np.stack([np.roll(ramp, 7 * n) for n in range(channels)], axis=2)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_colour_files_stay_16_bit(upscaler: Upscaler, tmp_path: Path, suffix: str, channels: int) -> None:
    pytest.importorskip("pyvips", reason="16-bit colour is read by libvips")
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    image = deep_photo(channels)
    metadata = files.Metadata(SRGB if channels >= 3 else None, exif(ORIENTATION=6).tobytes())
    files.write(source, image, metadata, quality=95, overwrite=False)
    upscaler.upscale_file(source, target)
    result, kept = files.read(target)
    assert result.dtype == np.uint16 and len(np.unique(result[..., 0])) >= 4096
    np.testing.assert_array_equal(result, doubled(np.rot90(image, -1)))
    tags = Image.Exif()
    tags.load(kept.exif)
    assert kept.icc_profile == metadata.icc_profile and tags[ARTIST] == "A. Painter" and ORIENTATION not in tags
    assert tags.get_ifd(GPS)[GPS_LATITUDE_REF] == "N"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "suffix,dtype", [(".png", "uint16"), (".tif", "uint8"), (".tif", "uint16"), (".tif", "float32")]
)
def test_an_independent_decoder_reads_what_is_written(tmp_path: Path, suffix: str, dtype: str, channels: int) -> None:
    """Not Pillow and not our reader; larger than a tile of TIFF, and than a band of PNG rows."""
    pyvips = pytest.importorskip("pyvips")
    image = np.random.default_rng(0).integers(0, 65536, (700, 1100, channels)).astype(np.uint16)
    image = {"uint8": (image >> 8).astype(np.uint8), "uint16": image, "float32": image / np.float32(65535)}[dtype]
    path = tmp_path / f"a{suffix}"
    files.write(path, image, files.Metadata(), quality=95, overwrite=False)
    decoded = pyvips.Image.new_from_file(str(path), fail_on="warning")
    np.testing.assert_array_equal(decoded.numpy().reshape(image.shape), image)
    assert decoded.hasalpha() == (channels in (2, 4))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_arrays_of_any_strides_are_written(tmp_path: Path, suffix: str, channels: int) -> None:
    pytest.importorskip("pyvips", reason="16-bit colour is read by libvips")
    for image in (deep_photo(channels).transpose(1, 0, 2), deep_photo(channels)[::-1, ::-2, ::-1]):
        files.write(tmp_path / f"a{suffix}", image, files.Metadata(), quality=95, overwrite=True)
        np.testing.assert_array_equal(files.read(tmp_path / f"a{suffix}")[0].reshape(image.shape), image)


def test_16_bit_colour_of_other_programs_is_read_as_it_is(tmp_path: Path) -> None:
    pyvips = pytest.importorskip("pyvips")
    for channels, meaning in ((2, "grey16"), (3, "rgb16"), (4, "rgb16")):
        image = deep_photo(channels)
        for suffix, options in ((".png", {}), (".tif", {"compression": "lzw"}), (".tif", {"tile": True})):
            path = tmp_path / f"{channels}{len(options)}{suffix}"
            pyvips.Image.new_from_array(image).copy(interpretation=meaning).write_to_file(str(path), **options)
            np.testing.assert_array_equal(files.read(path)[0], image)
    path = tmp_path / "name[page=1].png"  # libvips takes options out of such names
    files.write(path, deep_photo(3), files.Metadata(), quality=95, overwrite=False)
    np.testing.assert_array_equal(files.read(path)[0], deep_photo(3))


def test_colour_in_floating_point_is_read(upscaler: Upscaler, tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    image = np.random.default_rng(0).random((9, 7, 3), np.float32)
    files.write(tmp_path / "in.tif", image, files.Metadata(SRGB), quality=95, overwrite=False)
    upscaler.upscale_file(tmp_path / "in.tif", tmp_path / "out.tif")
    result, metadata = files.read(tmp_path / "out.tif")
    np.testing.assert_allclose(result, doubled(image), rtol=3e-7)
    assert metadata.icc_profile == SRGB


@pytest.mark.parametrize("suffix", [".png", ".tif", ".float.tif", ".grey.tif"])
def test_without_libvips_deep_colour_is_refused_and_not_reduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    image = deep_photo(2 if "grey" in suffix else 3)
    image = image / np.float32(65535) if "float" in suffix else image
    path = tmp_path / f"deep{suffix}"
    files.write(path, image, files.Metadata(), quality=95, overwrite=False)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(BackendUnavailable, match=r"deep.*sr-sdk\[large\]"):
        files.read(path)


def test_deep_grey_spans_the_whole_range(tmp_path: Path) -> None:
    """White that is zero, and 12 bits: Pillow gives the numbers as they stand in the file."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    values = np.array([[0, 100], [2048, 4095]], np.uint16)
    packed = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in values)
    for bits, photometric, data, expected in (
        (12, 1, packed, values << 4 | values >> 8),
        (16, 0, values.tobytes(), 65535 - values),
        (16, 1, values.tobytes(), values),
    ):
        directory = ImageFileDirectory_v2(prefix=b"II")
        for tag, value in {256: 2, 257: 2, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 2, 279: len(data)}.items():
            directory[tag] = value
        directory[273] = 0
        stream = io.BytesIO()
        directory.save(stream)
        path = tmp_path / "grey.tif"
        path.write_bytes(stream.getvalue() + data)
        np.testing.assert_array_equal(files.read(path)[0], expected)


@AVIF
@pytest.mark.parametrize("bits", [10, 12])
def test_deep_avif_is_read_in_its_depth(tmp_path: Path, bits: int) -> None:
    pyvips = pytest.importorskip("pyvips")
    values = np.full((8, 8, 3), 2**bits - 1, np.uint16)
    values[:4] = 321
    picture = pyvips.Image.new_from_array(values << 16 - bits).copy(interpretation="rgb16")
    path = tmp_path / "a.avif"
    path.write_bytes(picture.heifsave_buffer(compression="av1", bitdepth=bits, lossless=True))
    image, _ = files.read(path)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, values << 16 - bits | values >> 2 * bits - 16)


def test_other_deep_colour_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 2 2 65535\n" + bytes(24))
    with pytest.raises(ImageError, match="PPM of more than 8 bits"):
        files.read(path)
    path.write_bytes(b"P5 2 1 65535\n\x12\x34\xff\xff")
    assert files.read(path)[0].tolist() == [[0x1234, 0xFFFF]]
    if features.check("jpg_2000"):
        data = encode(Image.fromarray(photo()), "JPEG2000")
        size = data.index(b"\xff\x4f\xff\x51") + 42
        path.write_bytes(data[:size] + b"\x0f" + data[size + 1 :])
        with pytest.raises(ImageError, match="JPEG2000 of more than 8 bits"):
            files.read(path)


def test_cmyk_goes_through_its_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pyvips = pytest.importorskip("pyvips", reason="its CMYK profile is taken")
    profile = pyvips.Operation.call("profile_load", "cmyk")
    image = Image.new("CMYK", (8, 8), (200, 60, 20, 10))
    path = tmp_path / "a.tif"
    image.save(path, icc_profile=profile)
    with caplog.at_level(logging.INFO):
        result, metadata = files.read(path)
    assert "CMYK, converted to sRGB through its ICC profile" in caplog.text and str(path) in caplog.text
    assert metadata.icc_profile is None
    expected = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=0x2000,
    )  # fmt: skip
    np.testing.assert_array_equal(result, np.asarray(expected))
    naive = np.asarray(image.convert("RGB")).astype(int)
    assert abs(result.astype(int) - naive).max() > 20  # the profile makes a difference


def test_cmyk_without_a_profile_is_converted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(path, quality=100)
    image, _ = files.read(path)
    assert abs(image.astype(int) - (0, 255, 255)).max() <= 2 and "without a profile" in caplog.text


def test_only_the_first_frame_is_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.fromarray(np.full((6, 6, 3), level, np.uint8)) for level in (10, 200, 90)]
    for suffix in (".tif", ".png", ".webp"):
        path = tmp_path / f"frames{suffix}"
        options = {"lossless": True} if suffix == ".webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        caplog.clear()
        image, _ = files.read(path)
        assert (image == 10).all() and ("several pages" if suffix == ".tif" else "3 frames") in caplog.text


def test_pages_after_the_first_are_neither_counted_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Counting takes Pillow the square of their number, and fails at one that is damaged."""
    from PIL import TiffImagePlugin

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(lambda image: pytest.fail("counted")))
    path = tmp_path / "a.tif"
    Image.fromarray(photo()).save(path)
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    at_next = first + 2 + 12 * count
    broken = struct.pack("<HHHII", 1, 256, 4, 0xFFFFFFFF, 0xFFFFFFFF)  # and then nothing
    for following, said in ((0, False), (len(data), True), (1 << 30, True), (first, False)):
        struct.pack_into("<I", data, at_next, following)
        path.write_bytes(data + broken)
        caplog.clear()
        np.testing.assert_array_equal(files.read(path)[0], photo())
        assert ("several pages" in caplog.text) == said


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        for read in (files.read, animation.read):
            with pytest.raises(ImageError, match=f"{path}: not a file"):
                read(path)


def test_jpegs_of_very_many_scans_are_refused(tmp_path: Path) -> None:
    data, scan = encode(Image.fromarray(photo()), "JPEG", progressive=True), bytes.fromhex("FFDA 0008 0101 0001 3F00")
    usual = data.count(scan[:2])
    path = tmp_path / "a.jpg"
    for extra, good in ((0, True), (opening.MAX_SCANS - usual, True), (opening.MAX_SCANS - usual + 1, False)):
        path.write_bytes(data[:-2] + scan * extra + data[-2:])
        if good:
            assert files.read(path)[0].shape == (6, 9, 3)
        else:
            with pytest.raises(ImageError, match="201 scans"):
                files.read(path)
    # What only looks like scans: in a comment, and behind the end.
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 10_000) + scan * 1000
    path.write_bytes(data[:2] + comment + data[2:] + scan * 1000)
    assert files.read(path)[0].shape == (6, 9, 3)


def test_truncated_pictures_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(photo(64, 64))
    for suffix in (".png", ".jpg", ".webp", ".tif", ".bmp"):
        whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
        image.save(whole)
        for share in (0.1, 0.5, 0.9):
            cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
            with pytest.raises(ImageError):
                files.read(cut)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth,colour_type,pixel", [(8, 2, 3), (8, 0, 1), (16, 0, 2)])
def test_a_png_without_all_its_rows_is_refused(
    tmp_path: Path, depth: int, colour_type: int, pixel: int, interlaced: bool
) -> None:
    """Pillow stops in silence, and leaves the others black."""
    # Rows and columns of the passes over 9 x 6 pixels.
    passes = [(1, 2), (1, 1), (1, 3), (2, 2), (1, 5), (3, 4), (3, 9)] if interlaced else [(6, 9)]
    rows = [bytes(1) + b"\x28" * columns * pixel for count, columns in passes for _ in range(count)]
    path = tmp_path / "a.png"
    for present in range(len(rows) + 2):
        raw = b"".join([*rows, rows[-1]][:present])
        path.write_bytes(png(depth, colour_type, raw, (9, 6), interlaced=interlaced))
        if present < len(rows):
            with pytest.raises(ImageError, match="missing; the file is damaged"):
                files.read(path)
        else:  # what is too much is ignored, as everywhere
            assert (files.read(path)[0] == (0x28 if depth == 8 else 0x2828)).all()


def test_pngs_of_every_layout_are_whole(tmp_path: Path) -> None:
    pyvips = pytest.importorskip("pyvips", reason="it writes interlaced files")
    for height, width in ((1, 1), (1, 5), (5, 1), (3, 2), (9, 17)):
        image = photo(height, width)
        for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
            files.read_bytes(encode(Image.fromarray(image).convert(mode), "PNG"))
        picture = pyvips.Image.new_from_array(image)
        for bits in (1, 2, 4, 8):
            for shown in (picture, picture.colourspace("b-w")):
                for interlace in (False, True):
                    files.read_bytes(shown.pngsave_buffer(interlace=interlace, bitdepth=bits, palette=shown.bands == 3))


def test_a_profile_too_long_for_png_is_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix, length, kept in ((".png", 1 << 20, True), (".png", (1 << 20) + 1, False), (".tif", 1 << 21, True)):
        for image in (photo(), deep_photo(1)) if suffix == ".png" else (photo(),):
            profile = SRGB if image.ndim == 3 and image.shape[2] == 3 else SRGB[:16] + b"GRAY" + SRGB[20:]
            profile = profile.ljust(length, b"\0")
            caplog.clear()
            files.write(tmp_path / f"a{suffix}", image, files.Metadata(profile), quality=95, overwrite=True)
            assert files.read(tmp_path / f"a{suffix}")[1].icc_profile == (profile if kept else None)
            assert ("ICC profile is longer" in caplog.text) != kept


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(8, 2, b"\0", size=(60_000, 60_000)))
    with pytest.raises(ImageError, match=r"too large \(60000 x 60000 px, the limit is 178956970 pixels"):
        files.read(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".gif", pytest.param(".avif", marks=AVIF)])
def test_the_limit_of_pixels_is_an_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(photo(20, 30)).save(path)
    if suffix not in (".webp", ".tif"):  # whose plug-ins ask Pillow's limit themselves
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # of all threads: neither asked nor changed
    for limit in (600, np.int64(600), 0, None):
        assert files.read(path, max_pixels=limit)[0].shape == (20, 30, 3)
    with pytest.raises(ImageError, match=r"30 x 20 px, the limit is 599.*max_pixels \(--max-pixels\)"):
        files.read(path, max_pixels=599)
    for limit in (-1, 1.5, "many", True, np.bool_(True)):
        with pytest.raises(OptionError, match="max_pixels"):
            files.read(path, max_pixels=limit)


def test_the_limit_holds_within_an_icon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table tells 16 x 16, and what lies inside is larger; Pillow decodes that as it opens the file."""
    from PIL import IcoImagePlugin

    picture = Image.fromarray(photo(50, 60))
    bitmap = bytearray(encode(picture, "DIB"))
    bitmap[8:12] = struct.pack("<i", 100)  # height, with that of the mask
    old = struct.pack("<IHHHH", 12, 60, 100, 1, 24) + bytes(2000)
    path = tmp_path / "a.ico"
    for inner in (encode(picture, "PNG"), bytes(bitmap) + bytes(400), old):
        head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 24, len(inner), 22)
        path.write_bytes(head + inner)
        if inner is not old:
            with pytest.warns(UserWarning, match="expected size"):
                assert files.read(path, max_pixels=3000)[0].shape[:2] == (50, 60)
        with monkeypatch.context() as patched:
            patched.setattr(IcoImagePlugin.IcoImageFile, "load", lambda image: pytest.fail("decoded"))
            with pytest.raises(ImageError, match="60 x 50 px, the limit is 2999"):
                files.read(path, max_pixels=2999)


def test_the_limit_of_pillow_names_a_way_out() -> None:
    with (
        pytest.raises(ImageError, match=r"a\.webp: too large.*MAX_IMAGE_PIXELS.*or convert it to PNG"),
        opening.told("a.webp"),
    ):
        raise Image.DecompressionBombError("more than Pillow's limit")


def test_the_limit_holds_for_libvips_too(tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    files.write(tmp_path / "a.tif", deep_photo(2), files.Metadata(), quality=95, overwrite=False)  # unknown to Pillow
    with pytest.raises(ImageError, match="the limit is 100 pixels"):
        files.read(tmp_path / "a.tif", max_pixels=100)


def test_avif_without_support_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "has_avif", lambda: False)
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, lambda prefix: "built without it"))
    (tmp_path / "a.avif").write_bytes(bytes(4) + b"ftypavif" + bytes(20))
    with pytest.raises(ImageError, match=r"pillow>=11\.3"):
        files.read(tmp_path / "a.avif")
    with pytest.raises(OutputError, match=r"pillow>=11\.3"):
        files.write(tmp_path / "b.avif", photo(), files.Metadata(), quality=95, overwrite=False)


def test_formats_that_start_programs_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "script.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="known format"):
        files.read(path)


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


def test_a_quality_of_numpy_is_taken(tmp_path: Path) -> None:
    files.write(tmp_path / "a.jpg", photo(), files.Metadata(), quality=np.int64(30), overwrite=False)
    files.write(tmp_path / "b.jpg", photo(), files.Metadata(), quality=30, overwrite=False)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()


@pytest.mark.parametrize("quality", [0, 101, -1, "high", None, 9.5, True])
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
        ("a.webp", np.zeros((4, 4, 3), np.uint16)),
        ("a.gif", np.zeros((4, 4), np.float32)),
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


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".gif", pytest.param(".avif", marks=AVIF)])
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


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left"), MemoryError])
@pytest.mark.parametrize("step", ["fsync", "link", "replace"])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, step: str
) -> None:
    def fail(*arguments: object) -> None:
        raise failure

    target = tmp_path / "a.png"
    if step == "replace":
        target.write_bytes(b"precious")
    before = list(tmp_path.iterdir())
    monkeypatch.setattr(files.os, step, fail)
    expected = KeyboardInterrupt if failure is KeyboardInterrupt else OutputError
    with pytest.raises(expected):
        files.write(target, photo(), files.Metadata(), quality=95, overwrite=step == "replace")
    assert list(tmp_path.iterdir()) == before
    assert not before or target.read_bytes() == b"precious"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    target = tmp_path / "a.png"
    synced = os.fsync

    def race(descriptor: int) -> None:
        synced(descriptor)
        target.write_bytes(b"precious")

    monkeypatch.setattr(files.os, "fsync", race)
    if not links:
        monkeypatch.setattr(files.os, "link", no_links)
    with pytest.raises(OutputError, match="exists already"):
        files.write(target, photo(), files.Metadata(), quality=95, overwrite=False)
    assert target.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [target]


def no_links(*arguments: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_and_then_its_name_are_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    target, synced, kinds = tmp_path / "a.png", os.fsync, []

    def sync(descriptor: int) -> None:
        kinds.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), target.exists()))
        synced(descriptor)

    monkeypatch.setattr(files.os, "fsync", sync)
    files.write(target, photo(), files.Metadata(), quality=95, overwrite=overwrite)
    assert kinds == [(False, False), (True, True)]


def test_only_errors_of_encoders_become_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), files.new_file(tmp_path / "a.png", overwrite=False):
        raise ZeroDivisionError

    def fail(*arguments: object, **options: object) -> None:
        raise KeyError("of Pillow")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OutputError, match=r"a\.png: cannot be written \('of Pillow'\)"):
        files.write(tmp_path / "a.png", photo(), files.Metadata(), quality=95, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_can_be_removed_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_creating", threading.Lock())  # which is never let go: the program ends
    """By a program that is told to end while another thread writes."""
    with pytest.raises(OutputError), files.new_file(tmp_path / "a.png", overwrite=False) as stream:
        stream.write(b"half")
        assert len(leftovers(tmp_path)) == 1
        files.remove_unfinished()
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    files.remove_unfinished()


def test_no_file_is_begun_once_the_unfinished_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stay: the program ends a moment later."""
    monkeypatch.setattr(files, "_creating", threading.Lock())
    files.remove_unfinished()
    begun = threading.Thread(target=files.write, args=(tmp_path / "a.png", photo(), files.Metadata()),
                             kwargs={"quality": 95, "overwrite": False})  # fmt: skip
    begun.start()
    begun.join(0.2)
    assert begun.is_alive() and list(tmp_path.iterdir()) == []
    files._creating.release()
    begun.join(10)
    assert leftovers(tmp_path) == [] and (tmp_path / "a.png").exists()


def test_file_systems_without_links_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "link", no_links)
    target = tmp_path / "a.png"
    files.write(target, photo(), files.Metadata(), quality=95, overwrite=False)
    np.testing.assert_array_equal(files.read(target)[0], photo())
    assert list(tmp_path.iterdir()) == [target]

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        files.write(tmp_path / "b.png", photo(), files.Metadata(), quality=95, overwrite=False)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("subsampling,factors", [("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2)])
def test_subsampling_of_jpeg(tmp_path: Path, subsampling: str, factors: int) -> None:
    from PIL.JpegImagePlugin import get_sampling

    path = tmp_path / "a.jpg"
    files.write(path, photo(), files.Metadata(), quality=95, overwrite=True, subsampling=subsampling)
    with Image.open(path) as result:
        assert get_sampling(result) == factors
    with pytest.raises(OptionError, match="4:4:4, 4:2:2, 4:2:0"):
        files.write(path, photo(), files.Metadata(), quality=95, overwrite=True, subsampling="4:1:1")


@AVIF
def test_subsampling_of_avif(tmp_path: Path) -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, ::2] = 255, 0, 0
    errors = []
    for subsampling in ("4:4:4", "4:2:0"):
        path = tmp_path / "a.avif"
        files.write(path, red, files.Metadata(), quality=95, overwrite=True, subsampling=subsampling)
        errors.append(abs(files.read(path)[0].astype(int) - red).max())
    assert errors[0] < 20 < errors[1]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_webp_without_loss(tmp_path: Path, channels: int) -> None:
    image = photo(20, 20, channels)
    files.write(tmp_path / "a.webp", image, files.Metadata(), quality=50, overwrite=False, lossless=True)
    result, _ = files.read(tmp_path / "a.webp")
    np.testing.assert_array_equal(
        result, image[:, :, [0, 0, 0, 1]] if channels == 2 else np.broadcast_to(image, result.shape)
    )


def test_gif_keeps_up_to_256_colours_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for channels, count in ((3, 256), (4, 255), (1, 256), (2, 255)):
        colours = rng.permutation(256 if channels < 3 else 1 << 24)[:count]
        image = colours[np.arange(400).reshape(20, 20) % count]
        image = np.stack([image >> 8 * n & 255 for n in range(3 if channels >= 3 else 1)], axis=2).astype(np.uint8)
        if channels in (2, 4):
            image = np.concatenate((image, np.where(np.arange(400).reshape(20, 20, 1) < 30, 0, 255)), axis=2)
        image = image.astype(np.uint8)
        files.write(tmp_path / "a.gif", image, files.Metadata(), quality=95, overwrite=True)
        result, _ = files.read(tmp_path / "a.gif")
        if channels in (2, 4):
            np.testing.assert_array_equal(result[..., 3], image[..., -1])
            result, image = result[..., :3] * (result[..., 3:] > 0), image[..., :-1] * (image[..., -1:] > 0)
        result = result if result.ndim == 3 else result[:, :, None]  # a palette of greys is read as grey
        np.testing.assert_array_equal(result[..., :3] - image, 0)


def test_gif_of_a_photograph(tmp_path: Path, make_photo) -> None:
    image = make_photo(120, 160)
    files.write(tmp_path / "a.gif", image, files.Metadata(), quality=95, overwrite=True)
    result, _ = files.read(tmp_path / "a.gif")
    assert ((result.astype(float) - image) ** 2).mean() < 80  # 256 colours, dithered: 29 dB and better


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
