"""What is written is what was made, and it is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.runtime import media
from conceptmaster.runtime.request import Concept
from conceptmaster.runtime.video import Video


def bars(frames: int = 17, height: int = 32, width: int = 48) -> np.ndarray:
    """Colour bars over which a white square moves, uint8 [F,H,W,3]."""
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (30, 30, 30), (255, 255, 0)]
    result = np.zeros((frames, height, width, 3), np.uint8)
    for i, color in enumerate(colors):
        result[:, :, i * 8 : i * 8 + 8] = color
    for i in range(frames):
        result[i, 8:16, 2 * i : 2 * i + 8] = 255
    return result


def decoded(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_mp4_keeps_frames_rate_and_colours(tmp_path: Path) -> None:
    import av

    video = Video(bars(), 8.0)
    path = video.save(tmp_path / "a.mp4", scale=4)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 8.0 and (stream.width, stream.height) == (192, 128)
        assert float(stream.duration * stream.time_base) == pytest.approx(17 / 8)
    error = decoded(path).astype(int) - video.frames.repeat(4, 1).repeat(4, 2)
    assert np.abs(error).mean() < 2
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat"), "the index comes first"


def test_mp4_of_odd_sizes_and_one_frame(tmp_path: Path) -> None:
    frames = bars(1)[:, :31, :47]
    Video(frames, 7.5).save(tmp_path / "a.mp4")
    assert decoded(tmp_path / "a.mp4").shape == (1, 32, 48, 3)


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


@pytest.mark.parametrize("scale", [0, -1, True, 1.5, "2", 1000])
def test_bad_scale(tmp_path: Path, scale: object) -> None:
    with pytest.raises(InputError, match="scale"):
        Video(bars(), 8.0).save(tmp_path / "a.mp4", scale=scale)  # type: ignore[arg-type]


def test_bad_paths(tmp_path: Path) -> None:
    video = Video(bars(), 8.0)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for name, word in (
        ("a.avi", "must end in .mp4, .gif, .png, .npy"),
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
    def interrupted(frames: np.ndarray, fps: float, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(media, "save_mp4", interrupted)
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        Video(bars(), 8.0).save(tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    Video(bars(1), 8.0).save(tmp_path / "a.npy")
    assert (tmp_path / "a.npy").stat().st_mode == (tmp_path / "plain").stat().st_mode
