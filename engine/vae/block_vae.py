"""A video autoencoder of blocks: linear components of each block, and a small network that mends the picture.

For models that must be trained with little: 48 components of 4 frames of 8x8 pixels keep more of a drawn
video, from the first minute, than a convolutional autoencoder learns to keep in hours on a CPU. The encoder
is exact linear algebra. The decoder inverts it, then a convolutional network that sees a latent frame and the
one before it takes away what cutting into blocks left. Latent frames and causality are those of Wan's VAE:
the first latent frame is one video frame, every later one is `scale_factor_temporal`.

Letters: B batch, Cz latent channels, F H W latent frames, height, width, t and s a block's frames and side.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLD = 2
"""Where nothing else is said, pixels of a side that the network sees as one position: half the picture's
resolution."""


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class BlockVAE(nn.Module):
    """The arguments are the configuration's `vae` entry without its `kind`; see the module's text.

    `mean` [t*s*s*3] (a block's pixels in -1..1, by frame, row, column, colour), `basis` [Cz,t*s*s*3]
    (orthonormal rows) and `scale` [Cz] (what each component is multiplied by) are stored with the weights and
    found by analysis, not by gradient. `width` and `layers` are the mending network's, `fold` the pixels of a
    side that it sees as one position.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(
        self,
        z_dim: int,
        scale_factor_temporal: int,
        scale_factor_spatial: int,
        width: int,
        layers: int,
        latents_mean: list[float],
        latents_std: list[float],
        fold: int = FOLD,
    ) -> None:
        super().__init__()
        self.fold = fold
        t, s = self.frames, self.side = scale_factor_temporal, scale_factor_spatial
        self.config = SimpleNamespace(z_dim=z_dim, latents_mean=latents_mean, latents_std=latents_std)
        self.register_buffer("mean", torch.zeros(t * s * s * 3))
        self.register_buffer("basis", nn.init.orthogonal_(torch.empty(z_dim, t * s * s * 3)))
        self.register_buffer("scale", torch.ones(z_dim))
        channels = 3 * t * fold * fold
        self.conv_in = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*[_Residual(width) for _ in range(layers)])
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv_in.weight.device

    def encode(self, video: Tensor) -> Tensor:
        """video [B,3,1+tn,sH,sW] in -1..1 -> raw latents [B,Cz,1+n,H,W]; the first frame stands for t."""
        return self.project(torch.cat([video[:, :, :1]] * (self.frames - 1) + [video], dim=2))

    def project(self, video: Tensor) -> Tensor:
        """Whole blocks only: video [B,3,tF,sH,sW] in -1..1 -> raw latents [B,Cz,F,H,W]."""
        return (((self.cut(video) - self.mean) @ self.basis.T) * self.scale).permute(0, 4, 1, 2, 3)

    def cut(self, video: Tensor) -> Tensor:
        """video [B,3,tF,sH,sW] -> [B,F,H,W,t*s*s*3]."""
        t, s = self.frames, self.side
        blocks = video.unflatten(4, (-1, s)).unflatten(3, (-1, s)).unflatten(2, (-1, t))
        return blocks.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents [B,Cz,F,H,W] -> video [B,3,1+t(F-1),sH,sW], not clamped."""
        now = latents.transpose(1, 2)  # [B,F,Cz,H,W]
        before = torch.cat([now[:, :1], now[:, :-1]], dim=1)
        frames = self.decode_frame(now.flatten(0, 1), before.flatten(0, 1))  # [B*F,t,sH,sW,3]
        frames = frames.unflatten(0, now.shape[:2]).flatten(1, 2)[:, self.frames - 1 :]
        return frames.permute(0, 4, 1, 2, 3)

    def decode_frame(self, now: Tensor, before: Tensor) -> Tensor:
        """One latent frame and the one before it, raw [B,Cz,H,W] each -> frames [B,t,sH,sW,3], not clamped.

        A first latent frame is its own predecessor, and only the last of its frames counts.
        """
        drawn = self.synthesise(now)  # [B,12t,h,w] at half the resolution
        hidden = self.conv_in(torch.cat([drawn, self.synthesise(before)], dim=1))
        return self.unfold(drawn + self.conv_out(F.silu(self.blocks(hidden))))

    def synthesise(self, latents: Tensor) -> Tensor:
        """The linear inverse: raw latents [B,Cz,H,W] -> [B,t*fold*fold*3,sH/fold,sW/fold]."""
        t, fold, n = self.frames, self.fold, self.side // self.fold
        pixels = (latents / self.scale[:, None, None]).permute(0, 2, 3, 1) @ self.basis + self.mean
        b, h, w, _ = pixels.shape
        pixels = pixels.view(b, h, w, t, n, fold, n, fold, 3).permute(0, 3, 5, 7, 8, 1, 4, 2, 6)
        return pixels.reshape(b, t * fold * fold * 3, h * n, w * n)

    def unfold(self, folded: Tensor) -> Tensor:
        """[B,t*fold*fold*3,h,w] -> frames [B,t,h*fold,w*fold,3]."""
        b, _, h, w = folded.shape
        fold = self.fold
        pixels = folded.view(b, self.frames, fold, fold, 3, h, w).permute(0, 1, 5, 2, 6, 3, 4)
        return pixels.reshape(b, self.frames, h * fold, w * fold, 3)
