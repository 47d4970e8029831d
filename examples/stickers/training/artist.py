"""Draws what scenes tell: clips and their latents, decoys, reference pictures, upright pictures."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.vae.block_vae import BlockVAE

from ..world import drawing, grounds
from ..world.atlas import Atlas
from ..world.looks import random_look
from ..world.scenes import MAX_CONCEPTS, Scene, Wish, generator
from .batches import BARE, REFERENCES, Captions, for_clip
from .scenery import Page, Writer


class Artist(Writer):
    """A writer that draws, on a device.

    ``small`` is the VAE for clips of half the size (``components.halved``), of which the latents are those of
    the clips themselves. ``chunk``: clips that are drawn together: few on a CPU, for its cache, many on a
    GPU, which would mostly wait for calls.
    """

    def __init__(
        self, atlas: Atlas, tokenizer: Tokenizer, config: ModelConfig, small: BlockVAE, device: str = "cpu"
    ) -> None:
        super().__init__(atlas, tokenizer, config)
        self.device, self.small = device, small.to(device)
        self.chunk = 16 if torch.device(device).type == "cpu" else 256
        self.tiles = torch.from_numpy(atlas.tiles).to(device)
        self.paintings = torch.from_numpy(grounds.banks(0, config.height // 2)).to(device)

    def draw(self, scenes: list[Scene], seed: int, decoys: bool = True) -> dict[str, Tensor]:
        """``paint`` of scenes; ``seed``: of what is not told by them."""
        starts = range(0, len(scenes), self.chunk)
        return self.paint(self.page(scenes[k : k + self.chunk], seed * 4096 + k, decoys) for k in starts)

    @torch.no_grad()
    def paint(self, pages: Iterable[Page]) -> dict[str, Tensor]:
        """What a batch has of every scene, with ``REFERENCES`` reference pictures of each concept; ``count``
        on the CPU.

        Latents are float16, not normalised; pictures and portraits uint8.
        """
        parts = [self._page(page.to(self.device)) for page in pages]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        count = found.pop("count")
        return {name: value.to(self.device) for name, value in found.items()} | {"count": count}

    def _page(self, page: Page) -> dict[str, Tensor]:
        stage, cast = page.stage, page.cast
        dressed = drawing.dress(self.tiles, cast)
        latents, visible = self._latents(dressed, cast.stretch, stage)
        found = {"latents": latents, "coverage": _by_latent_frame(visible), "decoys": latents}
        if page.others is not None:
            others = drawing.dress(self.tiles, page.others)
            found["decoys"] = self._latents(others, page.others.stretch, stage)[0]
        g = torch.Generator(self.device).manual_seed(page.seed)
        pictures = [drawing.references(dressed, cast.stretch, g) for _ in range(REFERENCES)]
        for name, value in (
            ("references", torch.stack(pictures, 1)),
            ("portraits", drawing.upright(dressed, cast.stretch)),
        ):
            slots = value.new_full((len(stage.ground), MAX_CONCEPTS, *value.shape[1:]), 128)
            slots[stage.row, stage.slot] = value
            found[name] = slots
        return found | page.words

    @torch.no_grad()
    def pixels(self, scenes: list[Scene]) -> Tensor:
        """The clips of scenes at half the size, float [n,3,F,H/2,W/2] in -1..1."""
        parts = (scenes[k : k + self.chunk] for k in range(0, len(scenes), self.chunk))
        return torch.cat([self._small(part) for part in parts])

    def _small(self, scenes: list[Scene]) -> Tensor:
        page = self.page(scenes, 0, decoys=False).to(self.device)
        return self._clips(drawing.dress(self.tiles, page.cast), page.cast.stretch, page.stage)[0]

    def _clips(self, dressed: Tensor, stretch: Tensor, stage: drawing.Stage) -> tuple[Tensor, Tensor]:
        """Clips at half the size, from tiles of half the size, in -1..1, and what shows of their concepts."""
        fine = F.avg_pool2d(dressed, 2)
        clips, visible = drawing.clips(fine, stretch, stage, self.paintings, self.config.height // 2)
        return 2 * clips - 1, visible

    def _latents(self, dressed: Tensor, stretch: Tensor, stage: drawing.Stage) -> tuple[Tensor, Tensor]:
        clips, visible = self._clips(dressed, stretch, stage)
        return self.small.encode(clips).half(), visible

    @torch.no_grad()
    def pictures(self, seed: int, size: int) -> tuple[Tensor, Tensor]:
        """Pictures that are trained on, in looks of their own: references [size,3,px,px] (CLIP-normalised)
        and what they show upright, [size,3,32,32] in -1..1."""
        rng = generator(seed, 105)
        by_noun = list(self.atlas.of("train").values())
        some = [by_noun[int(rng.integers(len(by_noun)))] for _ in range(size)]
        chosen = [alike[int(rng.integers(len(alike)))] for alike in some]
        cast = drawing.Cast.of(chosen, [random_look(rng) for _ in chosen]).to(self.device)
        dressed = drawing.dress(self.tiles, cast)
        g = torch.Generator(self.device).manual_seed(seed)
        seen = drawing.references(dressed, cast.stretch, g)
        return for_clip(seen), drawing.upright(dressed, cast.stretch).float() / 127.5 - 1

    @torch.no_grad()
    def backgrounds(self, seeds: range, wish: Wish) -> dict[str, Tensor]:
        """Each background as it is on average in the clips of these seeds, by its name: the normalised
        latents' means by rows, where no concept is, [Cz,H]."""
        mean, deviation = (
            torch.tensor(self.config.vae[name], device=self.device)[:, None]
            for name in ("latents_mean", "latents_std")
        )
        sums: dict[str, Tensor] = {}  # [Cz+1,H], the last their number
        for start in range(seeds.start, seeds.stop, 16 * self.chunk):
            scenes = self.scenes(range(start, min(start + 16 * self.chunk, seeds.stop)), wish)
            drawn = self.draw(scenes, start, decoys=False)
            covered = (drawn["coverage"].float() / 255).sum(1, keepdim=True)  # [B,1,F,H,W]
            bare = (covered <= BARE).float()
            latents = torch.cat((drawn["latents"].float() * bare, bare), 1).sum((2, 4))  # [B,Cz+1,H]
            for scene, each in zip(scenes, latents, strict=True):
                sums[scene.ground] = sums[scene.ground] + each if scene.ground in sums else each
        return {name: (one[:-1] / one[-1:].clamp(min=1) - mean) / deviation for name, one in sums.items()}

    def captions(self, seeds: range, wish: Wish) -> Captions:
        """Sentences of scenes that are not drawn."""
        return Captions.of(self.told(seeds, wish)).to(self.device)


def _by_latent_frame(visible: Tensor) -> Tensor:
    """[B,N,F,8,8] of every video frame in 0..1 -> uint8 [B,N,1+(F-1)/4,8,8]."""
    rest = visible[:, :, 1:].unflatten(2, (-1, 4)).mean(3)
    return (torch.cat([visible[:, :, :1], rest], 2) * 255).round().to(torch.uint8)
