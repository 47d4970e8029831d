"""How the model and its decoder are trained, as options. Known without PyTorch: the commands' help is made of
them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.arguments import check_counts, check_seed, check_shares, option
from conceptmaster.examples.sprites.training.options import Dropped


@dataclass(frozen=True)
class Supply:
    """How much is drawn: ``blocks`` of ``size`` are there at a time, and the oldest is drawn anew every
    ``every`` steps."""

    blocks: int = 8
    size: int = 192
    every: int = 15


ON_GPU: dict[str, Any] = {
    "batch_size": 1500,
    "more": 1,
    "apart": False,
    "lr": 0.012,
    "captions": 500,
    "log_every": 25,
    "supply": Supply(blocks=16, size=2048, every=20),
    "told": Supply(blocks=8, size=2048, every=20),
}
"""What a GPU takes where nothing else is asked.

Batches have two shapes, whole and cut, as each is compiled anew, and are so large that a step takes longer
than telling what to do in it. Clips are seen fifteen times on average; those that are there take 12 GB.
"""


@dataclass(frozen=True)
class Options:
    """How to train. minutes or steps: of this and former runs of the folder together, the learning rate
    following them; lr: Muon's, for matrices; captions: sentences read beside every batch, and in each of the
    ``reading`` steps before the first, and those of ``seeing`` before them; eager: nothing is compiled, as
    on a CPU; workers: processes that make scenes ahead of time, 0 for none; more: how many times as many
    clips there are in steps of some frames alone; apart: clips of few concepts, and of more, have batches of
    their own; told: captions that are there to be read, None for others in every step. Raises
    InputError."""

    minutes: float | None = option(
        None, "train for so long, all runs of the folder together, until all is written", metavar="M"
    )
    steps: int = option(2000, "train to this step, where no minutes are given", metavar="N")
    batch_size: int = option(32, f"whole clips in a step (32; {ON_GPU['batch_size']} on a GPU)", metavar="B")
    lr: float = option(0.008, f"Muon's learning rate, AdamW takes an eighth (0.008; {ON_GPU['lr']} on a GPU)")
    windows: float = option(0.7, "share of the steps with only two latent frames of every clip")
    decoys: float = option(0.5, "share of the noisy clips that go on from one with other pictures")
    high: float = option(0.4, "share of the clips that are almost noise, where captions are followed")
    boxes: float = option(0.25, "share of the clips whose concepts are seen in boxes around them alone")
    captions: int = option(48, f"captions read beside every batch (48; {ON_GPU['captions']} on a GPU)")
    seeing: int = option(300, "steps on pictures alone, first (300; with --start 0)")
    reading: int = option(300, "steps on captions alone, second (300; with --start 0)")
    seed: int = option(0, "of weights and batches")
    device: str = "cpu"
    eager: bool = option(False, "do not compile the steps (on a CPU they never are)")
    log_every: int = option(
        10,
        "steps between lines of the log, of which every fifth brings a checkpoint, or one a minute "
        f"(10; {ON_GPU['log_every']} on a GPU)",
    )
    workers: int = option(0, "processes that make scenes (none; on a GPU as many as cores)", metavar="W")
    dropped: Dropped = field(default_factory=Dropped)
    supply: Supply = field(default_factory=Supply)
    told: Supply | None = None
    more: int = 2
    apart: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "captions", "log_every")
        check_seed(self.seed)
        check_counts(self, "seeing", "reading", "workers", least=0)
        check_shares(self, "decoys", "high", "windows", "boxes")
        if not 0 < self.lr < 1:
            raise InputError(f"--lr must lie between 0 and 1, got {self.lr}")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"--minutes must be above 0, got {self.minutes}")

    @property
    def told_supply(self) -> Supply:
        """Of the captions that are read."""
        return self.told or Supply(1, self.captions, 1)


@dataclass(frozen=True)
class Shown:
    """Clips that there are at a time; of which so many are drawn anew after so many steps; and clips of
    held-out nouns that PSNR is told of."""

    clips: int = 160
    fresh: int = 16
    every: int = 20
    judged: int = 24


@dataclass(frozen=True)
class DecoderOptions:
    """How the decoder's network is trained. decay: of the averaged weights. Raises InputError."""

    steps: int = option(2000, "train to this step", metavar="N")
    batch_size: int = option(8, "latent frames in a step", metavar="B")
    own: float = option(0.5, "share of the latents that the model of the folder makes of noised clips")
    seed: int = option(0, "of batches")
    device: str = "cpu"
    lr: float = option(0.006, "Muon's learning rate, AdamW takes a tenth of it")
    decay: float = 0.995
    log_every: int = option(50, "steps between lines of the log, each with a checkpoint")
    shown: Shown = field(default_factory=Shown)

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "log_every")
        check_seed(self.seed)
        check_shares(self, "own")
