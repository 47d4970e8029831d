"""Blocks of clips and captions that are there when they are asked for: processes make their scenes ahead of
time, and a thread draws them, on a GPU in a stream of its own, beside the steps of the training.

What a block holds follows from its number alone, whoever makes it and when.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from conceptmaster.examples.sprites.processes import new_pool

from ..world.scenes import Wish
from .artist import Artist
from .options import Options
from .scenery import Page, Writer, to_numpy, to_torch

READ_BESIDE = 1 << 44
"""First seed of the captions that are read beside the batches."""

Block = dict[str, Tensor]
Job = tuple[range, int]
"""The seeds of some scenes, and of what these do not tell."""


class Studio:
    """``clips(number)`` and ``told(number)`` are the blocks that a training's options ask for."""

    def __init__(self, artist: Artist, options: Options) -> None:
        supply, told = options.supply, options.told_supply

        def jobs(seed: int, size: int) -> list[Job]:
            starts = range(0, size, artist.chunk)
            seeds = (range(seed + k, seed + min(k + artist.chunk, size)) for k in starts)
            return [(some, seed * 4096 + k) for some, k in zip(seeds, starts, strict=True)]

        def pages(number: int) -> list[Job]:
            return jobs((options.seed * (1 << 24) + number) * supply.size, supply.size)

        def captions(number: int) -> list[Job]:
            return jobs(READ_BESIDE + number * told.size, told.size)

        def read(parts: list[Block]) -> Block:
            block = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            return {name: v if name == "count" else v.to(artist.device) for name, v in block.items()}

        self._own: list[ProcessPoolExecutor | ThreadPoolExecutor] = []
        if not options.workers:
            self.clips: Callable[[int], Block] = lambda n: artist.paint(_page(artist, j) for j in pages(n))
            self.told: Callable[[int], Block] = lambda n: read([_told(artist, j) for j in captions(n)])
            return
        processes = new_pool(options.workers, _begin, artist.without_pictures())
        thread = ThreadPoolExecutor(1)
        self._own = [processes, thread]
        far = 1 + -(-options.workers // len(pages(0)))  # blocks that are begun early, so that nobody is idle
        self.clips = _Ahead(processes, thread, _page, pages, artist.paint, artist.device, far)
        self.told = _Ahead(processes, thread, _told, captions, read, artist.device, far)

    def close(self) -> None:
        """End the processes and the thread."""
        for each in self._own:
            each.shutdown(wait=False, cancel_futures=True)


class _Ahead:
    """Blocks in the order of their numbers: ``work`` of a block's ``jobs`` is done by processes, ``far``
    blocks ahead, and ``finish`` of what comes of it by the thread, one block ahead."""

    def __init__(
        self,
        processes: ProcessPoolExecutor,
        thread: ThreadPoolExecutor,
        work: Callable[[Writer, Job], Any],
        jobs: Callable[[int], list[Job]],
        finish: Callable[[list[Any]], Block],
        device: str,
        far: int,
    ) -> None:
        self._processes, self._thread, self._work, self._jobs = processes, thread, work, jobs
        self._finish, self._far, self._last = finish, far, -1
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._begun: dict[int, list[Future[Any]]] = {}
        self._drawn: dict[int, Future[Block]] = {}

    def __call__(self, number: int) -> Block:
        """The block of a number."""
        for n in range(max(number, self._last + 1), number + self._far + 1):
            self._begun[n] = [self._processes.submit(_run, self._work, job) for job in self._jobs(n)]
            self._last = n
        for n in (number, number + 1):
            if n in self._begun:
                self._drawn[n] = self._thread.submit(self._draw, self._begun.pop(n))
        block = self._drawn.pop(number).result()
        if self._stream is not None:
            for value in block.values():
                if value.is_cuda:  # its memory is this stream's until what is asked of it here is done
                    value.record_stream(torch.cuda.current_stream(value.device))
        return block

    def _draw(self, parts: list[Future[Any]]) -> Block:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            block = self._finish([to_torch(part.result()) for part in parts])
        if self._stream is not None:
            self._stream.synchronize()
        return block


def _page(writer: Writer, job: Job) -> Page:
    seeds, seed = job
    return writer.page(writer.scenes(seeds, Wish()), seed)


def _told(writer: Writer, job: Job) -> Block:
    return writer.told(job[0], Wish())


_writer: Writer | None = None  # of a process


def _begin(writer: Writer) -> None:
    global _writer
    torch.set_num_threads(1)
    _writer = writer


def _run(work: Callable[[Writer, Job], Any], job: Job) -> Any:
    assert _writer is not None
    return to_numpy(work(_writer, job))
