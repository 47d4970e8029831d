"""The denoising step, replayed as a CUDA graph, and ways to compute less of it.

Everything between two steps stays on the device. On CUDA the whole step is captured once per shape and
replayed: one launch instead of thousands. Which branches see how many concepts is in the shapes (seen.py of
the engine), so a graph never serves a request that it was not captured for. Two ways to do less are off
unless asked for, and change the video:

* without guidance towards the end: only the branch that reads the caption and sees the concepts is computed,
  as if the scale were 1 (after Kynkäänniemi et al., arXiv 2404.07724: guidance in a limited interval);
* a step cache after EasyCache (Zhou et al., arXiv 2507.02860): over a few steps the velocity changes about as
  fast, for each change of the latents, as it did before. While the change that this predicts, summed up since
  the last computed step, stays below a threshold, the velocity is the latents plus what it was beyond them.

Letters: K guidance branches, M solver states, Cz F H W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....engine.blocks import KEYS_VALUES
from ....engine.fused import compute_exactly
from ....engine.step import DenoiseStep, update
from ....engine.tiers import EightBits

Replay = Callable[[], tuple[Tensor, ...]]
Capture = Callable[[Replay], Replay]
"""Takes a call on fixed tensors; gives one that does the same again, into the same outputs."""


MOST_PROGRAMS = 32
"""So many are kept: with each number of concepts and each length of text a step has other shapes."""


def cuda_graphs() -> Capture:
    """Captures calls as CUDA graphs, each after three runs that compile its kernels and settle its memory.

    They share one pool of memory, so what a replay gives must be copied before the next one's.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(call: Replay) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            kept = call()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return kept

        return replay

    return capture


class Place:
    """Memory that stays where it is, for tensors of one name and at most so many elements as the first."""

    def __init__(self, tensor: Tensor) -> None:
        self.memory = tensor.new_empty(tensor.numel())
        self.last: Tensor | None = None

    def put(self, tensor: Tensor) -> Tensor:
        """The place, of the tensor's shape and with its values; they are copied when it is another tensor
        than the last one: what a request computes once is copied once."""
        held = self.memory[: tensor.numel()].view(tensor.shape)
        if tensor is not self.last:
            held.copy_(tensor)
            self.last = tensor  # which also keeps it from being freed, and another from looking the same
        return held


class Captured:
    """A function of named tensors at fixed shapes, captured with inputs of its own, in `places`: what never
    runs at the same time may share them. Outputs are the caller's."""

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], places: Mapping[str, Place],
        inputs: Mapping[str, Tensor], capture: Capture,
    ) -> None:  # fmt: skip
        self.places = {name: places[name] for name in inputs}
        self.held = {name: self.places[name].put(tensor) for name, tensor in inputs.items()}
        self.replay = capture(lambda: function(**self.held))

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The function of these inputs."""
        for name, tensor in inputs.items():
            self.places[name].put(tensor)
        return tuple(output.clone() for output in self.replay())


@dataclass
class Memory:
    """What a step cache knows of a video, each tensor [1,Cz*F*H*W]: the last step's latents, and of the last
    computed step its latents, velocity, rate of change (None before there are two) and the change predicted
    since, in parts of it."""

    latents: Tensor
    computed: Tensor
    velocity: Tensor
    rate: float | None = None
    change: float = 0.0


@dataclass(frozen=True)
class Carried:
    """A state [M,Cz,F,H,W] between two steps, with what the step cache remembers."""

    state: Tensor
    memory: Memory | None = None


class Stepper:
    """Runs steps of `denoise`; capture: how a step is made replayable, None to run it as it is; bits: which
    steps are in 8 bits, if any."""

    def __init__(
        self,
        denoise: DenoiseStep,
        capture: Capture | None = None,
        skip_guidance: float = 0.0,
        step_cache: float = 0.0,
        bits: EightBits | None = None,
    ) -> None:
        self.denoise, self.capture = denoise, capture
        self.skip_guidance, self.step_cache = skip_guidance, step_cache
        self.bits, self.exactly = bits, False
        self.programs: dict[tuple[Any, ...], Captured] = {}
        self.places: dict[str, Place] = {}
        self.evaluations = 0
        """Branches computed so far, over all steps: what a lossy option saves shows here."""

    def __call__(self, carried: Carried, inputs: dict[str, Tensor], step: int, steps: int) -> Carried:
        """inputs: those of `DenoiseStep` by name, but for the state; step of steps, from 0."""
        if self.bits is not None:
            self.exactly = not self.bits.step(step, steps)
            compute_exactly(self.denoise, self.exactly)
        if len(inputs["guidance"]) > 1 and step >= steps * (1 - self.skip_guidance):
            inputs = last_branch(inputs) | {"guidance": inputs["guidance"].new_ones(1)}
        if not self.step_cache:
            return Carried(self._run(carried.state, inputs)[0])
        memory, latents = carried.memory, carried.state[:1].flatten(1)
        predicted = None if memory is None or step == steps - 1 else _predicted(memory, latents)
        if memory is not None and predicted is not None and predicted < self.step_cache:
            velocity = latents + (memory.velocity - memory.computed)
            memory.latents, memory.change = latents, predicted
            return Carried(update(carried.state, velocity, inputs["coefficients"]), memory)
        state, velocity = self._run(carried.state, inputs)
        return Carried(state, _remembered(memory, latents, velocity))

    def _run(self, state: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The next state, and the guided velocity."""
        self.evaluations += len(inputs["guidance"])
        inputs = {"state": state, **inputs}
        if self.capture is None:
            return self._step(**inputs)
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        shapes += (("exactly", (self.exactly,)),)
        program = self.programs.get(shapes)
        if program is None:
            self._make_room(inputs)
            program = self.programs[shapes] = Captured(self._step, self.places, inputs, self.capture)
        return program(inputs)

    def _make_room(self, inputs: Mapping[str, Tensor]) -> None:
        """For one more program. Inputs are held once for all of them: those that know a place which is too
        small are captured anew when they are needed."""
        for name, tensor in inputs.items():
            place = self.places.get(name)
            if place is None or place.memory.numel() < tensor.numel():
                self.programs = {k: p for k, p in self.programs.items() if name not in p.places}
                self.places[name] = Place(tensor)
        while len(self.programs) >= MOST_PROGRAMS:
            del self.programs[next(iter(self.programs))]

    def _step(self, state: Tensor, coefficients: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        velocity = self.denoise.velocity(state, coefficients=coefficients, **inputs)
        return update(state, velocity, coefficients), velocity


def last_branch(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is by branch of the last one alone, which reads the caption and sees the concepts."""
    found = inputs | {name: inputs[name][:, -1:] for name in KEYS_VALUES if name in inputs}
    rows = {"concept_mask", "text_bias"} & inputs.keys()
    return found | {name: inputs[name][-1:] for name in rows}


def _predicted(memory: Memory, latents: Tensor) -> float | None:
    """The velocity's change since the last computed step, in parts of it; None while there is no rate."""
    if memory.rate is None:
        return None
    moved = (latents - memory.latents).abs().mean() / memory.velocity.abs().mean()
    return memory.change + memory.rate * float(moved)


def _remembered(memory: Memory | None, latents: Tensor, velocity: Tensor) -> Memory:
    if memory is None:
        return Memory(latents, latents, velocity)
    moved = float((latents - memory.computed).abs().mean())
    rate = float((velocity - memory.velocity).abs().mean()) / moved if moved else None
    return Memory(latents, latents, velocity, rate)
