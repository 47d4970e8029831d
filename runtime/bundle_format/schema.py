"""What manifest.json says: a bundle's graphs, their shapes, and what a request gets by default.

Each dataclass is one JSON object and refuses values that cannot be. A bundle is written in the oldest format
that has what it needs. Format 7 adds pictures that are tiled, a qformer that reads labels and boxes, and
masks of single tokens. Format 6 adds the keys `guided_first`, `prompt_prefix` and `picture_name`, a scale of
an expert, the kind of pictures that are frames, and the solver `unipc_wan`. Format 5 adds the key `experts`,
a picture that a request may leave out, pictures that stand beside the video, and LoRAs that were merged in
part. Format 4 adds the key `whole_text`; format 3 what the bundle was made from (source_record.py) and the
keys `vocabulary`, `ranges` and `boxes`. Format 2 had none of them; format 1 neither conditioning frames, nor
tiles, nor a choice of how pictures are fitted. A key that
a format does not have is read as absent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..solver import SHIFTS, SOLVERS, TRAINED_STEPS
from .hashed_file import HashedFile, check_file
from .pictured import FrameConditioning, Pictures
from .shapes import (
    LONGEST_NAME,
    MOST_TILES,
    MOST_TOKENS,
    Shapes,
    TensorSpec,
    Tile,
    require,
)
from .source_record import SourceRecord
from .strict_json import added, stored_as

FORMAT = 7
READABLE = (1, 2, 3, 4, 5, 6, 7)
EXPERTS = ("transformer", "transformer_2")
"""The names of two transformers, that of high noise and that of low."""
PRECISIONS = ("fp32", "int8")
FPS = (0.01, 1000.0)
MOST_GUIDANCE = 1e6  # far from overflow in float32
LONGEST_TEXT = 10_000  # characters
MOST_ENTRIES = 20_000  # of a vocabulary
GUIDED_FIRST = ("caption", "concepts")


@dataclass(frozen=True)
class GraphFile:
    """One graph: its ONNX file, its signature, and the files that hold its weights if they lie outside.

    file and sha256 are empty in a bundle without graphs, which the torch backend runs from the source.
    """

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    external: tuple[HashedFile, ...] = ()

    def __post_init__(self) -> None:
        if self.file or self.sha256 or self.external:
            check_file(self.file, self.sha256)
        for side, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            require(len({spec.name for spec in specs}) == len(specs), f"{side} share a name")
        require(len(self.outputs) > 0, "a graph without outputs")

    def files(self) -> tuple[HashedFile, ...]:
        """Its files, the graph's first; none in a bundle without graphs."""
        return (HashedFile(self.file, self.sha256), *self.external) if self.file else ()

    def input(self, name: str) -> TensorSpec | None:
        """The input called `name`, or None when the graph does not use it."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output called `name`, or None."""
        return next((spec for spec in self.outputs if spec.name == name), None)


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
        require(self.solver in SOLVERS, f"unknown solver {self.solver!r:.80}")
        require(1 <= self.steps <= TRAINED_STEPS, f"steps must be 1 to {TRAINED_STEPS}")
        require(SHIFTS[0] <= self.shift <= SHIFTS[1], f"shift must be {SHIFTS[0]} to {SHIFTS[1]}")
        scales = (self.guidance, 0.0 if self.concept_guidance is None else self.concept_guidance)
        require(all(0 <= scale <= MOST_GUIDANCE for scale in scales), f"guidance: 0 to {MOST_GUIDANCE:g}")
        require(len(self.negative) <= LONGEST_TEXT, f"negative: {LONGEST_TEXT} characters at most")


@dataclass(frozen=True)
class Vocabulary:
    """What a model was taught to read.

    words: those that may stand anywhere in a caption; labels: what names a concept; phrases: whole wordings
    by kind (places, motions, ...), whose words mean something in them alone; open: whether any other word may
    be asked for as well, so that the rest only tells people what was taught.
    """

    words: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    phrases: dict[str, tuple[str, ...]] | None = None
    open: bool = False

    def __post_init__(self) -> None:
        kinds = {"words": self.words, "labels": self.labels, **(self.phrases or {})}
        require(sum(map(len, kinds.values())) <= MOST_ENTRIES, f"{MOST_ENTRIES} entries at most")
        for kind, entries in kinds.items():
            require(len(set(entries)) == len(entries), f"{kind} must be there each once")
            plain = (0 < len(e) <= LONGEST_NAME and e == " ".join(e.split()) for e in entries)
            require(all(plain), f"{kind}: 1 to {LONGEST_NAME} characters, single spaces inside")
        require(self.open or bool(self.words and self.labels), "words and labels must be there, unless open")


