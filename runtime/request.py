"""What is asked for: checked once, whole, before anything is computed."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, wrong_in
from ..untrusted import read_json
from . import boxes as placing
from .cleaning import clean
from .guidance import Guidance, make_guidance
from .solver import SHIFTS, SOLVERS, TRAINED_STEPS

if TYPE_CHECKING:
    from PIL.Image import Image

    from .bundle_format.schema import Manifest

MAX_SEED = 2**63 - 1
MAX_SAMPLES = 64
LONGEST_TEXT = 100_000  # characters; no model reads as many
MAX_GUIDANCE = 1e6  # far beyond any use, far from overflow in float32


@dataclass(frozen=True)
class Concept:
    """One thing that the video must show.

    label: what it is, in the caption's words for it ("cat"), which tell it from the other concepts; it binds
    picture and caption. image: its picture: a path, a file's bytes, a file open for reading bytes, a PIL
    image, or a uint8 array [H,W], [H,W,3] or [H,W,4].
    Two concepts are equal when labels and pictures are, pixel by pixel where they are arrays.
    Raises: InputError for an empty label or another type.
    """

    label: str
    image: str | os.PathLike[str] | bytes | bytearray | IO[bytes] | Image | np.ndarray

    @wrong_in("concepts")
    def __post_init__(self) -> None:
        _text("a concept's label", self.label)
        if not clean(self.label):
            raise InputError("a concept's label is empty: say in a word or two what the picture shows")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Concept):
            return NotImplemented
        mine, its = self.image, other.image
        if isinstance(mine, np.ndarray) and isinstance(its, np.ndarray):
            same = np.array_equal(mine, its)
        else:
            same = type(mine) is type(its) and mine == its
        return self.label == other.label and same

    def __hash__(self) -> int:
        return hash(self.label)  # arrays have no hash, and equal concepts have equal labels


@dataclass(frozen=True)
class Request:
    """A prompt, its concepts and the options; None means the bundle's default.

    concepts: in any order; negative: what the unguided branch reads; steps: model evaluations, 1..1000;
    guidance, concept_guidance: scales, see guidance.py; guidance_2: of a bundle of two experts the scale of
    the second, that of low noise (where guidance alone is given, that one); solver: one of solver.SOLVERS;
    shift: above 1 spends more steps on noise; seed: 0..2**63-1; samples: videos, 1..64, sample i starting
    from seed + i; boxes: where concepts may be, by their labels, see boxes.py: (x0, y0, x1, y1) in fractions
    of the picture, or such boxes by video frame, {0: …, 16: …}, between which they move.

    Raises: InputError for the first field that is wrong.
    """

    prompt: str
    concepts: Sequence[Concept] = ()
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    concept_guidance: float | None = None
    solver: str | None = None
    shift: float | None = None
    seed: int = 0
    samples: int = 1
    guidance_2: float | None = None
    boxes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        with wrong_in("prompt"):
            _text("the prompt", self.prompt)
            if not clean(self.prompt):
                raise InputError("the prompt is empty: say what happens in the video")
        with wrong_in("concepts"):
            _set(self, "concepts", _concepts(self.concepts))
        _set(self, "boxes", placing.checked(self.boxes, [concept.label for concept in self.concepts]))
        if self.negative is not None:
            with wrong_in("negative"):
                _text("the negative prompt", self.negative)
        if self.steps is not None:
            _set(self, "steps", _integer("steps", self.steps, 1, TRAINED_STEPS))
        for name in ("guidance", "concept_guidance", "guidance_2"):
            if (scale := getattr(self, name)) is not None:
                _set(self, name, _number(name, scale, 0.0, MAX_GUIDANCE))
        if self.solver is not None and self.solver not in SOLVERS:
            known = ", ".join(SOLVERS)
            raise InputError(f"unknown solver {self.solver!r}: choose one of {known}", field="solver")
        if self.shift is not None:
            _set(self, "shift", _number("shift", self.shift, *SHIFTS))
        _set(self, "samples", _integer("samples", self.samples, 1, MAX_SAMPLES))
        _set(self, "seed", _integer("seed", self.seed, 0, MAX_SEED - (self.samples - 1)))

    @property
    def seeds(self) -> range:
        """One seed per sample."""
        return range(self.seed, self.seed + self.samples)

    def resolve(self, manifest: Manifest) -> tuple[Request, Guidance]:
        """This request with the bundle's defaults filled in, every field set but concept_guidance and, for
        one transformer, guidance_2, and what each guidance branch is told.

        Raises: InputError for more concepts than the bundle takes, fewer pictures than it needs, or guidance
            or boxes that it cannot follow.
        """
        names = ("negative", "steps", "guidance", "concept_guidance", "solver", "shift", "guidance_2")
        defaults = {name: getattr(manifest.defaults, name) for name in names[:-1]} | manifest.scales
        if self.guidance_2 is not None and "guidance_2" not in defaults:
            raise InputError(
                f"guidance_2 is of a second expert, and the bundle {manifest.name!r} has one transformer: "
                "leave it out",
                field="guidance_2",
            )
        scale = 1.0 if manifest.experts is None else manifest.experts[1].scale
        if self.guidance is not None and "guidance_2" in defaults:
            defaults["guidance_2"] = self.guidance * scale
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if self.guidance is not None and self.concept_guidance is None:
            del missing["concept_guidance"]  # a scale given alone is the joint scale
        _fit(self.concepts, manifest)
        placing.fit(self.boxes, manifest)
        resolved = replace(self, **missing)
        assert resolved.guidance is not None
        branches = manifest.shapes.branches
        concept, first = resolved.concept_guidance, manifest.guided_first
        guidance = make_guidance(branches, resolved.guidance, concept, first)
        if resolved.guidance_2 is not None:
            own = None if concept is None else concept * scale
            second = make_guidance(branches, resolved.guidance_2, own, first)
            guidance = replace(guidance, weights_2=second.weights)
        return resolved, guidance

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Request:
        """Reads a request file: an object whose keys are this class's fields. Each concept is {"label",
        "image"}, the image's path is relative to the file.

        Raises: InputError naming the file, for anything missing, unknown or wrong.
        """
        path = Path(path)
        try:
            data = read_json(path, pipes=True)
            return cls.from_data(data, path.parent.absolute())  # found after os.chdir, too
        except OSError as error:
            raise InputError(f"cannot read the request {str(path)!r}: {error.strerror}") from None
        except ValueError as error:  # InputError is one
            raise InputError(f"request {str(path)!r}: {error}") from None

    @classmethod
    def from_data(cls, data: Any, folder: Path) -> Request:
        """The request that a parsed JSON value says, see `from_json`; images are found from `folder`.

        Raises: ValueError for anything missing, unknown or wrong.
        """
        return cls(**_from_json(data, folder))


def _from_json(data: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError("is not an object")
    known = [field.name for field in fields(Request)]
    for key in data:
        if key not in known:
            raise ValueError(f"unknown key {key!r:.60}; known are {', '.join(known)}")
    if "prompt" not in data:
        raise ValueError("lacks the key 'prompt'")
    concepts = [] if data.get("concepts") is None else data["concepts"]
    if not isinstance(concepts, list):
        raise ValueError("concepts must be a list")
    for concept in concepts:
        if not isinstance(concept, dict) or set(concept) != {"label", "image"}:
            raise ValueError('each concept must be {"label": ..., "image": ...}')
        image = concept["image"]
        if not isinstance(image, str) or not image or "\0" in image:
            raise ValueError(f"a concept's image must be a path, not {image!r:.60}")
    # null is the default, but for the prompt
    found = {key: value for key, value in data.items() if value is not None or key == "prompt"}
    return found | {"concepts": tuple(Concept(c["label"], folder / c["image"]) for c in concepts)}


def _set(request: Request, name: str, value: Any) -> None:
    object.__setattr__(request, name, value)  # the dataclass is frozen to everybody else


def _concepts(concepts: object) -> tuple[Concept, ...]:
    if not isinstance(concepts, Sequence) or not all(isinstance(each, Concept) for each in concepts):
        raise InputError("concepts must be a sequence of Concept(label, image)")
    seen: set[str] = set()
    for concept in concepts:
        label = clean(concept.label)
        if label.casefold() in seen:
            raise InputError(f"two concepts are labelled {label!r}: labels must differ, they are what binds")
        seen.add(label.casefold())
    return tuple(concepts)


@wrong_in("concepts")
def _fit(concepts: Sequence[Concept], manifest: Manifest) -> None:
    """Raises InputError for more concepts than the bundle takes, or fewer than it needs."""
    most = manifest.concepts
    if concepts and not most:
        raise InputError(
            f"the bundle {manifest.name!r} takes no concepts: it was exported from a base without a "
            "picture encoder"
        )
    least = 0 if manifest.conditioning is None else manifest.conditioning.required
    if len(concepts) < least:
        need = "a picture" if least == 1 else f"{least} pictures"
        if least < most and manifest.conditioning is not None and manifest.conditioning.kind != "frames":
            need = f"{least} to {most} pictures"
        raise InputError(
            f"the bundle {manifest.name!r} makes videos out of pictures: give it {need}, each with "
            "--concept LABEL IMAGE"
        )
    if len(concepts) > most:
        raise InputError(f"{len(concepts)} concepts, but the bundle {manifest.name!r} takes at most {most}")


def _text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} is not valid Unicode text") from None
    if len(value) > LONGEST_TEXT:
        raise InputError(f"{what} has {len(value)} characters, {LONGEST_TEXT} are the most of any")


def _integer(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name} must be an integer, not {value!r:.60}", field=name)
    if not least <= int(value) <= most:
        raise InputError(f"{name} must be {least} to {most}, not {int(value)}", field=name)
    return int(value)


def _number(name: str, value: object, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name} must be a number, not {value!r:.60}", field=name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not least <= number <= most:  # so NaN is refused as well
        raise InputError(f"{name} must be {least:g} to {most:g}, not {number:g}", field=name)
    return number
