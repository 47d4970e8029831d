"""manifest.json: what a bundle holds, in which shapes, and the SHA-256 of every file. Format 2.

Format 1 had no `given`, no `tile`, and no choice of how pictures are fitted; it is read as if it said so.

Reading fails closed. A newer format, an unknown or missing key, a wrong type, a path that leaves the bundle,
a missing file, a hash that differs: each is a BundleError of one line. The manifest's own contents are
covered by its key `checksum` (SHA-256 of the canonical JSON of all other keys), so a changed bit there shows
as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ...errors import BundleError
from ..atomic_write import replacing
from ..solver import SHIFTS, SOLVERS, STATES, TRAINED_STEPS
from . import signatures, strict_json

if TYPE_CHECKING:
    import numpy as np

FORMAT = 2
READABLE = (1, 2)
FILE_NAME = "manifest.json"
PRECISIONS = ("fp32", "int8")
FITS = ("whole", "middle", "padded", "cut", "stretched")
DTYPES = ("float32", "float16", "int64", "int32", "bool")
REPAIR = "write it again with `conceptmaster export`, or reinstall conceptmaster if it came with it"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (one of DTYPES) and fixed shape of one graph input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"unknown dtype {self.dtype!r}")
        _require(
            all(size > 0 for size in self.shape),
            f"the shape {list(self.shape)} of {self.name!r} is not fixed",
        )

    def check(self, graph: str, array: np.ndarray | TensorSpec) -> None:
        """Raises ValueError, which names the graph, unless `array`, or what it tells of one, has exactly this
        dtype and shape."""
        if array.dtype != self.dtype or array.shape != self.shape:
            given = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{graph}: {self.name!r} must be {self.dtype} {list(self.shape)}, not {given}")


@dataclass(frozen=True)
class HashedFile:
    """A file of the bundle: its path relative to the bundle, with forward slashes, and its SHA-256 in hex."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        _check_file(self.file, self.sha256)


@dataclass(frozen=True)
class GraphFile:
    """One ONNX graph: its file, its signature, and the files that hold its weights if they lie outside."""

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    external: tuple[HashedFile, ...] = ()

    def __post_init__(self) -> None:
        _check_file(self.file, self.sha256)
        for side, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            _require(len({spec.name for spec in specs}) == len(specs), f"{side} share a name")
        _require(len(self.outputs) > 0, "a graph without outputs")

    def input(self, name: str) -> TensorSpec | None:
        """The input called `name`, or None when the graph does not use it."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output called `name`, or None."""
        return next((spec for spec in self.outputs if spec.name == name), None)


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
        sizes = [value for value in dataclasses.astuple(self) if isinstance(value, int)]
        _require(all(size > 0 for size in (*sizes, *self.latent)), "every size must be positive")
        _require(self.branches <= 3, f"1 to 3 guidance branches are known, not {self.branches}")
        _require(self.solver_states == STATES, f"{STATES} solver states are known, not {self.solver_states}")
        _require(self.label_tokens <= self.text_tokens, "label_tokens exceed text_tokens")

    @property
    def space(self) -> int:
        """Pixels of a side that one latent stands for."""
        return self.height // self.latent[2]


@dataclass(frozen=True)
class Pictures:
    """How the picture encoder's pictures are prepared: fitted into its square (`fit`, one of FITS, see
    pictures.py), then (pixel / 255 - mean) / std per channel.

    background: RGB, where a picture leaves the square free or is transparent; padded_to: None, or the side of
    a square in pixels that a picture is padded and scaled to before.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    background: tuple[int, int, int]
    fit: str = "whole"
    padded_to: int | None = None

    def __post_init__(self) -> None:
        _require(self.fit in FITS, f"unknown fit {self.fit!r}")
        _require(self.padded_to is None or self.padded_to > 0, "padded_to must be positive")
        _require(all(math.isfinite(mean) for mean in self.mean), "mean must be finite")
        _require(all(0 < std < math.inf for std in self.std), "std must be positive")
        _require(all(0 <= channel <= 255 for channel in self.background), "background must be 0 to 255")


@dataclass(frozen=True)
class Place:
    """Where one picture stands in the video: `count` frames from frame `first` on (negative: counted from the
    end). fit: how it is fitted into a frame, one of FITS."""

    first: int
    count: int
    fit: str

    def __post_init__(self) -> None:
        _require(self.count > 0, "count must be positive")
        _require(self.fit in FITS, f"unknown fit {self.fit!r}")

    def frames(self, total: int) -> range:
        """The frames' numbers in a video of `total` frames."""
        first = self.first if self.first >= 0 else total + self.first
        return range(first, first + self.count)


