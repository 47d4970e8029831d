"""The two graphs of a causal encoder or decoder, run over a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .bundle_format.graph_list import BY_NAME

if TYPE_CHECKING:
    from .backends import Backend


def run_causal(backend: Backend, graph: str, parts: Iterable[dict[str, Any]], output: str) -> Iterator[Any]:
    """Runs "decode" or "encode", and before it its first graph, on the inputs `parts`: of the first latent
    frame, then of as many each as `spans` says. Yields the array `output` of each; it and the state between
    them stay on the device."""
    name = BY_NAME[graph].follows or graph
    state: dict[str, Any] = {}
    for part in parts:
        outputs = backend.run(name, {**state, **part})
        found = outputs.pop(output)
        state = {key.removeprefix("next_"): value for key, value in outputs.items()}
        name = graph
        yield found


def spans(latent_frames: int, at_once: int) -> list[range]:
    """The latent frames of each call: the first alone, then at most `at_once`."""
    starts = range(1, latent_frames, at_once)
    return [range(1), *(range(start, min(start + at_once, latent_frames)) for start in starts)]
