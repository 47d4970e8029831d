"""What pictures and words are compared by: CLIP, DINOv2, and LAION's head on CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from conceptmaster.errors import WeightsError

CLIP = {"clip": "CLIPModel"}
DINO = {"dinov2": "Dinov2Model"}
BATCH = 32


class Looks(Protocol):
    """Tells pictures apart."""

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H,W,3] each, of any size -> unit rows float32 [n,D]."""


class Names(Looks, Protocol):
    """Tells pictures apart, and which words are of which."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit rows float32 [n,D], of the same space as the pictures'."""


class Clip:
    """CLIP's embeddings of pictures and texts. clip: an opened CLIPModel."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.processor, self.tokenizer = clip.image_processor(), clip.tokenizer()

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """See ``Looks``."""
        return _in_batches(pictures, self._pictures)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """See ``Names``; a text beyond CLIP's 77 tokens is cut."""
        import torch

        longest = self.clip.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        model = self.clip.model
        with torch.no_grad():
            told = model.text_model(**tokens.to(self.clip.device)).pooler_output
            return _unit(model.text_projection(told))

    def _pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        model = self.clip.model
        seen = model.vision_model(**_pixels(self.processor, pictures, self.clip.device)).pooler_output
        return _unit(model.visual_projection(seen))


class Dino:
    """DINOv2's class token. dino: an opened Dinov2Model."""

    def __init__(self, dino: Any) -> None:
        self.dino, self.processor = dino, dino.image_processor()

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """See ``Looks``."""
        return _in_batches(pictures, self._pictures)

    def _pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return _unit(self.dino.model(**_pixels(self.processor, pictures, self.dino.device)).pooler_output)


class Aesthetic:
    """LAION's linear head on CLIP ViT-L/14's unit embedding of a picture: 0..10, about."""

    def __init__(self, looks: Looks, weight: np.ndarray, bias: float) -> None:
        self.looks, self.weight, self.bias = looks, weight, bias

    @classmethod
    def open(cls, looks: Looks, path: Path) -> Aesthetic:
        """With the head in a safetensors file of ``weight`` [1,D] and ``bias`` [1]. Raises WeightsError."""
        weight, bias = read_head(path)
        return cls(looks, weight, bias)

    def scores(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Of each picture, float [n]. Raises WeightsError for a head of another CLIP."""
        seen = self.looks.pictures(pictures)
        if seen.shape[1] != len(self.weight):
            raise WeightsError(
                f"the aesthetic head reads {len(self.weight)} numbers, this CLIP gives {seen.shape[1]}: "
                "LAION's is for ViT-L/14"
            )
        return seen @ self.weight + self.bias


def read_head(path: Path) -> tuple[np.ndarray, float]:
    """Weight [D] and bias of a linear head in safetensors. Raises WeightsError, one line."""
    from conceptmaster.engine.checkpoints.safetensors_io import load

    try:
        tensors, _ = load(path)
    except FileNotFoundError as error:
        raise WeightsError(str(error)) from None
    if set(tensors) != {"weight", "bias"} or tensors["weight"].ndim != 2 or len(tensors["weight"]) != 1:
        has = ", ".join(f"{name} {list(value.shape)}" for name, value in list(tensors.items())[:4])
        raise WeightsError(
            f"{path} is no aesthetic head: it must hold weight [1,D] and bias [1], and has {has or 'nothing'}"
        )
    return tensors["weight"][0].float().numpy(), float(tensors["bias"].reshape(-1)[0])


def _pixels(processor: Any, pictures: Sequence[np.ndarray], device: Any) -> Any:
    images = [Image.fromarray(np.ascontiguousarray(picture)) for picture in pictures]
    return processor(images=images, return_tensors="pt").to(device)


def _unit(values: Any) -> np.ndarray:
    return (values / values.norm(dim=-1, keepdim=True)).float().cpu().numpy()


def _in_batches(pictures: Sequence[np.ndarray], embed: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.concatenate([embed(pictures[k : k + BATCH]) for k in range(0, len(pictures), BATCH)])
