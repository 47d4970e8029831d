"""What a request asks of a bundle that it was not made for, in one line each, before anything is computed.

A model never refuses: a label that its caption has not, or a word that it has never read, gives a video of
something else. What a bundle of a small world knows stands in its manifest (`vocabulary`, `ranges`); of one
that may be asked for any word only the labels can be looked at, which bind a picture to the caption's words
for it. Text is compared as the model reads it: `Cat` is `cat` where its tokenizer says so, and only there.
"""

from __future__ import annotations

import itertools
import string
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ..errors import InputError, RequestWarning
from ..tokenizer_file import WORD
from ..untrusted import printable

if TYPE_CHECKING:
    from .bundle_format.schema import Manifest, Ranges, Vocabulary
    from .request import Request

MARKS = string.punctuation + "…“”‘’«»–—¿¡、。，！？"
SMALL = {"a", "an", "the", "and", "of", "in", "on", "at", "my", "your", "our"}  # alone they name nothing
NEAR = 0.8  # difflib's ratio from which a word is taken for a slip of another; `forest` and `first` have 0.73
LONGEST_WORD, LONGEST_NAME, COMPARED = 30, 8, 1000  # characters, words, candidates
SHOWN = 20  # of a list in a message


def remarks(request: Request, manifest: Manifest, read: Callable[[str], str]) -> list[str]:
    """Lines for people, none where all is well.

    Args: request: resolved, so that its numbers are set; read: a text as the bundle's model reads it, see
        `Tokenizer.read`.
    """
    caption = read(request.prompt).split()
    named = manifest.reads_labels or manifest.caption_names
    labels = {c.label: read(c.label).split() for c in request.concepts} if named else {}
    found = _labels_in(caption, labels)
    if manifest.vocabulary is not None and not manifest.vocabulary.open:
        known, said = _Known(manifest.vocabulary), {word.casefold() for word in caption}
        more = [word for words in labels.values() for word in words if word.casefold() not in said]
        found += [*known.unknown([*caption, *more]), *known.nameless(labels), *known.torn(caption)]
    return [printable(line) for line in (*found, *_out_of(manifest.ranges, request))]


def warn(remarks: Sequence[str], strict: bool) -> None:
    """Each remark as a RequestWarning of the line outside of the pipeline that asked for the video. Raises
    InputError for them if strict."""
    if remarks and strict:
        raise InputError(f"{'; '.join(remarks)} (strict)")
    frame, level = sys._getframe(1), 2
    pipeline = frame.f_code.co_filename
    while frame.f_code.co_filename == pipeline and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    for remark in remarks:
        warnings.warn(remark, RequestWarning, stacklevel=level)


def _labels_in(caption: Sequence[str], labels: Mapping[str, Sequence[str]]) -> list[str]:
    """Each label stands in the caption, and in a place of its own."""
    said, found = [_bare(word) for word in caption], []
    places: dict[str, list[range]] = {}
    for label, words in labels.items():
        own = [_bare(word) for word in words]
        places[label] = [range(at, at + len(own)) for at in _places(own, said)]
        if not places[label] and not _inside(" ".join(words), " ".join(caption)):
            spelling = _spelling(own, said)
            right = f"it says {spelling!r}" if spelling else "a label is the caption's own word for a thing"
            found.append(f"the label {label!r} is not in the caption as the model reads it: {right}")
    taken: dict[int, str] = {}
    for label, spans in sorted(places.items(), key=lambda place: (len(place[1]), -len(labels[place[0]]))):
        free = next((span for span in spans if taken.keys().isdisjoint(span)), None)
        if free is not None:
            taken |= dict.fromkeys(free, label)
        elif spans:
            other = next(taken[at] for span in spans for at in span if at in taken)
            both = f"the labels {other!r} and {label!r} stand for the same words of the caption"
            found.append(f"{both}, which must name two things")
    return found


