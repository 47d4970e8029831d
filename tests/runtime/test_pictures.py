"""Reference pictures: every kind that people have, and every way in which a file can be bad."""

from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from conceptmaster.errors import InputError, OutOfMemory
from conceptmaster.runtime import pictures

WHITE = (255, 255, 255)


def load(picture: object, size: int = 8) -> np.ndarray:
    return pictures.load(picture, size, WHITE, "the picture of 'cat'")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_the_right_size_is_left_as_it_is(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for given_ in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels):
        np.testing.assert_array_equal(load(given_), pixels)


def test_normalise(pixels: np.ndarray) -> None:
    values = pictures.normalise(pixels, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert values.dtype == np.float32 and values.shape == (3, 8, 8)
    assert values[1, 2, 3] == pytest.approx((pixels[2, 3, 1] / 255 - 0.4) / 0.3)


@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_any_size_fits_uncut_in_the_middle(width: int, height: int, size: int) -> None:
    """A black picture on white: one centred black box with the picture's proportions."""
    black = load(np.zeros((height, width, 3), np.uint8), size).max(2) == 0
    box = [size * side / max(width, height) for side in (height, width)]
    rows, columns = black.any(1).sum(), black.any(0).sum()
    assert black.shape == (size, size) and black.sum() == rows * columns
    assert max(rows, columns) == size
    assert abs(rows - max(1, box[0])) <= 0.5 and abs(columns - max(1, box[1])) <= 0.5
    for lines in (black.any(1), black.any(0)):
        before, after = int(lines.argmax()), int(lines[::-1].argmax())
        assert 0 <= after - before <= 1


def test_shrinking_antialiases() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(load(board).astype(int) - 127).max() <= 3


def test_transparency_is_laid_over_the_background(tmp_path: Path) -> None:
    half = np.zeros((8, 8, 4), np.uint8)
    half[:4] = 255, 0, 0, 255
    half[4:, 4:] = 0, 0, 255, 51  # a fifth blue
    for image in (half, Image.fromarray(half), Image.fromarray(half).convert("RGBa")):
        result = load(image)
        assert tuple(result[0, 0]) == (255, 0, 0) and tuple(result[7, 0]) == WHITE
        assert tuple(result[7, 7]) == (204, 204, 255)
    Image.fromarray(half).quantize(16).save(tmp_path / "palette.png")
    assert tuple(load(tmp_path / "palette.png")[7, 0]) == WHITE
    Image.fromarray(half).getchannel("A").save(tmp_path / "trns.png", transparency=0)
    assert tuple(load(tmp_path / "trns.png")[7, 0]) == WHITE


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    assert (load(image) >= 254).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    for name in ("a.png", "a.tiff"):
        result = load(tmp_path / name)
        np.testing.assert_allclose(result[..., 0], ramp / 257, atol=1)


def test_exif_orientation(pixels: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load(tmp_path / "a.png"), np.rot90(pixels, -1))


def test_an_animation_gives_its_first_frame_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for suffix in ("gif", "png", "webp"):
        caplog.clear()
        path = tmp_path / f"a.{suffix}"
        red.save(
            path, save_all=True, append_images=[blue], **({"lossless": True} if suffix == "webp" else {})
        )
        with caplog.at_level(logging.WARNING):
            assert tuple(load(path)[0, 0]) == (255, 0, 0)
        assert len(caplog.messages) == 1 and "has 2 frames: only the first is used" in caplog.text


def test_a_huge_picture_is_scaled_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(Image.new("L", (8192, 4096))).shape == (8, 8, 3)
    assert len(caplog.messages) == 1 and "8192×4096" in caplog.text


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels should begin."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"\x78\x9c")


@pytest.mark.parametrize("size", [(9000, 8000), (10_000, 10_000), (100_000, 100_000)])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(InputError, match="more than 64 megapixels"):
        load(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(2**20 + 1, 1), (1, 2**20 + 1)])
def test_a_side_without_end_is_refused_by_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(InputError, match="a side may be 1048576 pixels long at most"):
        load(tmp_path / "a.png")


