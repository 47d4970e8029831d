"""The set, made from a folder of pictures; and read back from its request lines.

    PICTURES/persons/young man/anna.png     a folder's name is the label of all pictures in it
    PICTURES/livings/dog.png                or the file's own name is, less a number at its end (dog_2.png)
    PICTURES/stuffs/…

The same folder and seed give the same samples. A line is what `conceptmaster generate --requests` takes; its
name says the scenario.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conceptmaster.atomic_write import replacing
from conceptmaster.errors import InputError
from conceptmaster.runtime.request import MAX_SEED, Request
from conceptmaster.untrusted import open_plain, parse_json

from .scenarios import KINDS, SCENARIOS, SLOT, Scenario, scenario_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
LONGEST_LINE = 2**20
TRIES = 1000


@dataclass(frozen=True)
class Picture:
    """One concept that samples may be made of."""

    label: str
    path: Path


@dataclass(frozen=True)
class Sample:
    """A video that is asked for: caption, labels and their pictures, in the order of the caption."""

    name: str
    caption: str
    labels: tuple[str, ...]
    pictures: tuple[Path, ...]
    seed: int

    @property
    def scenario(self) -> str:
        """Which of the six it is of."""
        return scenario_of(self.name)


def read_pictures(folder: Path, scenarios: Sequence[Scenario] = SCENARIOS) -> dict[str, list[Picture]]:
    """Pictures by kind ("persons"), in the order of their names.

    Raises: InputError for a folder, or a kind in it, that is missing or has too few different labels for the
        scenarios asked for.
    """
    if not folder.is_dir():
        raise InputError(f"no folder of pictures at {str(folder)!r}")
    asked = {kind: [s for s in scenarios if kind in s.kinds] for kind in KINDS.values()}
    for kind, needing in asked.items():
        if needing and not (folder / kind).is_dir():
            raise InputError(
                f"{str(folder)!r} has no folder {kind!r}, which {_names(needing)} need: put its pictures "
                f"into {kind}/LABEL/, or ask for other scenarios with --scenario"
            )
    found = {}
    for letter, kind in KINDS.items():
        if not asked[kind]:
            continue
        found[kind] = list(_pictures(folder / kind))
        most = max(
            len([t for t in SLOT.findall(text) if t[0] == letter])
            for s in asked[kind]
            for text in s.templates
        )
        labels = {picture.label for picture in found[kind]}
        if len(labels) < most:
            raise InputError(
                f"{str(folder / kind)!r} has pictures of {len(labels)} labels, {_names(asked[kind])} need "
                f"{most}: the labels of a sample differ, as they are what binds"
            )
    return found


def _names(scenarios: Sequence[Scenario]) -> str:
    return f"the scenarios {', '.join(scenario.name for scenario in scenarios)}"


def _pictures(folder: Path) -> Iterator[Picture]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            inner = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            yield from (Picture(_label(path.name), p) for p in inner if not p.name.startswith("."))
        elif path.suffix.lower() in SUFFIXES:
            yield Picture(_label(re.sub(r"[\W_]*\d+$", "", path.stem) or path.stem), path)


def _label(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def make_samples(
    pictures: Mapping[str, Sequence[Picture]],
    scenarios: Sequence[Scenario] = SCENARIOS,
    seed: int = 0,
    each: int | None = None,
) -> list[Sample]:
    """The samples of the scenarios: templates in turn, pictures in rounds, so that all are used alike.

    each: so many of each scenario instead of its own number. Raises InputError as ``read_pictures``.
    """
    samples = []
    for scenario in scenarios:
        rng = np.random.Generator(
            np.random.Philox(key=[seed, 41 + [s.name for s in SCENARIOS].index(scenario.name)])
        )
        decks = {
            letter: _Deck(pictures[kind], rng) for letter, kind in KINDS.items() if kind in scenario.kinds
        }
        templates = rng.permutation(len(scenario.templates))
        for number in range(scenario.samples if each is None else each):
            template = scenario.templates[templates[number % len(templates)]]
            samples.append(_sample(f"{scenario.name}-{number + 1:02d}", template, decks, seed + number))
    return samples


class _Deck:
    """Pictures of a kind, dealt in rounds, each in a new order."""

    def __init__(self, pictures: Sequence[Picture], rng: np.random.Generator) -> None:
        self.pictures, self.rng, self.left = pictures, rng, list[Picture]()

    def deal(self, taken: set[str]) -> Picture:
        """The next picture whose label is not ``taken``."""
        for _ in range(TRIES):
            for index, picture in enumerate(self.left):
                if picture.label not in taken:
                    return self.left.pop(index)
            self.left += [self.pictures[i] for i in self.rng.permutation(len(self.pictures))]
        raise InputError("the pictures of a kind have too few labels that no other kind has")


def _sample(name: str, template: str, decks: Mapping[str, _Deck], seed: int) -> Sample:
    dealt: dict[str, Picture] = {}
    for letter, number in SLOT.findall(template):
        taken = {picture.label for picture in dealt.values()}
        dealt.setdefault(letter + number, decks[letter].deal(taken))
    caption = template.format(**{slot: with_article(picture.label) for slot, picture in dealt.items()})
    labels = tuple(picture.label for picture in dealt.values())
    return Sample(
        name, caption, labels, tuple(picture.path for picture in dealt.values()), seed % (MAX_SEED + 1)
    )


def with_article(label: str) -> str:
    """ "dog" as a caption says it: "a dog"; a label that has an article, or a name's capital, stays."""
    first = label.split()[0]
    if first.lower() in ("a", "an", "the", "some", "my", "his", "her", "their") or first[0].isupper():
        return label
    return f"{'an' if first[0].lower() in 'aeiou' else 'a'} {label}"


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Writes request lines, whole or not at all; pictures are found from the file's folder. Raises
    OSError."""
    with replacing(path) as temporary:
        lines = [json.dumps(_line(sample, path.parent), ensure_ascii=False) for sample in samples]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(sample: Sample, folder: Path) -> dict[str, Any]:
    images = [Path(os.path.relpath(path, folder)).as_posix() for path in sample.pictures]
    concepts = [{"label": a, "image": b} for a, b in zip(sample.labels, images, strict=True)]
    return {"name": sample.name, "prompt": sample.caption, "concepts": concepts, "seed": sample.seed}


def read_samples(path: Path) -> list[Sample]:
    """Request lines as samples; a line without a name is called by its number, as `generate` calls its video.

    Raises: InputError, one line, for a file that cannot be read, or the first line that is wrong.
    """
    samples: dict[str, Sample] = {}
    try:
        with open_plain(path) as file:
            for number, data in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(data) > LONGEST_LINE:
                    raise ValueError(f"line {number} has more than {LONGEST_LINE} bytes")
                if data.strip():
                    sample = _read(data, number, path.parent)
                    if sample.name in samples:
                        raise ValueError(f"line {number} has the name {sample.name!r}, as another before it")
                    samples[sample.name] = sample
    except OSError as error:
        raise InputError(f"cannot read the requests {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"the file of requests {str(path)!r}: {error}") from None
    if not samples:
        raise InputError(f"{str(path)!r} holds no request: one JSON object on every line")
    return list(samples.values())


def _read(data: bytes, number: int, folder: Path) -> Sample:
    try:
        value = parse_json(data)
        name = value.pop("name", None) if isinstance(value, dict) else None
        name = str(number) if name is None else name
        if not isinstance(name, str) or not name.isprintable() or re.search(r"[/\\{}]|^\.*$", name):
            raise ValueError(f"a name becomes part of a file's: text without / \\ {{ }}, not {name!r:.60}")
        request = Request.from_data(value, folder)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    paths = tuple(Path(str(concept.image)) for concept in request.concepts)
    labels = tuple(concept.label for concept in request.concepts)
    return Sample(name, request.prompt, labels, paths, request.seeds[0])
