"""The loop that every network of this world is trained with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from .learning import Average, MuonAdamW, gradient_norm, load_checkpoint, save_checkpoint, schedule

Log = Callable[[dict[str, Any]], None]
"""Takes one line of a log."""


@dataclass(frozen=True)
class LoopOptions:
    """How long a network is trained, and when it is told of.

    name: on the progress bar; steps: until which it is trained, or with ``minutes`` so long, whatever number
    of steps that is; rate: what the learning rates are scaled by, over 0..1 of the training; limit: of the
    gradient's norm; log_every: steps between lines of the log, each with the means of the losses since the
    last; save_every: steps between checkpoints (``log_every``); also: further steps with both.
    """

    name: str
    steps: int
    minutes: float | None = None
    rate: Callable[[float], float] = schedule
    limit: float = 2.0
    log_every: int = 100
    save_every: int | None = None
    also: tuple[int, ...] = ()

    def part(self, progress: Mapping[str, float]) -> float:
        """How much is done, 0 to 1: of the steps, or of the time where that is given."""
        if self.minutes is None:
            return progress["step"] / self.steps if self.steps else 1.0
        return progress["seconds"] / (60 * self.minutes)


def train(
    module: nn.Module,
    optimizer: MuonAdamW,
    losses_of: Callable[[int], dict[str, Tensor]],
    options: LoopOptions,
    *,
    log: Log,
    average: Average | None = None,
    checkpoint: Path | None = None,
    publish: Callable[[int], dict[str, Any]] = lambda steps: {},
    after_step: Callable[[int], None] = lambda steps: None,
) -> None:
    """Train ``module`` on the ``total`` of ``losses_of(step)``; the other losses are only logged.

    Resumes from ``checkpoint``, to the same weights if the losses follow from the number of the step, and
    writes it. ``publish`` is called before that, with the averaged weights in the module; what it returns
    joins the line of the log. It and ``after_step`` are told how many steps are done. Raises CheckpointError
    for a checkpoint that cannot be read, and where the gradient is not finite.
    """
    progress = {"step": 0.0, "seconds": 0.0}
    if checkpoint is not None and checkpoint.exists():
        progress = load_checkpoint(checkpoint, module, average, optimizer)
    if options.part(progress) >= 1:
        return
    parameters = [p for p in module.parameters() if p.requires_grad]
    sums: dict[str, Tensor] = {}
    counted, began = 0, time.perf_counter()
    bar = tqdm(total=options.steps, initial=int(progress["step"]), desc=options.name)
    while (part := options.part(progress)) < 1:
        step = int(progress["step"])
        optimizer.set_scale(options.rate(part))
        losses = losses_of(step)
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        gradient_norm(parameters, options.limit)
        optimizer.step()
        if average is not None:
            average.update(module)
        now = time.perf_counter()
        progress["step"] += 1
        progress["seconds"] += now - began
        began = now
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        counted += 1
        bar.update(1)
        now_too = options.part(progress) >= 1 or step + 1 in options.also
        saves = now_too or (step + 1) % (options.save_every or options.log_every) == 0
        if saves or (step + 1) % options.log_every == 0:
            record: dict[str, Any] = {name: round(float(value) / counted, 5) for name, value in sums.items()}
            record |= {"step": step + 1, "seconds": round(progress["seconds"])}
            sums, counted = {}, 0
            if saves:
                with nullcontext() if average is None else average.in_place(module):
                    record |= publish(step + 1)
                if checkpoint is not None:
                    save_checkpoint(checkpoint, module, average, optimizer, progress)
            log(record)
        after_step(step + 1)
    bar.close()


def log_to(path: Path, **about: str) -> Log:
    """A log that appends each line to a file, as JSON that begins with ``about``, and shows it."""

    def log(record: dict[str, Any]) -> None:
        line = json.dumps({**about, **record})
        with path.open("a") as file:
            file.write(line + "\n")
        tqdm.write(line)

    return log


def random_of(seed: int, step: int) -> np.random.Generator:
    """The random numbers of a step."""
    return np.random.Generator(np.random.Philox(key=[seed, step]))
