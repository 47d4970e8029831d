"""A step that several ranks make together: rank 0's half, and the others'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....engine.dit import ConceptDiT
from ....engine.step import DenoiseStep

if TYPE_CHECKING:
    from .leader import Leader
    from .ranks import Ranks


class SharedStep(DenoiseStep):
    """On rank 0 in the place of a DenoiseStep, for the steps of `graph`: others compute their shares of a
    velocity, and everything else is done here alone."""

    def __init__(self, transformer: ConceptDiT, leader: Leader, graph: str) -> None:
        super().__init__(transformer)
        self._leader, self._graph = leader, graph

    def velocity(
        self,
        state: Tensor,
        time: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        concept_mask: Tensor | None = None,
        given: Tensor | None = None,
        **conditions: Any,
    ) -> Tensor:
        """As of DenoiseStep. Among the conditions is `held`, what `Leader.condition` gave."""
        held, ranks, branches = conditions.pop("held"), self._leader.ranks, len(guidance)
        with ranks.together():
            self._leader.tell({"do": "step", "graph": self._graph, "held": held.number, "branches": branches})
            ranks.spread(torch.cat((state[0].flatten(), time)))
            own = self.told(ranks.share(branches), state[:1], time, concept_mask, given, **conditions)
            told = ranks.total(own)
        return self.guided(told, state, time, guidance, coefficients)


def follow(denoise: DenoiseStep, ranks: Ranks, branches: int, known: Mapping[str, Tensor]) -> None:
    """The others' half. known: what `told` takes beside latents and time, of so many branches."""
    latents = denoise.transformer.config.denoised_shape
    spread = ranks.spread(torch.empty(math.prod(latents) + 1, device=ranks.device))
    state, time = spread[:-1].view(1, *latents), spread[-1:]
    ranks.total(denoise.told(ranks.share(branches), state, time, **known))
