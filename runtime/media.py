"""H.264 in MP4. The only file that imports PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

QUALITY = "12"  # x264's constant rate factor: below 18 differences are hard to see
BT601 = 6  # the matrix that swscale converts RGB with; written into the stream so that players use it too


def save_mp4(frames: np.ndarray, fps: float, path: Path) -> None:
    """Writes frames as H.264, yuv420p, index first (faststart).

    Args: frames: uint8 [F,H,W,3] RGB; an odd height or width is extended by repeating its last row or column.
    Raises: OSError.
    """
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": QUALITY, "preset": "medium"}
        stream.codec_context.colorspace = BT601
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode())
