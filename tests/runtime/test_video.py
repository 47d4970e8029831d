"""What is written is what was made, and it is written whole or not at all."""

from __future__ import annotations

import base64
import html
import io
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from conceptmaster.errors import InputError, MissingDependency
from conceptmaster.runtime import media
from conceptmaster.runtime.request import Concept
from conceptmaster.runtime.video import Video
from conceptmaster.runtime.video_file import SUFFIXES, enlargement


def bars(frames: int = 17, height: int = 32, width: int = 48) -> np.ndarray:
    """Colour bars over which a white square moves, uint8 [F,H,W,3]."""
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (30, 30, 30), (255, 255, 0)]
    result = np.zeros((frames, height, width, 3), np.uint8)
    for i, color in enumerate(colors):
        result[:, :, i * 8 : i * 8 + 8] = color
    for i in range(frames):
        result[i, 8:16, 2 * i : 2 * i + 8] = 255
    return result


def decoded(path: Path) -> tuple[np.ndarray, Any]:
    """A video's frames, uint8 [F,H,W,3], and its codec context. Not by FFmpeg's own conversion, which may be
    wrong in the same way: from the planes, by the formulas of BT.709 for limited range."""
    import av

    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(video=0):
            height, width = frame.height, frame.width
            planes = frame.to_ndarray().reshape(-1)
            luma, rest = np.split(planes, [height * width])
            shape = (height, width) if frame.format.name == "yuv444p" else (height // 2, width // 2)
            block = np.ones((height // shape[0],) * 2)
            colors = [np.kron(color.reshape(shape), block) for color in np.split(rest, 2)]
            y = (luma.reshape(height, width) - 16.0) / 219
            blue, red = ((color - 128) / 224 for color in colors)
            r, b = y + 2 * (1 - 0.2126) * red, y + 2 * (1 - 0.0722) * blue
            g = (y - 0.2126 * r - 0.0722 * b) / 0.7152
            frames.append(np.rint(255 * np.clip(np.stack([r, g, b], -1), 0, 1)).astype(np.uint8))
        return np.stack(frames), stream.codec_context


def enlarged(frames: np.ndarray, times: int) -> np.ndarray:
    return frames.repeat(times, axis=1).repeat(times, axis=2)


@pytest.mark.parametrize("chroma", [None, "420", "444"])
@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "h264"), ("webm", "vp9")])
def test_videos_keep_frames_rate_and_colours(
    tmp_path: Path, suffix: str, codec: str, chroma: str | None
) -> None:
    import av

    video = Video(bars(), 8.0)
    path = video.save(tmp_path / f"a.{suffix}", scale=4, chroma=chroma)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 8.0 and (stream.width, stream.height) == (192, 128)
        assert container.duration / 1e6 == pytest.approx(17 / 8, abs=0.002)
    frames, context = decoded(path)
    assert (context.name, context.pix_fmt) == (codec, f"yuv{chroma or '420'}p")
    # H.273's numbers: BT.709 primaries, transfer and matrix; limited range
    tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
    assert tags == (1, 1, 1, 1)
    error = np.abs(frames.astype(int) - enlarged(video.frames, 4))
    assert error.mean() < 1.5 and np.median(error, axis=(0, 1, 2)).max() <= 1


@pytest.mark.parametrize("fps", [0.01, 1 / 3, 23.976, 1000])
def test_any_rate_can_be_written(tmp_path: Path, fps: float) -> None:
    video = Video(bars(3), fps)
    for suffix in (".mp4", ".webm", ".webp", ".gif"):
        assert video.save(tmp_path / f"a{suffix}", scale=np.int64(1)).stat().st_size
    assert np.load(video.save(tmp_path / "a.npy", scale=np.int64(2))).shape == (3, 64, 96, 3)


def test_the_index_of_an_mp4_comes_first(tmp_path: Path) -> None:
    data = Video(bars(), 8.0).save(tmp_path / "a.mp4").read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")


def test_444_keeps_colours_of_single_pixels(tmp_path: Path) -> None:
    """A board of red and blue pixels, with nothing enlarged."""
    board = np.zeros((2, 64, 64, 3), np.uint8)
    red = np.indices((64, 64)).sum(0) % 2 == 0
    board[:, red], board[:, ~red] = (255, 0, 0), (0, 0, 255)
    errors = {}
    for chroma in ("420", "444"):
        frames, _ = decoded(Video(board, 8.0).save(tmp_path / "a.mp4", scale=1, chroma=chroma))
        errors[chroma] = np.abs(frames.astype(int) - board).mean()
    assert errors["444"] < 8 and errors["420"] > 40


