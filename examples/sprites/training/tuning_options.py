"""How a base is tuned on a request's pictures, as options. Known without PyTorch: the command's help is made
of them."""

from __future__ import annotations

from dataclasses import dataclass

from conceptmaster.errors import InputError

from ..arguments import check_counts, check_seed, option

METHODS = ("custom_diffusion", "dreambooth", "dreambooth_lora")
RATES = {"custom_diffusion": 1e-3, "dreambooth": 2e-4, "dreambooth_lora": 2e-3}


@dataclass(frozen=True)
class TuneOptions:
    """How one request is tuned. Raises InputError for a value that cannot be."""

    steps: int | None = option(None, "of tuning (250 for one concept, 500 for more)", metavar="N")
    lr: float | None = option(None, "learning rate (the method's)", metavar="R")
    word_lr: float = option(1e-2, "of new words")
    views: int = option(96, "clips that a concept's picture is made into")
    prior: int = option(128, "clips of other things of its kind")
    rank: int = option(8, "of a LoRA")
    seed: int = option(0, "of clips, noise and order")

    def __post_init__(self) -> None:
        check_counts(self, "steps", "views", "prior", "rank")
        check_seed(self.seed)
        for name in ("lr", "word_lr"):
            if (rate := getattr(self, name)) is not None and not 0 < rate < 1:
                raise InputError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {rate}")

    def rate(self, method: str) -> float:
        """The learning rate of a method."""
        return RATES[method] if self.lr is None else self.lr
