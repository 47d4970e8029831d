"""Motion and naturalness: known shifts, still videos, and scikit-video's own NIQE."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("skvideo")

from conceptmaster.benchmarks.mc_bench import flow, naturalness  # noqa: E402

from .conftest import moving, textured  # noqa: E402


@pytest.mark.parametrize(("x", "y"), [(3, 0), (0, -2), (-4, 3)])
def test_flow_of_a_known_shift(x, y):
    (found,) = flow.flows(moving(2, x, y))
    inner = found[16:-16, 16:-16]
    assert np.abs(np.median(inner, (0, 1)) - (x, y)).max() < 0.1


def test_a_still_video():
    still = moving(9, 0, 0)
    assert flow.smoothness(still) == 1.0
    assert flow.dynamic_degree(still, 8.0) == {"dynamic degree": 0.0, "moves": 0.0}
    assert flow.farneback(still) < 1e-3


def test_motion_is_in_pixels_and_a_quarter_of_the_pairs_decides():
    found = flow.dynamic_degree(moving(9, 4), 8.0)
    assert found["dynamic degree"] == pytest.approx(4, abs=2.5)  # rolled edges jump
    assert found["moves"] == 1.0  # 4 > 6 * 96 / 256
    still, fast = moving(20, 0), moving(3, 4)
    assert flow.dynamic_degree(np.concatenate([still, fast]), 8.0)["moves"] == 0.0
    assert flow.dynamic_degree(np.concatenate([still[:4], fast]), 8.0)["moves"] == 1.0


def test_motion_is_judged_at_eight_frames_a_second():
    slow = flow.speeds(moving(17, 1), 24.0)
    assert len(slow) == 5  # every third frame
    assert np.median(slow) == pytest.approx(3, abs=1)
    assert len(flow.speeds(moving(1), 8.0)) == 0 and flow.smoothness(moving(2)) == 1.0


def test_the_frame_in_the_middle_of_a_shift():
    frames = moving(3, 4)
    middle = flow.midpoint(frames[0], frames[2])[16:-16, 24:-24]
    assert np.abs(middle - frames[1][16:-16, 24:-24]).mean() < 4
    assert np.abs(middle - frames[0][16:-16, 24:-24]).mean() > 20


def test_what_jumps_is_less_smooth():
    even = moving(9, 2)
    jumps = even.copy()
    jumps[1::2] = even[[8, 2, 7, 0]]
    assert flow.smoothness(jumps) < flow.smoothness(even) - 0.05 and 0 < flow.smoothness(jumps) < 1


def test_niqe_is_scikit_videos(monkeypatch):
    """Its code, with what NumPy and SciPy have dropped since given back to it."""

    def imresize(image, factor, interp, mode):
        size = tuple(int(side * factor) for side in image.shape[::-1])
        return np.asarray(Image.fromarray(image, mode).resize(size, Image.Resampling.BICUBIC))

    monkeypatch.setattr(np, "int", int, raising=False)
    monkeypatch.setattr(np, "float", float, raising=False)
    misc = types.ModuleType("scipy.misc")
    misc.imresize = imresize
    monkeypatch.setitem(sys.modules, "scipy.misc", misc)
    import scipy

    monkeypatch.setattr(scipy, "misc", misc, raising=False)
    from skvideo.measure.niqe import niqe

    frame = textured(320, 416)
    grey = naturalness._luminance(frame)
    assert grey.shape == (288, 384)
    assert naturalness.niqe(frame) == pytest.approx(float(niqe(grey)[0]), rel=1e-3)


def test_niqe_prefers_what_is_natural():
    from pathlib import Path

    import skvideo

    from conceptmaster.benchmarks.mc_bench.videos import read

    clip = Path(skvideo.__file__).parent / "datasets" / "data" / "bikes.mp4"
    frame = read(clip).frames[0]
    noise = np.random.default_rng(0).normal(0, 40, frame.shape)
    worse = (frame + noise).clip(0, 255).astype(np.uint8)
    assert 0 < naturalness.niqe(frame) < naturalness.niqe(worse)
    small = np.asarray(Image.fromarray(frame).resize((64, 48)))
    assert np.isfinite(naturalness.niqe(small))  # enlarged first


def test_flat_frames_have_a_number():
    assert np.isfinite(naturalness.niqe(np.full((64, 64, 3), 90, np.uint8)))
