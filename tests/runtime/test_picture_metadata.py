"""Whatever stands beside the pixels, sound pixels are read; what they need to be shown right is kept."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from conceptmaster.errors import InputError
from conceptmaster.runtime import pictures

RGB = np.kron(np.random.default_rng(0).integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
IMAGE = Image.fromarray(RGB)
UPRIGHT = np.rot90(RGB, -1)


def read(picture: object) -> np.ndarray:
    return np.asarray(pictures.read(picture, (255, 255, 255), "the picture of 'cat'"))


def encoded(format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    IMAGE.save(file, format, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ wrong)


BULK = zlib.compress(bytes(5_000_000))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # a quarter turn
ANCILLARY = "tIME pHYs gAMA cHRM sRGB sBIT bKGD hIST eXIf acTL fcTL iTXt zTXt tEXt sPLT iCCP zzZz"
CHUNKS = {
    "compressed text": chunk(b"zTXt", b"a\0\0" + BULK),
    "compressed XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BULK),
    "texts of 70 MB": chunk(b"tEXt", b"a\0" + b"A" * 1_000_000) * 70,
    "a wrong checksum": chunk(b"tEXt", b"a\0b", wrong=1),
    "a raw profile": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz\n"),
    "EXIF that is none": chunk(b"eXIf", b"\0\x08\0\2\1\x12\0\3"),
    "a profile of another method": chunk(b"iCCP", b"a\0\5abc"),
    "a bulky profile": chunk(b"iCCP", b"a\0\0" + BULK),
    **{
        f"{length} bytes of {name}": chunk(name.encode(), bytes(range(length)))
        for name in ANCILLARY.split()
        for length in (0, 2, 256)
    },
}


@pytest.mark.parametrize("place", ["before", "behind"])
def test_png(place: str) -> None:
    data = encoded("PNG")
    cut = 33 if place == "before" else len(data) - 12  # behind the header, or before the end
    for name, piece in CHUNKS.items():
        assert (read(data[:cut] + piece + data[cut:]) == RGB).all(), name
    assert (read(data[:-12]) == RGB).all(), "no end"
    assert (read(data + b"junk" * 100) == RGB).all(), "more than there is"


def test_orientation_is_kept_where_a_text_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded("PNG", exif=EXIF)
    with caplog.at_level(logging.WARNING):
        found = read(data[:33] + CHUNKS["compressed text"] + data[33:])
    np.testing.assert_array_equal(found, UPRIGHT)
    assert len(caplog.messages) == 1 and "metadata is broken or too large, and ignored" in caplog.text


def test_jpeg() -> None:
    data = encoded("JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    bodies = [
        b"",
        b"\0",
        b"Exif\0\0",
        b"Exif\0\0junkjunk",
        b"ICC_PROFILE\0",
        b"ICC_PROFILE\0\1\3abc",
        b"MPF\0junk",
    ]
    bodies += [
        b"Photoshop 3.0\x008BIM\4\4\xff\xff\xff",
        b"Adobe",
        b"JFIF",
        b"http://ns.adobe.com/xap/1.0/\0<",
    ]
    for marker in (*range(0xE0, 0xF0), 0xFE):
        for body in bodies:
            segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
            assert (read(data[:2] + segment + data[2:]) == expected).all(), (hex(marker), body)
    turned = encoded("JPEG", quality=95, exif=EXIF)
    for segment in (b"\xff\xfe\xff\xff" + bytes(65533), b"\xff\xe0\0\6JFIF"):
        np.testing.assert_array_equal(read(turned[:2] + segment * 9 + turned[2:]), np.rot90(expected, -1))


def test_tiff() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    beside = {305: "soft" * 10, 270: "described", 33432: "(c) a", 700: b"<xmp>" * 9, 34675: b"junk" * 9}
    for tag, value in beside.items():
        tags.tagtype[tag], tags[tag] = 7 if isinstance(value, bytes) else 2, value
    for compression in (None, "tiff_lzw"):
        data = encoded("TIFF", tiffinfo=tags, compression=compression)
        (place,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, kind, number, where = struct.unpack_from("<HHII", data, entry)
            if tag not in beside:
                continue
            for new in (
                (kind, number, 2**31),
                (kind, 2**30, where),
                (99, number, where),
                (5, number, where),
                (kind, 0, 0),
            ):
                broken = bytearray(data)
                struct.pack_into("<HII", broken, entry + 2, *new)
                assert (read(broken) == RGB).all(), (tag, new)
        for following in (7, 10**8):  # a second directory that is none
            broken = bytearray(data)
            struct.pack_into("<I", broken, place + 2 + 12 * count, following)
            assert (read(broken) == RGB).all(), following
    for tag in (34665, 34853, 330):  # records elsewhere, which are not there
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype[tag], tags[tag] = 4, 999_999
        tags.tagtype[274], tags[274] = 3, 6
        assert (read(encoded("TIFF", tiffinfo=tags)) == UPRIGHT).all(), tag


@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
def test_others(format: str) -> None:
    how = {"lossless": True} if format == "WEBP" else {"quality": 90}
    try:
        expected = np.asarray(Image.open(io.BytesIO(encoded(format, **how))).convert("RGB"))
    except (KeyError, OSError):
        pytest.skip(f"this Pillow has no {format}")
    for beside in (
        {"icc_profile": b"junk" * 50},
        {"xmp": b"<x>" * 1_000_000},
        {"xmp": b"\xff<tiff:Orientation>9"},
    ):
        np.testing.assert_array_equal(read(encoded(format, **how, **beside)), expected)


def test_an_animation_that_ends_early_still_begins() -> None:
    data = encoded("GIF", save_all=True, append_images=[Image.new("RGB", IMAGE.size, "blue")] * 3)
    first = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(read(data[:-30]), first)


def test_damaged_pixels_are_refused_all_the_same() -> None:
    """A comment that must go does not make them sound; the error is of the pixels."""
    data = encoded("PNG")
    for piece in (b"", CHUNKS["compressed text"], CHUNKS["a wrong checksum"]):
        with pytest.raises(InputError, match="is damaged"):
            read(data[:33] + piece + data[33:-80])


def test_limits_of_the_process_stay_what_they_are() -> None:
    limits = (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES)
    data = encoded("PNG")
    read(data[:33] + CHUNKS["compressed text"] + data[33:])
    assert limits == (
        PngImagePlugin.MAX_TEXT_CHUNK,
        PngImagePlugin.MAX_TEXT_MEMORY,
        ImageFile.LOAD_TRUNCATED_IMAGES,
    )
