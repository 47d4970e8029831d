"""What a manifest says of pictures: how they are prepared, and what of the video they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .shapes import LONGEST_SIDE, MOST_FRAMES, require
from .strict_json import added, stored_as

KINDS = ("frames", "behind", "canvas", "grids")
FITS = ("whole", "middle", "padded", "cut", "stretched", "bilinear", "centred", "bicubic", "own")
MOST_ON_CANVAS = 8  # see runtime/canvas.py


@dataclass(frozen=True)
class Pictures:
    """How the picture encoder's pictures are prepared: fitted into its square (`fit`, one of FITS, see
    pictures.py), then (pixel / 255 - mean) / std per channel.

    background: RGB, where a picture leaves the square free or is transparent; padded_to: None, or the side of
    a square in pixels that a picture is padded and scaled to before; tiled: 0, or how many pictures a request
    may have, which are put on one (canvas.py), the only one that the picture encoder sees: then the square is
    one cell's.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    background: tuple[int, int, int]
    fit: str = "whole"
    padded_to: int | None = None
    tiled: int = added(0)

    def __post_init__(self) -> None:
        require(self.fit in FITS, f"unknown fit {self.fit!r:.80}")
        padded_to = LONGEST_SIDE if self.padded_to is None else self.padded_to
        require(0 < padded_to <= LONGEST_SIDE, f"padded_to must be 1 to {LONGEST_SIDE}")
        require(0 <= self.tiled <= MOST_ON_CANVAS, f"tiled must be 0 to {MOST_ON_CANVAS}")
        require(all(math.isfinite(mean) for mean in self.mean), "mean must be finite")
        require(all(0 < std < math.inf for std in self.std), "std must be positive")
        require(all(0 <= channel <= 255 for channel in self.background), "background must be 0 to 255")


@dataclass(frozen=True)
class FramePlacement:
    """Where one picture stands in the video: `count` frames from frame `first` on (negative: counted from the
    end). fit: how it is fitted into a frame, one of FITS."""

    first: int
    count: int
    fit: str

    def __post_init__(self) -> None:
        require(0 < self.count <= MOST_FRAMES, f"count must be 1 to {MOST_FRAMES}")
        require(abs(self.first) <= MOST_FRAMES, f"first must be {-MOST_FRAMES} to {MOST_FRAMES}")
        require(self.fit in FITS, f"unknown fit {self.fit!r:.80}")

    def frames(self, total: int) -> range:
        """The frames' numbers in a video of `total` frames."""
        first = self.first if self.first >= 0 else total + self.first
        return range(first, first + self.count)


@dataclass(frozen=True)
class FrameConditioning:
    """How the pictures of an image-to-video model are frames of its video, too.

    placements: of the first picture, the second, …; required: how many pictures a request must have, at most
    as many as there are placements; dropped_frames: video frames that each picture costs at the start: they
    are made and decoded, then left out. Where none is required, the one picture is the first latent frame
    itself, which is never noisy. beside: how many latent frames the pictures are that stand beside the
    video's, one each: then placements count latent frames, all of them, and what the steps make of the
    pictures' is not decoded (VACE's control). kind: one of KINDS, `frames` unless format 6 says otherwise:
    `behind`, each picture is a clean latent frame behind the video's that steps do not make, and placements
    count these; `canvas`, all pictures together are the first frame, and what is dropped is dropped once;
    `grids`, each is one of a size of its own, of which the longer side is at most `side` pixels.
    """

    placements: tuple[FramePlacement, ...] = stored_as("places")
    required: int = stored_as("least")
    dropped_frames: int = stored_as("dropped")
    beside: int = added(0)
    kind: str = added("frames")
    side: int = added(0)

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"unknown kind {self.kind!r:.80}")
        most = len(self.placements)
        require(0 <= self.required <= most, f"least must be 0 to {most}, not {self.required}")
        places = [(place.first, place.count) for place in self.placements]
        first = places == [(0, 1)] and not self.dropped_frames
        require(self.required > 0 or first, "a picture that may be left out must be the first frame")
        require(0 <= self.dropped_frames <= MOST_FRAMES, f"dropped must be 0 to {MOST_FRAMES}")
        alone = [count for _, count in places] == [1] * self.beside and self.required == most
        right = alone and self.dropped_frames == 0
        require(self.beside == 0 or right, "beside must be one latent frame for each picture, all required")
        own = 0 < self.side <= LONGEST_SIDE if self.kind == "grids" else self.side == 0
        require(own, f"side must be 1 to {LONGEST_SIDE} for grids, and 0 for others")
        require((self.kind == "grids") == any(p.fit == "own" for p in self.placements), "own is grids' fit")
        tokens = places == [(n, 1) for n in range(most)] and self.required > 0 and not self.dropped_frames
        require(not self.by_branch or (tokens and not self.beside), f"{self.kind} must be numbered in order")
        if self.kind == "canvas":
            shared = set(self.placements) == {FramePlacement(0, 1, "centred")} and self.required == 1
            told = f"a canvas is the first frame, of 1 to {MOST_ON_CANVAS} centred pictures"
            require(shared and most <= MOST_ON_CANVAS and not self.beside, told)

    def leading(self, pictures: int) -> int:
        """How many frames at the start of a video from so many pictures are left out."""
        return self.dropped_frames * (min(pictures, 1) if self.kind == "canvas" else pictures)

    @property
    def by_branch(self) -> bool:
        """Whether a guidance branch may be without the pictures: where they are tokens of their own."""
        return self.kind in ("behind", "grids")
