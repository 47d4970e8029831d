"""What the backends share that run a bundle's graphs as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..pixels import to_uint8

if TYPE_CHECKING:
    import numpy as np


class GraphBackend:
    """A backend for which a latent frame is a call, and which gives frames to the host as they are."""

    latent_frames = 1

    def to_host(self, array: Any) -> np.ndarray:
        """See `Backend`."""
        raise NotImplementedError

    def to_pixels(self, frames: Any) -> np.ndarray:
        """See `Backend`."""
        return to_uint8(self.to_host(frames))
