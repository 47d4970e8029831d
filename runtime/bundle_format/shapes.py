"""The sizes baked into a bundle's graphs: of each tensor, of the whole video, and of a decoder's tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..solver import STATES

if TYPE_CHECKING:
    import numpy as np

DTYPES = ("float32", "float16", "int64", "int32", "bool")

# Plain upper bounds, far beyond what a model can be today: a manifest costs nothing to write.
MOST_AXES, LONGEST_AXIS = 8, 2**31
MOST_CONCEPTS, MOST_FRAMES, MOST_TOKENS, MOST_TILES = 64, 2**16, 2**16, 4096
WIDEST, LONGEST_SIDE = 2**16, 2**14  # features of a token; pixels
MOST_PICTURE_PIXELS = 2**26  # of a frame, and of all concepts' pictures together
MOST_NUMBERS = 2**32  # of a video, of its latents
LONGEST_NAME = 255  # characters


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (one of DTYPES) and fixed shape of one graph input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"unknown dtype {self.dtype!r:.80}")
        require(len(self.name) <= LONGEST_NAME, "a tensor's name is too long")
        require(len(self.shape) <= MOST_AXES, f"{self.name!r:.80} has more than {MOST_AXES} axes")
        require(
            all(0 < size < LONGEST_AXIS for size in self.shape),
            f"the shape {list(self.shape)} of {self.name!r:.80} is not fixed, or beyond reason",
        )

    def check(self, graph: str, array: np.ndarray | TensorSpec) -> None:
        """Raises ValueError, which names the graph, unless `array`, or what it tells of one, has exactly this
        dtype and shape."""
        if array.dtype != self.dtype or array.shape != self.shape:
            given = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{graph}: {self.name!r} must be {self.dtype} {list(self.shape)}, not {given}")


@dataclass(frozen=True)
class Shapes:
    """The sizes baked into the graphs.

    concepts N; picture_size px; text_tokens T; label_tokens L; text_width Dt; queries Q; concept_width Dc;
    branches K; solver_states M; latent (Cz, F, H, W); frames, height, width: of the video, in frames and
    pixels.
    """

    concepts: int
    picture_size: int
    text_tokens: int
    label_tokens: int
    text_width: int
    queries: int
    concept_width: int
    branches: int
    solver_states: int
    latent: tuple[int, int, int, int]
    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        most = dict.fromkeys(("picture_size", "height", "width"), LONGEST_SIDE) | {"frames": MOST_FRAMES}
        most |= dict.fromkeys(("text_tokens", "label_tokens", "queries"), MOST_TOKENS)
        most |= {"concepts": MOST_CONCEPTS, "text_width": WIDEST, "concept_width": WIDEST}
        for name, largest in most.items():
            size = getattr(self, name)
            require(0 < size <= largest, f"{name} must be 1 to {largest}, not {size}")
        video, latent = (self.frames, self.height, self.width), self.latent
        for size, whole in zip(latent, (WIDEST, *video), strict=True):
            require(0 < size <= whole, f"the latents {list(latent)} are not those of such a video")
        require(
            self.frames == 1 + (latent[1] - 1) * self.frames_per_latent
            and all(whole == self.space * size for whole, size in zip(video[1:], latent[2:], strict=True)),
            f"the latents {list(latent)} do not divide a video of {self.frames} frames, {self.width}×"
            f"{self.height}",
        )
        pictures = (self.concepts * self.picture_size**2, self.height * self.width)
        numbers = (math.prod(video), math.prod(latent), self.concepts * self.queries * self.concept_width)
        require(
            max(pictures) <= MOST_PICTURE_PIXELS and max(numbers) <= MOST_NUMBERS,
            "the sizes together are beyond reason",
        )
        require(1 <= self.branches <= 3, f"1 to 3 guidance branches are known, not {self.branches}")
        require(self.solver_states == STATES, f"{STATES} solver states are known, not {self.solver_states}")
        require(self.label_tokens <= self.text_tokens, "label_tokens exceed text_tokens")

    @property
    def space(self) -> int:
        """Pixels of a side that one latent stands for."""
        return self.height // self.latent[2]

    @property
    def frames_per_latent(self) -> int:
        """Video frames of every latent frame but the first, which is one."""
        return (self.frames - 1) // max(1, self.latent[1] - 1)


@dataclass(frozen=True)
class Tile:
    """A part of the video that the decoder takes at once, where it does not take all of it.

    size: height and width, in latents; overlap: the least that neighbours share, of height and of width.
    """

    size: tuple[int, int]
    overlap: tuple[int, int]

    def __post_init__(self) -> None:
        require(
            all(0 < 2 * shared <= side for side, shared in zip(self.size, self.overlap, strict=True)),
            "a tile's overlap must be 1 to half of its size",
        )

    def axis(self, index: int) -> tuple[int, int]:
        """(size, overlap) of the height, 0, or of the width, 1."""
        return self.size[index], self.overlap[index]

    def count(self, latents: tuple[int, int]) -> int:
        """How many of them a picture of so many latents takes."""
        axes = [(length, *self.axis(index)) for index, length in enumerate(latents)]
        return math.prod(1 + max(0, -(-(length - size) // (size - shared))) for length, size, shared in axes)


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)
