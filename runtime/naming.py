"""What stands in a prompt beside a caption: a prefix, and which picture is which.

Bernini's references are called image0, image1, … in the captions that it was trained with: "The marble statue
from image0, wearing the black T-shirt from image2, …" (its assets/testcases/r2v). So behind the first place
where a caption has a label, as whole words, `from image0` is added. A picture that the caption calls by its
name is left to it, with the words that its label is and those in front of the name, and so is a caption that
names all. The prefix is what its program puts in front, with nothing between.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import InputError
from .cleaning import clean

if TYPE_CHECKING:
    from .bundle_format.schema import Manifest
    from .request import Request


def spoken(request: Request, manifest: Manifest) -> str:
    """What the model reads for a request's prompt: as it is, for a bundle that adds nothing.

    Raises: InputError for a picture that the caption names neither by its label nor as image0, image1, …, for
        two labels that stand for the same words of it, and for a name that no picture has.
    """
    if not manifest.picture_name:
        return manifest.prompt_prefix + clean(request.prompt) if manifest.prompt_prefix else request.prompt
    labels = [clean(concept.label) for concept in request.concepts]
    return manifest.prompt_prefix + named(clean(request.prompt), labels, manifest.picture_name)


def named(caption: str, labels: list[str], name: str) -> str:
    """`caption`, cleaned as the labels are, with `name` and a number for each of them. Raises as `spoken`."""
    spelled, how = rf"(?<!\w){name}(0|[1-9][0-9]*)(?!\w)", re.IGNORECASE | re.ASCII
    said = {int(number[:9]) for number in re.findall(spelled, caption, how)}
    behind = re.compile(rf"\s+from\s+{spelled}", how)
    if said and max(said) >= len(labels):
        have = f"{name}0" if len(labels) == 1 else f"{name}0 to {name}{len(labels) - 1}"
        raise InputError(
            f"the prompt names {name}{max(said)}, but the pictures are {have}" if labels else
            f"the prompt names {name}{max(said)}, and there are no pictures"
        )  # fmt: skip
    taken: dict[int, int] = {}  # where a label begins → its number
    ends: dict[int, int] = {}
    for number in sorted(range(len(labels)), key=lambda n: -len(labels[n])):
        label = labels[number]
        places = [found.span() for found in _whole(label).finditer(caption)]
        unused = [p for p in places if all(p[1] <= at or p[0] >= ends[at] for at in taken)]
        if number in said:  # these words are its own
            taken, ends = taken | {start: number for start, _ in unused}, ends | dict(unused)
            continue
        unused = [place for place in unused if not behind.match(caption, place[1])]
        unused.sort(key=lambda place: caption[place[1] : place[1] + 1] in ("'", "’"))  # an owner's come last
        free, places = next(iter(unused), None), [p for p in places if not behind.match(caption, p[1])]
        if free is None and places:
            at = next(at for at in taken if any(p[0] < ends[at] and p[1] > at for p in places))
            other = labels[taken[at]]
            raise InputError(
                f"the labels {other!r} and {label!r} stand for the same words of the prompt, which must name "
                f"two things: say {name}{number} in it"
            )
        if free is None:
            raise InputError(
                f"the prompt does not say what the picture of {label!r} shows: write {label!r} in it, or its "
                f"name, {name}{number}"
            )
        taken[free[0]], ends[free[0]] = number, free[1]
    for at in sorted((at for at in taken if taken[at] not in said), reverse=True):
        end = ends[at]
        space = " " if caption[end : end + 1].isalnum() else ""  # in a script without spaces
        caption = f"{caption[:end]} from {name}{taken[at]}{space}{caption[end:]}"
    return caption


def _whole(label: str) -> re.Pattern[str]:
    """The label where it is no part of longer words, in letters of any case; of a script without capitals,
    which may have no spaces between words, wherever it stands."""
    if any(c.isalpha() and c.lower() == c.upper() for c in label):
        return re.compile(re.escape(label))
    return re.compile(rf"(?<!\w){re.escape(label)}(?!\w)", re.IGNORECASE)
