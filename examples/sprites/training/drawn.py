"""Clips that are drawn, and encoded, where the model is trained, and replaced as it goes on.

An H200 draws a clip, with its decoy, pictures and latents, in 0.4 ms; a CPU's core takes 40. So a look need
not come back often enough to be learned by heart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.vae.block_vae import BlockVAE

from ..world.scene_arrays import BACKGROUNDS_PER_KIND, Arrays, SceneStream
from ..world.scenes import BACKGROUNDS
from .batches import Pool
from .clip_arrays import draw_block
from .train_vae import from_bytes

BLOCK = 8192
"""Most clips that are drawn anew at a time."""
BLOCKS = 8
"""Least number of blocks that a pool has: so many clips outlive a refresh."""
SEED_STRIDE = 2**20
"""Blocks between the scenes of one seed and those of the next."""
JUDGED = 128
"""Clips to judge by."""


@dataclass(frozen=True)
class Drawing:
    """What a ``DrawnPool`` draws: so many clips (a few less where blocks do not add up to them), from a seed;
    ``workers`` processes make the scenes; of looks that are held out, or of the others; ``videos``: the
    clips' own frames are kept too."""

    clips: int
    seed: int = 0
    workers: int = 1
    held_out: bool = False
    videos: bool = False

    @property
    def block(self) -> int:
        """Clips that are drawn anew at a time."""
        return min(BLOCK, max(1, self.clips // BLOCKS))

    @property
    def bank(self) -> int:
        """Backgrounds of each kind."""
        return min(BACKGROUNDS_PER_KIND, max(2, self.clips // len(BACKGROUNDS)))


class DrawnPool(Pool):
    """Clips that are drawn on their device.

    Every ``refresh`` puts a new block in the place of the oldest. Which clips there are follows from the seed
    and how many refreshes there have been, ``done`` of them before this pool was made: whoever resumes goes
    on with the same.
    """

    def __init__(
        self, config: ModelConfig, vae: BlockVAE, drawing: Drawing, device: str, done: int = 0
    ) -> None:
        super().__init__(config, device)
        self.vae, self.how, self._next = vae.to(device), drawing, done
        self.block = drawing.block
        self.many = max(1, drawing.clips // self.block)
        first, told = drawing.seed * SEED_STRIDE + done, (drawing.held_out, *self.tokens)
        self._stream = SceneStream(self.block, first, self.many + 1, told, drawing.workers, drawing.bank)
        self._banks = torch.stack([torch.from_numpy(each.result()) for each in self._stream.banks]).to(device)
        self._draw(self.many)

    def refresh(self) -> None:
        """Draw the next block over the oldest."""
        self._draw(1)

    def close(self) -> None:
        """End the processes that make scenes."""
        self._stream.close()

    def _draw(self, blocks: int) -> None:
        drawing = self._stream.blocks(blocks)
        for arrays in tqdm(drawing, "draw", blocks, unit="block", leave=False, disable=blocks == 1):
            first = self._next % self.many * self.block
            for name, value in self._drawn(arrays).items():
                if name not in self.arrays:
                    self.arrays[name] = value.new_empty((self.many * self.block, *value.shape[1:]))
                self.arrays[name][first : first + self.block] = value
            self._next += 1

    @torch.no_grad()
    def _drawn(self, arrays: Arrays) -> dict[str, Tensor]:
        scenes = {name: torch.from_numpy(value).to(self.device) for name, value in arrays.items()}
        g = torch.Generator(self.device).manual_seed((self.how.seed * SEED_STRIDE + self._next) * 2 + 1)
        bank = torch.randint(self._banks.shape[1], (self.block,), generator=g, device=self.device)
        ground = self._banks[scenes["background"], bank]
        return draw_block(
            scenes, ground, g, lambda video: self.vae.encode(from_bytes(video)).half(), self.how.videos
        )


def judging_pool(config: ModelConfig, vae: BlockVAE, device: str) -> DrawnPool:
    """Clips of looks that are held out, always the same."""
    pool = DrawnPool(config, vae, Drawing(JUDGED, held_out=True), device)
    pool.close()
    return pool
