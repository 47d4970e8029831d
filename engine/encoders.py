"""Text and image encoders, from transformers, which is imported here only, when one is built."""

from __future__ import annotations

from collections.abc import Sequence
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

    gives: what of a picture it gives, [N,P,Dp]:
    `patches`: the last layer's patch tokens (no class token), through the final layer norm and the projection
    that CLIP itself applies to its class token;
    `hidden`: what enters the last layer, the class token's too; so Wan's image-to-video models read it, and
    MS-Diffusion;
    `embedding`: CLIP's image embedding, P = 1; `mean`: the mean of the `patches`, P = 1;
    `layers`: what leaves each of `layers` (counted from 1), the class token's too, one after the other.
    bare: without CLIP's last norm and projection, which `hidden` and `layers` do not read, and which weights
    files of Wan's do not have; with them the weights are the same whatever is read.
    """

    def __init__(
        self, config: dict[str, Any], gives: str = "patches", layers: Sequence[int] = (), bare: bool = False
    ) -> None:
        super().__init__()
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

        whole = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        self.gives, self.layers = gives, tuple(layers)
        self.model: Any = whole.vision_model if bare else whole
        # No weights file has these numbers: built on the meta device they would have no values.
        embeddings = whole.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device="cpu")[None]

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N,3,px,px], normalised as for CLIP -> picture tokens [N,P,Dp]."""
        if self.gives == "embedding":
            return self.model(pixel_values=pixels).image_embeds[:, None]  # [N,1,Dp]
        tower = getattr(self.model, "vision_model", self.model)
        if self.gives in ("patches", "mean"):
            hidden = tower(pixel_values=pixels).last_hidden_state[:, 1:]  # [N,P,hidden]
            patches = self.model.visual_projection(tower.post_layernorm(hidden))  # [N,P,Dp]
            return patches if self.gives == "patches" else patches.mean(1, keepdim=True)
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        if self.gives == "hidden":
            return states[-2]
        return torch.cat([states[layer] for layer in self.layers], dim=1)
