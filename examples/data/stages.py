"""What is done with a video, stage by stage. A stage's result is a file, so that what was done once is not
done again: its name is the stage's, its key a hash of all that it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.atomic_write import replacing
from conceptmaster.hashed import sha256_file
from conceptmaster.runtime.bundle_format.strict_json import checksum
from conceptmaster.untrusted import read_json

from . import boxes, captions, masks, nouns, pairs
from .cuts import find_shots
from .faces import face_finder
from .films import Film, Unreadable
from .motion import Sampled, filter_motion
from .moving import Moving
from .parts import Parts
from .taxonomy import Taxonomy
from .thresholds import Thresholds

VERSION = 1
"""Of what the stages do: results of another one are made anew."""
LARGEST = 2**28
"""Bytes of a stage's result."""
Shots = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What all videos of a run share. faces: whether a picture shows one."""

    output: Path
    thresholds: Thresholds
    taxonomy: Taxonomy
    parts: Parts

    @cached_property
    def faces(self) -> Callable[[np.ndarray], bool]:
        """Opened when the first person is met."""
        return face_finder(self.thresholds.face_side)


@dataclass
class Work:
    """A video that is worked on. name: its own in the output folder, path: where it lies."""

    run: Run
    name: str
    path: Path
    _sampled: dict[int, Sampled] = field(default_factory=dict)
    _moving: dict[int, Moving] = field(default_factory=dict)

    @cached_property
    def film(self) -> Film:
        """The video, open. Raises Unreadable."""
        return Film(self.path)

    @property
    def folder(self) -> Path:
        """Where its stages' results are."""
        return self.run.output / "stages" / self.name

    def has_face(self, picture: np.ndarray) -> bool:
        """Whether a picture uint8 [H,W,3] shows a face. Raises MissingDependency."""
        return self.run.faces(picture)

    def sampled(self, shot: dict[str, Any]) -> Sampled:
        """Some frames of a shot, read once."""
        if shot["shot"] not in self._sampled:
            self._sampled[shot["shot"]] = Sampled(self.film, *shot["frames"])
        return self._sampled[shot["shot"]]

    def moving(self, shot: dict[str, Any]) -> Moving:
        """What moves in a shot, computed once."""
        if shot["shot"] not in self._moving:
            self._moving[shot["shot"]] = Moving(self.sampled(shot), self.run.thresholds)
        return self._moving[shot["shot"]]


Result = tuple[Shots, list[dict[str, Any]]]
"""The shots that go on, with what was found of them, and what was dropped: {"shot", "label", "why",
"value"}."""


@dataclass(frozen=True)
class Stage:
    """A step. reads: the thresholds that it depends on; parts: the learned parts; more: what else; files:
    what lies beside its result, without which it is none."""

    name: str
    do: Callable[[Work, Shots], Result]
    reads: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    more: Callable[[Work], Any] = lambda work: None
    files: Callable[[Work, Shots], list[Path]] = lambda work, shots: []

    def key(self, work: Work, before: str) -> str:
        """A hash of all that the result depends on; before: the key of the stage before."""
        thresholds, told = work.run.thresholds, work.run.parts.told
        depends = [VERSION, self.name, before, {name: getattr(thresholds, name) for name in self.reads}]
        return checksum([*depends, {name: told.get(name) for name in self.parts}, self.more(work)])


def _cuts(work: Work, shots: Shots) -> Result:
    return find_shots(work.film, work.run.thresholds)


def _motion(work: Work, shots: Shots) -> Result:
    sampled = {shot["shot"]: work.sampled(shot) for shot in shots}
    return filter_motion(shots, work.film, sampled, work.run.thresholds)


def _caption(work: Work, shots: Shots) -> Result:
    text, wrong = captions.beside(work.path)
    kept, dropped = [], []
    for shot in shots:
        said, whose = text, "beside"
        if said is None and wrong is None and work.run.parts.captioner is not None:
            frames = work.sampled(shot).frames
            which = np.linspace(0, len(frames) - 1, min(captions.FRAMES, len(frames))).round().astype(int)
            said, whose = work.run.parts.captioner([frames[n] for n in which]), "captioner"
        if said:
            kept.append(shot | {"caption": said, "caption_by": whose})
        else:
            dropped.append({"shot": shot["shot"], "why": wrong or "no caption"})
    return kept, dropped


def _nouns(work: Work, shots: Shots) -> Result:
    kept, dropped = [], []
    for shot in shots:
        found, others = nouns.choose(shot["caption"], work.run.taxonomy, work.run.parts.tagger)
        dropped += [{"shot": shot["shot"], "label": noun, "why": why} for noun, why in others]
        if found:
            kept.append(shot | {"nouns": [vars(noun) | {"places": list(noun.places)} for noun in found]})
        else:
            dropped.append({"shot": shot["shot"], "why": "no noun of the taxonomy"})
    return kept, dropped


