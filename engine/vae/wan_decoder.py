"""The video VAE: diffusers' AutoencoderKLWan (imported here only, when one is built), or a BlockVAE.

Besides whole-video encode and decode there is a streaming decoder, `DecodeFirst` then `DecodeNext`: its
causal state is an input and an output, so that one fixed-shape graph decodes a video of any length.

Letters: B batch, Cz latent channels, F H W latent frames, height, width; f video frames of one latent frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import MissingDependency, how_to_install
from ..config import ModelConfig
from .block_vae import BlockVAE

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

VAE: TypeAlias = "AutoencoderKLWan | BlockVAE"


def build_vae(config: ModelConfig) -> VAE:
    """The VAE of `config.vae` with random weights, in evaluation mode: AutoencoderKLWan or BlockVAE.

    Raises MissingDependency that names what to install where diffusers is missing.
    """
    if config.vae.get("kind") == "blocks":
        return BlockVAE(**{name: value for name, value in config.vae.items() if name != "kind"}).eval()
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise MissingDependency(f"the video VAE needs diffusers: {how_to_install('export')}") from error
    return AutoencoderKLWan(**config.vae).eval()


def latent_statistics(vae: VAE) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the raw latents, each float32 [1,Cz,1,1,1], on the VAE's device."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32, device=vae.device).view(shape)
    std = torch.tensor(vae.config.latents_std, dtype=torch.float32, device=vae.device).view(shape)
    return mean, std


def encode(vae: VAE, video: Tensor) -> Tensor:
    """video [B,3,frames,height,width] in -1..1 -> latents [B,Cz,F,H,W]: the posterior's mean, normalised."""
    mean, std = latent_statistics(vae)
    raw = vae.encode(video) if isinstance(vae, BlockVAE) else vae.encode(video).latent_dist.mean
    return (raw - mean.to(video)) / std.to(video)


def decode(vae: VAE, latents: Tensor) -> Tensor:
    """Normalised latents [B,Cz,F,H,W] -> video [B,3,frames,height,width], clamped to -1..1."""
    mean, std = latent_statistics(vae)
    raw = latents * std.to(latents) + mean.to(latents)
    return vae.decode(raw).clamp(-1.0, 1.0) if isinstance(vae, BlockVAE) else vae.decode(raw).sample


def streaming_decoders(vae: VAE) -> tuple[nn.Module, nn.Module]:
    """The two halves of the streaming decoder, in evaluation mode: for the first latent frame, for the rest.

    (latents [1,Cz,n,H,W], *states) -> (frames [f,height,width,3] in 0..1, *states); the first takes no state
    and n = 1, the rest any n: all is causal, so several latent frames in one call give what each would.
    """
    if isinstance(vae, BlockVAE):
        return DecodeBlocksFirst(vae).eval(), DecodeBlocksNext(vae).eval()
    return DecodeFirst(vae).eval(), DecodeNext(vae).eval()


def _unpatch(video: Tensor, patch: int) -> Tensor:
    """[B,3*patch*patch,f,h,w] -> [B,3,f,h*patch,w*patch]; within a patch, column-major as in Wan2.2's VAE."""
    x = video.unflatten(1, (3, patch, patch))  # [B,3,pw,ph,f,h,w]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)  # [B,3,f,h*ph,w*pw]


class _Decode(nn.Module):
    """What both halves of the streaming decoder share."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.patch = vae.config.patch_size or 1
        mean, std = latent_statistics(vae)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def _decode(self, latents: Tensor, cache: list[Any], first: bool) -> tuple[Tensor, list[Any]]:
        """Latents [1,Cz,n,H,W] -> frames [f,height,width,3] in 0..1, and the caches in use."""
        used = [0]
        x = self.post_quant_conv(latents * self.std + self.mean)  # [1,Cz,n,H,W]
        x = self.decoder(x, feat_cache=cache, feat_idx=used, first_chunk=first)  # [1,3*patch*patch,f,h,w]
        if self.patch > 1:
            x = _unpatch(x, self.patch)  # [1,3,f,height,width]
        frames = (x.clamp(-1.0, 1.0) + 1.0) * 0.5
        return frames[0].permute(1, 2, 3, 0), cache[: used[0]]  # [f,height,width,3]


class DecodeFirst(_Decode):
    """Decodes a video's first latent frame: latents [1,Cz,1,H,W] -> (frames [1,height,width,3], *states).

    Each state is [1,channels,2,h,w]: the last two frames that a causal convolution has seen, zeros before the
    start.
    """

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """latents: normalised. Frames are in 0..1, in the latents' dtype."""
        slots = sum(1 for module in self.decoder.modules() if isinstance(module, nn.Conv3d))
        frames, cache = self._decode(latents, [None] * slots, first=True)
        states: list[Tensor] = []
        for entry in cache:
            if isinstance(entry, str):
                # "Rep": a temporal upsampler. It starts at the second latent frame and sees zeros before.
                # Its input has the shape that the residual block in front of it has just cached.
                states.append(torch.zeros_like(states[-1]))
            else:
                states.append(torch.cat((torch.zeros_like(entry), entry), dim=2))  # [1,channels,2,h,w]
        return frames, *states


class DecodeNext(_Decode):
    """Later latent frames: (latents [1,Cz,n,H,W], *states) -> (frames [f,height,width,3], *next states)."""

    def forward(self, latents: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """latents: normalised; states: as they came out of the frame before, same order and shapes."""
        frames, cache = self._decode(latents, list(states), first=False)
        return frames, *cache


class _DecodeBlocks(nn.Module):
    """What both halves share for a BlockVAE; the state is the raw latent frame before, [1,Cz,H,W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: BlockVAE) -> None:
        super().__init__()
        self.vae = vae
        mean, std = latent_statistics(vae)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def _raw(self, latents: Tensor) -> Tensor:
        return (latents * self.std + self.mean)[0].transpose(0, 1)  # [n,Cz,H,W]

    def _frames(self, now: Tensor, before: Tensor) -> Tensor:
        frames = self.vae.decode_frame(now, before).flatten(0, 1)  # [t*n,height,width,3]
        return (frames.clamp(-1.0, 1.0) + 1.0) * 0.5


class DecodeBlocksFirst(_DecodeBlocks):
    """Decodes a video's first latent frame: latents [1,Cz,1,H,W] -> (frames [1,height,width,3], state)."""

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents: normalised. Frames are in 0..1, in the latents' dtype."""
        now = self._raw(latents)
        return self._frames(now, now)[-1:], now


class DecodeBlocksNext(_DecodeBlocks):
    """Later latent frames: (latents [1,Cz,n,H,W], state) -> (frames [t*n,height,width,3], next state)."""

    def forward(self, latents: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """latents: normalised; state: as it came out of the frame before."""
        now = self._raw(latents)
        before = state if len(now) == 1 else torch.cat((state, now[:-1]))
        return self._frames(now, before), now[-1:]
