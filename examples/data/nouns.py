"""Which nouns of a caption may become concepts.

With a spaCy model its tags say what is a noun; without, every word of the taxonomy counts as one. Either way
a noun stays if it is in the taxonomy and is one thing: a plural, or two of a class, cannot be told apart by
their label."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptmaster.errors import InputError, how_to_install, not_loaded

from .taxonomy import Mention, Taxonomy

ANOTHER = re.compile(
    r"\b(a|an|another|one|first|second|third|other)\s+((?!the\b)\w+\s+){0,2}$", re.IGNORECASE
)
"""What stands before a noun that is met for the first time: with two of them there are two things."""


@dataclass(frozen=True)
class Noun:
    """A concept that a caption names: its label, in the caption's word; its class and kind; and where its
    mentions begin and end."""

    label: str
    name: str
    kind: str
    places: tuple[tuple[int, int], ...]


Tagger = Callable[[str], list[tuple[int, int]]]
"""Where a caption's nouns begin and end."""


def choose(
    caption: str, taxonomy: Taxonomy, tagger: Tagger | None
) -> tuple[list[Noun], list[tuple[str, str]]]:
    """The nouns that stay, in the caption's order, and those that do not: (noun, why)."""
    mentions, dropped = list(taxonomy.mentions(caption)), []
    if tagger is not None:
        spans = tagger(caption)
        ends = {end for _, end in spans}
        dropped += [(m.text, "no noun here") for m in mentions if m.end not in ends]
        mentions = [mention for mention in mentions if mention.end in ends]
        known = {mention.end for mention in mentions}
        dropped += [(caption[start:end], "not in the taxonomy") for start, end in spans if end not in known]
    by_class: dict[str, list[Mention]] = {}
    for mention in mentions:
        by_class.setdefault(mention.name, []).append(mention)
    kept = []
    for name, found in by_class.items():
        new = sum(ANOTHER.search(caption[: mention.start]) is not None for mention in found)
        if any(mention.plural for mention in found) or new > 1:
            dropped.append((found[0].text, "several of a class"))
        else:
            places = tuple((mention.start, mention.end) for mention in found)
            kept.append(Noun(found[0].text.lower(), name, found[0].kind, places))
    return kept, dropped


def spacy_tagger(model: Path) -> Tagger:
    """The nouns by a spaCy pipeline in a folder, as `nlp.to_disk` writes it; what only stands before another
    noun ("cat" of "cat food") is none.

    Raises: InputError for a folder that is none, or tags no parts of speech; MissingDependency.
    """
    try:
        import spacy
    except ImportError as error:
        raise not_loaded("spacy", how_to_install("nouns"), error) from error
    if not (model / "config.cfg").is_file():
        raise InputError(f"{str(model)!r} is no spaCy pipeline: it has no config.cfg")
    try:
        pipeline: Any = spacy.load(model)
        tags = any(token.pos_ for token in pipeline("a cat runs"))
    except Exception as error:  # whatever its parts raise for files that do not fit
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the spaCy pipeline {str(model)!r} does not load: {reason:.300}") from error
    if not tags:
        raise InputError(
            f"the spaCy pipeline {str(model)!r} tags no parts of speech: one with a tagger is needed"
        )

    def nouns(caption: str) -> list[tuple[int, int]]:
        return [
            (token.idx, token.idx + len(token))
            for token in pipeline(caption)
            if token.pos_ in ("NOUN", "PROPN") and token.dep_ != "compound"
        ]

    return nouns
