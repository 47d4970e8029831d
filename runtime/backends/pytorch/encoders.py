"""Encoders that do not read what is only padding."""

from __future__ import annotations

import torch

TEXT_BUCKET = 32
"""A text's tokens are so many, or a multiple."""


class ShortText(torch.nn.Module):
    """A text encoder that reads no padding: what it makes of real tokens does not depend on that."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids int64 [B,T], mask bool [B,T], real tokens first -> text [B,T,Dt], exactly zero where masked."""
        kept = bucket(int(mask.sum(1).max()), ids.shape[1])
        text = self.encoder(ids[:, :kept], mask[:, :kept])  # [B,kept,Dt]
        return torch.nn.functional.pad(text, (0, 0, 0, ids.shape[1] - kept))  # [B,T,Dt]


class Cropped(torch.nn.Module):
    """An encoder of pictures of their own size that gets each without the rest of its square."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, frames: torch.Tensor, area: torch.Tensor) -> tuple[torch.Tensor]:
        """As `EncodeArea.forward`."""
        height, width = (int(area[0, 0, 0].any(dim=axis).sum()) for axis in (1, 0))
        space = frames.shape[1] // area.shape[3]
        latents = self.encoder(frames[:, : height * space, : width * space])[0]  # [1,Cz,1,height,width]
        rest = (0, area.shape[4] - width, 0, area.shape[3] - height)
        return (torch.nn.functional.pad(latents, rest),)


def bucket(count: int, most: int) -> int:
    """How many tokens are read of so many that count: few lengths, so that few shapes are captured."""
    return min(most, -(-count // TEXT_BUCKET) * TEXT_BUCKET)
