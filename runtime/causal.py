"""The two graphs of a causal encoder or decoder, run over a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .bundle_format.graph_list import BY_NAME

if TYPE_CHECKING:
    import numpy as np

    from .backends import Backend


def run_causal(backend: Backend, graph: str, parts: Iterable[dict[str, Any]], output: str) -> Iterator[Any]:
    """Runs "decode" or "encode", and before it its first graph, on the inputs `parts` of one latent frame
    each; yields the array `output` of each, on the host. The state between them stays on the device."""
    name = BY_NAME[graph].follows or graph
    state: dict[str, Any] = {}
    for part in parts:
        outputs = backend.run(name, {**state, **part})
        found: np.ndarray = backend.to_host(outputs.pop(output))
        state = {key.removeprefix("next_"): value for key, value in outputs.items()}
        name = graph
        yield found
