"""The latents of this world: principal components of blocks of 4 frames by 8x8 pixels, largest first.

A small network that must find its own latents spends hours on a CPU before it keeps what 48 linear components
keep at once: every measure of ``score`` is perfect on true videos rebuilt from these alone. So the encoder is
linear algebra, and what is learned is the decoder, which may also use what surrounds a block.

Latents are scaled so that component k has the deviation (variance_k / variance_0)^(1/4): between whitening,
where noise-like detail counts as much as colour, and plain projection, where detail hardly counts at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conceptmaster.engine.weights import load, save

from .pool import open_shard, shards

FRAMES, SIDE = 4, 8
"""Frames and pixels of a block's edges: the VAE's scale factors."""
CHANNELS = 48
DEVIATION = 0.5
"""``latents_std`` of every channel: latents are divided by it before the model sees them."""
NAME = "components.safetensors"


@dataclass(frozen=True)
class Components:
    """mean [768], basis [Cz,768] orthonormal, variance [Cz] of the components, in pixels of -1..1."""

    mean: Tensor
    basis: Tensor
    variance: Tensor

    @property
    def scale(self) -> Tensor:
        """What each component is multiplied by to become a latent, [Cz]."""
        return self.variance**-0.25 * self.variance[0] ** -0.25

    def encode(self, video: Tensor) -> Tensor:
        """video [B,3,1+4n,H,W] in -1..1 -> latents [B,Cz,1+n,H/8,W/8]; the first frame stands for four."""
        blocks = to_blocks(video)  # [B,f,h,w,768]
        return (((blocks - self.mean) @ self.basis.T) * self.scale).permute(0, 4, 1, 2, 3)

    def decode(self, latents: Tensor) -> Tensor:
        """The linear inverse: latents [B,Cz,1+n,h,w] -> video [B,3,1+4n,8h,8w], not clamped."""
        blocks = (latents.permute(0, 2, 3, 4, 1) / self.scale) @ self.basis + self.mean
        b, f, h, w, _ = blocks.shape
        video = blocks.view(b, f, h, w, FRAMES, SIDE, SIDE, 3).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return video.reshape(b, 3, f * FRAMES, h * SIDE, w * SIDE)[:, :, FRAMES - 1 :]

    def to(self, device: str | torch.device) -> Components:
        """The same on a device."""
        return Components(self.mean.to(device), self.basis.to(device), self.variance.to(device))

    def save(self, folder: Path) -> None:
        """Write ``components.safetensors``."""
        save(folder / NAME, {"mean": self.mean, "basis": self.basis, "variance": self.variance})

    @classmethod
    def load(cls, folder: Path) -> Components:
        """Read what ``save`` wrote. Raises FileNotFoundError or WeightsError."""
        return cls(**load(folder / NAME)[0])


def to_blocks(video: Tensor) -> Tensor:
    """video [B,3,1+4n,H,W] -> blocks [B,1+n,H/8,W/8,768], a block's pixels by frame, row, column, colour."""
    video = torch.cat([video[:, :, :1]] * (FRAMES - 1) + [video], dim=2)
    blocks = video.unflatten(4, (-1, SIDE)).unflatten(3, (-1, SIDE)).unflatten(2, (-1, FRAMES))
    return blocks.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4)


def analyse(data: Path, clips: int = 800, seed: int = 0) -> Components:
    """The components of clips of a pool, spread over its shards; the first shard, which judges, is left out."""
    rng = np.random.default_rng(seed)
    folders = shards(data)[1:]
    total, products, count = torch.zeros(768).double(), torch.zeros(768, 768).double(), 0
    for n in range(clips):
        video = open_shard(folders[n % len(folders)]).video
        clip = torch.from_numpy(np.array(video[rng.integers(len(video))]))
        blocks = to_blocks(clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).reshape(-1, 768).double()
        total += blocks.sum(0)
        products += blocks.T @ blocks
        count += len(blocks)
    mean = total / count
    variance, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    order = torch.arange(767, 767 - CHANNELS, -1)
    basis = vectors[:, order].T.contiguous()
    # A vector's sign is free: fixed, so that the same clips give the same latents on every machine.
    basis = basis * torch.sign(basis.sum(1, keepdim=True))
    return Components(mean.float(), basis.float(), variance[order].float())