@pytest.mark.parametrize("suffix", ["mp4", "webm", "webp"])
def test_enlarging_keeps_the_colours_of_a_small_video(tmp_path: Path, suffix: str) -> None:
    """Ten decibels, where single pixels have colours of their own."""
    colors = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    small = np.kron(colors, np.ones((3, 3, 1))).astype(np.uint8)[None].repeat(3, 0)  # [3,48,48,3]

    def noise(scale: int | None) -> float:
        path = Video(small, 8.0).save(tmp_path / f"a.{suffix}", scale=scale)
        if suffix == "webp":
            with Image.open(path) as image:
                shown = np.asarray(image.convert("RGB"))[None]
        else:
            shown, _ = decoded(path)
        times = shown.shape[1] // 48
        assert times == (scale or 6)
        return ((shown.astype(float) - enlarged(small, times)[: len(shown)]) ** 2).mean()

    assert noise(None) < noise(1) / 10


@pytest.mark.parametrize(
    ("height", "width", "times"), [(64, 64, 4), (32, 48, 8), (255, 900, 2), (256, 256, 1), (480, 832, 1)]
)
def test_small_videos_are_enlarged_to_256(tmp_path: Path, height: int, width: int, times: int) -> None:
    video = Video(np.zeros((1, height, width, 3), np.uint8), 8.0)
    for suffix in (".mp4", ".webm", ".webp", ".gif"):
        assert enlargement(suffix, height, width, None) == times
        assert enlargement(suffix, height, width, 1) == 1
    for suffix in (".png", ".npy"):
        assert enlargement(suffix, height, width, None) == 1
    assert decoded(video.save(tmp_path / "a.mp4"))[0].shape[1:3] == (
        height * times + height * times % 2,
        width * times,
    )
    assert Image.open(video.save(tmp_path / "a.webp")).size == (width * times, height * times)
    assert np.load(video.save(tmp_path / "a.npy")).shape == (1, height, width, 3)


@pytest.mark.parametrize(
    ("suffix", "width", "scale"),
    [(".mp4", 300, 64), (".webm", 300, 64), (".gif", 1100, 64), (".webp", 300, 64), (".mp4", 16385, 1)],
)
def test_a_scale_beyond_the_file_is_refused(tmp_path: Path, suffix: str, width: int, scale: int) -> None:
    video = Video(np.zeros((1, 8, width, 3), np.uint8), 16.0)
    with pytest.raises(InputError, match=rf"would be {width * scale}×{8 * scale}.*(at most \d+$|write .npy)"):
        video.save(tmp_path / f"a{suffix}", scale=scale)
    assert not any(tmp_path.iterdir())


