"""Leaves out of a picture's file what is not the picture.

Pillow refuses a file whose pixels are sound when a text in it is large, a checksum of a comment is wrong or a
record beside the pixels is broken; viewers show it. Its limits could be changed for the whole process only,
so such a file is read a second time, without those parts.
"""

from __future__ import annotations

import struct
import zlib

PNG, JPEG, TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", {b"II*\0": "<", b"MM\0*": ">"}
# JPEG: APP0 (JFIF), APP14 (Adobe's, which says how colours are stored); APP1 has EXIF, APP2 the profile
JPEG_PIXELS = {0xE0: 16, 0xEE: 14}  # and their least lengths
JPEG_KEPT = {(0xE1, b"Exif\0"), (0xE2, b"ICC_PROFILE\0")}
# TIFF: sizes, bits, compression, colours, strips, tiles, palettes, transparency, old and new JPEG, YCbCr
TIFF_PIXELS = {*range(254, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, *range(320, 326)}
TIFF_PIXELS |= {332, 334, 336, 338, 339, 347, *range(512, 522), *range(529, 533)}
TIFF_KEPT = {274: 3, 34675: 7}  # orientation (a short), the colour profile (bytes)


def without_metadata(data: bytes, bare: bool) -> bytes | None:
    """The same picture without texts, comments and records; None for a format that this does not know.

    Args: data: a whole file; bare: leave out orientation and colour profile, too.
    """
    try:
        if data.startswith(PNG):
            return _png(data, bare)
        if data.startswith(JPEG):
            return _jpeg(data, bare)
        if (order := TIFF.get(data[:4])) is not None:
            return _tiff(data, order, bare)
    except (struct.error, IndexError):  # damaged beyond its records
        pass
    return None


def _png(data: bytes, bare: bool) -> bytes:
    kept, place = [PNG], len(PNG)
    wanted = {b"tRNS"} if bare else {b"tRNS", b"iCCP", b"eXIf"}
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        ancillary = bool(name[0] & 0x20)
        if not ancillary or (name in wanted and chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))):
            kept.append(chunk)
        place += 12 + length
    return b"".join(kept)


def _jpeg(data: bytes, bare: bool) -> bytes:
    kept, place = [data[:2]], 2
    while data[place] == 0xFF and (marker := data[place + 1]) != 0xDA:  # until the pixels
        if marker == 0xFF:  # a filling byte
            place += 1
            continue
        (length,) = struct.unpack_from(">H", data, place + 2)
        segment = data[place : place + 2 + length]
        beside = marker == 0xFE or 0xE0 <= marker <= 0xEF
        wanted = not bare and any(marker == m and segment[4:].startswith(b) for m, b in JPEG_KEPT)
        if not beside or len(segment) >= JPEG_PIXELS.get(marker, 2**16) + 2 or wanted:
            kept.append(segment)
        place += 2 + length
    return b"".join([*kept, data[place:]])


def _tiff(data: bytes, order: str, bare: bool) -> bytes:
    """In place: fewer entries in the first directory, and no second one."""
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, place)
    kept = []
    for index in range(count):
        entry = data[place + 2 + 12 * index : place + 14 + 12 * index]
        tag, kind = struct.unpack_from(f"{order}HH", entry)
        if tag in TIFF_PIXELS or (not bare and TIFF_KEPT.get(tag) == kind):
            kept.append(entry)
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:place] + directory + data[place + len(directory) :]
