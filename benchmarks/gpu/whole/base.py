"""The Wan2.1 base with random weights that whole videos are made with, written to disk where it is needed."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from conceptmaster.engine.config import ModelConfig
from conceptmaster.errors import InputError, free_memory
from conceptmaster.runtime.backends.pytorch import memory_plan

from ...random_base import SHARD, Part, adapter_shapes, parts_of, write_adapter, write_base
from ..job import Job
from ..model import Size

TEXT_LAYERS = 2
"""Of the text encoder, which runs once a video and whose 24 layers would be 11 GB to write and hash."""
WRITERS = 4
BUNDLES = 1 << 28
"""Bytes of what is made beside the weights: bundles without graphs, videos."""
STAMP = "complete"


@dataclass(frozen=True)
class Base:
    """A folder for a base of a video's size, its adapter, and what is made of them."""

    folder: Path
    video: Size

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The model's, its text encoder cut short."""
        config = self.video.config
        text = config.text_encoder | {"num_layers": min(TEXT_LAYERS, config.text_encoder["num_layers"])}
        return dataclasses.replace(config, text_encoder=text)

    @property
    def weights(self) -> Path:
        """In diffusers' layout."""
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        """Concept modules, every layer of which shows."""
        return self.folder / "adapter.safetensors"

    @property
    def size(self) -> list[str]:
        """Of the video, for `export`."""
        return ["--size", f"{self.video.width}x{self.video.height}", "--frames", str(self.video.frames)]

    def write(self, job: Job) -> None:
        """Draws the weights on the job's device and writes them, unless an earlier run has.

        Raises InputError in one line where disk or memory are too small for that.
        """
        stamp = self.folder / STAMP
        if stamp.exists():
            job.found.setdefault("base", {"kept": "it was there"})
            return
        parts = parts_of(self.config)
        adapter = 4 * sum(shape.numel() for shape in adapter_shapes(self.config).values())
        total = adapter + sum(part.size for part in parts)
        writers = self._writers(total, parts)
        shutil.rmtree(self.weights, ignore_errors=True)
        start = time.perf_counter()
        write_base(self.config, self.weights, device=job.device, writers=writers)
        write_adapter(self.config, self.adapter, device=job.device)
        stamp.touch()
        seconds = time.perf_counter() - start
        job.found["base"] = {"bytes": total, "seconds": seconds}
        job.say(f"a random base of {memory_plan.size_of(total)} is written, in {seconds:.1f} s")

    def _writers(self, total: int, parts: list[Part]) -> int:
        """How many files there is memory to write side by side. Raises InputError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        need, free = total + BUNDLES, shutil.disk_usage(self.folder).free
        if free < need:
            raise InputError(
                f"a random base takes {memory_plan.size_of(need)} of disk, in {str(self.folder)!r} "
                f"{memory_plan.size_of(free)} are free: --scratch DIR says where else"
            )
        tensors = (shape.numel() * part.dtype.itemsize for part in parts for shape in part.shapes.values())
        need, memory = 2 * max(tensors), free_memory()  # a file is copied as it is written
        if memory is not None and memory < need:
            raise InputError(
                f"to write a random base takes {memory_plan.size_of(need)} of memory, "
                f"{memory_plan.size_of(memory)} are free"
            )
        return 1 if memory is None else min(WRITERS, max(1, memory // (3 * SHARD)))