def test_what_the_limit_allows_can_be_written(tmp_path: Path) -> None:
    """The longest sides; an automatic scale stays within them."""
    for suffix, side in ((".mp4", 16384), (".webm", 16384), (".webp", 16383), (".gif", 65535)):
        video = Video(np.zeros((1, 8, side, 3), np.uint8), 16.0)
        assert video.save(tmp_path / f"a{suffix}").stat().st_size
        assert enlargement(suffix, 1, side // 3, None) == 3


def test_webp(tmp_path: Path) -> None:
    with Image.open(Video(bars(), 8.0).save(tmp_path / "a.webp")) as image:
        assert (image.format, image.n_frames, image.size, image.info["loop"]) == ("WEBP", 17, (384, 256), 0)
        ends = 0
        for i in range(17):
            image.seek(i)
            image.load()
            ends += image.info["duration"]
            error = np.abs(np.asarray(image.convert("RGB")).astype(int) - enlarged(bars(), 8)[i])
            assert error.mean() < 3 and ends == pytest.approx(125 * (i + 1), abs=1)


def test_an_open_file_takes_the_video(tmp_path: Path) -> None:
    video = Video(bars(), 8.0)
    for suffix in SUFFIXES:
        path = video.save(tmp_path / f"a{suffix}")
        for format in (suffix, suffix[1:].upper()):
            buffer = io.BytesIO()
            assert video.save(buffer, format=format) is None
            assert buffer.getvalue() == path.read_bytes()
    with (tmp_path / "b.gif").open("wb") as file:
        video.save(file)
        assert not file.closed
    assert (tmp_path / "b.gif").read_bytes() == (tmp_path / "a.gif").read_bytes()
    reader, writer = os.pipe()  # which cannot seek
    with os.fdopen(writer, "wb") as file, os.fdopen(reader, "rb") as other:
        one = Video(bars(1), 8.0)
        one.save(file, format="mp4")
        file.close()
        assert other.read() == one.save(tmp_path / "c.mp4").read_bytes()
    assert video.save(tmp_path / "no-ending", format="npy").read_bytes()[:6] == b"\x93NUMPY"
    with open(tmp_path / "text.mp4", "w") as text, (tmp_path / "a.gif").open("rb") as read_only:
        for target, format, word in (
            (io.BytesIO(), None, "needs format="),
            (io.BytesIO(), "avi", "unknown format 'avi'"),
            (text, None, "opened with 'wb'"),
            (read_only, None, "opened with 'wb'"),
            (3, "mp4", "opened with 'wb'"),
        ):
            with pytest.raises(InputError, match=word):
                video.save(target, format=format)  # type: ignore[call-overload]


def test_a_notebook_shows_the_video(tmp_path: Path) -> None:
    for shape, size in (((17, 64, 64), (256, 256)), ((3, 270, 960), (136, 480))):
        video = Video(np.full((*shape, 3), 200, np.uint8), 8.0, 7, 'a <b>ball</b> & "cat"')
        found = re.fullmatch(
            r'<video [^<>]*title="([^"]*)" src="data:video/mp4;base64,([^"]*)"></video>', video._repr_html_()
        )
        assert found and html.unescape(found[1]) == video.prompt
        (tmp_path / "a.mp4").write_bytes(base64.b64decode(found[2]))
        frames, _ = decoded(tmp_path / "a.mp4")
        assert frames.shape == (shape[0], *size, 3) and np.abs(frames.astype(int) - 200).max() <= 2


def test_the_repr_is_short() -> None:
    video = Video(bars(), 8.0, 7, "a ball " * 100)
    assert repr(video).startswith("<Video: 17 frames of 48×32 at 8 a second, seed 7, 'a ball a ball")
    assert len(repr(video)) < 120


@pytest.mark.parametrize(
    ("frames", "fps", "word"),
    [
        (np.zeros((2, 8, 8, 3)), 8.0, "uint8 array"),
        (np.zeros((8, 8, 3), np.uint8), 8.0, "uint8 array"),
        ([1], 8.0, "uint8 array"),
        (np.zeros((0, 8, 8, 3), np.uint8), 8.0, "empty"),
        (np.zeros((2, 8, 8, 3), np.uint8), 1e9, "0.01 to 1000"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0.0, "0.01 to 1000"),
        (np.zeros((2, 8, 8, 3), np.uint8), math.nan, "0.01 to 1000"),
    ],
)
def test_what_is_no_video_is_said_at_once(frames: Any, fps: float, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Video(frames, fps)


def test_a_pyav_without_the_encoder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.av, "codecs_available", {"libx264"})
    with pytest.raises(MissingDependency, match="libvpx-vp9"):
        Video(bars(1), 8.0).save(tmp_path / "a.webm")
    Video(bars(1), 8.0).save(tmp_path / "a.mp4")


def test_mp4_of_odd_sizes_and_one_frame(tmp_path: Path) -> None:
    frames = bars(1)[:, :31, :47]
    Video(frames, 7.5).save(tmp_path / "a.mp4", scale=1)
    assert decoded(tmp_path / "a.mp4")[0].shape == (1, 32, 48, 3)


def test_gif(tmp_path: Path) -> None:
    Video(bars(), 8.0).save(tmp_path / "a.gif", scale=2)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 17 and image.size == (96, 64) and image.info["loop"] == 0
        durations = []
        for i in range(17):
            image.seek(i)
            durations.append(image.info["duration"])
            np.testing.assert_allclose(np.asarray(image.convert("RGB"))[::2, ::2], bars()[i], atol=8)
    assert sum(durations) == pytest.approx(1000 * 17 / 8, abs=10)


def test_npy_and_png(tmp_path: Path) -> None:
    video = Video(bars(), 8.0)
    np.testing.assert_array_equal(np.load(video.save(tmp_path / "a.npy"), allow_pickle=False), video.frames)
    sheet = np.asarray(Image.open(video.save(tmp_path / "a.PNG")))
    np.testing.assert_array_equal(sheet[16:48, 8:56], video.frames[0])


def test_sheet_shows_references_caption_and_frames(tmp_path: Path) -> None:
    concepts = (Concept("a red thing with a long name", np.full((8, 8, 3), (255, 0, 0), np.uint8)),)
    video = Video(bars(), 8.0, prompt="a word " * 60, concepts=concepts)
    sheet = video.sheet()
    pixels = np.asarray(sheet)
    assert (pixels[10:100, 10:100] == (255, 0, 0)).all()
    assert sheet.height > Video(bars(), 8.0, prompt="a").sheet().height
    assert video.sheet(references=[], columns=17, scale=1).width == 17 * 56 + 8
    assert video.sheet(references=[Concept("x", Image.new("RGB", (9, 5)))]).size[0] >= 320
    large = Video(np.zeros((3, 480, 832, 3), np.uint8), 15.0).sheet()
    assert large.width < 1100
    video.save_sheet(tmp_path / "s.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "s.png")), pixels)


def text_box(sheet: Image.Image, top: int) -> tuple[int, int, int, int]:
    """What is written below `top` on a sheet of white frames: left, top, right, bottom."""
    box = ImageOps.invert(sheet.convert("L")).crop((0, top, *sheet.size)).getbbox()
    assert box is not None
    return box


@pytest.mark.parametrize("caption", ["w" * 500, "a " + "m" * 100 + " b", "one\n\n\ttwo\r\nthree " * 20])
def test_captions_stay_on_the_sheet(caption: str) -> None:
    white = Video(np.full((2, 64, 64, 3), 255, np.uint8), 8.0, prompt=caption)
    sheet = white.sheet()
    left, _, right, bottom = text_box(sheet, 0)
    assert left >= 7 and right <= sheet.width - 7 and bottom < sheet.height - 128
    spaced = Video(white.frames, 8.0, prompt=" ".join(caption.split())).sheet()
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(spaced))


def test_labels_stay_beside_each_other() -> None:
    picture = np.full((8, 8, 3), 255, np.uint8)
    labels = ["W" * 300, "two\nlines", "x" * 100_000]
    white = Video(np.full((2, 64, 64, 3), 255, np.uint8), 8.0)
    sheet = white.sheet([Concept(label, picture) for label in labels])
    for i in range(3):  # each below its own picture, in one line
        left, top, right, bottom = text_box(sheet.crop((8 + 144 * i, 0, 8 + 144 * i + 140, 170)), 0)
        assert left < 6 and right <= 137 and 130 < top and bottom < 160


def test_letters_that_the_font_lacks_are_replaced_and_said(caplog: pytest.LogCaptureFixture) -> None:
    def sheet(caption: str, label: str) -> np.ndarray:
        concept = Concept(label, np.zeros((8, 8, 3), np.uint8))
        return np.asarray(Video(bars(1), 8.0, prompt=caption, concepts=(concept,)).sheet())

    plain = sheet('a cafe - ??? "ball" ...', "cat ?")
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        found = sheet('a cafe\u0301 — \u6f22\U0001f600\ud83d "ball\u200d" ...', "cat \x1b\u0416")
    np.testing.assert_array_equal(found, plain)
    assert len(caplog.messages) == 1
    for part in ("é as e", "— as -", "\u6f22 as ?", "\U0001f600 as ?", "\u0416 as ?", r"'\ud83d' as ?"):
        assert part in caplog.text


@pytest.mark.parametrize("scale", [0, -1, True, 1.5, "2", 1000])
def test_bad_scale(tmp_path: Path, scale: object) -> None:
    with pytest.raises(InputError, match="scale"):
        Video(bars(), 8.0).save(tmp_path / "a.mp4", scale=scale)  # type: ignore[arg-type]


def test_bad_paths(tmp_path: Path) -> None:
    video = Video(bars(), 8.0)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for name, word in (
        ("a.avi", "must end in .mp4, .webm, .webp, .gif, .png, .npy"),
        ("a", "must end"),
        ("folder.mp4", "is a folder"),
        ("none/a.mp4", "does not exist"),
        ("x" * 300 + ".mp4", "too long"),
        ("file/a.mp4", "Not a directory"),
    ):
        with pytest.raises(InputError, match=word):
            video.save(tmp_path / name)
    with pytest.raises(InputError, match="must end in .png"):
        video.save_sheet(tmp_path / "a.gif")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(frames: Iterator[np.ndarray], fps: float, path: Path, *options: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(media, "save", interrupted)
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        Video(bars(), 8.0).save(tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    Video(bars(1), 8.0).save(tmp_path / "a.npy")
    assert (tmp_path / "a.npy").stat().st_mode == (tmp_path / "plain").stat().st_mode
