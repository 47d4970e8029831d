"""Text and image encoders, from transformers, which is imported here only, when one is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# How CLIP's pictures are normalised, by channel of 0..1: OpenAI's constants.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class TextEncoder(nn.Module):
    """UMT5's encoder with random weights, for captions and for labels. `config`: arguments of UMT5Config."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers.models.umt5.configuration_umt5 import UMT5Config
        from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

        self.model = UMT5EncoderModel(UMT5Config(**config))
        # The default attention cannot be exported: it views a tensor whose strides do not allow it.
        self.model.set_attn_implementation("eager")

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """token_ids int64 [B,T], token_mask bool [B,T] -> text [B,T,Dt], exactly zero where masked."""
        hidden = self.model(input_ids=token_ids, attention_mask=token_mask).last_hidden_state  # [B,T,Dt]
        return hidden * token_mask[:, :, None].to(hidden.dtype)


class ImageEncoder(nn.Module):
    """CLIP's vision tower, random weights. `config`: arguments of CLIPVisionConfig.

    hidden: False gives the last layer through CLIP's projection, which concept modules read; True the layer
    before the last, the class token's too, which Wan's image-to-video models read: these have no projection.
    """

    def __init__(self, config: dict[str, Any], hidden: bool = False) -> None:
        super().__init__()
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

        whole = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        self.hidden = hidden
        self.model: Any = whole.vision_model if hidden else whole
        # No weights file has these numbers: built on the meta device they would have no values.
        embeddings = whole.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device="cpu")[None]

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N,3,px,px], normalised as for CLIP -> picture tokens [N,P,Dp].

        The last layer's patch tokens (no class token), through the final layer norm and the projection that
        CLIP itself applies to its class token; or with `hidden` what enters the last layer.
        """
        if self.hidden:
            return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        tower = self.model.vision_model
        hidden = tower(pixel_values=pixels).last_hidden_state[:, 1:]  # [N,P,hidden]
        return self.model.visual_projection(tower.post_layernorm(hidden))  # [N,P,Dp]
