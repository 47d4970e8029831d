"""Reading reference pictures, and fitting them to what a model wants."""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import InputError, OutOfMemory
from .grids import own_size
from .picture_colors import Color, to_srgb
from .picture_metadata import TIFF, without_metadata

if TYPE_CHECKING:
    from .bundle_format.pictured import Pictures

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # none that starts another program
MOST_PIXELS = 64 * 2**20  # more is refused before it is decoded; no canvas is made larger
MOST_SIDE = 2**20  # a row, a column or a resampling table of more takes gigabytes, whatever the other side
MOST_BYTES = 2**30  # of an open file
HUGE_PIXELS = 16 * 2**20  # more is worth a warning: so much detail is lost
LATENT = 8  # pixels of a side that one of Wan2.1's latents stands for
ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
TURNS = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load(picture: object, size: int, background: Color, what: str) -> np.ndarray:
    """Reads a reference picture and fits it, uncut, into the middle of a square.

    Args: as of `read`; size: the square's side in pixels.
    Returns: uint8 [size,size,3], RGB, bicubic with antialiasing.
    Raises, warns: as `read`.
    """
    return fit(read(picture, background, what), (size, size), "whole", background)


def read(picture: object, background: Color, what: str) -> Image.Image:
    """Reads a picture, all of it: sRGB, upright (EXIF orientation applied), transparency laid over
    `background`.

    Args: picture: a path; a file's bytes; a file open for reading bytes (from where it stands, and left
        there if it can seek); a PIL image (its current frame); or a uint8 array [H,W], [H,W,1], [H,W,3] (RGB)
        or [H,W,4] (RGBA). background: RGB behind transparency; what: whose picture it is ("the picture of
        'cat'"), for messages.
    Raises: InputError when it is missing, no picture, damaged, of an unreadable kind, or larger than 64
        megapixels; OutOfMemory.
    Warns: one log line each for an animated file (its first frame is used), a picture above 16 megapixels,
        a colour profile that cannot be used, and metadata that cannot be read.
    """
    if isinstance(picture, (str, os.PathLike)):
        what = f"{what} {os.fspath(picture)!r}"
        with _opened(picture, what) as file:
            return _read_file(file, background, what)
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return _read_file(io.BytesIO(picture), background, what)
    if hasattr(picture, "read"):
        return _read_open(picture, background, what)
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture, what)
    if not isinstance(picture, Image.Image):
        kinds = "a path, bytes, an open file, a PIL image or a uint8 array"
        raise InputError(f"{what} must be {kinds}, not {type(picture).__name__}")
    try:
        return _upright(*_decode(picture, background, what))
    except (InputError, OutOfMemory):
        raise
    except Exception as error:  # decoding may happen only here
        raise _damaged(error, what) from None


def media_type(path: Path) -> str:
    """What kind of picture a file is that `read` has read: "image/png". Raises OSError."""
    with Image.open(path, formats=FORMATS) as image:
        return Image.MIME[image.format or ""]


def fit(image: Image.Image, size: tuple[int, int], how: str, background: Color) -> np.ndarray:
    """Fits an RGB image into width × height: uint8 [height,width,3], or float32 in 0..255 where it says so.

    Args: how: `whole` (scaled, uncut, in the middle, the rest is background), `middle` (scaled so that it
        covers all, the middle kept: CLIP's own way), `padded` and `cut` (first given the shape, by background
        or by cutting, then scaled: SkyReels-A2's ways), `stretched` (scaled to the size, whatever its shape:
        diffusers' way), `bilinear` (as `whole`, but without antialiasing, in float32: the way of diffusers'
        WanVACEPipeline), `centred` (as `whole`, but sides rounded down and by Lanczos: the way of Phantom,
        SkyReels-V3 and MAGREF), `bicubic` (as `stretched`, but in float32 and without antialiasing: the way
        of Wan's own programs with what CLIP sees), `own` (its own size, whole patches, within a square: see
        grids.py). All are bicubic with antialiasing where nothing else is said; `stretched` is Lanczos's.
    """
    return np.array(_FITS[how](image, size, background))


