"""Colour profiles against the formulas of colorimetry, and pixels of 16 bits against their 8-bit twins."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin, features

from conceptmaster.errors import InputError
from conceptmaster.runtime import pictures

# Columns red, green, blue; rows X, Y, Z, adapted to D50, as profiles hold them (Lindbloom's tables)
SRGB = np.array([[0.43607, 0.38506, 0.14308], [0.22250, 0.71688, 0.06062], [0.01393, 0.09710, 0.71417]])
ADOBE = np.array([[0.60976, 0.20524, 0.14922], [0.31112, 0.62566, 0.06322], [0.01948, 0.06089, 0.74484]])
D50 = np.array([0.9642, 1.0, 0.8249])
FORMATS = ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"]


def read(picture: object, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    return np.asarray(pictures.read(picture, background, "the picture of 'cat'"))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    best = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    best["AVIF"] = {"quality": 100, "subsampling": "4:4:4"}
    file = io.BytesIO()
    image.save(file, format, **best.get(format, {}), **options)
    return file.getvalue()


def icc(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2."""
    described = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": described, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": xyz(D50), **tags}
    table, body, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"test", 0x02400000, kind, space, pcs)
    head += bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + xyz(D50)[8:] + bytes(48) + table + body


def xyz(values: Sequence[float] | np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(v) * 65536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def rgb_profile(matrix: np.ndarray = ADOBE, curve: bytes = gamma(563 / 256)) -> bytes:
    columns = {name: xyz(matrix[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return icc(b"RGB ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def srgb_curve() -> bytes:
    """sRGB's curve as a table, as the oldest sRGB profiles have it."""
    x = np.arange(1024) / 1023
    y = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv" + bytes(4) + struct.pack(">I", 1024) + np.rint(y * 65535).astype(">u2").tobytes()


def to_srgb(linear_xyz: np.ndarray) -> np.ndarray:
    """XYZ (D50) [...,3] → sRGB 0..255."""
    linear = np.clip(linear_xyz @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def patches() -> np.ndarray:
    """uint8 [64,64,3]: 8 × 8 colours that Adobe RGB and sRGB both have."""
    colors = np.random.default_rng(0).integers(70, 190, (8, 8, 3))
    return np.kron(colors, np.ones((8, 8, 1))).astype(np.uint8)


@pytest.mark.parametrize("format", FORMATS)
def test_a_profile_of_rgb_is_converted(format: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    expected = to_srgb((patches() / 255.0) ** (563 / 256) @ ADOBE.T)
    found = read(encoded(Image.fromarray(patches()), format, icc_profile=rgb_profile()))
    difference = np.abs(found - expected)[4::8, 4::8]
    exact = format in ("PNG", "TIFF", "WEBP")
    assert difference.max() <= (1.5 if exact else 12) and difference.mean() < 1.5
    assert np.abs(patches() - expected).max() > 20, "otherwise nothing would be shown"


def test_a_profile_applies_to_palettes_transparency_and_images() -> None:
    expected = read(encoded(Image.fromarray(patches()), "PNG", icc_profile=rgb_profile()))
    palette = Image.fromarray(patches()).quantize(64)
    exact = read(encoded(palette.convert("RGB"), "PNG", icc_profile=rgb_profile()))
    np.testing.assert_array_equal(read(encoded(palette, "PNG", icc_profile=rgb_profile())), exact)
    half = np.dstack([patches(), np.full((64, 64), 255, np.uint8)])
    half[:32, :, 3] = 0
    found = read(encoded(Image.fromarray(half), "PNG", icc_profile=rgb_profile()), (1, 2, 3))
    assert (found[:32] == (1, 2, 3)).all(), "the background is sRGB as it stands"
    np.testing.assert_array_equal(found[32:], expected[32:])
    opened = Image.open(io.BytesIO(encoded(Image.fromarray(patches()), "PNG", icc_profile=rgb_profile())))
    np.testing.assert_array_equal(read(opened), expected)
    np.testing.assert_array_equal(np.asarray(opened), patches())  # which stays what it was


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_a_profile_of_grey_is_converted(mode: str) -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)
    levels = np.asarray(ramp.convert("L")) / 255.0
    expected = to_srgb((levels**1.8)[..., None] * D50)
    found = read(encoded(ramp, "PNG", icc_profile=icc(b"GRAY", {b"kTRC": gamma(1.8)})))
    assert np.abs(found - expected).max() <= 1.5
    same = read(encoded(ramp, "PNG", icc_profile=icc(b"GRAY", {b"kTRC": srgb_curve()})))
    np.testing.assert_array_equal(same, np.asarray(ramp.convert("RGB")))


def cmyk_profile() -> bytes:
    """Whose inks are odd: cyan is orange, more of any ink is darker. A table from 2⁴ corners to Lab."""
    corners = []
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        light = max(0.0, 100 - 30 * c - 25 * m - 10 * y - 100 * k)
        corners.append([light * 2.55, 128 + 30 * c * (1 - k), 128 + 50 * c * (1 - k)])
    identity = b"".join(np.arange(256, dtype=np.uint8).tobytes() for _ in range(4))
    matrix = struct.pack(">9i", *(np.eye(3).ravel() * 65536).astype(int))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity
    lut += np.rint(corners).clip(0, 255).astype(np.uint8).tobytes() + identity[: 3 * 256]
    return icc(b"CMYK", {b"A2B0": lut}, b"Lab ", b"prtr")


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_a_profile_of_cmyk_is_converted(format: str) -> None:
    def lab(light: float, a: float, b: float) -> np.ndarray:
        y = (light + 16) / 116
        f = np.array([y + a / 500, y, y - b / 200])
        return to_srgb(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50)

    inks = {(0, 0, 0, 0): lab(100, 0, 0), (255, 0, 0, 0): lab(70, 30, 50), (0, 255, 0, 0): lab(75, 0, 0)}
    for ink, expected in inks.items():
        data = encoded(Image.new("CMYK", (16, 16), ink), format, icc_profile=cmyk_profile())
        assert np.abs(read(data)[8, 8] - expected).max() <= 3
    plain = read(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), format))
    assert np.abs(plain[8, 8] - inks[255, 0, 0, 0]).max() > 50


@pytest.mark.parametrize("profile", ["littlecms", "table"])
def test_a_profile_of_srgb_changes_no_bit(profile: str, caplog: pytest.LogCaptureFixture) -> None:
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if profile == "table":
        data = rgb_profile(SRGB, srgb_curve())
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(pixels), "PNG", icc_profile=data)), pixels)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("profile", "word"),
    [
        (b"junk" * 50, "ignored"),
        (rgb_profile()[:200], "ignored"),
        (icc(b"GRAY", {b"kTRC": gamma(1.8)}), "for GRAY, the picture is RGB"),
        (cmyk_profile(), "for CMYK, the picture is RGB"),
        (icc(b"RGB ", {}), "ignored"),
        (icc(b"RGB ", {}, kind=b"link"), "ignored"),
    ],
)
def test_a_profile_that_does_not_fit_is_ignored(
    profile: bytes, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = read(encoded(Image.fromarray(patches()), "PNG", icc_profile=profile))
    np.testing.assert_array_equal(found, patches())
    assert len(caplog.messages) == 1 and "colour profile is ignored" in caplog.text and word in caplog.text


def test_lab_is_converted() -> None:
    image = Image.new("LAB", (8, 8), (255, 128, 128))
    assert np.abs(read(encoded(image, "TIFF"))[4, 4].astype(int) - 255).max() <= 2


# 16 bits


def png(pixels: np.ndarray, transparent: Sequence[int] | np.ndarray = ()) -> bytes:
    """A PNG of [H,W,C], 8 or 16 bits a channel, C of grey, grey and alpha, RGB, RGBA; transparent: tRNS."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width, channels = pixels.shape
    depth, kind = 8 * pixels.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    keyed = chunk(b"tRNS", np.array(transparent, ">u2").tobytes()) if len(transparent) else b""
    return b"\x89PNG\r\n\x1a\n" + head + keyed + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_is_its_twin(channels: int) -> None:
    twin = np.random.default_rng(0).integers(0, 256, (32, 32, channels), dtype=np.uint8)
    wide = twin.astype(np.uint16) * 257
    np.testing.assert_array_equal(read(png(wide)), read(png(twin)))
    if channels in (1, 3):
        key = twin[3, 4]
        expected = read(png(twin, key), (9, 8, 7))
        assert tuple(expected[3, 4]) == (9, 8, 7)
        np.testing.assert_array_equal(read(png(wide, key.astype(int) * 257), (9, 8, 7)), expected)


def test_the_transparent_grey_is_that_of_16_bits() -> None:
    """Of two greys that are one at 8 bits, one is transparent."""
    found = read(png(np.array([[[1000], [1001]]], np.uint16), [1000]), (255, 0, 0))
    assert found.tolist() == [[[255, 0, 0], [3, 3, 3]]]


def tiff(values: np.ndarray, order: str, photometric: int, bits: int = 16, sample: int = 1) -> bytes:
    """An uncompressed grey TIFF of 16 × 16 pixels, written by hand; values: as they lie in the file."""
    data = values.tobytes()
    height = width = 16
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    entries += [(273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample)]
    packed = struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        packed += struct.pack(f"{order}HHI", tag, kind, 1)
        packed += struct.pack(f"{order}I" if kind == 4 else f"{order}Hxx", value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + packed + bytes(4)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_tiff_of_16_bits_is_its_twin(order: str, white_is_zero: bool) -> None:
    wide = RAMP.astype(np.uint16) * 257
    stored = (65535 - wide if white_is_zero else wide).astype(f"{order}u2")
    data = tiff(stored, order, 0 if white_is_zero else 1)
    if white_is_zero and order == ">":  # Pillow does not know it
        with pytest.raises(InputError, match="is a TIFF of a kind that is not known: save it as PNG"):
            read(data)
    else:
        assert (read(data)[..., 0] == RAMP).all()
    small = 255 - RAMP if white_is_zero else RAMP
    assert (read(tiff(small, order, 0 if white_is_zero else 1, 8))[..., 0] == RAMP).all()


def test_compressed_tiff_of_16_bits_is_its_twin() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    image = Image.fromarray((65535 - RAMP.astype(np.uint16) * 257).astype(np.uint16))
    data = encoded(image, "TIFF", compression="tiff_lzw", tiffinfo=tags)
    with Image.open(io.BytesIO(data)) as opened:
        inverted = opened.tag_v2[262] == 0  # a Pillow that writes what it is told
    assert (read(data)[..., 0] == (RAMP if inverted else 255 - RAMP)).all()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (tiff(RAMP.astype("<i2") * 100, "<", 1, 16, 2), "signed pixels"),
        (tiff(RAMP.astype("i1"), "<", 1, 8, 2), "signed pixels"),
        (tiff(RAMP.astype("<i4"), "<", 1, 32, 2), "signed pixels"),
        (tiff(RAMP.astype("<u4"), "<", 1, 32, 1), "32-bit pixels"),
        (tiff(RAMP.astype("<f4"), "<", 1, 32, 3), "floating-point pixels"),
        (Image.fromarray(np.array([[-1, 5]], np.int32)), "32-bit pixels"),
        (Image.fromarray(np.array([[70000, 5]], np.int32)), "32-bit pixels"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(data: object, word: str) -> None:
    with pytest.raises(InputError, match=f"{word}, whose range is not known: save it with 8 bits a channel"):
        read(data)


def test_other_ways_to_hold_16_bits() -> None:
    wide = RAMP.astype(np.uint16) * 257
    for mode, values in (("I;16", wide), ("I;16B", wide.astype(">u2")), ("I", wide.astype(np.int32))):
        image = Image.frombytes(mode, (16, 16), values.tobytes())
        assert (read(image)[..., 0] == RAMP).all(), mode
    pgm = b"P5 16 16 65535\n" + wide.astype(">u2").tobytes()
    assert (read(pgm)[..., 0] == RAMP).all()
    first, second = (np.arange(256) * 4095 // 255).reshape(-1, 2).T  # of 12 bits, two in three bytes
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    assert np.abs(read(tiff(packed, "<", 1, 12))[..., 0].astype(int) - RAMP).max() <= 1


def test_large_pictures_are_converted_in_bands_as_small_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the mode: a band is a crop, and knows its palette, profile and transparent colour."""
    twin = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    palette = Image.fromarray(twin).quantize(64)
    kinds = [
        png(twin),
        png(twin[..., :3], twin[3, 4, :3]),
        png(twin[..., :1].astype(np.uint16) * 257, [int(twin[3, 4, 0]) * 257]),
        encoded(palette, "PNG", icc_profile=rgb_profile()),
        encoded(Image.fromarray(twin), "PNG", icc_profile=rgb_profile()),
    ]
    whole = [read(data) for data in kinds]
    monkeypatch.setattr("conceptmaster.runtime.picture_colors.BAND", 7 * 30)
    for data, expected in zip(kinds, whole, strict=True):
        np.testing.assert_array_equal(read(data), expected)
