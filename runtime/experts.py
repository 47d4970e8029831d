"""Which transformer makes a step: the only one, or of two experts that of high noise or that of low, by time.

diffusers' WanPipeline compares the scheduler's timestep, whole numbers of UniPC and others of flow-matching
Euler, with the boundary times 1000; so does this, in float32 as there. The solver's state knows nothing of
it and goes from one expert to the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle_format.graph_list import STEP_GRAPHS, condition_of
from .solver import TRAINED_STEPS

if TYPE_CHECKING:
    from .backends import Backend
    from .bundle_format.schema import Manifest
    from .guidance import Guidance


def step_graphs(manifest: Manifest, timesteps: np.ndarray) -> list[str]:
    """The graph of each step. timesteps: float32 [steps], see solver.py."""
    if manifest.experts is None:
        return [STEP_GRAPHS[0]] * len(timesteps)
    boundary = np.float32(manifest.experts[0].boundary * TRAINED_STEPS)
    return [STEP_GRAPHS[0 if time >= boundary else 1] for time in timesteps]


class Conditions:
    """What a step's graph is given beside state, time and coefficients: keys and values out of `condition`,
    and the weights of the guidance. Of two experts only those of the one whose turn it is are held."""

    def __init__(self, backend: Backend, known: dict[str, Any], guidance: Guidance) -> None:
        """known: what `condition` gets, and what every step gets."""
        self._backend, self._known = backend, known
        self._weights = dict(zip(STEP_GRAPHS, (guidance.weights, guidance.weights_2), strict=True))
        self._graph, self._held = "", dict[str, Any]()

    def of(self, graph: str) -> dict[str, Any]:
        """Of a step's graph. Computed when it is another one's turn than at the last call."""
        if graph != self._graph:
            self._graph, self._held = "", {}  # let go before the next ones are there
            keys_values = self._backend.run(condition_of(graph), self._known)
            self._held = self._known | keys_values | {"guidance": self._weights[graph]}
            self._graph = graph
        return self._held
