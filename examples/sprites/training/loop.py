"""The loop that every network of this world is trained with."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from conceptmaster.runtime import stop_signals

from .learning import (
    Average,
    MuonAdamW,
    check_norm,
    gradient_norm,
    load_checkpoint,
    save_checkpoint,
    schedule,
)

SPARE = 1.5
"""How many times as long as it last took to write a checkpoint is kept free for the last one."""

Log = Callable[[dict[str, Any]], None]
"""Takes one line of a log."""


@dataclass(frozen=True)
class LoopOptions:
    """How long a network is trained, and when it is told of.

    name: on the progress bar; steps: until which it is trained, or with ``minutes`` so long, whatever number
    of steps that is; rate: what the learning rates are scaled by, over 0..1 of the training; limit: of the
    gradient's norm; log_every: steps between lines of the log, each with the means of the losses since the
    last; save_every: steps between checkpoints (``log_every``); also: further steps with both; save_minutes:
    minutes between checkpoints, in the place of steps; began: when what counts as its time began, by
    ``time.perf_counter``.
    """

    name: str
    steps: int
    minutes: float | None = None
    rate: Callable[[float], float] = schedule
    limit: float = 2.0
    log_every: int = 100
    save_every: int | None = None
    also: tuple[int, ...] = ()
    save_minutes: float | None = None
    began: float | None = None

    def part(self, progress: Mapping[str, float]) -> float:
        """How much is done, 0 to 1: of the steps, or of the time where that is given, but for the time that
        it takes to write what was learned."""
        if self.minutes is None:
            return progress["step"] / self.steps if self.steps else 1.0
        writing = SPARE * progress.get("saving", 0.0)
        return progress["seconds"] / max(60 * self.minutes - writing, 1e-9)

    def saves(self, step: int, unsaved: float) -> bool:
        """Whether there is a checkpoint when so many steps are done, and so many seconds after the last."""
        if self.save_minutes is not None:
            return unsaved >= 60 * self.save_minutes
        return step % (self.save_every or self.log_every) == 0


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
    joins the line of the log. It and ``after_step`` are told how many steps are done. Nothing waits for the
    device but the log and a checkpoint. A signal that ends the process is followed after the step that it
    came in, and a checkpoint. Raises CheckpointError for a checkpoint that cannot be read, and where the
    gradient is not finite.
    """
    began = time.perf_counter() if options.began is None else options.began
    progress = {"step": 0.0, "seconds": 0.0}
    if checkpoint is not None and checkpoint.exists():
        progress = load_checkpoint(checkpoint, module, average, optimizer)
    if options.part(progress) >= 1:
        return
    parameters = [p for p in module.parameters() if p.requires_grad]
    at_once = all(p.device.type == "cpu" for p in parameters)  # where nothing is lost by looking
    sums: dict[str, Tensor] = {}
    counted, worst, saved = 0, torch.zeros(()), progress["seconds"]
    bar = tqdm(total=options.steps, initial=int(progress["step"]), desc=options.name)
    with put_off() as came:
        while (part := options.part(progress)) < 1 and not came:
            step = int(progress["step"])
            optimizer.set_scale(options.rate(part))
            losses = losses_of(step)
            optimizer.zero_grad(set_to_none=True)
            losses["total"].backward()
            norm = gradient_norm(parameters, options.limit)
            worst = torch.maximum(worst.to(norm.device), norm)  # one that is no number stays
            if at_once:
                check_norm(worst)
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
            saves = options.part(progress) >= 1 or step + 1 in options.also or bool(came)
            saves = saves or options.saves(step + 1, progress["seconds"] - saved)
            if saves or (step + 1) % options.log_every == 0:
                check_norm(worst)
                record: dict[str, Any] = {n: round(float(value) / counted, 5) for n, value in sums.items()}
                record |= {"step": step + 1, "seconds": round(progress["seconds"])}
                sums, counted = {}, 0
                if saves:
                    if came and checkpoint is not None:  # whoever stops this may not wait for long
                        save_checkpoint(checkpoint, module, average, optimizer, progress)
                    with nullcontext() if average is None else average.in_place(module):
                        record |= publish(step + 1)
                    if checkpoint is not None:
                        save_checkpoint(checkpoint, module, average, optimizer, progress)
                    saved, progress["saving"] = progress["seconds"], time.perf_counter() - now
                log(record)
            after_step(step + 1)
    bar.close()
    for number in came:
        signal.raise_signal(number)


@contextmanager
def put_off() -> Iterator[list[int]]:
    """Signals that ask the process to end are only noted while the block runs, each of them once: a second
    one is followed at once. Yields those that came. Does nothing outside of the main thread."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for name in stop_signals.NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
