"""Tiny random models of each class, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptmaster.runtime.video import Video

WIDTH, PIXELS = 16, 32


def tokenizer():
    """CLIP's, of single letters."""
    from transformers import CLIPTokenizer

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
    sized = CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    save("clip", transformers.CLIPModel(config), sized, own)
    dino = transformers.Dinov2Config(**vision(28, 14) | {"mlp_ratio": 2})
    save("dino", transformers.Dinov2Model(dino), sized)
    owl = transformers.Owlv2Config(
        text_config=text(own) | {"max_position_embeddings": 16}, vision_config=vision(), projection_dim=WIDTH
    )
    reads = Owlv2ImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    own.model_max_length = 16
    found = transformers.Owlv2ForObjectDetection(owl)
    for parameter in found.box_head.parameters():  # boxes of a patch's size, where the patch is
        parameter.data.mul_(0.01)
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
    save(
        "clipseg", transformers.CLIPSegForImageSegmentation(seg), transformers.CLIPSegProcessor(squares, own)
    )
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
        "blocks_per_stage": [1, 1, 2, 1],
        "global_attention_blocks": [3],
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


def textured(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """A picture with detail at all places, uint8 [H,W,3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def moving(frames: int = 9, x: int = 2, y: int = 0, seed: int = 0) -> np.ndarray:
    """A video that moves by x, y pixels a frame."""
    picture = textured(seed=seed)
    return np.stack([np.roll(picture, (y * i, x * i), (0, 1)) for i in range(frames)])


def save_video(path: Path, frames: np.ndarray, fps: float = 8.0, scale: int | None = None) -> None:
    Video(frames, fps, 0, "").save(path, scale=scale)


@pytest.fixture(scope="session")
def gallery(tmp_path_factory) -> Path:
    """A folder of pictures as the set is made of."""
    root = tmp_path_factory.mktemp("pictures")
    named: dict[str, Sequence[str]] = {
        "persons": ["young man/anna.png", "young man/bo.png", "woman/c.png", "old man/d.png"],
        "livings": ["dog_1.png", "dog_2.png", "cat.png", "owl/x.png"],
        "stuffs": ["red_lamp.png", "ice cream.png", "bench/b.png"],
    }
    for kind, names in named.items():
        for seed, name in enumerate(names):
            path = root / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(textured(64, 64, seed=hash_of(kind) + seed)).save(path)
    return root


def hash_of(text: str) -> int:
    return sum(text.encode())
