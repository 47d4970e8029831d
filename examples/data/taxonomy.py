"""The classes of things that may become concepts, and where a caption names one. The list is taxonomy.txt."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conceptmaster.errors import InputError
from conceptmaster.untrusted import read_plain

OWN = Path(__file__).with_name("taxonomy.txt")
KINDS = ("persons", "livings", "stuffs")
"""The paper's three sorts of concepts, by which its benchmark's scenarios are named."""
LARGEST = 2**20  # bytes


@dataclass(frozen=True)
class Mention:
    """A place of a caption that names a class: characters start..end, as it is written ("kitten"), and
    whether it is a plural."""

    start: int
    end: int
    text: str
    name: str
    kind: str
    plural: bool


@dataclass(frozen=True)
class Taxonomy:
    """Classes by name, each with its kind, and for every word of one, in lower case: the class, and whether
    it is a plural."""

    kinds: dict[str, str]
    words: dict[str, tuple[str, bool]]

    @classmethod
    def read(cls, path: Path = OWN) -> Taxonomy:
        """A list in taxonomy.txt's form. Raises InputError naming the file, and the line that is wrong."""
        try:
            text = read_plain(path, LARGEST).decode("utf-8")
        except OSError as error:
            raise InputError(f"cannot read the taxonomy {str(path)!r}: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"the taxonomy {str(path)!r} is no text: {error}") from None
        kind, kinds, words = "", dict[str, str](), dict[str, tuple[str, bool]]()
        for number, line in enumerate(text.splitlines(), 1):
            line = line.partition("#")[0].strip()
            where = f"line {number} of the taxonomy {str(path)!r}"
            if line.startswith("["):
                kind = line.strip("[]")
                if kind not in KINDS:
                    raise InputError(f"{where}: {line:.40} must be one of {', '.join(KINDS)}")
            elif line:
                if not kind:
                    raise InputError(f"{where}: a class before the first of {', '.join(KINDS)} in brackets")
                first, _, others = line.partition(":")
                name = first.partition("/")[0].strip()
                for entry in [first, *filter(None, others.split(","))]:
                    for word, plural in _forms(entry):
                        if word in words and words[word] != (name, plural) and word != name:
                            raise InputError(f"{where}: {word!r:.40} is there already")
                        words.setdefault(word, (name, plural))
                kinds[name] = kind
        if not kinds:
            raise InputError(f"the taxonomy {str(path)!r} holds no class")
        return cls(kinds, words)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.words, key=len, reverse=True)  # teddy bear, not bear
        return re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)

    def mentions(self, caption: str) -> Iterator[Mention]:
        """Where a caption names classes, in its order."""
        for found in self._pattern.finditer(caption):
            name, plural = self.words[found[1].lower()]
            yield Mention(found.start(), found.end(), found[1], name, self.kinds[name], plural)


def _forms(entry: str) -> list[tuple[str, bool]]:
    """A word and its plural, each with whether it is one. A plural that looks like its word counts as one
    thing."""
    word, _, plural = (part.strip().lower() for part in entry.partition("/"))
    return [(word, False), *([(plural or _plural(word), True)] if plural != word else [])]


def _plural(word: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"(s|x|z|ch|sh)$", word) else f"{word}s"
