"""Videos out of one process, and the report of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..card import clocks_in_words
from ..job import Job
from .command_line import CommandFailed, last_line

TELLS = '{"video": '
"""How a line of the worker's begins."""
PATIENCE = 60.0
"""Seconds that a process may take beyond the time it was given."""


@dataclass(frozen=True)
class Ordered:
    """A video. arguments: of `generate`, beside those of all; needs: seconds that it takes, roughly, where
    none with the same arguments was made before; spare: seconds that are to be left afterwards; plain:
    without this project's kernels."""

    name: str
    arguments: tuple[str, ...] = ()
    needs: float = 0.0
    spare: float = 0.0
    plain: bool = False


def make(title: str, arguments: Sequence[str], videos: Sequence[Ordered], job: Job) -> dict[str, Any]:
    """Makes the videos in one process with `generate ARGUMENTS`; {name: what its meters say}.

    What is made stands in the job's `found` under `title`, as soon as it is there. Raises CommandFailed where
    none is made.
    """
    found: dict[str, Any] = job.found.setdefault(title, {}).setdefault("videos", {})
    if all("seconds" in found.get(video.name, {}) for video in videos):
        return found  # by an earlier run, that ended in another one of them
    found.clear()
    seconds, now = min(job.left(), 3600.0), time.time()
    order = {
        "started": now,
        "until": now + seconds,
        "arguments": list(arguments),
        "videos": [vars(video) for video in videos],
    }
    command = [sys.executable, "-m", f"{__package__}.worker", json.dumps(order)]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            late = threading.Timer(seconds + PATIENCE, process.kill)
            late.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if not line.startswith(TELLS):
                        continue  # of a library
                    told = json.loads(line)
                    name = told.pop("video")
                    found[name] = told
                    job.say(f"{title}, {name}: {in_words(told)}")
                process.wait(PATIENCE)
            finally:
                late.cancel()
                process.kill()
        errors.seek(0)
        written = errors.read()
    if not any("seconds" in told or "left_out" in told for told in found.values()):
        reasons = [told["failed"] for told in found.values()] or [last_line(written)]
        raise CommandFailed(reasons[0] or f"its process ended with {process.returncode}")
    return found


def in_words(told: dict[str, Any]) -> str:
    """What the meters said of a video, in a line."""
    for kind in ("failed", "left_out"):
        if kind in told:
            return f"{kind.replace('_', ' ')}: {told[kind]}"
    stages = {name: value for name, value in told["seconds"].items() if name not in ("total", "denoise")}
    words = [f"{told['from_start_s']:.2f} s"]
    words.append(", ".join(f"{name} {value:.2f}" for name, value in stages.items()))
    step = told["graphs"].get("denoise", {})
    words.append(f"{step.get('calls', 0)} steps {told['seconds']['denoise']:.2f}")
    if "p50_ms" in step:
        words[-1] += f", one {step['p50_ms']:.1f} ms"
    once = {name: entry for name, entry in told["graphs"].items() if name != "denoise"}
    words.append("ms: " + ", ".join(f"{name} {entry['total_ms']:.1f}" for name, entry in once.items()))
    if "peak_reserved_bytes" in told:
        words.append(f"peak {told['peak_reserved_bytes'] / 2**30:.1f} GiB")
    if told.get("planned_bytes"):
        words.append(f"{told['planned_bytes']['peak'] / 2**30:.1f} GiB were planned")
    if "latents_from_first" in told:
        words.append(f"latents {told['latents_from_first']:.1e} from the first")
    if "sm_mhz" in told["clocks"]:
        words.append(clocks_in_words(told["clocks"]))
    return "; ".join(words)
