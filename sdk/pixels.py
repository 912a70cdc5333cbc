"""Picture <-> array: what may come in, how alpha and grey become RGB for the network, and back."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .errors import ImageError

LOG = logging.getLogger(__name__)
MAX_OVERSHOOT = 0.5  # of float pictures beyond 0 and 1, as resampling leaves it: clipped; more is another range
DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
PROFILED = ("CMYK", "LAB")  # PIL modes that an ICC profile turns into RGB
BLACK_POINT_COMPENSATION: Any = 0x2000  # cmsFLAGS_BLACKPOINTCOMPENSATION; ImageCms.Flags came with Pillow 10.3
OPAQUE_FROM = 128  # alpha from which a pixel is visible where there is only visible or not: GIF


def check_array(image: np.ndarray) -> None:
    """Accept (H, W), (H, W, 1..4) arrays of uint8, uint16 or float32 in [0, 1] with at least one pixel.

    Raises: ImageError that says what was received and what is expected.
    """
    if not isinstance(image, np.ndarray):
        raise ImageError(f"expected a numpy array or a PIL picture, got {type(image).__name__}")
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


@dataclass(frozen=True)
class Planes:
    """A picture as the network takes it.

    colour: (H, W, 3). alpha: (H, W, 3) with equal channels, one number where it is the same everywhere (nothing to
    enlarge), or None. uint8, or float32 in [0, 1].
    """

    colour: np.ndarray
    alpha: np.ndarray | np.generic | None


def split(image: np.ndarray) -> Planes:
    """Turn a checked array into RGB and alpha planes; uint16 becomes float32.

    Colour under fully transparent pixels is replaced by that of visible neighbours, so that it cannot bleed in.
    """
    if image.ndim == 2:
        image = image[:, :, None]
    if image.dtype == np.uint16:
        image = image.astype(np.float32) / np.float32(65535)
    elif image.dtype == np.float32:
        image = np.clip(image, 0, 1)
    channels = image.shape[2]
    colour = image[:, :, : 3 if channels >= 3 else 1]
    alpha: np.ndarray | np.generic | None = None
    if channels in (2, 4):
        plane = image[:, :, -1]
        colour = _bleed(colour, plane > 0)
        alpha = plane[0, 0] if plane.min() == plane.max() else np.repeat(plane[:, :, None], 3, axis=2)
    if colour.shape[2] == 1:
        colour = np.repeat(colour, 3, axis=2)
    return Planes(np.ascontiguousarray(colour), alpha)


def join(planes: Planes, *, channels: int | None, dtype: np.dtype) -> np.ndarray:
    """Put enlarged planes back into the caller's form.

    channels: 1 to 4, or None for a (H, W) grey array. dtype: that of the input.
    """
    colour = planes.colour
    if channels in (None, 1, 2):
        # The network's channels of a grey picture differ by a little: their mean is the result.
        grey = colour.mean(axis=2, keepdims=True, dtype=np.float32)
        colour = np.rint(grey).astype(np.uint8) if colour.dtype == np.uint8 else grey
    if planes.alpha is not None:
        alpha = np.broadcast_to(planes.alpha, (*colour.shape[:2], 3)).mean(axis=2, keepdims=True, dtype=np.float32)
        alpha = np.rint(alpha).astype(np.uint8) if colour.dtype == np.uint8 else alpha
        colour = np.concatenate((colour, alpha), axis=2)
    if dtype == np.uint16:
        colour = np.rint(np.clip(colour, 0, 1) * np.float32(65535)).astype(np.uint16)
    return colour[:, :, 0] if channels is None else colour


def bound_alpha(enlarged: np.ndarray, alpha: np.ndarray, *, scale: int) -> np.ndarray:
    """Keep enlarged alpha between the least and the most of the 3x3 pixels around its source.

    A network does not map a constant to itself; so what is opaque or invisible stays exactly that.
    alpha: (H, W, C). enlarged and the result: (H*scale, W*scale, C).
    """
    height, width = alpha.shape[:2]
    padded = np.pad(alpha, ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    least, most = (
        extreme.reduce(around).repeat(scale, axis=0).repeat(scale, axis=1) for extreme in (np.minimum, np.maximum)
    )
    return np.clip(enlarged, least, most)


def _bleed(colour: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fill invisible pixels with the mean colour of visible neighbours, outwards by coarse-to-fine averages."""
    if visible.all() or not visible.any():
        return colour
    weight = visible.astype(np.float32)[:, :, None]
    filled = _fill(colour.astype(np.float32) * weight, weight)
    if colour.dtype == np.uint8:
        filled = np.rint(filled).astype(np.uint8)
    return np.where(visible[:, :, None], colour, filled)


