"""What the backends share that run a bundle's graphs as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from ..bundle_format.graph_list import BY_NAME, GRAPHS, other_expert
from ..pixels import to_uint8

if TYPE_CHECKING:
    import numpy as np


class GraphBackend:
    """A backend for which a latent frame is a call, and which gives frames to the host as they are."""

    latent_frames = 1

    def load(self, graphs: Iterable[str]) -> None:
        """See `Backend`. Of two experts, where memory holds one, that which stands first in `graphs`."""
        loaded: set[str] = set()
        for graph in graphs:
            if loaded.isdisjoint(self._in_the_way(graph)):
                self._make_ready(graph)
                loaded.add(graph)

    def _make_ready(self, graph: str) -> None:
        raise NotImplementedError

    def _in_the_way(self, graph: str) -> set[str]:
        """What must be let go before `graph` can be made ready, see `in_the_way`."""
        return set()

    def to_host(self, array: Any) -> np.ndarray:
        """See `Backend`."""
        raise NotImplementedError

    def to_pixels(self, frames: Any) -> np.ndarray:
        """See `Backend`."""
        return to_uint8(self.to_host(frames))


def in_the_way(
    graph: str, held: Collection[str], needs: Callable[[str], int], free: Callable[[], int | None]
) -> set[str]:
    """Those of the graphs `held` that must be let go before `graph` is made ready: the other expert's, unless
    there is memory for both.

    needs: gives the bytes that a graph takes when it is ready; free: those that are, None where nobody tells.
    """
    others = other_expert(graph) & set(held)
    if graph in held or not others:
        return set()
    expert = BY_NAME[graph].expert
    missing = (other.name for other in GRAPHS if other.expert == expert and other.name not in held)
    available = free()
    return set() if available is not None and sum(map(needs, missing)) <= available else others
