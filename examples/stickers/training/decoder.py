"""Train the decoder's network: from latents of frames at half their resolution to crisp frames.

The latents are known after the analysis (``components``), so the network trains beside the model, or after
it. Its clips are drawn as it goes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training.learning import Average, MuonAdamW
from conceptmaster.examples.sprites.training.loop import LoopOptions, log_to, random_of
from conceptmaster.examples.sprites.training.loop import train as run_loop
from conceptmaster.examples.sprites.training.noising import normal
from conceptmaster.examples.sprites.training.train_vae import (
    LATENT_NOISE,
    drawing_loss,
    frames_of,
    load_vae,
    psnr,
    random_frames,
    write_vae,
)

from ..world import drawing, grounds
from ..world.atlas import Atlas
from ..world.scenes import Scene, Wish, random_scene
from .options import DecoderOptions, Shown

SHOWN_FIRST, JUDGED_FIRST = 1 << 46, 1 << 47
"""First seeds of the clips that are learned from, and of those that are judged."""


def train_decoder(atlas: Atlas, output: Path, options: DecoderOptions) -> None:
    """Train the network of ``output/vae.safetensors``; resumes from ``decoder-training.safetensors`` there,
    to the same weights. Writes ``vae.safetensors`` again, averaged, and ``decoder-log.jsonl``.

    Components, and so latents, stay what they are. Raises InputError where there is no VAE yet,
    CheckpointError.
    """
    if not (output / "vae.safetensors").exists():
        raise InputError(f"{output / 'vae.safetensors'} is missing: `train --output` makes it")
    config = json.loads((output / "vae.json").read_text())
    torch.manual_seed(options.seed)
    vae = load_vae(output).train().to(options.device)
    screen = Screen(atlas, options.device, options.shown)
    judged = screen.judged().cpu().numpy()

    def losses_of(step: int) -> dict[str, Tensor]:
        return {"total": _loss(vae, screen.at(step), random_of(options.seed, step), options.batch_size)}

    def publish(steps: int) -> dict[str, float]:
        write_vae(vae, output, config)
        return {"psnr": round(psnr(vae, judged), 3)}

    run_loop(
        vae,
        MuonAdamW(vae.named_parameters(), options.lr, options.lr / 10),
        losses_of,
        LoopOptions("decoder", options.steps, limit=1.0, log_every=options.log_every),
        log=log_to(output / "decoder-log.jsonl"),
        average=Average(vae, options.decay),
        checkpoint=output / "decoder-training.safetensors",
        publish=publish,
    )


class Screen:
    """Clips at a video's full size, uint8 [n,F,S,S,3]; which are there at a step follows from it alone."""

    def __init__(self, atlas: Atlas, device: str, how: Shown, side: int = drawing.PIXELS) -> None:
        self.atlas, self.device, self.how, self.side = atlas, device, how, side
        self.tiles = torch.from_numpy(atlas.tiles).to(device)
        self.paintings = torch.from_numpy(grounds.banks(2, side)).to(device)
        self._next = 0
        self._videos: Tensor | None = None

    def judged(self) -> Tensor:
        """Clips of held-out nouns."""
        wish, seeds = Wish(split="nouns", plain=True), range(JUDGED_FIRST, JUDGED_FIRST + self.how.judged)
        return torch.cat([self._clip(random_scene(seed, self.atlas, wish)) for seed in seeds])

    def at(self, step: int) -> Tensor:
        """The clips of a step; those that are not there yet are drawn."""
        how, last = self.how, self.how.clips + step // self.how.every * self.how.fresh
        for number in range(max(self._next, last - how.clips), last):
            clip = self._clip(random_scene(SHOWN_FIRST + number, self.atlas, Wish()))
            if self._videos is None:
                self._videos = clip.new_zeros(how.clips, *clip.shape[1:])
            self._videos[number % how.clips] = clip[0]
        self._next = last
        assert self._videos is not None
        return self._videos

    def _clip(self, scene: Scene) -> Tensor:
        cast = drawing.cast_of([scene]).to(self.device)
        stage = drawing.Stage.of([scene], self.paintings.shape[1]).to(self.device)
        dressed = drawing.dress(self.tiles, cast)
        video, _ = drawing.clips(dressed, cast.stretch, stage, self.paintings, self.side)
        return drawing.to_bytes(video).permute(0, 2, 3, 4, 1)  # [1,F,S,S,3]


def _loss(vae: BlockVAE, videos: Tensor, rng: np.random.Generator, size: int) -> Tensor:
    """``drawing_loss`` of random latent frames, from latents with a little noise."""
    video = frames_of(videos, *random_frames(rng, videos, vae.frames, size), vae.frames)
    latents = vae.project(video)  # [B,Cz,2,H,W]
    noise = normal(rng, tuple(latents.shape), str(video.device))
    level = torch.from_numpy(rng.random((len(latents), 1, 1, 1, 1), np.float32)).to(video.device)
    before, now = (latents + LATENT_NOISE * level * noise).unbind(2)
    return drawing_loss(vae, now, before, video[:, :, vae.frames :])
