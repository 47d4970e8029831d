"""Training clips that are drawn, and encoded, where the model is trained, and replaced as it goes on.

An H200 draws a clip, with its decoy, pictures and latents, in 0.4 ms; a CPU's core takes 40. So a look need
not come back often enough to be learned by heart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.vae.block_vae import BlockVAE

from ..world.scene_arrays import BACKGROUNDS_PER_KIND, Arrays, SceneStream
from .batches import Pool
from .clip_arrays import draw_block
from .train_vae import from_bytes

BLOCK = 8192
"""Clips that are drawn anew at a time."""
SEED_STRIDE = 2**20
"""Blocks between the scenes of one seed and those of the next."""


@dataclass(frozen=True)
class Drawing:
    """What a ``DrawnPool`` draws: so many clips, in blocks, from a seed; ``workers`` processes make the
    scenes; ``bank``: backgrounds of each kind."""

    clips: int
    seed: int = 0
    workers: int = 1
    block: int = BLOCK
    bank: int = BACKGROUNDS_PER_KIND


class DrawnPool(Pool):
    """Clips on a device that no disk has seen.

    Every ``refresh`` puts a new block in the place of the oldest. Which clips there are follows from the seed
    and how many refreshes there have been, ``done`` of them before this pool was made: whoever resumes goes
    on with the same. No look that is kept for judging occurs.
    """

    def __init__(
        self, config: ModelConfig, vae: BlockVAE, drawing: Drawing, device: str, done: int = 0
    ) -> None:
        super().__init__(config, device)
        self.vae, self.seed, self._next = vae.to(device), drawing.seed, done
        self.block = min(drawing.block, drawing.clips)
        self.many = max(1, drawing.clips // self.block)
        first = drawing.seed * SEED_STRIDE + done
        self._stream = SceneStream(
            self.block, first, self.many + 1, self.tokens, drawing.workers, drawing.bank
        )
        self._banks = torch.stack([torch.from_numpy(each.result()) for each in self._stream.banks]).to(device)
        self._all: dict[str, Tensor] = {}
        self._draw(self.many)

    def __len__(self) -> int:
        return self.many * self.block

    def rows(self, name: str, clips: Tensor) -> Tensor:
        """See ``Pool``."""
        return self._all[name][clips]

    def refresh(self) -> None:
        """Draw the next block over the oldest."""
        self._draw(1)

    def close(self) -> None:
        """End the processes that make scenes."""
        self._stream.close()

    def _draw(self, blocks: int) -> None:
        for arrays in self._stream.blocks(blocks):
            first = self._next % self.many * self.block
            for name, value in self._drawn(arrays).items():
                if name not in self._all:
                    self._all[name] = value.new_empty((len(self), *value.shape[1:]))
                self._all[name][first : first + self.block] = value
            self._next += 1

    @torch.no_grad()
    def _drawn(self, arrays: Arrays) -> dict[str, Tensor]:
        scenes = {name: torch.from_numpy(value).to(self.device) for name, value in arrays.items()}
        g = torch.Generator(self.device).manual_seed((self.seed * SEED_STRIDE + self._next) * 2 + 1)
        bank = torch.randint(self._banks.shape[1], (self.block,), generator=g, device=self.device)
        ground = self._banks[scenes["background"], bank]
        return draw_block(scenes, ground, g, lambda video: self.vae.encode(from_bytes(video)).half())
