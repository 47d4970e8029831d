"""ONNX Runtime keeps to itself: nothing is written but what was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def written(folder: Path) -> list[str]:
    """The files below `folder`, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def home_alone(home: Path) -> dict[str, str]:
    """This environment, with another home folder, and without what turns telemetry or its files away."""
    dropped = ("ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("XDG_")}
    return kept | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("writable", [True, False])
def test_generate_writes_the_video_and_nothing_else(bundle: Path, tmp_path: Path, writable: bool) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    out.mkdir()
    arguments = ["generate", "--bundle", str(bundle), "--prompt", "a ball rolls left", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "conceptmaster", *arguments],
        cwd=out,
        env=home_alone(home if writable else Path("/proc")),  # where root cannot write, either
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert written(home) == [] and written(out) == ["out.mp4"]
