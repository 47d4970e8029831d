"""From pictures and labels to concept tokens: Q-Former, DAM (arXiv 2501.04698) and its table 3's variants.

Encoders take one picture's dense tokens to that concept's visual tokens; binders tie these to the concept's
label. The first axis, here M, counts concepts: N of one request, or B*N of a training batch.

Letters: P picture tokens, Q tokens per concept, L label tokens, Dp picture width, Dc concept width, Dt text
width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.cross_attention import attention
from .config import ModelConfig
from .layers import mean_label
from .rival_encoders import EmbeddingTokens, GroundedResampler, LabelSelected


class FeedForward(nn.Sequential):
    """Two layers with GELU: [..., width_in] -> [..., width]."""

    def __init__(self, width: int, hidden: int, width_in: int | None = None) -> None:
        super().__init__(nn.Linear(width_in or width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MultiHead(nn.Module):
    """Multi-head attention with all four projections: x [M,Q,Dc] attends to context [M,P,Dc] -> [M,Q,Dc]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [M,Q,Dc], context [M,P,Dc] -> [M,Q,Dc]."""
        q, k, v = (
            project(source).unflatten(-1, (self.heads, -1))  # [M,Q|P,A,E]
            for project, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(attention(q, k, v).flatten(-2))  # [M,Q,Dc]


class QFormerLayer(nn.Module):
    """Cross-attention to the picture, then feed-forward, both residual with the norm in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = MultiHead(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        """x [M,Q,Dc], picture [M,P,Dc] -> [M,Q,Dc]."""
        x = x + self.attn(self.norm1(x), picture)
        return x + self.ffn(self.norm2(x))


class QFormer(nn.Module):
    """Learned queries that read a picture: dense tokens [M,P,Dp] -> visual queries [M,Q,Dc]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.concept
        self.queries = nn.Parameter(torch.randn(c.queries, c.width))  # unit variance keeps them apart
        self.proj_in = nn.Linear(c.picture_dim, c.width)
        self.norm_in = nn.LayerNorm(c.width)
        self.layers = nn.ModuleList([QFormerLayer(c.width, c.heads) for _ in range(c.layers)])
        self.norm_out = nn.LayerNorm(c.width)

    def forward(self, picture_tokens: Tensor) -> Tensor:
        """[M,P,Dp] -> [M,Q,Dc]."""
        picture = self.norm_in(self.proj_in(picture_tokens))  # [M,P,Dc]
        x = self.queries.expand(picture.shape[0], -1, -1)  # [M,Q,Dc]
        for layer in self.layers:
            x = layer(x, picture)
        return self.norm_out(x)


class MLPEncoder(nn.Module):
    """Without Q-Former: every picture token through a two-layer network, [M,P,Dp] -> [M,P,Dc]; `joined_mlp`:
    P/Q neighbours of a row at a time, joined along channels, -> [M,Q,Dc]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.concept
        self.joined = c.picture_tokens // c.tokens_per_concept
        self.ffn = FeedForward(c.width, 4 * c.width, width_in=self.joined * c.picture_dim)

    def forward(self, picture_tokens: Tensor) -> Tensor:
        """[M,P,Dp] -> [M,Q,Dc]."""
        if self.joined > 1:
            picture_tokens = picture_tokens.unflatten(1, (-1, self.joined)).flatten(2)  # [M,Q,Dp*P/Q]
        return self.ffn(picture_tokens)


class DecoupleAttention(nn.Module):
    """DAM: binds a concept's visual tokens x to its label's tokens y, inside the pair.

    Q = W_Q x; K, V = W_K y, W_V y; b = Q + Attention(Q, K, V); c = b + FFN(b). The residual is on the
    projected Q.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.concept
        self.heads = c.heads
        self.to_q = nn.Linear(c.width, c.width, bias=False)
        self.to_k = nn.Linear(config.transformer.text_dim, c.width, bias=False)
        self.to_v = nn.Linear(config.transformer.text_dim, c.width, bias=False)
        self.ffn = FeedForward(c.width, 4 * c.width)

    def forward(self, visual_queries: Tensor, label_text: Tensor, label_mask: Tensor) -> Tensor:
        """visual_queries [M,Q,Dc], label_text [M,L,Dt], label_mask bool [M,L] -> concept tokens [M,Q,Dc].

        A label without any token (a padded concept) contributes zero.
        """
        heads = (self.heads, -1)
        q = self.to_q(visual_queries)  # [M,Q,Dc]
        k, v = (
            self.to_k(label_text).unflatten(-1, heads),
            self.to_v(label_text).unflatten(-1, heads),
        )  # [M,L,A,E]
        b = q + attention(q.unflatten(-1, heads), k, v, label_mask).flatten(-2)  # [M,Q,Dc]
        return b + self.ffn(b)


class VisualOnly(nn.Module):
    """Without DAM: the visual tokens are the concept tokens and labels are unused."""

    def forward(
        self, visual_queries: Tensor, label_text: Tensor | None = None, label_mask: Tensor | None = None
    ) -> Tensor:
        """visual_queries [M,Q,Dc] as they are."""
        return visual_queries


class ConcatMLP(nn.Module):
    """Variant: the mean label joined to every visual token along channels, two layers back to width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.concept
        self.proj_label = nn.Linear(config.transformer.text_dim, c.width)
        self.ffn = FeedForward(c.width, 4 * c.width, width_in=2 * c.width)

    def forward(self, visual_queries: Tensor, label_text: Tensor, label_mask: Tensor) -> Tensor:
        """visual_queries [M,Q,Dc], label_text [M,L,Dt], label_mask bool [M,L] -> concept tokens [M,Q,Dc]."""
        label = self.proj_label(mean_label(label_text, label_mask))  # [M,1,Dc]
        return self.ffn(torch.cat((visual_queries, label.expand_as(visual_queries)), dim=-1))


class PairSelfAttention(nn.Module):
    """Variant: the mean label added to every visual token, then residual self-attention within the pair;
    `self_attention_ffn`: and DAM's feed-forward behind it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.concept
        self.proj_label = nn.Linear(config.transformer.text_dim, c.width)
        self.norm = nn.LayerNorm(c.width)
        self.attn = MultiHead(c.width, c.heads)
        self.ffn = FeedForward(c.width, 4 * c.width) if c.binding == "self_attention_ffn" else None

    def forward(self, visual_queries: Tensor, label_text: Tensor, label_mask: Tensor) -> Tensor:
        """visual_queries [M,Q,Dc], label_text [M,L,Dt], label_mask bool [M,L] -> concept tokens [M,Q,Dc]."""
        x = visual_queries + mean_label(self.proj_label(label_text), label_mask)  # [M,Q,Dc]
        h = self.norm(x)
        x = x + self.attn(h, h)
        return x if self.ffn is None else x + self.ffn(x)


def concept_encoder(config: ModelConfig) -> nn.Module:
    """The encoder that `config.concept.encoder` names: picture tokens [M,P,Dp], and of some what
    ENCODER_INPUTS says -> visual tokens [M,Q,Dc]."""
    encoders = {
        "qformer": QFormer,
        "mlp": MLPEncoder,
        "joined_mlp": MLPEncoder,
        "image_embedding": EmbeddingTokens,
        "label_selected": LabelSelected,
        "grounded": GroundedResampler,
    }
    return encoders[config.concept.encoder](config)


def concept_binder(config: ModelConfig) -> nn.Module:
    """The binder that `config.concept.binding` names.

    (visual tokens [M,Q,Dc], label text [M,L,Dt], label mask bool [M,L]) -> concept tokens [M,Q,Dc].
    """
    if config.concept.binding == "none":
        return VisualOnly()
    binders = {
        "dam": DecoupleAttention,
        "concat_mlp": ConcatMLP,
        "self_attention": PairSelfAttention,
        "self_attention_ffn": PairSelfAttention,
    }
    return binders[config.concept.binding](config)
