"""Names of modules in Wan's own code, which ComfyUI keeps, and in diffusers'."""

from __future__ import annotations

import re

# Module names, diffusers' to Wan2.1's; what is not listed has the same name in both. diffusers swapped norm2
# and norm3; only the one before the cross-attention has weights, so both spellings are unambiguous.
_OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
}
_IN_BLOCK = {
    f"{ours}.{layer}": f"{theirs}.{name}"
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for layer, name in (
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "o"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
} | {
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
    "proj_in": "before_proj",  # these two of VACE's own blocks
    "proj_out": "after_proj",
}
BLOCK = re.compile(r"((?:vace_)?blocks\.\d+)\.(.+)")


def wan_name(module: str) -> str:
    """Wan2.1's own name of a module, or of a parameter that stands alone, from diffusers' name."""
    block = BLOCK.fullmatch(module)
    if block is None:
        return _OUTSIDE.get(module, module)
    return f"{block[1]}.{_IN_BLOCK.get(block[2], block[2])}"


_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}


def diffusers_name(tensor: str) -> str:
    """diffusers' name of a transformer's tensor, from Wan2.1's own; what is not known keeps its name."""
    module, dot, kind = tensor.rpartition(".")
    if kind not in ("weight", "bias"):
        module, dot, kind = tensor, "", ""
    block = BLOCK.fullmatch(module)
    if block is None:
        return f"{_OUTSIDE_BACK.get(module, module)}{dot}{kind}"
    return f"{block[1]}.{_IN_BLOCK_BACK.get(block[2], block[2])}{dot}{kind}"
