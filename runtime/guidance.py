"""Classifier-free guidance: what each branch of the batch is told, and how the branches are added up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class Guidance:
    """velocity = sum_k weights[k] * velocity_k. weights: float32 [K], summing to 1; caption[k]: whether
    branch k reads the caption (else the negative caption); concepts[k]: whether it sees the concepts;
    weights_2: of the second of two experts, None of one transformer."""

    weights: np.ndarray
    caption: tuple[bool, ...]
    concepts: tuple[bool, ...]
    weights_2: np.ndarray | None = None


def make_guidance(
    branches: int, guidance: float, concept_guidance: float | None, first: str = "caption"
) -> Guidance:
    """Weights for a bundle of `branches` (K) branches.

    guidance, concept_guidance: the scales g and c. K = 1: (1,), no guidance. K = 2: (1 - g, g), one joint
    scale. K = 3: (1 - g, g - c, c), the caption added first and the concepts to it; or with first="concepts"
    (1 - c, c - g, g), the concepts first and the caption to them. c is g where it is None: the joint rule.

    Raises: InputError when the bundle cannot follow the scales; ValueError for another K.
    """
    if branches != 3 and concept_guidance is not None:
        raise InputError(
            f"concept guidance needs a bundle with 3 guidance branches, this one has {branches}: leave it "
            "out",
            field="concept_guidance",
        )
    if branches == 1:
        if guidance != 1.0:
            raise InputError(
                f"this bundle has no guidance branch: guidance must be 1, not {guidance:g}", field="guidance"
            )
        return Guidance(np.ones(1, np.float32), (True,), (True,))
    if branches == 2:
        return Guidance(np.array([1.0 - guidance, guidance], np.float32), (False, True), (False, True))
    if branches == 3:
        concept = guidance if concept_guidance is None else concept_guidance
        scales = (guidance, concept) if first == "caption" else (concept, guidance)
        weights = np.array([1.0 - scales[0], scales[0] - scales[1], scales[1]], np.float32)
        added, last = (False, True, True), (False, False, True)
        return Guidance(weights, *((added, last) if first == "caption" else (last, added)))
    raise ValueError(f"a bundle has 1, 2 or 3 guidance branches, not {branches}")
