"""H.264 in MP4 and VP9 in WebM. The only file that imports PyAV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..errors import MissingDependency

# numbers of ITU-T H.273, the same in both containers: players convert with the matrix that a file names
BT709 = 1  # primaries, transfer and matrix of high-definition video, and what players take for granted
LIMITED, FULL = 1, 2  # luma 16 to 235, as every player expects it; RGB is 0 to 255


@dataclass(frozen=True)
class _Codec:
    encoder: str
    container: str
    options: dict[str, str]  # of the encoder, with its constant quality
    flags: dict[str, str]  # of the container


CODECS = {
    ".mp4": _Codec(  # below a constant rate factor of 18 differences are hard to see
        "libx264", "mp4", {"crf": "12", "preset": "medium"}, {"movflags": "+faststart"}
    ),
    ".webm": _Codec(  # bitexact: without a random name, so that the same frames give the same file
        "libvpx-vp9",
        "webm",
        {"crf": "12", "b": "0", "deadline": "good", "cpu-used": "3", "row-mt": "1"},
        {"fflags": "+bitexact"},
    ),
}


def check_encoder(suffix: str) -> None:
    """Raises MissingDependency where PyAV was built without the encoder for files of this kind."""
    encoder = CODECS[suffix].encoder
    if encoder not in av.codecs_available:
        raise MissingDependency(
            f"{suffix} needs the encoder {encoder}, which this build of PyAV lacks: the wheel has it "
            "(pip install --force-reinstall --only-binary av av); .gif and .webp need no PyAV"
        )


def save(
    frames: Iterable[np.ndarray],
    fps: float,
    path: Path,
    suffix: str,
    chroma: str,
    *,
    quality: int | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Writes frames as a video whose colours are BT.709, limited range, and tagged so.

    Args: frames: at least one, each uint8 [H,W,3] RGB, taken one at a time; an odd height or width is
        extended by repeating its last row or column; suffix: .mp4 (H.264, index first) or .webm (VP9);
        chroma: "420", one colour for 2 × 2 pixels, which all players show, or "444", one for each; quality:
        the constant rate factor, 12 if None; size: height and width, both even, to scale the frames to.
    Raises: OSError.
    """
    try:
        _encode(frames, fps, path, CODECS[suffix], f"yuv{chroma}p", quality, size)
    except av.FFmpegError as error:
        if isinstance(error, (OSError, MemoryError)):
            raise
        raise OSError(f"cannot write {str(path)!r}: {error}") from None


def _encode(
    frames: Iterable[np.ndarray],
    fps: float,
    path: Path,
    codec: _Codec,
    layout: str,
    quality: int | None,
    size: tuple[int, int] | None,
) -> None:
    with av.open(str(path), "w", format=codec.container, options=codec.flags) as container:
        stream = container.add_stream(codec.encoder, rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = layout
        stream.options = codec.options | ({} if quality is None else {"crf": str(quality)})
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        for index, frame in enumerate(frames):
            height, width = frame.shape[:2]
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if index == 0:
                stream.height, stream.width = size or even.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24").reformat(
                width=stream.width,
                height=stream.height,
                format=layout,
                dst_colorspace="itu709",
                src_color_range=FULL,
                dst_color_range=LIMITED,
                interpolation="BICUBIC",
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
