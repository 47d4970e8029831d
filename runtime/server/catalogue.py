"""The bundles that are served, as far as a request can be held to them without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError, wrong_in
from .. import pictures, vocabulary
from ..bundle_format.find import Bundle
from ..frame_conditioning import lengths
from ..request import Concept, Request
from ..tokenizer import Tokenizer, open_tokenizer, tokenised

if TYPE_CHECKING:
    from ..bundle_format.schema import Manifest


@dataclass(frozen=True)
class Served:
    """A bundle by the name of its folder, which clients call it by."""

    name: str
    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer

    @property
    def size(self) -> str:
        """Of its videos, as in OpenAI's API."""
        return f"{self.manifest.shapes.width}x{self.manifest.shapes.height}"

    @property
    def frames(self) -> int:
        """How many its videos have, of the fewest pictures."""
        return lengths(self.manifest)[1]

    @property
    def seconds(self) -> str:
        """How long its videos are."""
        return f"{round(self.frames / self.manifest.fps, 3):g}"

    def check(self, request: Request) -> list[str]:
        """What there is to warn of. Raises InputError for what the bundle cannot do; pictures are read."""
        resolved, guidance = request.resolve(self.manifest)
        tokenised(resolved, guidance, self.manifest, self.tokenizer)
        with wrong_in("concepts"):
            for concept in resolved.concepts:
                pictures.read(
                    concept.image, self.manifest.pictures.background, f"the picture of {concept.label!r}"
                )
        return vocabulary.remarks(resolved, self.manifest, self.tokenizer.read)

    def about(self) -> dict[str, Any]:
        """What the page tells of it."""
        m, known = self.manifest, self.manifest.vocabulary
        least = 0 if m.conditioning is None else m.conditioning.required
        return {
            "size": self.size,
            "seconds": self.seconds,
            "frames": self.frames,
            "fps": m.fps,
            "concepts": {"least": least, "most": m.concepts},
            "reads_labels": m.reads_labels,
            "takes_boxes": m.takes_boxes,
            "prompt_names_pictures": m.reads_labels or m.caption_names or bool(m.picture_name),
            "defaults": {"steps": m.defaults.steps, "negative_prompt": m.defaults.negative} | m.scales,
            "vocabulary": None
            if known is None
            else {
                "open": known.open,
                "labels": known.labels,
                "words": known.words,
                "phrases": known.phrases or {},
            },
        }


class Catalogue:
    """All of them, by name; the first is meant where a request names none."""

    def __init__(self, places: Sequence[str], custom: Sequence[str] = ()) -> None:
        """Opens and verifies bundles, shipped ones' names or paths, and deltas for each. Raises what
        Bundle.open and Bundle.with_custom raise, and InputError where two have one name."""
        self._served: dict[str, Served] = {}
        for place in places:
            bundle = Bundle.open(place).with_custom(custom)
            name = bundle.folder.name
            if name in self._served:
                raise InputError(
                    f"two bundles' folders are called {name!r}, which is what clients call them by"
                )
            self._served[name] = Served(name, bundle.folder, bundle.manifest, open_tokenizer(bundle))

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    @property
    def names(self) -> list[str]:
        """In the order that they were given."""
        return list(self._served)

    def get(self, name: str | None) -> Served | None:
        """By its name; None: the first. None where there is none of the name."""
        return next(iter(self._served.values())) if name is None else self._served.get(name)


def as_request(values: dict[str, Any], images: Sequence[tuple[str, Any]]) -> Request:
    """A request of fields without concepts, and of labels with pictures. Raises InputError."""
    return Request(concepts=tuple(Concept(label, image) for label, image in images), **values)
