"""Reading reference pictures, and fitting them to what a model wants."""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

if TYPE_CHECKING:
    from .bundle_format.schema import Pictures

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # none that starts another program
MOST_PIXELS = 64 * 2**20  # more is refused before it is decoded
HUGE_PIXELS = 16 * 2**20  # more is worth a warning: so much detail is lost
ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")

Color = tuple[int, int, int]


def load(picture: object, size: int, background: Color, what: str) -> np.ndarray:
    """Reads a reference picture and fits it, uncut, into the middle of a square.

    Args: picture: a path, a PIL image, or a uint8 array [H,W], [H,W,1], [H,W,3] (RGB) or [H,W,4] (RGBA);
        size: the square's side in pixels; background: RGB behind transparency and beside what is not square;
        what: whose picture it is ("the picture of 'cat'"), for messages.
    Returns: uint8 [size,size,3], RGB, upright (EXIF orientation applied), bicubic with antialiasing.
    Raises, warns: as `read`.
    """
    return fit(read(picture, background, what), (size, size), "whole", background)


def read(picture: object, background: Color, what: str) -> Image.Image:
    """Reads a picture, all of it: RGB, upright, transparency laid over `background`.

    Args: as of `load`.
    Raises: InputError when it is missing, no picture, damaged, of an unreadable kind, or larger than 64
        megapixels.
    Warns: one log line each for an animated picture (its first frame is used) and one above 16 megapixels.
    """
    if isinstance(picture, (str, os.PathLike)):
        return _read_file(picture, background, f"{what} {os.fspath(picture)!r}")
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture, what)
    if not isinstance(picture, Image.Image):
        raise InputError(f"{what} must be a path, a PIL image or a uint8 array, not {type(picture).__name__}")
    return _read_checked(picture, background, what)


def fit(image: Image.Image, size: tuple[int, int], how: str, background: Color) -> np.ndarray:
    """Fits an RGB image into width × height: uint8 [height,width,3].

    Args: how: `whole` (scaled, uncut, in the middle, the rest is background), `middle` (scaled so that it
        covers all, the middle kept: CLIP's own way), `padded` and `cut` (first given the shape, by background
        or by cutting, then scaled: SkyReels-A2's ways), `stretched` (scaled to the size, whatever its shape:
        diffusers' way). All but the last, which is Lanczos's, are bicubic with antialiasing.
    """
    return np.array(_FITS[how](image, size, background))


def prepare(image: Image.Image, how: Pictures, size: int) -> np.ndarray:
    """An RGB image as the picture encoder sees it: uint8 [size,size,3]."""
    if how.padded_to is not None:
        square = fit(image, (how.padded_to, how.padded_to), "padded", how.background)
        image = Image.fromarray(square)
    return fit(image, (size, size), how.fit, how.background)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [px,px,3] → float32 [3,px,px], (pixel / 255 - mean) / std per channel, as CLIP wants it."""
    scaled = (pixels / 255.0 - np.asarray(mean)) / np.asarray(std)  # [px,px,3] float64
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)  # [3,px,px]


def _read_file(path: str | os.PathLike[str], background: Color, what: str) -> Image.Image:
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        raise InputError(f"{what} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not regular:
        raise InputError(f"{what} is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and about sizes that are refused below
            with Image.open(Path(path), formats=FORMATS) as image:
                return _read_checked(image, background, what)
    except UnidentifiedImageError:
        raise InputError(f"{what} is not a picture in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise InputError(f"{what} has more than {MOST_PIXELS // 2**20} megapixels") from None
    except InputError:
        raise
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        raise InputError(f"{what} is damaged: {_line(error)}") from None


def _read_checked(image: Image.Image, background: Color, what: str) -> Image.Image:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise InputError(f"{what} is {width}×{height}: more than {MOST_PIXELS // 2**20} megapixels")
    if width == 0 or height == 0:
        raise InputError(f"{what} is empty ({width}×{height})")
    if width * height > HUGE_PIXELS:
        log.warning("%s is %d×%d: it is scaled down, and most of it is lost", what, width, height)
    try:
        frames = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        if frames > 1:
            log.warning("%s has %d frames: only the first is used", what, frames)
            image.seek(0)
        return _flatten(ImageOps.exif_transpose(image), background)
    except InputError as error:
        raise InputError(f"{what} {error}") from None
    except Exception as error:  # see above: decoding happens here
        raise InputError(f"{what} is damaged: {_line(error)}") from None


def _flatten(image: Image.Image, background: Color) -> Image.Image:
    """Any mode → RGB, transparency laid over `background`."""
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip them
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(values // 257, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError("has floating-point pixels, whose range is not known: save it with 8 bits a channel")
    if image.has_transparency_data:
        layer = Image.new("RGBA", image.size, (*background, 255))
        layer.alpha_composite(image.convert("RGBA"))
        return layer.convert("RGB")
    return image.convert("RGB")


def _whole(image: Image.Image, size: tuple[int, int], background: Color) -> Image.Image:
    scale = min(full / side for full, side in zip(size, image.size, strict=True))
    width, height = (max(1, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # Pillow's bicubic antialiases
    canvas = Image.new("RGB", size, background)
    canvas.paste(image, ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def _middle(image: Image.Image, size: tuple[int, int], background: Color) -> Image.Image:
    # by the side that needs the larger factor; of the other a fraction of a pixel is left out, as CLIP does
    full, side = max(zip(size, image.size, strict=True), key=lambda pair: pair[0] / pair[1])
    width, height = (own * full // side for own in image.size)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size[0], top + size[1]))


def _padded(image: Image.Image, size: tuple[int, int], background: Color) -> Image.Image:
    (width, height), (own_width, own_height) = size, image.size
    aside = int((width / height * own_height - own_width) / 2)
    above = int((height / width * own_width - own_height) / 2)
    if own_height / own_width < height / width:
        aside = 0
    else:
        above = 0
    canvas = Image.new("RGB", (own_width + 2 * aside, own_height + 2 * above), background)
    canvas.paste(image, (aside, above))
    return canvas.resize(size, Image.Resampling.BICUBIC)


def _cut(image: Image.Image, size: tuple[int, int], background: Color) -> Image.Image:
    (width, height), (own_width, own_height) = size, image.size
    kept_width, kept_height = own_width, own_height
    if own_height / own_width < height / width:
        kept_width = max(1, int(own_height / height * width))
    else:
        kept_height = max(1, int(own_width / width * height))
    left, top = (own_width - kept_width) // 2, (own_height - kept_height) // 2
    return image.crop((left, top, left + kept_width, top + kept_height)).resize(
        size, Image.Resampling.BICUBIC
    )


def _stretched(image: Image.Image, size: tuple[int, int], background: Color) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


_FITS = {"whole": _whole, "middle": _middle, "padded": _padded, "cut": _cut, "stretched": _stretched}


def _from_array(array: np.ndarray, what: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(
            f"{what} must be a uint8 array [H,W], [H,W,3] or [H,W,4], not {array.dtype} {list(array.shape)}"
        )
    if array.size == 0:
        raise InputError(f"{what} is empty {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
