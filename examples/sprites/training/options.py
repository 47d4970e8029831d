"""How the model is trained, as options. Known without PyTorch: the command's help is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conceptmaster.errors import InputError

from ..arguments import check_counts, check_seed, check_shares, option

STAGES = ("vae", "model")
"""Of a whole training, in their order."""
FROZEN = ("text_encoder", "image_encoder", "qformer")
"""Parts that the last stage may leave as they are."""


@dataclass(frozen=True)
class Dropped:
    """How often training leaves out the concepts (pictures with their labels), the caption, and both; how
    often a picture is ``foreign`` (see ``decoys.py``), so that only its label says what it shows; how
    often an encoder that reads a concept's label and box is told neither; how often concepts are seen inside
    of their boxes alone (``boxed``), and how often a caption then tells places ``loose``ly, see
    ``tell_loosely``."""

    concepts: float = 0.10
    caption: float = 0.06
    both: float = 0.06
    foreign: float = 0.0
    grounding: float = 0.0
    boxed: float = 0.0
    loose: float = 0.0


@dataclass(frozen=True)
class TrainOptions:
    """How the model is trained. start: a ``model.safetensors`` to go on from, with fresh heads and optimizer;
    lr: Muon's, for matrices; freeze: of ``FROZEN``, as the paper freezes T5 and CLIP. Raises InputError."""

    steps: int = option(4000, "steps of model training")
    picture_steps: int = option(0, "steps on pictures alone, first (1500; with --start 0)")
    caption_steps: int = option(0, "steps on captions alone, second (550; with --start 0)")
    batch_size: int = option(32, "clips in a step")
    seed: int = option(0, "of weights and batches")
    device: str = "cpu"
    lr: float = option(0.012, "Muon's learning rate, AdamW takes an eighth of it")
    log_every: int = option(100, "steps between lines of the log, of which every fifth brings a checkpoint")
    start: Path | None = None
    freeze: Sequence[str] = option(
        (),
        f"leave parts as they are in the last stage, of {', '.join(FROZEN)} (none)",
        nargs="+",
        choices=FROZEN,
        type=str,
        metavar="PART",
    )
    decoys: float = option(0.0, "share of clips that go on from their decoy")
    foreign: float = option(0.0, "share of pictures that show the look on another noun")
    boxes: float = option(0.0, "share of clips whose concepts are seen inside of their boxes alone")
    loose: float = option(0.0, "share of these whose captions leave places out, or tell others")
    bare: bool = option(False, "no training-only heads on what becomes of pictures and labels")
    selection: float = option(0.1, "weight of SSR-Encoder's own loss, of an encoder like its")
    minutes: float | None = option(
        None, "train for so long, whatever number of steps that is (not: by steps)"
    )
    compile: bool = option(False, "compile the transformer first: a minute, then faster steps")

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "log_every")
        check_counts(self, "picture_steps", "caption_steps", least=0)
        check_seed(self.seed)
        check_shares(self, "decoys", "foreign", "boxes", "loose")
        if not 0 <= self.selection <= 1:
            raise InputError(f"--selection must lie between 0 and 1, got {self.selection}")
        if not 0 < self.lr < 1:
            raise InputError(f"--lr must lie between 0 and 1, got {self.lr}")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"--minutes must be above 0, got {self.minutes}")