def _fill(weighted: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Pull-push: average 2x2 blocks until all is covered, then fill each level's gaps from the coarser one."""
    if weight.min() > 0 or weight.shape[0] == weight.shape[1] == 1:
        return weighted / np.maximum(weight, 1e-6)
    pad = ((0, weight.shape[0] % 2), (0, weight.shape[1] % 2), (0, 0))
    coarse = []
    for plane in (weighted, weight):
        plane = np.pad(plane, pad)
        coarse.append(plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2])
    below = _fill(*coarse).repeat(2, axis=0).repeat(2, axis=1)[: weight.shape[0], : weight.shape[1]]
    return np.where(weight > 0, weighted / np.maximum(weight, 1e-6), below)


def from_pil(image: Image.Image, *, name: object = "the picture") -> np.ndarray:
    """Turn a PIL picture into an array that `check_array` accepts.

    Modes L, LA, RGB, RGBA, I;16 and F stay; palettes become RGB or RGBA; 1 becomes L; CMYK, YCbCr, LAB and HSV become
    RGB, CMYK and LAB through their ICC profile if there is one. name: of the picture, for the log.
    Raises: ImageError for other modes, or if the file behind the picture is damaged.
    """
    try:
        image.load()
    except OSError as exc:
        raise ImageError(f"the picture cannot be read ({exc.strerror or exc})") from exc
    mode = image.mode
    if mode in ("L", "LA", "RGB", "RGBA"):
        if mode in ("L", "RGB") and "transparency" in image.info:
            image = image.convert("RGBA")
    elif mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    elif mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info or mode == "PA" else "RGB")
    elif mode == "1":
        image = image.convert("L")
    elif mode in PROFILED:
        image = _through_profile(image, name)
    elif mode in ("YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    elif mode == "F":
        return np.asarray(image, dtype=np.float32)
    else:
        raise ImageError(f"PIL mode {mode!r} is not supported; convert to L, RGB or RGBA first")
    return np.asarray(image)


def _through_profile(image: Image.Image, name: object) -> Image.Image:
    """Convert CMYK or LAB to sRGB, through the embedded profile if there is a usable one."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=BLACK_POINT_COMPENSATION,
            )
        except (ImageCms.PyCMSError, OSError, ValueError) as exc:
            LOG.warning("%s: its ICC profile is not one for %s and is not used (%s)", name, image.mode, exc)
        else:
            LOG.info("%s: %s, converted to sRGB through its ICC profile", name, image.mode)
            assert converted is not None  # None only if converted in place
            return converted
    LOG.warning("%s: %s, converted to RGB without a profile: colours are approximate", name, image.mode)
    return image.convert("RGB")


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
    if picture.getcolors(count):
        packed = colour.astype(np.uint32) @ np.array((1 << 16, 1 << 8, 1), np.uint32)
        found, indices = np.unique(packed, return_inverse=True)
        palette = found[:, None] >> np.array((16, 8, 0), np.uint32) & 255
        return indices.reshape(colour.shape[:2]).astype(np.uint8), palette.astype(np.uint8)
    cut = Image.fromarray(sample).quantize(count, method=Image.Quantize.MEDIANCUT)
    drawn = picture.quantize(palette=cut, dither=Image.Dither.FLOYDSTEINBERG)
    return np.asarray(drawn), np.reshape(drawn.getpalette() or [], (-1, 3)).astype(np.uint8)


def kept_info(image: Image.Image, mode: str) -> dict[str, Any]:
    """Pick the metadata of a PIL picture that still hold for its enlargement, of a PIL mode: ICC profile and EXIF."""
    kept = {key: image.info[key] for key in ("icc_profile", "exif") if image.info.get(key)}
    if "icc_profile" in kept and not fits_profile(kept["icc_profile"], mode):
        del kept["icc_profile"]
    return kept


def fits_profile(profile: bytes, mode: str) -> bool:
    """Tell whether an ICC profile describes pictures of a PIL mode; its header names the colour space."""
    return profile[16:20] == (b"RGB " if mode.startswith("RGB") else b"GRAY")
