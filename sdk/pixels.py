"""Pictures as arrays: which may come in, and from and to PIL, palettes and ICC profiles."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from . import opening
from .errors import ImageError

LOG = logging.getLogger(__name__)
MAX_OVERSHOOT = 0.5  # of float pictures beyond 0 and 1, as resampling leaves it: clipped; more is another range
DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
PROFILED = ("CMYK", "LAB")  # PIL modes that an ICC profile turns into RGB
BLACK_POINT_COMPENSATION: Any = 0x2000  # cmsFLAGS_BLACKPOINTCOMPENSATION; ImageCms.Flags came with Pillow 10.3
BAND_PIXELS = 1 << 18  # looked up at once in a palette, which takes 20 bytes for each
OPAQUE_FROM = 128  # alpha from which a pixel is visible where there is only visible or not: GIF


def check_array(image: np.ndarray) -> None:
    """Accept (H, W), (H, W, 1..4) arrays of uint8, uint16 or float32 in [0, 1] with at least one pixel.

    Raises: ImageError that says what was received and what is expected.
    """
    if not isinstance(image, np.ndarray):
        raise ImageError(f"expected a numpy array or a PIL picture, got {type(image).__name__}")
    if isinstance(image, (np.matrix, np.ma.MaskedArray)):  # one has always two axes, the other hides pixels
        raise ImageError(f"a {type(image).__name__} is not supported; pass numpy.asarray of it")
    if image.dtype not in DTYPES:
        raise ImageError(f"dtype {image.dtype} is not supported: uint8, uint16 or float32 in [0, 1]")
    if image.ndim not in (2, 3) or (image.ndim == 3 and not 1 <= image.shape[2] <= 4):
        raise ImageError(f"shape {image.shape} is not supported: (H, W) or (H, W, C) with 1 to 4 channels")
    if 0 in image.shape:
        raise ImageError(f"a picture of shape {image.shape} has no pixels")
    if image.dtype == np.float32:
        low, high = float(image.min()), float(image.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ImageError("the picture holds NaN or infinite values; clean it before enlarging")
        if low < -MAX_OVERSHOOT or high > 1 + MAX_OVERSHOOT:
            raise ImageError(f"float32 pictures are 0 to 1, this one is {low:g} to {high:g}; scale it first")


def from_pil(image: Image.Image, *, name: object = "the picture") -> np.ndarray:
    """Turn a PIL picture into an array that `check_array` accepts.

    Modes L, LA, RGB, RGBA, I;16 and F stay; palettes become RGB or RGBA; 1 becomes L; CMYK, YCbCr, LAB and HSV become
    RGB, CMYK and LAB through their ICC profile if there is one. name: of the picture, for the log.
    Raises: ImageError for other modes, or if the file behind the picture is damaged.
    """
    with opening.told("the picture"):
        image.load()
    try:
        return _to_array(image, name)
    except (TypeError, ValueError) as exc:  # of entries in its info, which programs may set
        raise ImageError(f"metadata of the picture cannot be used ({opening.one_line(exc)})") from exc


def _to_array(image: Image.Image, name: object) -> np.ndarray:
    if image.mode == "1":
        image = _from_1_bit(image)
    mode = image.mode
    if mode in ("L", "LA", "RGB", "RGBA"):
        if mode in ("L", "RGB") and "transparency" in image.info:
            image = image.convert("RGBA")
    elif mode.startswith("I;16"):
        if "transparency" in image.info:
            raise ImageError("PIL has no 16 bits of grey with alpha; convert to RGBA first, or enlarge the file itself")
        return np.asarray(image).astype(np.uint16)
    elif mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info or mode == "PA" else "RGB")
    elif mode in PROFILED:
        image = _through_profile(image, name)
    elif mode in ("YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    elif mode == "F":
        return np.asarray(image, dtype=np.float32)
    else:
        raise ImageError(f"PIL mode {mode!r} is not supported; convert to L, RGB or RGBA first")
    return np.asarray(image)


def _from_1_bit(image: Image.Image) -> Image.Image:
    """Turn PIL's mode 1 into L, where a transparent value stays one."""
    grey = image.convert("L")
    if "transparency" in image.info:
        grey.info["transparency"] = 255 if image.info["transparency"] else 0
    return grey


def _through_profile(image: Image.Image, name: object) -> Image.Image:
    """Convert CMYK or LAB to sRGB, through the embedded profile if there is a usable one."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    transform = _to_srgb(profile, image.mode, name) if profile else None
    if transform:
        LOG.info("%s: %s, converted to sRGB through its ICC profile", name, image.mode)
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None  # None only if converted in place
        return converted
    LOG.warning("%s: %s, converted to RGB without a profile: colours are approximate", name, image.mode)
    return image.convert("RGB")


def _to_srgb(profile: bytes, mode: str, name: object) -> Any:
    """Build ImageCms' transform from pictures of a PIL mode to sRGB; None, and a warning, if the profile is no use."""
    from PIL import ImageCms

    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=BLACK_POINT_COMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as exc:
        LOG.warning("%s: its ICC profile is not one for %s and is not used (%s)", name, mode, exc)
        return None


