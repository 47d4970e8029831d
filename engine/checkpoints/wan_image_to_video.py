"""Which image-to-video model a base is, and what it does with pictures.

Six are known: Wan2.1's of a first frame, Wan2.1's of a first and a last one (which tells the two apart by a
table of positions), MAGREF, which is told by what it is called (magref.py), SkyReels-A2, whose own classes
have other names, Wan2.2's A14B, which has no picture encoder, and VACE, whose pictures are a control that
blocks of its own read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..checked import MOST, is_number
from ..concept_config import ConceptConfig
from ..encoders import CLIP_MEAN, CLIP_STD
from ..transformer_config import TransformerConfig
from .base import Base
from .derived import VACE_CLASS
from .diffusers_folder import LAYOUT, PROCESSOR
from .magref import is_magref

A2_TRANSFORMER = "A2Model"
A2_PIPELINES = ("A2Pipeline", "WanA2Pipeline")
"""What SkyReels-A2's programs call their classes. Its weights are otherwise a Wan2.1 of a first frame."""
VACE_PIPELINE = "WanVACEPipeline"
IMAGE_PIPELINE = "WanImageToVideoPipeline"
PIPELINES = (
    "WanPipeline",
    IMAGE_PIPELINE,
    "WanVideoToVideoPipeline",
    VACE_PIPELINE,
    *A2_PIPELINES,
    "WanSkyReelsA2WanT2VPipeline",
    "Phantom_Wan_S2V",
)
A2_REFERENCES, A2_FPS = 3, 15.0  # its programs write videos at this rate

BICUBIC = 3  # Pillow's number


