"""The parts of a run that others trained, each by path, and what takes their place without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conceptmaster.examples.sprites.arguments import option

from .boxes import Agrees, Detect
from .captions import Captioner
from .nouns import Tagger, spacy_tagger
from .thresholds import Thresholds

PLACE = "a folder as save_pretrained writes it, or OWNER/NAME of the Hugging Face Hub"


@dataclass(frozen=True)
class Models:
    """Where the learned parts are; None: the step goes without."""

    captioner: str | None = option(
        None,
        f"BLIP, Qwen2-VL or Qwen2.5-VL for videos without a caption beside them: {PLACE} "
        "(none: these are dropped)",
        metavar="MODEL",
    )
    spacy: Path | None = option(
        None,
        "a spaCy pipeline's folder, which tells nouns (none: words of the taxonomy)",
        metavar="DIR",
        type=Path,
    )
    detector: str | None = option(
        None, "Grounding-DINO (none: what moves, named by the caption's places and motions)", metavar="MODEL"
    )
    segmenter: str | None = option(None, "SAM 2 (none: GrabCut)", metavar="MODEL")
    clip: str | None = option(
        None, "CLIP, which must agree with the class (none: not asked)", metavar="MODEL"
    )


@dataclass(frozen=True)
class Parts:
    """The learned parts, open; None where there is none. told: by part, what a report says, and what a result
    depends on; without: what was left out, in sentences."""

    captioner: Captioner | None = None
    tagger: Tagger | None = None
    detect: Detect | None = None
    segment: Callable[..., Any] | None = None
    agrees: Agrees | None = None
    told: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


WITHOUT = {
    "captioner": "captions: only what lies beside a video; no --captioner was given",
    "spacy": "nouns: the taxonomy's words; no --spacy was given",
    "detector": "boxes: of what moves, named by the places and motions that the caption tells; no --detector "
    "was given",
    "segmenter": "masks: by GrabCut; no --segmenter was given",
    "clip": "CLIP's class: not asked, neither of boxes nor of masks; no --clip was given",
}


def open_parts(models: Models, thresholds: Thresholds, classes: list[str], device: str) -> Parts:
    """Opens what is given. classes: of the taxonomy, among which CLIP chooses; device: of PyTorch.

    Raises: InputError (WeightsError) for a model of the wrong kind, MissingDependency.
    """
    found: dict[str, Any] = {}
    told: dict[str, Any] = {}
    if models.spacy is not None:
        found["tagger"] = spacy_tagger(models.spacy)
        told["spacy"] = {"place": str(models.spacy)}
    given = {name: getattr(models, name) for name in ("captioner", "detector", "segmenter", "clip")}
    if any(given.values()):
        from . import learned  # PyTorch and transformers, which a run without weights does not need

        learned.check_device(device)
        for name, place in given.items():
            if place is not None:
                learned.check(name, place)  # all of them, before any is read
        for name, place in given.items():
            if place is not None:
                model = learned.load(name, place, device)
                told[name] = model.told()
                found |= learned.part(name, model, thresholds, classes)
    without = tuple(text for name, text in WITHOUT.items() if getattr(models, name) is None)
    return Parts(**found, told=told, without=without)
