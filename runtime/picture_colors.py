"""Any picture's pixels as sRGB, 8 bits a channel."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from ..errors import InputError

log = logging.getLogger(__name__)

Color = tuple[int, int, int]
Convert = Callable[[Image.Image], Image.Image]

BAND = 4 * 2**20  # pixels converted at a time: what is beside a large picture stays small
SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of colour profiles, and the modes that they are for
GREY = ("1", "L", "LA", "La")
SAME = 2  # levels by which a profile may move a colour and still be sRGB, written or rounded otherwise


def to_srgb(image: Image.Image, background: Color, what: str) -> Image.Image:
    """Any mode → RGB: 16 bits scaled to 8, the colour profile applied, transparency laid over `background`.

    Args: image: not changed; what: whose picture it is, for messages.
    Raises: InputError for pixels whose range is not known; what Pillow raises for damaged ones.
    Warns: a log line for a colour profile that cannot be used.
    """
    tiles: Any = getattr(image, "tile", None)  # what is still to be decoded
    sixteen = bool(tiles) and "16" in str(tiles[0][3])
    image.load()
    narrow = _narrower(image, sixteen)
    profile = _from_profile(image, what)
    width, height = image.size
    rows = max(1, BAND // width)
    result = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows)))
        result.paste(_flat(narrow(band), profile, background), (0, top))
    return result


def _flat(band: Image.Image, profile: Convert | None, background: Color) -> Image.Image:
    if not band.has_transparency_data:
        return band.convert("RGB") if profile is None else profile(band)
    opaque = band.convert("RGBA")
    if profile is not None:
        alpha = opaque.getchannel("A")
        opaque = profile(opaque.getchannel("R") if band.mode in GREY else opaque)
        opaque.putalpha(alpha)
    layer = Image.new("RGBA", band.size, (*background, 255))
    layer.alpha_composite(opaque)
    return layer.convert("RGB")


def _narrower(image: Image.Image, sixteen: bool) -> Convert:
    """What makes 8 bits of more. Pillow reads colours of 16 bits as 8, but says their transparent colour in
    16; grey of 16 bits it clips, and does not turn round where white is 0.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits, white_is_zero = tags.get(258, (16,))[0], tags.get(262) == 0
    if 2 in tags.get(339, ()):
        raise InputError("has signed pixels, whose range is not known: save it with 8 bits a channel")
    if image.mode == "F" or bits > 16 or (image.mode == "I" and not _within_sixteen(image)):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise InputError(f"has {kind} pixels, whose range is not known: save it with 8 bits a channel")
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        most = 2**bits - 1
        table = np.minimum(np.arange(2**16) * 255 // most, 255).astype(np.uint8)
        if white_is_zero:
            table = table[np.maximum(most - np.arange(2**16), 0)]
        return lambda band: _grey(np.asarray(band), table, transparent)
    if isinstance(transparent, tuple) and (sixteen or max(transparent) > 255):

        def scaled(band: Image.Image) -> Image.Image:
            band.info["transparency"] = tuple(value >> 8 for value in transparent)
            return band

        return scaled
    return lambda band: band


def _within_sixteen(image: Image.Image) -> bool:
    least, most = image.getextrema()
    return 0 <= least and most < 2**16  # type: ignore[operator]  # one band has two numbers


def _grey(values: np.ndarray, table: np.ndarray, transparent: object) -> Image.Image:
    """Values of 16 bits [H,W] through a table: an image L, or LA where one value is transparent."""
    grey = Image.fromarray(table[values])
    if not isinstance(transparent, int):
        return grey
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _from_profile(image: Image.Image, what: str) -> Convert | None:
    """The picture's colours → sRGB, as its profile says; None without one, and where it is sRGB's."""
    data = image.info.get("icc_profile")
    if not data and image.mode != "LAB":
        return None
    try:
        source = _profile(data)
        mode = _mode(image)
        space = "LAB" if image.mode == "LAB" else SPACES.get(source.profile.xcolor_space.strip())
        if space != mode:
            raise ValueError(f"it is for {source.profile.xcolor_space.strip()}, the picture is {image.mode}")
        intent = ImageCms.Intent.PERCEPTUAL
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
        if mode in ("L", "RGB") and _changes_nothing(transform, mode):
            return None
    except Exception as error:  # whatever is wrong with a profile, the pixels are sound
        if image.mode == "LAB":
            raise
        log.warning("%s: its colour profile is ignored: %s", what, " ".join(str(error).split())[:200])
        return None

    def convert(band: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(band if band.mode == mode else band.convert(mode), transform)
        assert converted is not None  # it is where it is not made in place
        return converted

    return convert


def _profile(data: object) -> ImageCms.ImageCmsProfile:
    if not data:
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    if not isinstance(data, bytes):
        raise ValueError("it is not bytes")
    return ImageCms.ImageCmsProfile(io.BytesIO(data))


def _mode(image: Image.Image) -> str:
    if image.mode in GREY or image.mode.startswith("I"):
        return "L"
    return image.mode if image.mode in ("CMYK", "LAB") else "RGB"


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves all greys, or a cube of 17 × 17 × 17 colours, as they are."""
    if mode == "L":
        sample = np.arange(256, dtype=np.uint8)[None]
    else:
        steps = np.linspace(0, 255, 17).astype(np.uint8)
        sample = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    image = Image.fromarray(sample)
    moved = ImageCms.applyTransform(image, transform)
    return bool(np.abs(np.asarray(moved).astype(int) - np.asarray(image.convert("RGB"))).max() <= SAME)
