"""Wan's VAE encoder one latent frame at a time: the counterpart of the streaming decoder in vae.py.

Image-to-video models read the latents of a video that is mostly empty. `EncodeFirst` then `EncodeNext` make
them: the causal state is an input and an output, so that one fixed-shape graph encodes a video of any length.

Letters: Cz latent channels, H W latent height, width; t video frames of a later latent frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .wan_decoder import latent_statistics

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def streaming_encoders(vae: AutoencoderKLWan) -> tuple[nn.Module, nn.Module]:
    """The two halves, in evaluation mode: for a video's first frame, for the t that each of n later latent
    frames stands for. (frames [f,height,width,3] in -1..1, *states) -> (latents [1,Cz,n,H,W], *states)."""
    return EncodeFirst(vae).eval(), EncodeNext(vae).eval()


class _Encode(nn.Module):
    """What both halves share."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv
        self.patch = vae.config.patch_size or 1
        mean, std = latent_statistics(vae)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def _encode(self, frames: Tensor, cache: list[Any] | None) -> tuple[Tensor, list[Any]]:
        """Frames [f,height,width,3] -> normalised mean of the latents [1,Cz,n,H,W], and the caches in use;
        cache: None for a single frame that nothing follows."""
        used = [0]
        x = _patched(frames.permute(3, 0, 1, 2)[None], self.patch)  # [1,3*patch*patch,f,h,w]
        x = self.quant_conv(self.encoder(x, feat_cache=cache, feat_idx=used))  # [1,2*Cz,n,H,W]
        return (x.chunk(2, dim=1)[0] - self.mean) / self.std, (cache or [])[: used[0]]


class EncodeFirst(_Encode):
    """Encodes a video's first frame: frames [1,height,width,3] -> (latents [1,Cz,1,H,W], *states).

    Each state is [1,channels,1 or 2,h,w]: the last frames that a causal layer has seen, zeros before the
    start.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae)
        self.slots = sum(1 for module in vae.encoder.modules() if isinstance(module, nn.Conv3d))
        self.kept = self._kept(vae)

    @torch.no_grad()
    def _kept(self, vae: AutoencoderKLWan) -> list[int]:
        """How many frames each state keeps once it is full: a convolution two, a downsampler in time one."""
        side = vae.config.scale_factor_spatial
        video = torch.zeros(1 + vae.config.scale_factor_temporal, side, side, 3).to(self.mean)
        _, cache = self._encode(video[:1], [None] * self.slots)
        _, cache = self._encode(video[1:], cache)
        return [entry.shape[2] for entry in cache]

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """frames: RGB in -1..1. Latents are normalised."""
        latents, cache = self._encode(frames, [None] * self.slots)
        states = [
            entry if count == 1 else torch.cat((torch.zeros_like(entry), entry), dim=2)
            for entry, count in zip(cache, self.kept, strict=True)
        ]
        return latents, *states


class EncodeNext(_Encode):
    """Those of n later latent frames: (frames [n*t,height,width,3], *states) -> (latents, *next states)."""

    def forward(self, frames: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """frames: RGB in -1..1; states: as they came out of the call before, same order and shapes."""
        latents, cache = self._encode(frames, list(states))
        return latents, *cache


class EncodePicture(_Encode):
    """Encodes a video's first frame alone: frames [1,height,width,3] -> latents [1,Cz,1,H,W]."""

    def forward(self, frames: Tensor) -> tuple[Tensor]:
        """frames: RGB in -1..1. Latents are normalised; a tuple of them, as where states follow."""
        return (self._encode(frames, None)[0],)


def _patched(video: Tensor, patch: int) -> Tensor:
    """[B,3,f,h*patch,w*patch] -> [B,3*patch*patch,f,h,w]; the inverse of the decoder's."""
    x = video.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B,3,f,h,ph,w,pw]
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)  # [B,3*pw*ph,f,h,w]
