"""What to score and how, as options. Known without PyTorch: the command's help is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.arguments import option, seed_range
from conceptmaster.runtime.request import MAX_SEED, Request

from ..world.atlas import SPLITS, Atlas
from ..world.scenes import MAX_CONCEPTS, Scene, Wish, random_scene

SOURCES = ("model", "truth", "shuffled")


@dataclass(frozen=True)
class Options:
    """What to score and how; None means the bundle's default.

    seeds: of the scenes and of the noise. concepts: 1..4 in every scene. same_noun: the first two share their
    noun, otherwise all differ. split: of ``SPLITS``. made_up_labels: every label is a word that nobody has
    read. places: captions tell them; otherwise only ``visible`` is asked. atlas: the file that ``fetch``
    makes; pictures: a folder of PNGs named by their labels in its place. source: "model" generates, "truth"
    takes the true videos, "shuffled" those of the next request. controls: whether the two controls are
    generated. workers: processes, each with a pipeline of its own; threads: CPU threads of each pipeline.

    Raises InputError for the first field that is wrong.
    """

    seeds: range = option(range(64), "of scenes and noise (0:64)", type=seed_range, metavar="A:B")
    concepts: int = option(2, f"concepts in a scene, 1 to {MAX_CONCEPTS}", metavar="K")
    same_noun: bool = option(False, "two of them share their noun; else all differ")
    split: str = option("nouns", f"of which pictures: {', '.join(SPLITS)}", metavar="NAME")
    made_up_labels: bool = option(False, "labels are words that nobody has read")
    places: bool = True
    atlas: Path = Path("stickers-atlas.npz")
    pictures: Path | None = option(
        None, "PNGs with alpha, named by their labels, in the place of an atlas (none)", metavar="DIR"
    )
    bundle: str = option("stickers", "shipped bundle or a path", metavar="NAME")
    source: str = "model"
    steps: int | None = option(None, "model evaluations (the bundle's default)", metavar="N")
    guidance: float | None = option(
        None, "how much more of what is asked (the bundle's default)", metavar="G"
    )
    controls: bool = True
    device: str = option("cpu", "cpu or cuda", metavar="NAME")
    threads: int | None = option(None, "CPU threads of each pipeline (one per core)", metavar="N")
    workers: int = option(1, "processes, of one thread each", metavar="W")

    def __post_init__(self) -> None:
        first, end = self.seeds.start, self.seeds.stop
        if self.seeds.step != 1 or not 0 <= first < end <= MAX_SEED + 1:
            raise InputError(f"seeds must be A:B with 0 <= A < B <= 2**63, not {first}:{end}")
        if not 1 <= self.concepts <= MAX_CONCEPTS:
            raise InputError(f"a scene has 1 to {MAX_CONCEPTS} concepts, not {self.concepts}")
        if self.same_noun and self.concepts < 2:
            raise InputError("two concepts of the same noun need at least 2 concepts")
        if self.split not in SPLITS:
            raise InputError(f"the split must be one of {', '.join(SPLITS)}, not {self.split!r}")
        if self.source not in SOURCES:
            raise InputError(f"the source must be one of {', '.join(SOURCES)}, not {self.source!r}")
        if self.source == "shuffled" and len(self.seeds) < 2:
            raise InputError("shuffling needs at least two requests")
        if self.workers < 1:
            raise InputError(f"workers must be 1 or more, not {self.workers}")
        Request("checks", steps=self.steps, guidance=self.guidance)

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
