"""One step of the solver in PyTorch: guidance and update around the transformer, replayed as a CUDA graph.

Everything between two steps stays on the device. On CUDA the whole step is captured once per shape and
replayed: one launch instead of thousands. Two ways to do less are off unless asked for, and change the video:

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

from ....engine.dit import ConceptDiT

Replay = Callable[[], tuple[Tensor, ...]]
Capture = Callable[[Replay], Replay]
"""Takes a call on fixed tensors; gives one that does the same again, into the same outputs."""


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


class Captured:
    """A function of named tensors at fixed shapes, captured with inputs of its own.

    Inputs are copied in when they are other tensors than at the call before: what a request computes once is
    copied once. Outputs are the caller's.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: Mapping[str, Tensor], capture: Capture
    ) -> None:
        self.held = {name: tensor.clone() for name, tensor in inputs.items()}
        self.given = dict(inputs)
        self.replay = capture(lambda: function(**self.held))

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The function of these inputs."""
        for name, tensor in inputs.items():
            if tensor is not self.given[name]:
                self.held[name].copy_(tensor)
        self.given = dict(inputs)  # which also keeps them from being freed, and another from looking the same
        return tuple(output.clone() for output in self.replay())


@dataclass
class Memory:
    """What a step cache knows of a video: the last step's latents, and of the last computed step its latents,
    velocity, rate of change (None before there are two) and the change predicted since, in parts of it."""

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
    """Runs steps of `transformer`; capture: how a step is made replayable, None to run it as it is.

    `dtype`: of the latents that the transformer is given; states and updates are float32.
    """

    def __init__(
        self,
        transformer: ConceptDiT,
        dtype: torch.dtype,
        capture: Capture | None = None,
        skip_guidance: float = 0.0,
        step_cache: float = 0.0,
    ) -> None:
        self.transformer, self.dtype, self.capture = transformer, dtype, capture
        self.skip_guidance, self.step_cache = skip_guidance, step_cache
        self.programs: dict[tuple[Any, ...], Captured] = {}
        self.evaluations = 0
        """Branches computed so far, over all steps: what a lossy option saves shows here."""

    def __call__(
        self,
        carried: Carried,
        inputs: dict[str, Tensor],
        conditions: dict[str, Tensor],
        step: int,
        steps: int,
    ) -> Carried:
        """inputs: time [1], concept_mask bool [K,N], guidance [K], coefficients [M,M+1], of an image-to-video
        base given [1,Cg,F,H,W]; conditions: the keys and values of all blocks, [layers,K,…] each; step of
        steps, from 0."""
        inputs = {"state": carried.state, **inputs}
        if len(inputs["guidance"]) > 1 and step >= steps * (1 - self.skip_guidance):
            last = inputs["guidance"].new_ones(1)
            inputs |= {"concept_mask": inputs["concept_mask"][-1:], "guidance": last}
            conditions = {name: tensor[:, -1:] for name, tensor in conditions.items()}
        if not self.step_cache:
            return Carried(self._run(inputs, conditions)[0])
        memory = carried.memory
        predicted = None if memory is None or step == steps - 1 else _predicted(memory, carried.state[0])
        if memory is not None and predicted is not None and predicted < self.step_cache:
            velocity = carried.state[0] + (memory.velocity - memory.computed)
            memory.latents, memory.change = carried.state[0], predicted
            return Carried(update(carried.state, velocity, inputs["coefficients"]), memory)
        state, velocity = self._run(inputs, conditions)
        return Carried(state, _remembered(memory, carried.state[0], velocity))

    def _run(self, inputs: dict[str, Tensor], conditions: dict[str, Tensor]) -> tuple[Tensor, ...]:
        self.evaluations += len(inputs["guidance"])
        given = inputs | conditions
        if self.capture is None:
            return self._step(**given)
        shape = tuple((name, tuple(tensor.shape)) for name, tensor in given.items())
        program = self.programs.get(shape)
        if program is None:
            program = self.programs[shape] = Captured(self._step, given, self.capture)
        return program(given)

    def _step(
        self, state: Tensor, time: Tensor, concept_mask: Tensor, guidance: Tensor, coefficients: Tensor,
        given: Tensor | None = None, **conditions: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """state [M,Cz,F,H,W] -> (the next one, the guided velocity [Cz,F,H,W]), float32 both. given
        [1,Cg,F,H,W]: of an image-to-video base, see `ConceptDiT.denoise`."""
        branches = len(guidance)
        latents = state[:1].to(self.dtype).expand(branches, -1, -1, -1, -1)  # [K,Cz,F,H,W]
        known = {} if given is None else {"given": given.to(self.dtype)}
        velocities = self.transformer.denoise(latents, time, conditions, concept_mask, **known).float()
        velocity = (guidance[:, None] * velocities.flatten(1)).sum(dim=0).view(state.shape[1:])
        return update(state, velocity, coefficients), velocity


def update(state: Tensor, velocity: Tensor, coefficients: Tensor) -> Tensor:
    """coefficients [M,M+1] times [state_0 .. state_{M-1}, velocity] -> [M,Cz,F,H,W]."""
    known = torch.cat((state.flatten(1), velocity.reshape(1, -1)))  # [M+1,Cz*F*H*W]
    return (coefficients @ known).view(state.shape)  # [M,Cz,F,H,W]


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