@dataclass(frozen=True)
class Given:
    """How the pictures of an image-to-video model are frames of its video, too.

    places: for the first picture, the second, …; least: how many pictures a request must have, at most as
    many as there are places; dropped: video frames that each picture costs at the start: they are made and
    decoded, then left out.
    """

    places: tuple[Place, ...]
    least: int
    dropped: int

    def __post_init__(self) -> None:
        _require(
            1 <= self.least <= len(self.places), f"least must be 1 to {len(self.places)}, not {self.least}"
        )
        _require(self.dropped >= 0, "dropped must not be negative")


@dataclass(frozen=True)
class Tile:
    """A part of the video that the decoder takes at once, where it does not take all of it.

    size: height and width, in latents; overlap: the least that neighbours share, of height and of width.
    """

    size: tuple[int, int]
    overlap: tuple[int, int]

    def __post_init__(self) -> None:
        _require(
            all(0 < 2 * shared <= side for side, shared in zip(self.size, self.overlap, strict=True)),
            "a tile's overlap must be 1 to half of its size",
        )

    def axis(self, index: int) -> tuple[int, int]:
        """(size, overlap) of the height, 0, or of the width, 1."""
        return self.size[index], self.overlap[index]


@dataclass(frozen=True)
class Defaults:
    """What a request that leaves these out gets."""

    solver: str
    steps: int
    shift: float
    guidance: float
    concept_guidance: float | None = None
    negative: str = ""

    def __post_init__(self) -> None:
        _require(self.solver in SOLVERS, f"unknown solver {self.solver!r}")
        _require(1 <= self.steps <= TRAINED_STEPS, f"steps must be 1 to {TRAINED_STEPS}")
        _require(SHIFTS[0] <= self.shift <= SHIFTS[1], f"shift must be {SHIFTS[0]} to {SHIFTS[1]}")
        scales = (self.guidance, 0.0 if self.concept_guidance is None else self.concept_guidance)
        _require(all(0 <= scale < math.inf for scale in scales), "guidance must be finite and not negative")


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json but its checksum.

    written_by: program → version; model: the engine's configuration, opaque here; fps: frames per second;
    precision: one of PRECISIONS; graphs: graph name → GraphFile; given: of an image-to-video model alone;
    tile: None where the decoder takes the whole picture.
    """

    format: int
    name: str
    written_by: dict
    model: dict
    shapes: Shapes
    fps: float
    precision: str
    pictures: Pictures
    defaults: Defaults
    tokenizer: HashedFile
    graphs: dict[str, GraphFile]
    given: Given | None = None
    tile: Tile | None = None

    def __post_init__(self) -> None:
        _require(self.format in READABLE, f"format must be {' or '.join(map(str, READABLE))}")
        _require(0 < self.fps < math.inf, "fps must be positive")
        _require(self.precision in PRECISIONS, f"unknown precision {self.precision!r}")
        _require(
            self.defaults.concept_guidance is None or self.shapes.branches == 3,
            "a default concept_guidance needs 3 guidance branches",
        )
        if self.given is not None:
            self._check_given(self.given)
        if self.tile is not None:
            inside = all(a <= b for a, b in zip(self.tile.size, self.shapes.latent[2:], strict=True))
            _require(inside and self.format > 1, "a tile must not be larger than the video")
        signatures.check(self.graphs, self.shapes, self.given is not None, self.decoded)

    def _check_given(self, given: Given) -> None:
        shapes = self.shapes
        _require(self.format > 1, "format 1 has no given frames")
        _require(shapes.branches <= 2, "given frames are the same in at most 2 guidance branches")
        _require(len(given.places) == shapes.concepts, "given must have a place for each concept")
        taken = [frame for place in given.places for frame in place.frames(shapes.frames)]
        inside = set(taken) < set(range(shapes.frames))
        _require(inside and len(set(taken)) == len(taken), "given frames must differ and leave some free")
        _require(given.dropped * len(given.places) < shapes.frames, "given frames leave nothing of the video")

    @property
    def decoded(self) -> tuple[int, int]:
        """Height and width, in latents, of what the decoder takes at once."""
        return self.shapes.latent[2:] if self.tile is None else self.tile.size

    @property
    def concepts(self) -> int:
        """How many concepts a request may have; none for a base alone, whatever the shapes leave room for."""
        return self.shapes.concepts if "image_encoder" in self.graphs else 0

    def files(self) -> Iterator[HashedFile]:
        """Every file that the manifest vouches for."""
        yield self.tokenizer
        for graph in self.graphs.values():
            yield HashedFile(graph.file, graph.sha256)
            yield from graph.external


def load(folder: Path) -> Manifest:
    """Reads and checks a bundle's manifest, and the hash of every file it names.

    Raises: BundleError, see the module's text.
    """
    path = folder / FILE_NAME
    try:
        data = strict_json.read(path)
        if not isinstance(data, dict):
            raise ValueError("is not an object")
        _check_format(data)
        checksum = data.pop("checksum", None)
        manifest = strict_json.decode(Manifest, data, "manifest")
        if checksum != strict_json.checksum(data):
            raise ValueError("differs from its own checksum: it was changed or damaged after it was written")
    except OSError as error:
        raise BundleError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise BundleError(f"bad bundle: {str(path)!r} {error}; {REPAIR}") from None
    for file in manifest.files():
        _verify(folder, file)
    return manifest


def save(manifest: Manifest, folder: Path) -> Path:
    """Writes manifest.json (whole or not at all) and returns its path. Raises OSError, ValueError for NaN."""
    data = json.loads(json.dumps(dataclasses.asdict(manifest), allow_nan=False))  # tuples become lists
    data["checksum"] = strict_json.checksum(data)
    path = folder / FILE_NAME
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in lower-case hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_file(file: str, sha256: str) -> None:
    parts = PurePosixPath(file).parts
    outside = (
        file.startswith("/")
        or "\\" in file
        or "\0" in file
        or ".." in parts
        or bool(PureWindowsPath(file).drive)
    )
    _require(bool(parts) and not outside, f"the path {file!r} leaves the bundle")
    _require(
        len(sha256) == 64 and set(sha256) <= set("0123456789abcdef"),
        f"{sha256!r:.80} is not a SHA-256 in hex",
    )


def _check_format(data: dict[str, Any]) -> None:
    found = data.get("format")
    if type(found) is int and found > FORMAT:
        raise ValueError(
            f"has format {found}, this conceptmaster reads formats up to {FORMAT}: upgrade conceptmaster"
        )


def _verify(folder: Path, file: HashedFile) -> None:
    path = folder / file.file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"bad bundle: {str(path)!r} is a link out of the bundle; {REPAIR}")
    if not path.is_file():
        raise BundleError(f"bad bundle: {str(path)!r} is missing; {REPAIR}")
    try:
        found = sha256_file(path)
    except OSError as error:
        raise BundleError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if found != file.sha256:
        raise BundleError(f"bad bundle: {str(path)!r} has SHA-256 {found}, expected {file.sha256}; {REPAIR}")
