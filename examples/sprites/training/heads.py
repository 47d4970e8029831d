"""Training-only heads that ask where every concept is: the video's tokens, and the caption's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayoutHead(nn.Module):
    """Where every concept is: a bilinear match of video tokens [B,S,D] and concept tokens [B,N,Q,Dc] ->
    [B,N,S]."""

    def __init__(self, width: int, concept_width: int, inner: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.video = nn.Linear(width, inner)
        self.concept = nn.Linear(concept_width, inner)
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, hidden: Tensor, concepts: Tensor) -> Tensor:
        """Logits of coverage."""
        tokens, wanted = self.video(self.norm(hidden)), self.concept(concepts.mean(2))
        return torch.einsum("bsd,bnd->bns", tokens, wanted) / tokens.shape[-1] ** 0.5 + self.bias


class StoryHead(nn.Module):
    """Where every concept will be, read from the caption alone: concept tokens [B,N,Q,Dc] look into the
    caption's tokens [B,T,Dt] -> coverage logits [B,N,S]."""

    def __init__(self, concept_width: int, text_width: int, tokens: int, inner: int = 64) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(concept_width, inner), nn.Linear(text_width, inner)
        self.net = nn.Sequential(nn.Linear(text_width, 256), nn.GELU(), nn.Linear(256, tokens))

    def forward(self, concepts: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """``mask`` bool [B,T]: the caption's tokens."""
        scores = torch.einsum("bni,bti->bnt", self.query(concepts.mean(2)), self.key(text)) / 8
        return self.net(scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ text)


def coverage_loss(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean binary cross-entropy of the rows of logits [...,S] that are ``counted``, bool [...]; zero where a
    batch has nothing to ask for. No shape depends on which rows these are."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return masked_mean(losses, counted[..., None])


def masked_mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of those values that are counted, bool of as many axes; zero where none is."""
    counted = counted.expand_as(values)
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)
