"""One process that makes videos with `conceptmaster generate`, one after the other, and reads its meters.

    python -m conceptmaster.benchmarks.gpu.whole.worker '{"started": …, "until": …, "arguments": […], …}'

The first video is cold: the weights are loaded, kernels compiled, the step captured. The others find the
pipeline that the first has opened, as in a batch; but for that it is the command. A line of JSON for each:
seconds by stage as `generate --json` tells them, milliseconds by graph on the GPU's own clock, peak memory,
clocks and watts while steps ran, how far the latents are from the first video's.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from conceptmaster.cli import main as command
from conceptmaster.kernels.common import in_plain_torch
from conceptmaster.runtime import generate_command
from conceptmaster.runtime.backends.pytorch.stepper import cuda_graphs

from ..card import Watch
from ..timing import why

STEP = "denoise"


class Meter:
    """Runs a pipeline's graphs and notes how long each call took: on CUDA by events, which wait for nothing,
    elsewhere by the wall's clock."""

    def __init__(self, backend: Any, cuda: bool) -> None:
        self.backend, self.cuda = backend, cuda
        self.run = backend.run
        self.calls: dict[str, list[Any]] = {}
        self.steps: list[float] = []  # times of the first step's begin and of each one's end, by the host
        self.state: Any = None
        backend.run = self

    def __call__(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As the backend's `run`."""
        if graph == STEP and not self.steps:
            self.steps.append(time.perf_counter())
        start = self._now()
        outputs = self.run(graph, inputs)
        self.calls.setdefault(graph, []).append((start, self._now()))
        if graph == STEP:
            self.state = outputs["next_state"]
            self.steps.append(time.perf_counter())
        return outputs

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """By graph: how many calls, all of them together, the first, and the median of the others."""
        found = {}
        for graph, calls in self.calls.items():
            times = [self._between(*call) for call in calls]
            found[graph] = {"calls": len(times), "total_ms": sum(times), "first_ms": times[0]}
            if times[1:]:
                found[graph]["p50_ms"] = statistics.median(times[1:])
        return found

    def latents(self) -> np.ndarray:
        """Of the newest video, float32 [Cz,F,H,W]."""
        return np.array(self.backend.to_host(self.state)[0])

    def clear(self) -> None:
        """For the next video."""
        self.calls, self.steps, self.state = {}, [], None

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return 1e3 * (end - start)
        end.synchronize()
        return float(start.elapsed_time(end))


class Session:
    """The pipeline that all videos share, and what is known of the first."""

    def __init__(self, order: dict[str, Any], watch: Watch) -> None:
        self.order, self.watch = order, watch
        self.cuda = torch.cuda.is_available() and "cuda" in order["arguments"]
        self.pipeline: Any = None
        self.meter: Meter | None = None
        self.first: np.ndarray | None = None
        self._open = generate_command.open_pipeline
        generate_command.open_pipeline = self._opened

    def make(self, video: dict[str, Any]) -> dict[str, Any]:
        """Makes a video with `order["arguments"]` and its own; what the meters say."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if self.meter is not None:
            self.meter.clear()
            self.pipeline._text.cache_clear()  # captions and pictures are encoded once for each pipeline
            self.pipeline._pictured.clear()
        begin = self.order["started"] if self.first is None else time.time()
        with self._in_plain_torch() if video["plain"] else contextlib.nullcontext():
            told = _generate([*self.order["arguments"], *video["arguments"]])
        meter = self.meter
        assert meter is not None
        found: dict[str, Any] = {"from_start_s": time.time() - begin, "seconds": told["seconds"]}
        found["graphs"] = meter.milliseconds()
        found["clocks"] = self.watch.between(meter.steps[0], meter.steps[-1])
        found["host_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if self.cuda:
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
            found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        latents = meter.latents()
        if self.first is None:
            self.first = latents
            found["planned_bytes"] = getattr(meter.backend, "plan", None)
        elif latents.shape == self.first.shape:
            apart = np.linalg.norm((latents - self.first).ravel()) / np.linalg.norm(self.first.ravel())
            found["latents_from_first"] = float(apart)
        return found

    def _opened(self, args: Any) -> Any:
        if self.pipeline is None:
            self.pipeline = self._open(args)
            self.meter = Meter(self.pipeline.backend, self.cuda)
        return self.pipeline

    @contextlib.contextmanager
    def _in_plain_torch(self) -> Iterator[None]:
        """Without any kernel of this project, captured anew; afterwards with them, captured anew."""
        self._forget()
        try:
            with in_plain_torch():
                yield
        finally:
            self._forget()

    def _forget(self) -> None:
        """Lets captured steps go, with their memory."""
        stepper = self.pipeline.backend.stepper
        stepper.programs.clear()
        if stepper.capture is not None:
            stepper.capture = cuda_graphs()


def _generate(arguments: list[str]) -> dict[str, Any]:
    """What `conceptmaster generate ARGUMENTS --json` tells. Raises RuntimeError with its error."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = command(["generate", *arguments, "--json", "--quiet"])
    if code:
        lines = errors.getvalue().strip().splitlines() or [f"exit code {code}"]
        raise RuntimeError(lines[-1])
    return dict(json.loads(out.getvalue().strip().splitlines()[-1]))


def main(order: dict[str, Any]) -> None:
    """Makes the order's videos; one that there is no time for is left out, and so is what follows a failure.

    A video takes as long as the last one with the same arguments did; of a first one its "needs" tells.
    """
    took: dict[str, float] = {}
    with Watch(always=True) as watch:
        session = Session(order, watch)
        for video in order["videos"]:
            kind = json.dumps(video["arguments"])
            needs = took.get(kind, video["needs"]) + video["spare"]
            if time.time() + needs > order["until"]:
                _tell(video["name"], {"left_out": "no time was left"})
                continue
            start = time.time()
            try:
                found = session.make(video)
            except Exception as error:  # of a kernel, a compiler, the card: no common base
                _tell(video["name"], {"failed": why(error)})
                return
            took[kind] = time.time() - start
            _tell(video["name"], found)


def _tell(name: str, found: dict[str, Any]) -> None:
    print(json.dumps({"video": name, **found}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
