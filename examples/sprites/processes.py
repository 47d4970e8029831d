"""Work shared out to processes of one thread each."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Job = TypeVar("Job")
Done = TypeVar("Done")


def new_pool(workers: int, begin: Callable[..., None] | None = None, *about: Any) -> ProcessPoolExecutor:
    """Processes that leave an interrupt to this one; each runs ``begin(*about)`` first."""
    # spawned, because neither ONNX Runtime's threads nor PyTorch's survive a fork, nor does CUDA
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin, (begin, *about))


def _begin(begin: Callable[..., None] | None, *about: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if begin is not None:
        begin(*about)


def in_processes(function: Callable[[Job], Done], jobs: Sequence[Job], workers: int) -> Iterator[Done]:
    """``function`` of each job, in their order; ``function`` and jobs can be pickled.

    With one worker all is done here. Whoever stops asking stops the work that has not begun; an interrupt is
    this process's affair.
    """
    if workers == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    pool = new_pool(min(workers, len(jobs)))
    try:
        yield from pool.map(function, jobs)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
