"""How a model is meant to be sampled: what came with its weights, and what the export makes defaults of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Solver, shift of its time, steps and guidance, as the source names them; where it does not, what
    diffusers' WanPipeline does when it is told nothing. guidance_2: of two experts that of the second, None
    is the same; scale_2: what all scales are multiplied with for it, where it has none of its own; branches:
    how many guidance branches its own program has where it guides, None for two.
    Checked by whoever samples."""

    solver: str
    shift: float
    steps: int = 50
    guidance: float = 5.0
    concept_guidance: float | None = None
    negative: str = ""
    guidance_2: float | None = None
    branches: int | None = None
    scale_2: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether any scale is not 1."""
        return self.guidance != 1.0 or self.guidance_2 not in (None, 1.0)
