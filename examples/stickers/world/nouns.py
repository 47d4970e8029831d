"""From the names of pictures to nouns: what a picture shows, in the words of one canonical noun phrase.

Names of one picture in several sets, or of one code point, are the same noun; the others are its synonyms.
Flags, letters, digits, clocks, signs and copies in other skin tones are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .sets import Source

LEFT_OUT_KINDS = ("Flags", "Symbols", "Modifiers")
"""Categories without pictures of things."""
KEPT_SIGNS = re.compile(r"heart|sparkle|^(recycling|trident|fleur)")
"""What a category of signs has that is a thing to look at."""
LEFT_OUT_WORDS = frozenset(
    "flag flags keycap oclock thirty clock1 letter letters latin digit button arrow arrows sign "
    "symbol squared ideograph cjkunifiedideograph regional indicator regionalindicator input medium- "
    "square circledideograph logo android debian google ipad iphone kindle linux nook reddit steam "
    "stumbleupon vlc wikipedia dribbble bbc aries taurus gemini cancer leo virgo libra scorpio "
    "scorpius sagittarius saggitarius capricorn aquarius pisces ophiuchus sorting undo redo up down "
    "left right next previous start info plus minus expand collapse column row about ok index zzz ten "
    "top soon cl ng vs sos fontsize checkmark ballot ballott dash curlyloop trademark copyright "
    "copyleft nfc wi rules asterix variant fistedhand cancellationx crossmark".split()
)
"""Words of names that are no pictures of things."""
MARKS = frozenset(
    "adilette arduino artstation bluesky chrome chromium cplusplus crocs csharp discord dotnet ecosia "
    "facebook facetime firefox github gitlab golang ibeacon inaturalist instagram internet javascript "
    "jellyfin kotlin linkedin markdown mastodon musicbrainz netscape openfoodfact openstreetmap opera "
    "peertube pinterest pixelfed raspberry safari svg twitter typescript ubuntu webassembly wikidata "
    "windows winrar youtube agender aromantic aroace asexual bdsm bigender bisexual demiboy demigender "
    "demigirl demisexual gay genderfluid genderqueer greysexual intersex lesbian nonbinary pansexual "
    "polyamory polysexual pride".split()
)
"""Trade marks, and flags that are not called so."""
RUN_TOGETHER = 11
"""A longer word that no other set spells is one of a few run together, which nobody would write."""
TONES = re.compile(r"-(?:(?:medium-)?(?:light|dark)|medium)(?:-skin-tone)?(?=-|$)")
CODED = re.compile(r"^[0-9a-f]{4,5}(-[0-9a-f]{4,5})*$")
"""A name that is a sequence of code points."""
TONE_POINTS = re.compile(r"1f3f[b-f]")
DEFAULT = re.compile(r"-default$")


@dataclass(frozen=True)
class Noun:
    """A canonical noun phrase, lower case, and other names of the same thing."""

    name: str
    synonyms: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether nothing of this noun is ever trained on, in any set: every tenth, by hash."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % 10 == 0


def usable(name: str, kind: str) -> bool:
    """Whether the picture of a name and category shows a thing, and is no copy in another skin tone."""
    if TONES.search(name) and not name.startswith(("light-", "dark-")) and "skin-tone" in name:
        return False
    if kind in LEFT_OUT_KINDS and not KEPT_SIGNS.search(name):
        return False
    words = name.split("-")
    if any(word in LEFT_OUT_WORDS or word in MARKS or any(c.isdigit() for c in word) for word in words):
        return False
    return not re.match(
        r"clock|squared|circled|regional|input|cjk|negative|heavy|(small|medium|large)(white|black)|"
        r"(black|white)(small|medium|large|square|left|right|down|up)|flag|.*flag$|.*arrow|.*(square|circle)$",
        name,
    )


def copies(name: str, names: Iterable[str]) -> bool:
    """Whether a name is one of a set's ``names`` with a skin tone at its end, as Fluent has them."""
    bare = TONES.sub("", name)
    return bare != name and (bare in names or f"{bare}-default" in names)


def spelled(name: str, words: frozenset[str], whole: dict[str, str]) -> str | None:
    """A name as a phrase: hyphens to spaces. One that is run together is looked up in ``whole``, phrases by
    themselves run together, or cut into the fewest of ``words``; None for a long one that cannot be."""
    name = DEFAULT.sub("", name)
    if "-" in name or name in words or len(name) < 6:
        return name.replace("-", " ")
    if name in whole:
        return whole[name]
    best: list[list[str] | None] = [[]] + [None] * len(name)
    for end in range(1, len(name) + 1):
        for start in range(max(0, end - 14), end):
            before, part = best[start], name[start:end]
            if before is not None and part in words:
                found = best[end]
                if found is None or len(before) + 1 < len(found):
                    best[end] = [*before, part]
    return " ".join(best[-1]) if best[-1] else name if len(name) <= RUN_TOGETHER else None


def nouns_of(sources: dict[str, Source]) -> tuple[dict[tuple[str, str], Noun], list[Noun]]:
    """The noun of every usable picture, by (set, name), and all nouns, by name.

    The most frequent name of a thing is the canonical one; of two as frequent, the shorter. A picture that is
    called as its code point is of the noun that other sets give this code point, or of none.
    """
    spaced = [source for source in sources.values() if any("-with-" in name for name in source.pictures)]
    known = [DEFAULT.sub("", name) for source in spaced for name in source.pictures]
    words = frozenset(
        word
        for name in known
        for word in name.split("-")
        if len(word) > 2 or word in ("in", "of", "on", "at")
    )
    whole = {name.replace("-", ""): name.replace("-", " ") for name in known}
    group = _Groups()
    said: dict[tuple[str, str], str] = {}
    names: Counter[str] = Counter()
    for title, source in sources.items():
        for name in source.pictures:
            if CODED.match(name):
                continue
            kind = source.category.get(name, "")
            if not usable(name, kind) or copies(name, source.pictures):
                continue
            phrase = spelled(name, words, whole)
            if phrase is None:
                continue
            said[title, name] = phrase
            names[phrase] += 1
            if point := source.characters.get(name):
                group.join(phrase, f"U+{point}")
        for alias, parent in source.aliases.items():
            if (title, parent) in said and usable(alias, ""):
                phrase = spelled(alias, words, whole)
                if phrase is not None:
                    names[phrase] += 0
                    group.join(phrase, said[title, parent])
    members: dict[str, list[str]] = {}
    for phrase in names:
        members.setdefault(group.root(phrase), []).append(phrase)
    noun_of: dict[str, Noun] = {}
    for alike in members.values():
        first, *rest = sorted(alike, key=lambda phrase: (-names[phrase], len(phrase), phrase))
        noun = Noun(first, tuple(rest))
        noun_of |= dict.fromkeys(alike, noun)
    found = {key: noun_of[phrase] for key, phrase in said.items()}
    by_point = {group.root(phrase): noun for phrase, noun in noun_of.items()}
    for title, source in sources.items():
        for name in filter(CODED.match, source.pictures):
            root = group.root(f"U+{source.characters[name]}")
            if root in by_point and not TONE_POINTS.search(name):
                found[title, name] = by_point[root]
    return found, sorted(set(found.values()), key=lambda noun: noun.name)


class _Groups:
    """Sets of strings that are joined two by two."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, item: str) -> str:
        while (above := self.parent.get(item, item)) != item:
            item = above
        return item

    def join(self, one: str, other: str) -> None:
        roots = sorted((self.root(one), self.root(other)))
        self.parent[roots[1]] = roots[0]
        self.parent.setdefault(roots[0], roots[0])