def test_a_bomb_given_as_an_image_is_refused() -> None:
    with pytest.raises(InputError, match="more than 64 megapixels"):
        load(Image.new("1", (10_000, 10_000)))


def test_files_that_are_no_pictures(tmp_path: Path, pixels: np.ndarray) -> None:
    bad = tmp_path / "bad.png"
    for content, word in (
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "is damaged|not a picture"),
        (png_header(8, 8), "is damaged"),
        (b"P6 8 8 255\n" + bytes(10), "is damaged"),
    ):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=word) as caught:
            load(bad)
        assert "\n" not in str(caught.value) and "the picture of 'cat'" in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        load(tmp_path / "none.png")
    with pytest.raises(InputError, match="not a file"):
        load(tmp_path)
    with pytest.raises(InputError, match="null"):
        load("a\0b")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a file"):
        load(tmp_path / "pipe.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncation_and_damage_never_escape(tmp_path: Path, suffix: str) -> None:
    """Whatever a decoder does with a damaged file: a picture or an InputError, nothing else."""
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((40, 30), 50).convert("RGB").save(path)
    data = path.read_bytes()
    draw = np.random.default_rng(1)
    refused = 0
    for i in range(60):
        changed = bytearray(data)
        if i < 20:
            changed = changed[: len(data) * (i + 1) // 22]
        else:
            for place in draw.integers(0, min(len(data), 200), 4):
                changed[place] ^= int(draw.integers(1, 256))
        path.write_bytes(changed)
        try:
            assert load(path).shape == (8, 8, 3)
        except InputError:
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("picture", "word"),
    [
        (np.zeros((8, 8, 3)), "uint8"),
        (np.zeros((8, 8, 2), np.uint8), "uint8 array"),
        (np.zeros((8,), np.uint8), "uint8 array"),
        (np.zeros((0, 8, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 4)), "empty"),
        (Image.new("F", (8, 8)), "floating-point"),
        (3, "must be a path"),
        (None, "must be a path"),
        (b"png", "not a picture"),
    ],
)
def test_objects_that_are_no_pictures(picture: object, word: str) -> None:
    with pytest.raises(InputError, match=word):
        load(picture)


def test_array_kinds(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(load(pixels[..., :1]), load(pixels[..., 0]))
    np.testing.assert_array_equal(load(pixels[:, ::-1]), pixels[:, ::-1])  # not contiguous


def read(picture: object) -> np.ndarray:
    return np.asarray(pictures.read(picture, WHITE, "the picture of 'cat'"))


def test_bytes_and_open_files(pixels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    for given_ in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        np.testing.assert_array_equal(read(given_), pixels)
    behind = io.BytesIO(b"something else" + data + b"and more")
    behind.seek(14)
    with path.open("rb") as file, path.open("rb", buffering=0) as raw:
        for _ in range(2):  # each is left where it stood: the next request finds its picture, too
            for opened in (file, raw, behind):
                np.testing.assert_array_equal(read(opened), pixels)
        assert (file.tell(), raw.tell(), behind.tell()) == (0, 0, 14) and not file.closed
        file.seek(3)
        with pytest.raises(InputError, match="not a picture"):
            read(file)
        assert file.tell() == 3
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:  # which cannot seek
        np.testing.assert_array_equal(read(pipe), pixels)
    with (
        path.open("r", encoding="latin-1") as text,
        path.open("ab") as write_only,
        pytest.MonkeyPatch.context() as patch,
    ):
        for bad, word in (
            (text, "opened for text: open it with 'rb'"),
            (io.StringIO("a"), "opened for text"),
            (write_only, "cannot be read"),
            (file, "cannot be read: .*closed"),
            (b"", "not a picture"),
        ):
            with pytest.raises(InputError, match=word):
                read(bad)
        patch.setattr(pictures, "MOST_BYTES", 100)
        with pytest.raises(InputError, match="more than 100 bytes"):
            read(behind)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_an_image_keeps_its_current_frame(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    first, *others = (Image.new("RGB", (8, 8), color) for color in colors)
    how = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others, **how)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        for frame in (0, 2, 3):  # Pillow cannot go back in a PNG
            image.seek(frame)
            assert tuple(read(image)[4, 4]) == colors[frame] and image.tell() == frame
            assert image.convert("RGB").getpixel((4, 4)) == colors[frame]
    assert not caplog.messages, "who gives a frame knows which"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(pixels: np.ndarray, orientation: int) -> None:
    image, exif = Image.fromarray(pixels[:5]), Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(file))
    np.testing.assert_array_equal(read(file.getvalue()), np.asarray(expected))


@pytest.mark.parametrize("how", ["padded", "middle", "cut", "whole", "stretched"])
@pytest.mark.parametrize("size", [(1, 300), (300, 1), (40, 90)])
def test_an_extreme_shape_is_fitted_as_an_ordinary_one_is(
    how: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done where the recipe's canvas would be too large, done where it is not: nearly the same."""
    noise = np.random.default_rng(0).normal(128, 60, (4, 4)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noise).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    for target in ((24, 24), (32, 18)):
        ordinary = pictures.fit(image, target, how, (10, 20, 30)).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "MOST_PIXELS", 1)
            extreme = pictures.fit(image, target, how, (10, 20, 30))
        assert np.abs(ordinary - extreme).mean() < (12 if how == "padded" else 4)


MEASURED = """
import io, resource, sys
from PIL import Image
from conceptmaster.runtime import pictures
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def megabytes(body: str) -> int:
    """What a process of its own needs for it, above what it needs for its imports."""
    done = subprocess.run([sys.executable, "-c", MEASURED.format(body)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_extreme_shapes_cost_little_memory() -> None:
    body = """
for size in ((60000, 1), (1, 60000), (800, 15078), (2**20, 1), (1, 2**20)):
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    image = pictures.read(file.getvalue(), (255, 255, 255), "it")
    for how in ("padded", "middle", "cut", "whole", "stretched"):
        assert pictures.fit(image, (512, 512), how, (255, 255, 255)).shape == (512, 512, 3)
    pictures.fit(image, (832, 480), how, (255, 255, 255))
"""
    assert megabytes(body) < 200


def large_png(channels: int) -> str:
    """Code for a PNG of 64 megapixels, 16 bits a channel."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return f"""
import struct, zlib
def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
packer = zlib.compressobj(1)
row = packer.compress(bytes(1 + 8192 * 2 * {channels}))
rows = [row] + [packer.compress(bytes(1 + 8192 * 2 * {channels})) for _ in range(8191)] + [packer.flush()]
head = struct.pack(">IIBBBBB", 8192, 8192, 16, {kind}, 0, 0, 0)
data = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"".join(rows)) + chunk(b"IEND", b"")
"""


def test_a_large_picture_of_16_bits_is_held_twice_at_most() -> None:
    body = large_png(4) + 'pictures.load(data, 64, (255, 255, 255), "it")\n'
    assert megabytes(body) < 2 * 256 + 100  # RGBA as it is decoded, and RGB: four bytes a pixel each


@pytest.mark.slow
def test_four_large_pictures_stay_under_a_gigabyte(bundle: Path) -> None:
    bodies = []
    for channels in (1, 2, 3, 4):
        body = (
            large_png(channels)
            + f"""
from conceptmaster import Concept, Pipeline
pipe = Pipeline.from_bundle({str(bundle)!r}, threads=1)
labels, most = ("ball", "cat", "dog", "red"), pipe.manifest.concepts
for start in range(0, 4, most):
    pipe("a ball", [Concept(label, data) for label in labels[start : start + most]], steps=1)
"""
        )
        bodies.append(megabytes(body))
    assert max(bodies) < 900


def test_too_little_memory_is_said_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pictures, "to_srgb", full)
    with pytest.raises(OutOfMemory, match="too little memory"):
        load(Image.new("RGB", (8, 8)))
