"""How fast a training goes, held against what its device multiplies matrices at."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conceptmaster.examples.sprites.training.learning import fast_dtype

SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the matrices that are multiplied."""


def matrix_rate(device: str, seconds: float) -> float:
    """Floating-point operations in a second, of products of large square matrices in ``fast_dtype``, over so
    many seconds."""
    kind = torch.device(device).type
    side = SIDE[kind]
    a, b = (torch.randn(side, side, device=device).to(fast_dtype(device)) for _ in range(2))
    out = a @ b
    count, wait = 0, torch.cuda.synchronize if kind == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or not count:
        for _ in range(10):
            torch.mm(a, b, out=out)
        count += 10
        wait()
    return 2 * side**3 * count / max(passed, 1e-9)


def operations(loss: Callable[[], Tensor]) -> int:
    """Floating-point operations of the products, attention and convolutions in a loss and its gradient,
    counted where nothing is compiled."""
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        loss().backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops()


class Pace:
    """The share of a matrix rate that steps reach: what they take and how long they take it, from one line of
    the log to the next."""

    def __init__(self, matrix_rate: float) -> None:
        self.matrix_rate = matrix_rate
        self.clips = self._operations = self._steps = 0
        self._began, self._clips = time.perf_counter(), 0

    def step(self, clips: int, operations: int) -> None:
        """One more step, of so many clips and floating-point operations."""
        self.clips += clips
        self._clips += clips
        self._operations += operations
        self._steps += 1

    def told(self) -> dict[str, float]:
        """Since it was last told: clips in a second, 10^12 floating-point operations of a step, on average,
        and the share of the matrix rate."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        found = {
            "clips_s": round(self._clips / seconds, 1),
            "tflop": round(self._operations / max(1, self._steps) / 1e12, 4),
            "share": round(self._operations / seconds / self.matrix_rate, 4),
        }
        self._began = time.perf_counter()
        self._operations = self._steps = self._clips = 0
        return found
