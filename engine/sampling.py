"""How a model is meant to be sampled: what came with its weights, and what the export makes defaults of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Solver, shift of its time, steps and guidance, as the source names them; where it does not, what
    diffusers' WanPipeline does when it is told nothing. Checked by whoever samples."""

    solver: str
    shift: float
    steps: int = 50
    guidance: float = 5.0
    concept_guidance: float | None = None
    negative: str = ""
