"""Training clips that are drawn, and encoded, where the model is trained, and replaced as it goes on.

An H200 draws a clip, with its decoy, pictures and latents, in 0.4 ms; a CPU's core takes 40. So a look need
not come back often enough to be learned by heart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.vae.block_vae import BlockVAE

from ..world.paint_many import Cast, draw_clips, draw_references, draw_upright, filled
from ..world.scene_arrays import BANK, LOOKS, Arrays, SceneStream
from ..world.scenes import MAX_CONCEPTS, PERIODS, TEXTURES
from .batches import PORTRAIT, RUNS, TURNS, Captions
from .pool import LATENT_GRID, REFERENCES
from .resident import ResidentPool, generator
from .train_vae import from_bytes

BLOCK = 8192
"""Clips that are drawn anew at a time."""
AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Of these as many as are drawn together, some 6 MB each on the way: on a GPU few calls count."""
APART = 2**20
"""Blocks between the scenes of one seed and those of the next."""


class DrawnPool(ResidentPool):
    """A ``ResidentPool`` of clips that no disk has seen: ``clips`` of them, in blocks.

    Every ``refresh`` puts a new block in the place of the oldest. Which clips there are follows from ``seed``
    and how many refreshes there have been, ``done`` of them before this pool was made: whoever resumes goes
    on with the same. No look that is kept for judging occurs.
    """

    def __init__(
        self,
        device: str,
        clips: int,
        vae: BlockVAE,
        tokenizer: Tokenizer,
        text_tokens: int,
        label_tokens: int,
        *,
        seed: int = 0,
        done: int = 0,
        workers: int = 1,
        block: int = BLOCK,
        bank: int = BANK,
    ) -> None:
        self.vae, self.block, self.seed = vae.to(device), min(block, clips), seed
        self.many, self._next = max(1, clips // self.block), done
        tokens = text_tokens, label_tokens
        first = seed * APART + done
        self._stream = SceneStream(self.block, first, self.many + 1, tokens, workers, bank)
        self._banks = torch.stack([torch.from_numpy(each.result()) for each in self._stream.banks]).to(device)
        super().__init__(device, Path(), tokenizer, text_tokens, label_tokens)

    def refresh(self) -> int:
        """Draw the next block over the oldest, or at first all of them; returns how many there are."""
        for arrays in self._stream.blocks(1 if self._all else self.many):
            rows = slice(self._next % self.many * self.block, (self._next % self.many + 1) * self.block)
            for name, value in self._drawn(arrays).items():
                if name not in self._all:
                    shape = (self.many * self.block, *value.shape[1:])
                    self._all[name] = torch.empty(shape, dtype=value.dtype, device=self.device)
                self._all[name][rows] = value
            self._next += 1
        return self.many

    def captions(self, rng: np.random.Generator, size: int) -> Captions:
        """A random batch of captions with their labels and what they tell, on the device."""
        g, everything = generator(rng, self.device), self._all
        clips = torch.randint(self.many * self.block, (size,), generator=g, device=self.device)
        names = ("token_ids", "token_mask", "label_ids", "label_mask")
        ids, mask, label_ids, label_mask = (everything[name][clips] for name in names)
        return Captions(ids, mask, label_ids, label_mask, everything["coverage"][clips].float() / 255)

    def close(self) -> None:
        """End the processes that make scenes."""
        self._stream.close()

    @torch.no_grad()
    def _drawn(self, arrays: Arrays) -> dict[str, Tensor]:
        """What ``ResidentPool`` has of a block of scenes."""
        scenes = {name: torch.from_numpy(value).to(self.device) for name, value in arrays.items()}
        g = torch.Generator(self.device).manual_seed((self.seed * APART + self._next) * 2 + 1)
        bank = torch.randint(self._banks.shape[1], (self.block,), generator=g, device=self.device)
        ground = self._banks[scenes["background"], bank]
        some = _at_once(self.device)
        parts = [
            self._clips({name: value[k : k + some] for name, value in scenes.items()}, ground[k : k + some])
            for k in range(0, self.block, some)
        ]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found |= self._pictures(scenes, g)
        told = ("count", "token_ids", "token_mask", "label_ids", "label_mask")
        return found | {name: scenes[name] for name in told}

    def _clips(self, scenes: dict[str, Tensor], ground: Tensor) -> dict[str, Tensor]:
        """Latents of clips and decoys, and coverage."""
        found = {}
        for name, prefix in (("latents", ""), ("decoys", "decoy_")):
            count, radius, path, motion = (scenes[field] for field in ("count", "radius", "path", "motion"))
            clips, visible = draw_clips(_looks(scenes, prefix), count, radius, path, motion, ground)
            found[name] = self.vae.encode(from_bytes(clips)).half()
            if name == "latents":
                found["coverage"] = coverage(visible)
        return found

    def _pictures(self, scenes: dict[str, Tensor], g: torch.Generator) -> dict[str, Tensor]:
        """References, foreign ones, portraits, and what the concepts are."""
        shape = self.block, MAX_CONCEPTS
        rows, columns = filled(scenes["count"], MAX_CONCEPTS)
        looks = {name: value[rows, columns] for name, value in _looks(scenes, "").items()}
        strangers = looks | {"noun": scenes["foreign_noun"][rows, columns]}
        drawn = {
            "references": torch.stack([_parts(draw_references, looks, g) for _ in range(REFERENCES)], 1),
            "foreign": _parts(draw_references, strangers, g),
            "portraits": _parts(draw_upright, looks, PORTRAIT),
            "traits": torch.stack([looks[name] for name in ("texture", "accessory", "noun")], 1).byte(),
            "patterns": patterns(looks),
        }
        found = {}
        for name, value in drawn.items():
            empty = {"portraits": 128, "patterns": torch.nan}.get(name, 0)
            found[name] = value.new_full((*shape, *value.shape[1:]), empty)
            found[name][rows, columns] = value
        return found


def _at_once(device: str | torch.device) -> int:
    return AT_ONCE.get(torch.device(device).type, AT_ONCE["cpu"])


def _looks(scenes: dict[str, Tensor], prefix: str) -> Cast:
    return {"noun": scenes["noun"]} | {name: scenes[prefix + name] for name in LOOKS}


def _parts(draw: Callable[..., Tensor], looks: Cast, *how: object) -> Tensor:
    """``draw`` of so many sprites at a time that their pixels fit."""
    size = 8 * _at_once(looks["noun"].device)
    starts = range(0, len(looks["noun"]), size)
    return torch.cat([draw({n: v[k : k + size] for n, v in looks.items()}, *how) for k in starts])


def coverage(visible: Tensor) -> Tensor:
    """How much of every latent cell a concept covers: float [B,N,F,S,S] -> uint8 [B,N,5,8,8]."""
    later, rows, columns = LATENT_GRID[0] - 1, *LATENT_GRID[1:]
    cells = visible.unflatten(4, (columns, -1)).unflatten(3, (rows, -1)).mean((4, 6))  # [B,N,F,8,8]
    rest = cells[:, :, 1:].unflatten(2, (later, -1)).mean(3)
    return (torch.cat((cells[:, :, :1], rest), dim=2) * 255).round().to(torch.uint8)


def patterns(looks: Cast) -> Tensor:
    """``batches.how_it_runs`` of many looks, float32 [P,RUNS]."""
    kind = looks["texture"]
    runs = looks["angle"].new_full((len(kind), RUNS), torch.nan)
    for column, times, names in TURNS:
        some = torch.isin(kind, torch.tensor([TEXTURES.index(name) for name in names], device=kind.device))
        turned = times * looks["angle"]
        runs[:, column] = torch.where(some, turned.cos(), runs[:, column])
        runs[:, column + 1] = torch.where(some, turned.sin(), runs[:, column + 1])
    period = (looks["period"] - float(np.mean(PERIODS))) / float(np.ptp(PERIODS) / 2)
    runs[:, 6] = torch.where(kind == TEXTURES.index("plain"), torch.nan, period)
    return runs
