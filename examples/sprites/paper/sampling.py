"""Videos of many requests at once, all rows from the same noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.config import ModelConfig
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.runtime import noise
from conceptmaster.runtime.solver import STATES, make_schedule

from ..training.attention import cheapest_attention
from ..training.learning import autocast
from .pool import Clips
from .trainee import Told, Trainee

SOLVER, STEPS, SHIFT = "unipc", 8, 3.0
GUIDANCE = 4.0
"""Of caption and concepts together against the base without either. Chosen by the base alone: of 1, 2 and 4
it draws most nouns and motions right with this one."""
AT_ONCE = 20


@torch.no_grad()
def sample(trainee: Trainee, clips: Clips, no_caption: tuple[Tensor, Tensor], seeds: list[int]) -> Tensor:
    """Latents, normalised, [B,Cz,F,H,W], each from the noise of its seed. The latents of ``clips`` are not
    looked at; no_caption: tokens of none, [1,T] each."""
    parts = []
    for rows in torch.arange(len(seeds)).split(AT_ONCE):
        start = [noise.from_seed(seeds[row], trainee.config.latent_shape) for row in rows.tolist()]
        with cheapest_attention("cpu"), autocast("cpu"):
            parts.append(_sample(trainee, clips[rows], no_caption, torch.from_numpy(np.stack(start))))
    return torch.cat(parts)


def _sample(trainee: Trainee, clips: Clips, no_caption: tuple[Tensor, Tensor], start: Tensor) -> Tensor:
    size, told = len(start), trainee.told(clips)
    silent = trainee.model.text_encoder(*no_caption).expand_as(told.text)
    both = Told(
        torch.cat((silent, told.text)),
        torch.cat((told.concepts, told.concepts)),
        torch.cat((torch.zeros_like(told.seen), told.seen)),
        None if told.boxes is None else torch.cat((told.boxes, told.boxes)),
    )
    keys_values = trainee.condition(both)
    schedule = make_schedule(SOLVER, STEPS, SHIFT)
    state = torch.zeros(STATES, *start.shape)
    state[0] = start
    for time, table in zip(schedule.timesteps, schedule.coefficients, strict=True):
        latents, times = torch.cat((state[0], state[0])), torch.full((2 * size,), float(time))
        found = trainee.model.transformer.denoise(latents, times, keys_values, both.seen).float()
        without, asked = found.chunk(2)
        velocity = without + GUIDANCE * (asked - without)
        state = torch.tensordot(torch.from_numpy(table), torch.cat((state, velocity[None])), dims=1)
    return state[0]


@torch.no_grad()
def frames(latents: Tensor, vae: BlockVAE, config: ModelConfig) -> np.ndarray:
    """Latents, normalised, [B,Cz,F,H,W] -> uint8 [B,F,H,W,3]."""
    mean, std = torch.tensor([config.vae["latents_mean"], config.vae["latents_std"]]).view(2, -1, 1, 1, 1)
    video = vae.decode(latents * std + mean).clamp(-1, 1)  # [B,3,F,H,W]
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