def inside(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where `centred` puts a picture of the size `own` (width, height) into one of `size`: left, top, and its
    width and height there."""
    (width, height), ratio = size, own[0] / own[1]
    if ratio > width / height:  # divided twice, as theirs: the last bit decides what is rounded down
        height = max(1, int(width / ratio))
    else:
        width = max(1, int(height * ratio))
    return (size[0] - width) // 2, (size[1] - height) // 2, width, height


def prepare(image: Image.Image, how: Pictures, size: int) -> np.ndarray:
    """An RGB image as the picture encoder sees it: [size,size,3], as of `fit`."""
    if how.padded_to is not None:
        square = fit(image, (how.padded_to, how.padded_to), "padded", how.background)
        image = Image.fromarray(square)
    return fit(image, (size, size), how.fit, how.background)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """0..255 [px,px,3] → float32 [3,px,px], (pixel / 255 - mean) / std per channel, as CLIP wants it."""
    scaled = (pixels / 255.0 - np.asarray(mean)) / np.asarray(std)  # [px,px,3] float64
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)  # [3,px,px]


def _opened(path: str | os.PathLike[str], what: str) -> IO[bytes]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise InputError(f"{what} is not a file")
        return Path(path).open("rb")
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read_open(file: Any, background: Color, what: str) -> Image.Image:
    """Reads an open file from where it stands, and puts it back there."""
    if isinstance(file, io.TextIOBase):
        raise InputError(f"{what} is a file opened for text: open it with 'rb'")
    try:
        place = file.tell() if getattr(file, "seekable", lambda: False)() else None
        rest = file if place == 0 else _rest(file, what)
    except (OSError, ValueError) as error:
        raise InputError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return _read_file(rest, background, what)
    finally:
        if place is not None:
            file.seek(place)


def _rest(file: Any, what: str) -> IO[bytes]:
    rest, left = io.BytesIO(), MOST_BYTES + 1
    while left > 0 and (part := file.read(min(left, 2**24))):
        left -= rest.write(part)
    if left <= 0:
        raise InputError(f"{what} has more than {MOST_BYTES:,} bytes")
    return rest


def _read_file(file: IO[bytes], background: Color, what: str) -> Image.Image:
    """Decodes a file that can seek; once more without its metadata where that may be what fails."""
    try:
        return _open(file, background, what)
    except (InputError, OutOfMemory):
        raise
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        reason = error
    file.seek(0)
    data = file.read(MOST_BYTES)
    for bare in (False, True):
        try:
            if (pixels := without_metadata(data, bare)) is not None and pixels != data:
                image = _open(io.BytesIO(pixels), background, what)
                log.warning("%s: its metadata is broken or too large, and ignored: %s", what, _line(reason))
                return image
        except (InputError, OutOfMemory):
            raise
        except Exception as error:  # the pixels are damaged, too
            reason = error
    if isinstance(reason, UnidentifiedImageError) and data[:4] in TIFF:  # Pillow has not all kinds
        raise InputError(f"{what} is a TIFF of a kind that is not known: save it as PNG")
    raise _damaged(reason, what) from None


def _open(file: IO[bytes], background: Color, what: str) -> Image.Image:
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, and about sizes that are refused
        with Image.open(file, formats=FORMATS) as image:
            decoded = _decode(image, background, what)
            if (frames := _frames(image)) > 1:
                log.warning("%s has %d frames: only the first is used", what, frames)
    del image  # before there is a third one
    return _upright(*decoded)


def _decode(image: Image.Image, background: Color, what: str) -> tuple[Image.Image, Image.Transpose | None]:
    """The current frame, and what makes it upright."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise InputError(f"{what} is {width}×{height}: more than {MOST_PIXELS // 2**20} megapixels")
    if max(width, height) > MOST_SIDE:
        raise InputError(f"{what} is {width}×{height}: a side may be {MOST_SIDE} pixels long at most")
    if width == 0 or height == 0:
        raise InputError(f"{what} is empty ({width}×{height})")
    if width * height > HUGE_PIXELS:
        log.warning("%s is %d×%d: it is scaled down, and most of it is lost", what, width, height)
    try:
        result = to_srgb(image, background, what)
    except InputError as error:
        raise InputError(f"{what} {error}") from None
    except MemoryError:
        raise OutOfMemory(f"{what} is {width}×{height}: there is too little memory to read it") from None
    try:
        return result, TURNS.get(image.getexif().get(0x0112, 1))
    except Exception as error:  # whatever is wrong with the record, the pixels are sound
        log.warning("%s: its EXIF data are broken, and ignored: %s", what, _line(error))
        return result, None


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    except Exception:  # the first frame is sound; how many follow is not known
        return 1


def _damaged(error: Exception, what: str) -> InputError:
    if isinstance(error, UnidentifiedImageError):
        return InputError(f"{what} is not a picture in a known format ({', '.join(FORMATS)})")
    if isinstance(error, Image.DecompressionBombError):
        return InputError(f"{what} has more than {MOST_PIXELS // 2**20} megapixels")
    return InputError(f"{what} is damaged: {_line(error)}")


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
    if width * height > MOST_PIXELS:  # an extreme shape: its middle first
        kept = [wanted * side / full for wanted in size]
        start = [(own - part) / 2 for own, part in zip(image.size, kept, strict=True)]
        box = (start[0], start[1], start[0] + kept[0], start[1] + kept[1])
        return image.resize(size, Image.Resampling.BICUBIC, box=box)
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
    if (own_width + 2 * aside) * (own_height + 2 * above) > MOST_PIXELS:  # an extreme shape: scaled first
        return _whole(image, size, background)
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
    if size[0] * image.height > MOST_PIXELS:  # an extreme shape: Pillow may widen it first
        image = image.resize((image.width, size[1]), Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)


def _bilinear(image: Image.Image, size: tuple[int, int], background: Color) -> np.ndarray:
    """First to whole latents, by Lanczos, as diffusers' VideoProcessor does with every picture; then torch's
    interpolate(mode="bilinear", align_corners=False), which samples four pixels each."""
    whole_width, whole_height = (max(LATENT, side - side % LATENT) for side in image.size)
    if image.size != (whole_width, whole_height):
        image = image.resize((whole_width, whole_height), Image.Resampling.LANCZOS)
    scale = min(full / side for full, side in zip(size, image.size, strict=True))
    width, height = (max(1, int(side * scale)) for side in image.size)
    pixels = np.asarray(image)  # [h,w,3]
    for axis, length in ((0, height), (1, width)):
        pixels = _resampled(pixels, axis, length)
    canvas = np.empty((size[1], size[0], 3), np.float32)
    canvas[:] = background
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def _centred(image: Image.Image, size: tuple[int, int], background: Color) -> Image.Image:
    left, top, width, height = inside(image.size, size)
    canvas = Image.new("RGB", size, background)
    canvas.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return canvas


def _own(image: Image.Image, size: tuple[int, int], background: Color) -> Image.Image:
    found = own_size(image.size, max(size))
    return image if found == image.size else image.resize(found, Image.Resampling.BICUBIC)


def _resampled(pixels: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Linear between the two nearest along an axis, whose new places are centred on the old ones; float32."""
    old = pixels.shape[axis]
    places = np.maximum((np.arange(length) + 0.5) * (old / length) - 0.5, 0.0)
    first = np.minimum(places.astype(np.int64), old - 1)
    second = np.minimum(first + 1, old - 1)
    part = np.expand_dims((places - first).astype(np.float32), tuple({0, 1, 2} - {axis}))
    return pixels.take(first, axis) * (1 - part) + pixels.take(second, axis) * part


def _bicubic(image: Image.Image, size: tuple[int, int], background: Color) -> np.ndarray:
    """torch's interpolate(mode="bicubic", align_corners=False), which samples 16 pixels each."""
    pixels = np.asarray(image)  # [h,w,3]
    for axis, length in ((0, size[1]), (1, size[0])):
        places = (np.arange(length) + 0.5) * (pixels.shape[axis] / length) - 0.5
        first = np.floor(places).astype(np.int64)
        part = places - first
        total = np.zeros((), np.float32)
        for tap in range(-1, 3):  # what is beyond an edge is as the edge
            weight = np.expand_dims(_cubic(np.abs(part - tap)), tuple({0, 1, 2} - {axis}))
            index = np.clip(first + tap, 0, pixels.shape[axis] - 1)
            total = total + pixels.take(index, axis) * weight.astype(np.float32)
        pixels = total
    return pixels


def _cubic(x: np.ndarray) -> np.ndarray:
    """The weight of a pixel at distance x, of 0 to 2: Keys' cubic convolution with torch's a."""
    a = -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    return np.where(x <= 1, near, ((x - 5) * x + 8) * x * a - 4 * a)


_FITS: dict[str, Callable[[Image.Image, tuple[int, int], Color], Image.Image | np.ndarray]] = {
    "whole": _whole,
    "middle": _middle,
    "padded": _padded,
    "cut": _cut,
    "stretched": _stretched,
    "bilinear": _bilinear,
    "centred": _centred,
    "bicubic": _bicubic,
    "own": _own,
}


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