def srgb_converter(profile: bytes | None, *, name: object) -> Callable[[np.ndarray], np.ndarray]:
    """Give a function that brings (H, W, C) uint8 of an ICC profile to sRGB, for formats that hold no profile.

    Grey stays as it is, and so does everything if the profile is none of RGB; this is logged. name: for the log.
    """
    from PIL import ImageCms

    transform = _to_srgb(profile, "RGB", name) if profile and not _is_srgb(profile) else None

    def convert(image: np.ndarray) -> np.ndarray:
        if transform is None:
            return image
        if image.shape[2] < 3:
            LOG.warning("%s: the ICC profile is dropped", name)
            return image
        colour = ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(image[:, :, :3])), transform)
        return np.concatenate((np.asarray(colour), image[:, :, 3:]), axis=2)

    return convert


def _is_srgb(profile: bytes) -> bool:
    from PIL import ImageCms

    if not fits_profile(profile, "RGB"):
        return False
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).startswith("sRGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False


def to_pil(image: np.ndarray) -> Image.Image:
    """Turn a result into a PIL picture: uint8 with 1 to 4 channels, uint16 or float32 grey.

    Raises: ImageError for colour in uint16 or float32.
    """
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim == 3 and image.dtype != np.uint8:
        raise ImageError(f"PIL has no mode for {image.shape[2]} channels of {image.dtype}")
    return Image.fromarray(image)


def to_palette(image: np.ndarray) -> tuple[Image.Image, int | None]:
    """Turn a uint8 picture of 1 to 4 channels into at most 256 colours, as GIF has them.

    More colours than that are chosen by median cut and dithered; fewer stay as they are. Alpha becomes visible or not.
    Returns: a PIL picture of mode P, and the index of the transparent colour, or None if all is visible.
    """
    visible, transparent = None, None
    if image.ndim == 3 and image.shape[2] in (2, 4):
        visible = image[:, :, -1] >= OPAQUE_FROM
        image = image[:, :, :-1]
        if visible.all():
            visible = None
    colour = np.asarray(to_pil(image).convert("RGB"))
    if visible is None:
        indices, palette = _quantise(colour, colour, 256)
    else:
        seen = colour[visible][None] if visible.any() else np.zeros((1, 1, 3), np.uint8)
        indices, palette = _quantise(np.where(visible[:, :, None], colour, seen[0, 0]), seen, 255)
        transparent = len(palette)
        indices = np.where(visible, indices, np.uint8(transparent))
        palette = np.concatenate((palette, np.zeros((1, 3), np.uint8)))
    picture = Image.fromarray(indices)
    picture.putpalette(palette.tobytes())
    return picture, transparent


def _quantise(colour: np.ndarray, sample: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find at most `count` colours for a sample of (H, W, 3) uint8 and draw a picture with them: indices, palette."""
    picture = Image.fromarray(colour)
    found = picture.getcolors(count)
    if found:
        palette = np.array([value for _, value in found], np.uint8)
        return _look_up(colour, palette), palette
    cut = Image.fromarray(sample).quantize(count, method=Image.Quantize.FASTOCTREE)
    drawn = picture.quantize(palette=cut, dither=Image.Dither.FLOYDSTEINBERG)
    return np.asarray(drawn), np.reshape(drawn.getpalette() or [], (-1, 3)).astype(np.uint8)


def _look_up(colour: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Give the index in a palette of each pixel of (H, W, 3) uint8, all of whose colours it has: (H, W) uint8."""
    weights = np.array((1 << 16, 1 << 8, 1), np.uint32)
    keys = palette @ weights
    order = np.argsort(keys)
    indices = np.empty(colour.shape[:2], np.uint8)
    rows = max(1, BAND_PIXELS // colour.shape[1])
    for top in range(0, len(colour), rows):
        packed = colour[top : top + rows] @ weights
        indices[top : top + rows] = order[np.searchsorted(keys, packed, sorter=order)]
    return indices


def kept_info(image: Image.Image, mode: str) -> dict[str, Any]:
    """Pick the metadata of a PIL picture that still hold for its enlargement, of a PIL mode: ICC profile and EXIF."""
    kept = {key: image.info[key] for key in ("icc_profile", "exif") if image.info.get(key)}
    if "icc_profile" in kept and not fits_profile(kept["icc_profile"], mode):
        del kept["icc_profile"]
    return kept


def fits_profile(profile: bytes, mode: str) -> bool:
    """Tell whether an ICC profile describes pictures of a PIL mode; its header names the colour space."""
    return profile[16:20] == (b"RGB " if mode.startswith("RGB") else b"GRAY")