def read_concept(
    base: Base, transformer: TransformerConfig, image_encoder: dict[str, Any], text_tokens: int
) -> ConceptConfig:
    """How the image-to-video model `base` takes its pictures.

    Args: transformer: its configuration, with an image_dim; image_encoder: the sizes of its CLIP;
        text_tokens: of a caption, and as many for a label, which nothing reads.
    Raises: ConfigError for what the engine cannot honour.
    """
    size = image_encoder["image_size"]
    _check_processor(base.where / PROCESSOR, base.processor, size)
    if is_a2(base):
        given, pictures = "references", A2_REFERENCES
        if transformer.pos_embed_seq_len is not None:
            raise ConfigError(f"{base.where}: SkyReels-A2 has no pos_embed_seq_len")
    elif is_magref(base):
        given, pictures = "canvas", 1
    else:
        given, pictures = ("first", 1) if transformer.pos_embed_seq_len is None else ("first_last", 2)
    width = image_encoder["hidden_size"]
    return ConceptConfig(
        max_concepts=pictures,
        picture_size=size,
        picture_tokens=(size // image_encoder["patch_size"]) ** 2 + 1,
        picture_dim=width,
        width=width,
        heads=1,
        label_tokens=text_tokens,
        injection="base",
        given=given,
    )


def frames_alone(base: Base, transformer: TransformerConfig, vae: Mapping[str, Any]) -> ConceptConfig | None:
    """How a model takes pictures that has no picture encoder, but channels for them as Wan2.2's I2V-A14B: a
    first one, and perhaps a last. None for any other model. Raises ConfigError for one of its two experts."""
    if transformer.image_dim is not None:
        return None
    if transformer.in_channels != 2 * vae["z_dim"] + vae["scale_factor_temporal"]:
        return None
    if "transformer_2" not in base.parts and (base.layout != LAYOUT or not base.index):
        raise ConfigError(
            f"{base.where} is one expert of an image-to-video model of two (Wan2.2 I2V-A14B): give both"
        )
    return ConceptConfig(max_concepts=2, injection="none", given="first_last")


def control(
    base: Base, transformer: TransformerConfig, adapter: ConceptConfig | None, references: int | None
) -> ConceptConfig | None:
    """How a VACE takes pictures: `references` of them, one where None is given. None for any other model.

    Raises: ConfigError, one line, for another model that a pipeline's name, or VACE's without its
        transformer, says it is.
    """
    pipeline = base.index.get("_class_name", "WanPipeline")
    if pipeline not in PIPELINES:
        raise ConfigError(
            f"{base.where} is of a {pipeline!r:.80}, which the engine does not have: it has "
            f"{', '.join(PIPELINES)}"
        )
    if transformer.vace_layers is None:
        if pipeline == VACE_PIPELINE:
            raise ConfigError(f"{base.where} is of a {VACE_PIPELINE}, but its transformer is none of VACE's")
        return None
    refuse_adapter(base, adapter)
    count = 1 if references is None else references
    try:
        return ConceptConfig(max_concepts=count, injection="none", given="control")
    except ConfigError:
        most = MOST["max_concepts"]
        raise ConfigError(f"references must be 1 to {most}, got {count!r:.60}") from None


def is_vace(base: Base) -> bool:
    """Whether the transformer is VACE's, by its class."""
    return base.part("transformer").config.get("_class_name") == VACE_CLASS


def refuse_adapter(base: Base, adapter: ConceptConfig | None) -> None:
    """Raises ConfigError where there is one, for a model that takes pictures itself."""
    if adapter is not None:
        raise ConfigError(f"{base.where} is an image-to-video model, which takes pictures itself: no adapter")


def is_a2(base: Base) -> bool:
    """Whether a class of SkyReels-A2's is named in the transformer's config.json or in model_index.json."""
    own = base.part("transformer").config.get("_class_name")
    entry = base.index.get("transformer")
    listed = isinstance(entry, list) and A2_TRANSFORMER in entry
    return own == A2_TRANSFORMER or listed or base.index.get("_class_name") in A2_PIPELINES


def expands_timesteps(base: Base) -> bool:
    """Whether each token has a time of its own, so that a picture can be the first latent frame: as the index
    says, or, where there is none, if the VAE is Wan2.2's of 48 channels, known by its shortcuts.

    Raises ConfigError for that VAE in a pipeline of Wan2.1's.
    """
    said, vae = base.index.get("expand_timesteps"), base.parts.get("vae")
    if said is not None and not isinstance(said, bool):
        raise ConfigError(f"{base.where}: expand_timesteps must be true or false, got {said!r:.80}")
    residual = vae is not None and vae.config.get("is_residual") is True
    if vae is not None and residual and base.index and not said:
        raise ConfigError(
            f"{vae.told} is the VAE of Wan2.2's TI2V-5B (is_residual), but the base is not: its "
            "model_index.json does not say expand_timesteps"
        )
    return bool(said) or residual


def _check_processor(path: Path, values: Mapping[str, Any] | None, size: int) -> None:
    """Refuses a preparation of pictures that the runtime does not do; without values it is CLIP's own."""
    if values is None:
        return
    wanted: dict[str, Any] = {
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": BICUBIC,
    }
    for name, value in wanted.items():
        if (found := values.get(name, value)) != value:
            raise ConfigError(f"{path}: {name} must be {value!r:.80}, got {found!r:.80}")
    sides = {"size": ({"shortest_edge": size}, size), "crop_size": ({"height": size, "width": size}, size)}
    for name, known in sides.items():
        if values.get(name, size) not in known:
            raise ConfigError(
                f"{path}: {name} must be {known[0]} for this image_encoder, got {values[name]!r:.80}"
            )
    numbers = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "rescale_factor": (1 / 255,)}
    for name, right in numbers.items():
        found = values.get(name, right)
        if not _close(found if isinstance(found, (list, tuple)) else [found], right):
            raise ConfigError(f"{path}: {name} must be CLIP's {list(right)}, got {found!r:.80}")


def _close(found: Sequence[Any], right: Sequence[float]) -> bool:
    """Whether these are the right numbers, but for their last digits."""
    numbers = len(found) == len(right) and all(map(is_number, found))
    return numbers and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found, right, strict=True))
