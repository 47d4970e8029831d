"""The world's VAE: the components of the sprites' VAE for frames twice as large, and more of them behind.

A block of 16x16 pixels has the latents that the sprites' VAE gives it at half the size, so a model of these
goes on where theirs ended. What is finer than that is left to the decoder's network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptmaster.engine.checkpoints.safetensors_io import load
from conceptmaster.engine.vae.block_vae import BlockVAE
from conceptmaster.examples.sprites.training.train_vae import new_vae


def halved(vae: BlockVAE) -> BlockVAE:
    """The VAE that gives clips of half the size the same latents; only good for encoding."""
    t, s = vae.frames, vae.side // 2
    config = vae.config
    small = BlockVAE(config.z_dim, t, s, 8, 1, config.latents_mean, config.latents_std)
    small.basis.copy_(2 * _pooled(vae.basis, t, 2 * s))
    small.mean.copy_(_pooled(vae.mean[None], t, 2 * s)[0])
    small.scale.copy_(2 * vae.scale)
    return small.eval()


def doubled(config: dict[str, Any], sprites: Path) -> BlockVAE:
    """A VAE of a configuration's ``vae`` entry that begins with the components of the file ``sprites``.

    Those behind them are empty; ``add_components`` finds them.
    """
    vae, old = new_vae(config), load(sprites)[0]
    t, s = vae.frames, vae.side // 2
    known = len(old["basis"])
    vae.basis.zero_()
    vae.scale.fill_(1.0)
    vae.basis[:known] = _repeated(old["basis"], t, s) / 2
    vae.mean.copy_(_repeated(old["mean"][None], t, s)[0])
    vae.scale[:known] = old["scale"] / 2
    return vae.eval()


@torch.no_grad()
def add_components(vae: BlockVAE, clips: Tensor, known: int) -> None:
    """Set the components from number ``known`` on to the principal ones of what those before leave over of
    clips [n,3,F,sH/2,sW/2] in -1..1, half the VAE's size; each is scaled as the first ones are."""
    t, s = vae.frames, vae.side // 2
    small = halved(vae)
    whole = torch.cat([clips[:, :, :1]] * (t - 1) + [clips], dim=2)
    blocks = small.cut(whole).reshape(-1, 3 * t * s * s) - small.mean
    basis = small.basis[:known]
    rest = (blocks - (blocks @ basis.T) @ basis).double()
    variance, vectors = torch.linalg.eigh(rest.T @ rest / len(rest))
    more = len(vae.basis) - known
    basis = vectors.flip(1)[:, :more].T
    variance = variance.flip(0)[:more]
    # A vector's sign is free: fixed, so that the same clips give the same latents on every machine.
    vae.basis[known:] = _repeated((basis * torch.sign(basis.sum(1, keepdim=True))).float(), t, s) / 2
    greatest = small.scale[0].double() ** -2
    vae.scale[known:] = ((variance * greatest) ** -0.25).float() / 2


def _repeated(rows: Tensor, t: int, side: int) -> Tensor:
    """Rows of blocks' pixels [n,t*s*s*3], each pixel as 2x2: [n,t*2s*2s*3]."""
    blocks = rows.view(-1, t, side, side, 3)
    return blocks.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1)


def _pooled(rows: Tensor, t: int, side: int) -> Tensor:
    """The means of 2x2 pixels: [n,t*s*s*3] -> [n,t*s/2*s/2*3]."""
    blocks = rows.view(-1, side, side, 3).permute(0, 3, 1, 2)
    return F.avg_pool2d(blocks, 2).permute(0, 2, 3, 1).reshape(len(rows), -1)