@dataclass(frozen=True)
class Ranges:
    """What a model was made for, smallest and largest; None where nothing is known. concepts: how many."""

    steps: tuple[int, int] | None = None
    guidance: tuple[float, float] | None = None
    concepts: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            pair = getattr(self, field.name)
            right = pair is None or 0 <= pair[0] <= pair[1] < math.inf
            require(right, f"{field.name} must be smallest, largest")


@dataclass(frozen=True)
class Boxes:
    """Where a request may say where its concepts are: `per_concept` boxes each, one for the whole video or
    one for each frame of patches (`Manifest.grid`); required: whether it must."""

    per_concept: int
    required: bool

    def __post_init__(self) -> None:
        require(self.per_concept > 0, "per_concept must be positive")


@dataclass(frozen=True)
class Expert:
    """One of two transformers, which runs while the time (1 is noise, 0 the video) is at least `boundary`;
    guidance: its default scale, None for the bundle's; scale: what a request's scales, but that of this very
    expert, are multiplied with for it."""

    name: str
    boundary: float
    guidance: float | None = None
    scale: float = added(1.0)

    def __post_init__(self) -> None:
        require(self.name in EXPERTS, f"{self.name!r:.80} is no expert's name")
        require(0 <= self.boundary < 1, "boundary must be 0 to 1")
        require(0 <= (self.guidance or 0.0) <= MOST_GUIDANCE, f"guidance: 0 to {MOST_GUIDANCE:g}")
        require(0 < self.scale <= 1, "scale must be above 0 and at most 1")


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json but its checksum.

    written_by: program → version; model: the engine's configuration, opaque here; fps: frames per second;
    precision: one of PRECISIONS; graphs: graph name → GraphFile, with no file in any of a bundle without
    graphs; conditioning: of an image-to-video model alone; tile: None where the decoder takes the whole
    picture; source: what the bundle was made from, None in formats 1 and 2. vocabulary: None where any word
    may be asked for; boxes: None where a request cannot have any; experts: the one of high noise and that
    of low, None for one transformer alone. whole_text: None, or how many tokens text has for
    the model, of which the graphs take shapes.text_tokens: one of these stands for all padding. guided_first:
    of three guidance branches, whether the second has the caption or the concepts alone. prompt_prefix: what
    stands in front of every prompt; picture_name: what prompts call the pictures, with a number from 0 on
    behind, see naming.py.
    """

    format: int
    name: str
    written_by: dict[str, str]
    model: dict
    shapes: Shapes
    fps: float
    precision: str
    pictures: Pictures
    defaults: Defaults
    tokenizer: HashedFile
    graphs: dict[str, GraphFile]
    conditioning: FrameConditioning | None = stored_as("given", None)
    tile: Tile | None = None
    source: SourceRecord | None = None
    vocabulary: Vocabulary | None = None
    ranges: Ranges | None = None
    boxes: Boxes | None = None
    experts: tuple[Expert, ...] | None = None
    whole_text: int | None = None
    guided_first: str = added("caption")
    prompt_prefix: str = added("")
    picture_name: str = added("")

    def __post_init__(self) -> None:
        require(self.format in READABLE, f"format must be {', '.join(map(str, READABLE))}")
        require(0 < len(self.name) <= LONGEST_NAME, f"name must be 1 to {LONGEST_NAME} characters")
        require(FPS[0] <= self.fps <= FPS[1], f"fps must be {FPS[0]:g} to {FPS[1]:g}")
        require(self.precision in PRECISIONS, f"unknown precision {self.precision!r:.80}")
        require(
            self.defaults.concept_guidance is None or self.shapes.branches == 3,
            "a default concept_guidance needs 3 guidance branches",
        )
        if self.conditioning is not None:
            self._check_conditioning(self.conditioning)
        if self.tile is not None:
            inside = all(a <= b for a, b in zip(self.tile.size, self.shapes.latent[2:], strict=True))
            require(inside and self.format > 1, "a tile must not be larger than the video")
            require(self.tile.count(self.shapes.latent[2:]) <= MOST_TILES, "tiles that small are too many")
        self._check_format_3()
        if self.whole_text is not None:
            right = 1 < self.shapes.text_tokens < self.whole_text <= MOST_TOKENS
            require(right and self.format > 3, "whole_text must be more than text_tokens, and of format 4")
        require(self.guided_first in GUIDED_FIRST, f"unknown guided_first {self.guided_first!r:.80}")
        plain = self.picture_name.isascii() and (self.picture_name.isalpha() or not self.picture_name)
        require(plain and len(self.picture_name) <= 30, "picture_name must be a word of letters")
        require(len(self.prompt_prefix) <= LONGEST_TEXT, f"prompt_prefix: {LONGEST_TEXT} characters at most")
        require(self.format > 5 or not self.needs_format_6, "a key, a kind or a solver of format 6")
        require(self.format > 6 or not self.needs_format_7, "pictures, inputs or masks of format 7")
        alone = self.shapes.concepts == 1 and self.conditioning is None and not self.reads_labels
        require(not self.pictures.tiled or alone, "tiled pictures are one concept, without label and frames")

    def _check_format_3(self) -> None:
        added = (self.source, self.vocabulary, self.ranges, self.boxes)
        files = [bool(graph.file) for graph in self.graphs.values()]
        require(all(files) or not any(files), "either all graphs have files or none has")
        require(
            self.format > 2 or (all(files) and not any(entry is not None for entry in added)),
            f"a key, or a graph without a file, that format {self.format} does not have",
        )
        require(self.format < 3 or self.source is not None, "format 3 says what the bundle was made from")
        old = self.source is None or not self.source.needs_format_5
        require(self.format > 4 or old, "LoRAs in part, or of a second transformer, are of format 5")
        if self.experts is not None:
            require(self.format > 4, "experts are of format 5")
            names = tuple(expert.name for expert in self.experts)
            require(names == EXPERTS, f"experts must be {' and '.join(EXPERTS)}")
            high, low = (expert.boundary for expert in self.experts)
            require(high > low == 0, "the first expert's boundary must be above the last's, which is 0")

    def _check_conditioning(self, conditioning: FrameConditioning) -> None:
        shapes, placements = self.shapes, conditioning.placements
        require(self.format > 1, "format 1 has no given frames")
        require(self.format > 4 or conditioning.required > 0, "before format 5 a picture is required")
        few = shapes.branches <= 2 or conditioning.by_branch
        require(few, "given frames are the same in at most 2 guidance branches")
        canvas = conditioning.kind == "canvas"  # which is one picture to the picture encoder
        places = 1 if canvas else len(placements)
        require(places == shapes.concepts, "given must have a place for each concept")
        small = shapes.width < 4 or shapes.height < 2
        require(not (canvas and small), "a canvas needs room for 8 cells")
        require(self.format > 4 or conditioning.beside == 0, "pictures beside the video are of format 5")
        if conditioning.by_branch:  # whose pictures are nothing of the video
            return
        total = self.denoised[1] if conditioning.beside else shapes.frames
        own = set(placements) if canvas else placements
        taken = sorted((p.frames(total) for p in own), key=lambda frames: frames.start)
        ends = [0, *(frames.stop for frames in taken)]
        inside = ends[-1] <= total
        apart = all(frames.start >= end for frames, end in zip(taken, ends, strict=False))
        free = sum(map(len, taken)) < total
        require(inside and apart and free, "given frames must differ and leave some free")
        dropped = conditioning.leading(len(placements))
        require(dropped < shapes.frames, "given frames leave nothing of the video")

    @property
    def needs_format_6(self) -> bool:
        """Whether an older reader would take it for something else, or refuse it."""
        kind = "frames" if self.conditioning is None else self.conditioning.kind
        told = (self.guided_first, kind, self.prompt_prefix, self.picture_name)
        scaled = any(expert.scale != 1 for expert in self.experts or ())
        scaled |= self.source is not None and bool(self.source.custom)
        return told != ("caption", "frames", "", "") or scaled or self.defaults.solver == "unipc_wan"

    @property
    def needs_format_7(self) -> bool:
        """The same of format 7."""
        own = self.graphs.get("qformer")
        told = own is not None and any(own.input(name) for name in ("label_text", "box"))
        return self.pictures.tiled > 0 or told or self.masks_tokens

    @property
    def masks_tokens(self) -> bool:
        """Whether a mask of concepts has an entry for each of their tokens: token q is one of the label's
        token q % label_tokens, and a label's padding has none."""
        graph, s = self.graphs.get("denoise"), self.shapes
        mask = None if graph is None else graph.input("concept_mask")
        return mask is not None and mask.shape == (s.branches, s.concepts * s.queries) and s.queries > 1

    @property
    def denoised(self) -> tuple[int, int, int, int]:
        """The latents that steps make, [Cz,F,H,W]: the video's, and the frames that stand beside it."""
        channels, frames, *sides = self.shapes.latent
        beside = 0 if self.conditioning is None else self.conditioning.beside
        return channels, frames + beside, sides[0], sides[1]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches of the video by frame, row and column: f*h*w tokens, in this order. Raises ValueError where
        the model's configuration does not say how large a patch is."""
        part = self.model.get("transformer")
        patch = part.get("patch_size") if isinstance(part, dict) else None
        right = isinstance(patch, list) and len(patch) == 3 and all(type(side) is int for side in patch)
        require(right, "boxes need the model's patch_size")
        pairs = list(zip(self.shapes.latent[1:], patch or (), strict=True))
        whole = all(side > 0 and size % side == 0 for size, side in pairs)
        require(whole, f"the latents {list(self.shapes.latent)} do not divide into patches {patch!r:.60}")
        frames, rows, columns = (size // side for size, side in pairs)
        return frames, rows, columns

    @property
    def begins_clean(self) -> bool:
        """Whether a request may have a picture that is the first latent frame itself, or none."""
        return self.conditioning is not None and self.conditioning.required == 0

    @property
    def scales(self) -> dict[str, float]:
        """The default guidance, and guidance_2 where there are two experts."""
        if self.experts is None:
            return {"guidance": self.defaults.guidance}
        own = (self.defaults.guidance * e.scale if e.guidance is None else e.guidance for e in self.experts)
        return dict(zip(("guidance", "guidance_2"), own, strict=True))

    @property
    def prompt_tokens(self) -> int:
        """How many tokens a prompt may have."""
        return self.shapes.text_tokens - (self.whole_text is not None)

    @property
    def cut(self) -> str:
        """What to add where a prompt is too long for the graphs, though not for the model."""
        if self.whole_text is None:
            return ""
        return (
            f", or export the bundle without --text-tokens {self.shapes.text_tokens} "
            f"(one of them stands for padding; the model reads {self.whole_text})"
        )

    @property
    def decoded(self) -> tuple[int, int]:
        """Height and width, in latents, of what the decoder takes at once."""
        return self.shapes.latent[2:] if self.tile is None else self.tile.size

    @property
    def concepts(self) -> int:
        """How many concepts a request may have, pictures that are frames alone among them; none for a base
        alone, whatever the shapes leave room for."""
        pictured = "image_encoder" in self.graphs or self.conditioning is not None
        if self.conditioning is not None and self.conditioning.kind == "canvas":
            return len(self.conditioning.placements)
        return self.pictures.tiled or self.shapes.concepts if pictured else 0

    @property
    def reads_labels(self) -> bool:
        """Whether the model reads the labels of concepts; to an image-to-video model they are names alone."""
        return any(graph.input("label_text") is not None for graph in self.graphs.values())

    @property
    def caption_names(self) -> bool:
        """Whether the model was trained with captions that name each picture, which it tells apart by nothing
        else: labels are then the words for it."""
        conditioning = self.conditioning
        return conditioning is not None and (
            conditioning.beside > 0 or conditioning.kind in ("behind", "canvas")
        )

    @property
    def takes_boxes(self) -> bool:
        """Whether a request may say where its concepts are."""
        return self.takes("boxes") or self.takes("box")

    def takes(self, name: str) -> bool:
        """Whether a graph has an input called `name`."""
        return any(graph.input(name) is not None for graph in self.graphs.values())

    @property
    def token_ids(self) -> int | None:
        """How many token ids the text encoder knows, where the model's configuration says so."""
        part = self.model.get("text_encoder")
        size = part.get("vocab_size") if isinstance(part, dict) else None
        return size if type(size) is int and size > 0 else None

    @property
    def has_graphs(self) -> bool:
        """Whether the bundle holds ONNX files, not only what the torch backend needs."""
        return any(graph.file for graph in self.graphs.values())

    def files(self) -> Iterator[HashedFile]:
        """Every file that the manifest vouches for."""
        yield self.tokenizer
        for graph in self.graphs.values():
            yield from graph.files()