class _Known:
    """What a vocabulary knows, by word."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._phrases = [phrase for kind in (vocabulary.phrases or {}).values() for phrase in kind]
        self._free = {word for entry in vocabulary.words for word in entry.split()}
        self._nouns = {word for label in vocabulary.labels for word in label.split()}
        bound = {word for phrase in self._phrases for word in phrase.split()}
        self._words = self._free | self._nouns | bound

    def _has(self, word: str) -> bool:
        """A small word may have a capital, as at the beginning of a sentence: that does no harm. A delta's is
        known, or the request is refused."""
        return (
            not word
            or WORD.fullmatch(word) is not None
            or word in self._words
            or word.casefold() in self._free
        )

    def unknown(self, words: Iterable[str]) -> Iterable[str]:
        """One line that names every word which is not known."""
        strange = dict.fromkeys(word for word in map(_unended, words) if not self._has(word))
        if not strange:
            return
        spelled = {word.casefold(): word for word in self._words}
        said, lost = [], False
        for word in list(strange)[: SHOWN + 1]:
            near = _near(word, spelled)
            lost |= near is None
            said.append(f"{word!r} (it knows {near!r})" if near else repr(word))
        things = f"; the things it knows are {_listed(self._vocabulary.labels)}" if lost else ""
        kinds = ", ".join(self._vocabulary.phrases or ["words"])
        more = f"; `conceptmaster inspect` lists its {kinds}" if lost else ""
        yield f"the model does not know {_listed(said)}{things}{more}"

    def nameless(self, labels: Mapping[str, Sequence[str]]) -> Iterable[str]:
        """A line for each label of known words that name nothing."""
        for label, words in labels.items():
            if all(map(self._has, words)) and self._nouns.isdisjoint(words):
                things = _listed(self._vocabulary.labels)
                yield f"the label {label!r} names none of the things that the model knows: {things}"

    def torn(self, caption: Sequence[str]) -> Iterable[str]:
        """One line that names the words which mean something only in phrases, and stand outside of any."""
        words = [_unended(word) for word in caption]
        whole: set[int] = set()
        for phrase in map(str.split, self._phrases):
            for at in _places(phrase, words) if phrase[0] in words else ():
                whole.update(range(at, at + len(phrase)))
        allowed = self._free | self._nouns
        torn = dict.fromkeys(
            word
            for at, word in enumerate(words)
            if at not in whole
            and self._has(word)
            and not WORD.fullmatch(word)
            and word not in allowed
            and word.casefold() not in allowed
        )
        if torn:
            shared = {phrase: len(torn.keys() & set(phrase.split())) for phrase in self._phrases}
            phrases = sorted((p for p in shared if shared[p]), key=shared.__getitem__, reverse=True)
            words_in = f"the model knows {_listed(map(repr, torn))} only in whole wordings"
            yield f"{words_in}, such as {', '.join(map(repr, phrases[:3]))}"


def _out_of(ranges: Ranges | None, request: Request) -> Iterable[str]:
    """A line for each number that is out of its range."""
    if ranges is None:
        return
    asked = {"steps": request.steps, "guidance": request.guidance, "concepts": len(request.concepts)}
    for name, value in asked.items():
        made_for: tuple[float, float] | None = getattr(ranges, name)
        if made_for is not None and value is not None and not made_for[0] <= value <= made_for[1]:
            least, most = made_for
            yield f"{name}: {value:g} is outside of what the model was made for, {least:g} to {most:g}"


def _places(words: Sequence[str], text: Sequence[str]) -> list[int]:
    """Where `words` stand in `text`, one behind the other."""
    starts = range(len(text) - len(words) + 1)
    return [at for at in starts if words and text[at : at + len(words)] == words]


def _inside(label: str, caption: str) -> bool:
    """Whether it stands there in a script without capitals, which may have no spaces between words either."""
    return any(c.isalpha() and c.lower() == c.upper() for c in label) and label in caption


def _spelling(label: Sequence[str], caption: Sequence[str]) -> str | None:
    """What the caption has of a label, or in its place: the most words of it, else a slip of the pen."""
    size = min(len(label), LONGEST_NAME)
    runs = [caption[at : at + n] for n in range(1, size + 1) for at in range(len(caption) - n + 1)]
    said = {" ".join(run).casefold(): " ".join(run) for run in reversed(runs)}
    for n in range(size, 0, -1):
        for at in range(len(label) - n, -1, -1):  # what is named stands last in English
            part = [word.casefold() for word in label[at : at + n]]
            if " ".join(part) in said and not SMALL.issuperset(part):
                return said[" ".join(part)]
    return _near(" ".join(label), said)


def _near(text: str, spelled: Mapping[str, str]) -> str | None:
    """What may be meant by a slip of the pen; spelled: what there is, by the same in lower case. Comparing is
    slow, so only what begins alike is, and no long text."""
    slip = text.casefold()
    if not 2 < len(slip) <= LONGEST_WORD:
        return None
    alike = itertools.islice((w for w in spelled if w[:1] == slip[0] and len(w) <= LONGEST_WORD), COMPARED)
    return next((spelled[word] for word in get_close_matches(slip, alike, 1, NEAR)), None)


def _bare(word: str) -> str:
    """A word without the marks around it, and without the end that makes it an owner."""
    return word.strip(MARKS).removesuffix("'s")


def _unended(word: str) -> str:
    """A word without what ends a sentence or a part of it, which does no harm."""
    return word.rstrip(".,;:!?")


def _listed(entries: Iterable[str]) -> str:
    entries = list(entries)
    return ", ".join([*entries[:SHOWN], *(["…"] if len(entries) > SHOWN else [])])