def _boxes(work: Work, shots: Shots) -> Result:
    thresholds, parts = work.run.thresholds, work.run.parts
    kept, dropped = [], []
    for shot in shots:
        sampled, (start, stop) = work.sampled(shot), shot["frames"]
        chosen = boxes.choose(len(sampled.numbers), thresholds, stop - start)
        numbers = [sampled.numbers[at] for at in chosen]
        named = [
            nouns.Noun(noun["label"], noun["name"], noun["kind"], tuple(map(tuple, noun["places"])))
            for noun in shot["nouns"]
        ]
        frames = work.film.some(numbers)
        why: dict[str, str] = {}
        if parts.detect is not None:
            found = boxes.detected(frames, named, parts.detect)
        else:
            found, why = boxes.moving(work.moving(shot), chosen, shot["caption"], named, thresholds)
        concepts, others = boxes.clean(found, frames, named, thresholds, parts.agrees, why)
        dropped += [{"shot": shot["shot"], **other} for other in others]
        if concepts:
            kept.append(shot | {"boxed": numbers, "concepts": concepts})
        else:
            dropped.append({"shot": shot["shot"], "why": "no concept with boxes"})
    return kept, dropped


def _masks(work: Work, shots: Shots) -> Result:
    parts, thresholds = work.run.parts, work.run.thresholds
    kept, dropped = [], []
    for shot in shots:
        frames = work.film.some(shot["boxed"])
        segment = parts.segment or masks.grab_cut(work.moving(shot))
        good = []
        for concept in shot["concepts"]:
            found, best, why = masks.choose(
                concept,
                frames,
                segment,
                work.has_face,
                parts.agrees,
                thresholds,
                len(shot["boxed"]),
            )
            if best is None:
                dropped.append({"shot": shot["shot"], "label": concept["label"], "why": why})
                continue
            names = {
                str(number): pairs.write_mask(mask, work.folder, shot["shot"], concept["label"], number)
                for number, mask in found.items()
            }
            box = {str(number): concept["boxes"][str(number)] for number in found}
            good.append(concept | {"boxes": box, "masks": names, "best": best})
        if good:
            kept.append(shot | {"concepts": good})
        else:
            dropped.append({"shot": shot["shot"], "why": "no concept with masks"})
    return kept, dropped


def _pairs(work: Work, shots: Shots) -> Result:
    made = [pairs.write_clip(work.run.output, work.name, work.film, work.folder, shot) for shot in shots]
    return made, []


STAGES = (
    Stage("cuts", _cuts, ("cuts", "cut_threshold", "shortest", "longest")),
    Stage("motion", _motion, ("least_flow", "least_contrast")),
    Stage("captions", _caption, (), ("captioner",), lambda work: captions.beside(work.path)),
    Stage("nouns", _nouns, (), ("spacy",), lambda work: sorted(work.run.taxonomy.words.items())),
    Stage(
        "boxes",
        _boxes,
        (
            "frames",
            "least_frames",
            "box_score",
            "nms",
            "least_area",
            "most_area",
            "least_seen",
            "clip_rank",
            "least_motion",
            "place_margin",
        ),
        ("detector", "clip"),
    ),
    Stage(
        "masks",
        _masks,
        ("least_mask", "most_mask", "most_pieces", "least_largest", "face_side", "clip_rank", "least_seen"),
        ("segmenter", "clip"),
        files=lambda work, shots: [
            work.folder / name for shot in shots for one in shot["concepts"] for name in one["masks"].values()
        ],
    ),
    Stage("pairs", _pairs, files=lambda work, shots: pairs.files_of(work.run.output, shots)),
)


def work_on(work: Work) -> dict[str, Result]:
    """All stages of a video: of each what goes on and what was dropped; none behind a video that cannot be
    decoded, which the last one tells.

    Raises: OSError where a result cannot be written.
    """
    results: dict[str, Result] = {}
    shots: Shots = []
    work.folder.mkdir(parents=True, exist_ok=True)
    key = sha256_file(work.path)
    for stage in STAGES:
        key = stage.key(work, key)
        place = work.folder / f"{stage.name}.json"
        found = _read(place, key)
        if found is None or not all(file.is_file() for file in stage.files(work, found[0])):
            _forget(work)  # what this stage changes is in the clips, too
            try:
                found = stage.do(work, shots)
            except Unreadable as error:
                found = [], [{"why": "cannot be decoded", "value": str(error)}]
            text = json.dumps({"key": key, "shots": found[0], "dropped": found[1]}, indent=1)
            with replacing(place) as temporary:
                temporary.write_text(text, encoding="utf-8")
            value = json.loads(text)  # as it will be read again: tuples are lists
            found = value["shots"], value["dropped"]
        results[stage.name] = found
        shots = found[0]
        if not shots:
            break
    if not shots:
        _forget(work)
    return results


def _forget(work: Work) -> None:
    """Removes a video's clips, and that they were made."""
    (work.folder / "pairs.json").unlink(missing_ok=True)
    pairs.forget(work.run.output, work.name)


def _read(place: Path, key: str) -> Result | None:
    """A stage's result, if it is there and is what would be made now."""
    try:
        value = read_json(place, LARGEST)
        return (value["shots"], value["dropped"]) if value["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is made anew
        return None
