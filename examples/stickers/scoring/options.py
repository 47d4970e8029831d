"""What to score and how, as options. Known without PyTorch: the command's help is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.arguments import option
from conceptmaster.examples.sprites.scoring.judging import Settings

from ..world.atlas import SPLITS, Atlas
from ..world.scenes import MAX_CONCEPTS, Scene, Wish, random_scene


@dataclass(frozen=True)
class Options(Settings):
    """What to score and how, see ``judging.Settings``; and of this world:

    split: of ``SPLITS``. made_up_labels: every label is a word that nobody has read. places: captions tell
    them; otherwise only ``visible`` is asked. boxes: these tell the places, and no caption does. atlas: the
    file that ``fetch`` makes; pictures: a folder of PNGs named by their labels in its place. Raises
    InputError for the first field that is wrong.
    """

    concepts: int = option(2, f"concepts in a scene, 1 to {MAX_CONCEPTS}", metavar="K")
    bundle: str = option("stickers", "shipped bundle or a path", metavar="NAME")
    split: str = option("nouns", f"of which pictures: {', '.join(SPLITS)}", metavar="NAME")
    made_up_labels: bool = option(False, "labels are words that nobody has read")
    places: bool = True
    boxes: bool = option(False, "boxes tell places, captions none; the bundle must take boxes")
    atlas: Path = Path("stickers-atlas.npz")
    pictures: Path | None = option(
        None, "PNGs with alpha, named by their labels, in the place of an atlas (none)", metavar="DIR"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.concepts <= MAX_CONCEPTS:
            raise InputError(f"a scene has 1 to {MAX_CONCEPTS} concepts, not {self.concepts}")
        if self.same_noun and self.concepts < 2:
            raise InputError("two concepts of the same noun need at least 2 concepts")
        if self.boxes and not self.places:
            raise InputError("boxes tell places: leave out --boxes or --no-places")
        if self.split not in SPLITS:
            raise InputError(f"the split must be one of {', '.join(SPLITS)}, not {self.split!r}")

    @property
    def wish(self) -> Wish:
        """What is asked of every scene."""
        return Wish(
            split="all" if self.pictures is not None else self.split,
            concepts=self.concepts,
            same_noun=self.same_noun,
            placed=self.places,
            made_up=self.made_up_labels,
            plain=True,
        )

    def scene(self, seed: int, atlas: Atlas) -> Scene:
        """The scene of a seed. Raises InputError where the pictures do not suffice."""
        try:
            return random_scene(seed, atlas, self.wish)
        except ValueError as error:
            raise InputError(str(error)) from None
