"""Encoders of other systems, as values of `ConceptConfig.encoder`: IP-Adapter, SSR-Encoder, MS-Diffusion.

Each is what its own code does, with modules of the same names, but for what belongs to their base: a label is
read by this model's text encoder, and where they have one vector of a phrase it is the mean of its tokens.
How their tokens enter the transformer says the configuration: `shared_query` with `keys` of the text's.

The first axis, M, counts concepts. Letters: P picture tokens, Q tokens per concept, L label tokens, Dp
picture width, Dc concept width, Dt text width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.cross_attention import attention
from .config import ModelConfig
from .layers import mean_label

HEAD_WIDTH = 64
"""Of SSR-Encoder's attention, whatever the widths around it."""
FREQUENCIES, HIGHEST = 8, 100.0
"""How MS-Diffusion tells a coordinate: sine and cosine of it times HIGHEST^(k/8), k = 0..7."""


class EmbeddingTokens(nn.Module):
    """IP-Adapter (Ye et al., arXiv 2308.06721): an image embedding [M,1,Dp] -> LN(reshape(W e)), [M,Q,Dc]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.concept
        self.proj = nn.Linear(c.picture_dim, c.queries * c.width)
        self.norm = nn.LayerNorm(c.width)

    def forward(self, picture_tokens: Tensor) -> Tensor:
        """[M,1,Dp] -> [M,Q,Dc]."""
        tokens = self.proj(picture_tokens.squeeze(1))  # [M,Q*Dc]
        return self.norm(tokens.unflatten(-1, (-1, self.norm.normalized_shape[0])))  # [M,Q,Dc]


class LabelSelected(nn.Module):
    """SSR-Encoder (Zhang et al., arXiv 2312.16272): what a label's tokens look for, in several layers.

    Label and the last layer's hidden states are aligned once; what is found so is read out of every layer
    with its own values and its own way out: o_i = softmax(W_Q text (W_K h_last)^T / 8) W_V^i h_i W_O^i. The
    o_i, one after the other, are normalised. What a label's padding finds is finite, and must be masked.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.concept
        assert c.picture_layers is not None
        self.heads, inner = c.heads, c.heads * HEAD_WIDTH
        self.to_q = nn.Linear(config.transformer.text_dim, inner, bias=False)
        self.to_k = nn.Linear(c.picture_dim, inner, bias=False)
        self.to_v, self.to_out = (
            nn.ModuleList([nn.Linear(*widths, bias=False) for _ in c.picture_layers])
            for widths in ((c.picture_dim, inner), (inner, c.width))
        )
        self.norm = nn.LayerNorm(c.width)

    def forward(self, picture_tokens: Tensor, label_text: Tensor) -> Tensor:
        """picture_tokens: hidden states of all layers, one after the other, [M,layers*P,Dp]; label_text
        [M,L,Dt] -> [M,layers*L,Dc]."""
        layers = picture_tokens.chunk(len(self.to_v), dim=1)  # [M,P,Dp] each
        q, k = (
            x.unflatten(-1, (self.heads, -1)) for x in (self.to_q(label_text), self.to_k(layers[-1]))
        )  # [M,L|P,A,64]
        values = (
            to_v(hidden).unflatten(-1, (self.heads, -1))
            for to_v, hidden in zip(self.to_v, layers, strict=True)
        )
        found = [
            to_out(attention(q, k, v).flatten(-2)) for to_out, v in zip(self.to_out, values, strict=True)
        ]  # [M,L,Dc] each
        return self.norm(torch.cat(found, dim=1))


class PerceiverAttention(nn.Module):
    """Latents attend to a picture and to themselves; both are normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, picture: Tensor, latents: Tensor) -> Tensor:
        """picture [M,P,Dp], latents [M,Q,Dp] -> what to add to these, [M,Q,Dp]."""
        picture, latents = self.norm1(picture), self.norm2(latents)
        k, v = self.to_kv(torch.cat((picture, latents), dim=1)).chunk(2, dim=-1)  # [M,P+Q,Dp] each
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.to_q(latents), k, v))
        return self.to_out(attention(q, k, v).flatten(-2))


class GroundedResampler(nn.Module):
    """MS-Diffusion's resampler (Wang et al., arXiv 2406.07209): latents = LN(MLP(label + Fourier(box))) read
    the picture in some layers.

    A box without any area tells nothing: then the learned `grounding_latents` stand in for label and box,
    which training is to do for one concept in ten.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.concept
        width, told = c.picture_dim, config.transformer.text_dim + 8 * FREQUENCIES
        self.grounding_latents = nn.Parameter(torch.randn(1, c.queries, width) / width**0.5)
        self.latent_proj = nn.Sequential(
            nn.Linear(told, 2 * told), nn.GELU(), nn.Linear(2 * told, c.queries * width)
        )
        self.latent_norm = nn.LayerNorm(width)
        self.proj_in = nn.Linear(width, width)
        self.layers = nn.ModuleList(
            [
                nn.ModuleList([PerceiverAttention(width, c.heads), _feed_forward(width)])
                for _ in range(c.layers)
            ]
        )
        self.attention_norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, c.width)
        self.norm_out = nn.LayerNorm(c.width)

    def forward(self, picture_tokens: Tensor, label_text: Tensor, label_mask: Tensor, box: Tensor) -> Tensor:
        """picture_tokens [M,P,Dp] (hidden states), label_text [M,L,Dt], label_mask bool [M,L], box [M,4]
        (left, top, right, bottom in 0..1 of width and height) -> [M,Q,Dc]."""
        phrase = mean_label(label_text, label_mask).squeeze(1)  # [M,Dt]
        latents = self.latent_proj(torch.cat((phrase, fourier(box).type_as(phrase)), dim=-1))  # [M,Q*Dp]
        latents = self.latent_norm(latents.unflatten(-1, self.grounding_latents.shape[1:]))  # [M,Q,Dp]
        placed = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])  # [M]
        latents = torch.where(placed[:, None, None], latents, self.grounding_latents)
        picture = self.proj_in(picture_tokens)  # [M,P,Dp]
        for attend, feed_forward in cast("list[nn.ModuleList]", list(self.layers)):
            latents = latents + attend(picture, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(self.attention_norm(latents)))


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


def fourier(box: Tensor) -> Tensor:
    """Boxes [M,4] as MS-Diffusion tells them: [M,64], of each frequency the sines, then the cosines."""
    steps = torch.arange(FREQUENCIES, device=box.device, dtype=torch.float32) / FREQUENCIES
    angles = box[:, None, :] * HIGHEST ** steps[:, None]  # [M,8,4]
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


def selection_loss(tokens: Tensor, label: Tensor, label_mask: Tensor) -> Tensor:
    """SSR-Encoder's auxiliary loss: over its layers, the sum of the mean of 1 - cos(token, label's token).

    tokens [M,layers*L,Dc] of `LabelSelected`; label [M,L,Dc]: the label as the transformer's cross-attention
    reads it, which gets no gradient; label_mask bool [M,L]: padding does not count (theirs does). A scalar;
    zero where nothing counts.
    """
    parts = tokens.unflatten(1, (-1, label.shape[1]))  # [M,layers,L,Dc]
    cosine = nn.functional.cosine_similarity(parts, label.detach()[:, None], dim=-1)  # [M,layers,L]
    missing = torch.where(label_mask[:, None], 1 - cosine, 0.0).sum(dim=(0, 2))  # [layers]
    return (missing / label_mask.sum().clamp(min=1)).sum()
