"""Train the decoder's network: from latents of frames at half their resolution to crisp frames.

The latents are known after the analysis (``components``), so the network trains beside the model, or after
it. Its clips are drawn as it goes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.presets import preset
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
    from_bytes,
    load_vae,
    psnr,
    random_frames,
    write_vae,
)

from ..world import drawing, grounds
from ..world.atlas import Atlas
from ..world.scenes import Scene, Wish, random_scene
from .artist import Artist
from .components import halved
from .options import DecoderOptions, Shown
from .own_latents import OwnLatents
from .packing import state_of
from .trainee import Trainee

SHOWN_FIRST, JUDGED_FIRST = 1 << 46, 1 << 47
"""First seeds of the clips that are learned from, and of those that are judged."""


def train_decoder(atlas: Atlas, output: Path, options: DecoderOptions) -> None:
    """Train the network of ``output/vae.safetensors``; resumes from ``decoder-training.safetensors`` there,
    to the same weights. Writes ``vae.safetensors`` again, averaged, and ``decoder-log.jsonl``.

    A share ``options.own`` of the latents is what the model of the folder makes of noised clips.

    Components, and so latents, stay what they are. Raises InputError where there is no VAE yet,
    CheckpointError.
    """
    if not (output / "vae.safetensors").exists():
        raise InputError(f"{output / 'vae.safetensors'} is missing: `train --output` makes it")
    config = json.loads((output / "vae.json").read_text())
    torch.manual_seed(options.seed)
    vae = load_vae(output).train().to(options.device)
    screen = Screen(atlas, options.device, options.shown)
    if options.own:
        screen.own, screen.vae = _own(atlas, output, options.device), vae
    judged = screen.judged().cpu().numpy()

    def losses_of(step: int) -> dict[str, Tensor]:
        screen.at(step)
        return {"total": _loss(vae, screen, random_of(options.seed, step), options)}

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


def _own(atlas: Atlas, output: Path, device: str) -> OwnLatents:
    if not (output / "model.safetensors").exists():
        raise InputError(
            f"{output / 'model.safetensors'} is missing, whose latents are asked for: `train --output` makes "
            "it, or --own 0"
        )
    config = preset("stickers")
    trainee = Trainee(config)
    trainee.load_state_dict(state_of(output), strict=False)
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    artist = Artist(atlas, tokenizer, config, halved(load_vae(output)), device)
    return OwnLatents(trainee.to(device), artist)


class Screen:
    """Clips at a video's full size, ``videos`` uint8 [n,F,S,S,3]; which are there at a step follows from it
    alone. ``guessed`` [n,Cz,F,H,W]: raw latents that ``own`` makes of them, where there is one."""

    own: OwnLatents | None = None
    vae: BlockVAE

    def __init__(self, atlas: Atlas, device: str, how: Shown, side: int = drawing.PIXELS) -> None:
        self.atlas, self.device, self.how, self.side = atlas, device, how, side
        self.tiles = torch.from_numpy(atlas.tiles).to(device)
        self.paintings = torch.from_numpy(grounds.banks(2, side)).to(device)
        self._next = 0
        self.videos = torch.empty(0)
        self.guessed = torch.empty(0)

    def judged(self) -> Tensor:
        """Clips of held-out nouns."""
        wish, seeds = Wish(split="nouns", plain=True), range(JUDGED_FIRST, JUDGED_FIRST + self.how.judged)
        return torch.cat([self._clip(random_scene(seed, self.atlas, wish)) for seed in seeds])

    def at(self, step: int) -> None:
        """Have the clips of a step; those that are not there yet are drawn."""
        how, last = self.how, self.how.clips + step // self.how.every * self.how.fresh
        for number in range(max(self._next, last - how.clips), last):
            scene = self._scene(SHOWN_FIRST + number)
            self.videos = _put(self.videos, self._clip(scene), number % how.clips, how.clips)
            if self.own is not None:
                now = self.videos[number % how.clips]
                latents = self.vae.encode(from_bytes(now[None]))
                guessed = self.own.of(scene, number, latents)
                self.guessed = _put(self.guessed, guessed, number % how.clips, how.clips)
        self._next = last

    def _scene(self, seed: int) -> Scene:
        """The scene of a seed; a model reads no words of any length."""
        if self.own is None:
            return random_scene(seed, self.atlas, Wish())
        return self.own.artist.scenes(range(seed, seed + 1), Wish())[0]

    def _clip(self, scene: Scene) -> Tensor:
        cast = drawing.cast_of([scene]).to(self.device)
        stage = drawing.Stage.of([scene], self.paintings.shape[1]).to(self.device)
        dressed = drawing.dress(self.tiles, cast)
        video, _ = drawing.clips(dressed, cast.stretch, stage, self.paintings, self.side)
        return drawing.to_bytes(video).permute(0, 2, 3, 4, 1)  # [1,F,S,S,3]


def _put(held: Tensor, one: Tensor, place: int, size: int) -> Tensor:
    """``held``, of ``size`` rows once anything is in it, with one [1,…] more."""
    if not len(held):
        held = one.new_zeros(size, *one.shape[1:])
    held[place] = one[0]
    return held


def _loss(vae: BlockVAE, screen: Screen, rng: np.random.Generator, options: DecoderOptions) -> Tensor:
    """``drawing_loss`` of random latent frames, from latents with a little noise, or from the model's own."""
    clips, frames = random_frames(rng, screen.videos, vae.frames, options.batch_size)
    video = frames_of(screen.videos, clips, frames, vae.frames)
    latents = vae.project(video)  # [B,Cz,2,H,W]
    noise = normal(rng, tuple(latents.shape), str(video.device))
    level = torch.from_numpy(rng.random((len(latents), 1, 1, 1, 1), np.float32)).to(video.device)
    latents = latents + LATENT_NOISE * level * noise
    if options.own:
        both = torch.stack([(frames - 1).clamp(min=0), frames], 1)[:, None]  # [B,1,2]
        own = screen.guessed[clips[:, None, None], torch.arange(latents.shape[1])[:, None], both]
        chosen = torch.from_numpy(rng.random(len(latents)) < options.own).to(video.device)
        latents = torch.where(chosen[:, None, None, None, None], own, latents)
    before, now = latents.unbind(2)
    return drawing_loss(vae, now, before, video[:, :, vae.frames :])
