"""Tiny random models of each class, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import pytest

WIDTH, PIXELS = 16, 32


def tokenizer():
    """CLIP's, of single letters."""
    from transformers import CLIPTokenizer
    from transformers.models.clip.tokenization_clip import CLIPTokenizer as Tokenizer

    assert CLIPTokenizer is Tokenizer
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,"]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[])


def text(own) -> dict[str, object]:
    return {
        "vocab_size": len(own),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": own.bos_token_id,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
    }


def vision(side: int = PIXELS, patch: int = 8) -> dict[str, object]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders by kind: clip, dino, owlv2, clipseg, sam2."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    root, own = tmp_path_factory.mktemp("models"), tokenizer()
    torch.manual_seed(0)

    def save(name: str, *parts: object) -> None:
        for part in parts:
            part.save_pretrained(root / name)

    config = transformers.CLIPConfig(text_config=text(own), vision_config=vision(), projection_dim=8)
    sized = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    save("clip", transformers.CLIPModel(config), sized, own)
    dino = transformers.Dinov2Config(**vision(28, 14) | {"mlp_ratio": 2})
    save("dino", transformers.Dinov2Model(dino), sized)
    owl = transformers.Owlv2Config(
        text_config=text(own) | {"max_position_embeddings": 16}, vision_config=vision(), projection_dim=WIDTH
    )
    reads = Owlv2ImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    own.model_max_length = 16
    found = transformers.Owlv2ForObjectDetection(owl)
    save("owlv2", found, transformers.Owlv2Processor(reads, own))
    own.model_max_length = 77
    seg = transformers.CLIPSegConfig(
        text_config=text(own),
        vision_config=vision() | {"num_hidden_layers": 3},
        projection_dim=8,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    squares = ViTImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    save("clipseg", transformers.CLIPSegForImageSegmentation(seg), transformers.CLIPSegProcessor(squares, own))
    save("sam2", tiny_sam2(transformers))
    return {path.name: path for path in root.iterdir()}


def tiny_sam2(transformers):
    """As facebook's folders are: of the kind sam2_video, though pictures are all that is asked of it."""
    backbone = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [64, 64],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 1, 1, 1],
        "global_attention_blocks": [2],
        "window_positional_embedding_background_size": [4, 4],
        "window_size_per_stage": [4, 4, 4, 2],
    }
    vision = {
        "backbone_config": backbone | {"model_type": "sam2_hiera_det_model"},
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    }
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    return transformers.Sam2Model(config)
