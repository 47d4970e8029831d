"""The command line where standard streams are closed, full, read by nobody, or of a small encoding."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "conceptmaster"]
PROMPT = ["--prompt", "a ball rolls left", "--threads", "1"]


def shell(folder: Path, command: list[str], after: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """A command in a shell, and what follows it there: `>&-` closes its output."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.join([*PROGRAM, *command])} {after}"],
        cwd=folder,
        env=os.environ | env,
        capture_output=True,
        encoding=env.get("PYTHONIOENCODING"),
        text=True,
    )


@pytest.mark.parametrize(
    ("closed", "quiet"),
    [
        ("2>&-", ["--quiet"]),
        (">&-", ["--json", "--verbose", "--progress"]),
        ("<&- >&- 2>&-", ["--json", "--verbose", "--progress"]),
    ],
)
def test_closed_streams_cost_no_video(tmp_path: Path, bundle: Path, closed: str, quiet: list[str]) -> None:
    done = shell(tmp_path, ["generate", "--bundle", str(bundle), *PROMPT, *quiet], closed)
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert b"conceptmaster" not in (tmp_path / "out.mp4").read_bytes()  # nobody's messages went in there


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_is_escaped(tmp_path: Path, bundle: Path, encoding: str) -> None:
    done = shell(tmp_path, ["inspect", str(bundle)], PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "") and "\\u2192" in done.stdout  # the arrow
    done = shell(
        tmp_path,
        ["generate", "--bundle", str(bundle), *PROMPT, "--output", "猫.gif"],
        PYTHONIOENCODING=encoding,
    )
    assert (done.returncode, done.stderr) == (0, "") and "\\u732b.gif (seed 0" in done.stdout
    done = shell(tmp_path, ["inspect", "猫"], PYTHONIOENCODING=encoding)
    assert done.returncode == 2 and "no bundle '\\u732b'" in done.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path, bundle: Path) -> None:
    for command, unbuffered in ((["inspect", str(bundle)], "1"), (["inspect", str(bundle), "--json"], "")):
        done = shell(tmp_path, command, "| true", PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
    assert shell(tmp_path, ["--help"], "| true").stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_is_full(tmp_path: Path, bundle: Path) -> None:
    done = shell(tmp_path, ["inspect", str(bundle)], ">/dev/full")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("No space left on device\n")
    assert shell(tmp_path, ["inspect", "none"], "2>/dev/full").returncode == 2
