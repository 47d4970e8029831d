"""Which base takes reference pictures as frames of their own, and how many.

VACE, whose blocks tell it, and two whose transformer is a plain text-to-video one of Wan2.1's:

* SkyReels-V3-R2V says so by a class of its own: its program's is SkyReelsA2WanI2v3DModel, what vLLM-Omni
  looks for in the published config.json is SkyReelsC1WanI2v3DModel, under a WanPipeline. A request has 1 to 4
  references, and places without one are zero latents.
* Phantom has Wan's own keys, shapes and configuration: nothing in its tensors tells it. It is told by a name
  with "phantom" in it, as all its files have (Phantom-Wan-1.3B.pth, Phantom_Wan_14B.safetensors.index.json,
  ComfyUI's and GGUF's too), see magref.py for which names count; or by a number of references, which no other
  text-to-video transformer takes. Its program takes 1 to 4, and no place stays empty.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace

from ...errors import ConfigError
from ..checked import is_whole
from ..concept_config import ConceptConfig
from ..transformer_config import TransformerConfig
from .base import Base
from .bernini import RENDERER, is_bernini
from .derived import VACE_CLASS
from .magref import names_at
from .wan_image_to_video import IMAGE_PIPELINE, control, expands_timesteps, refuse_adapter

log = logging.getLogger(__name__)

V3_TRANSFORMERS = ("SkyReelsC1WanI2v3DModel", "SkyReelsA2WanI2v3DModel")
V3, PHANTOM = "WanSkyReelsA2WanT2VPipeline", "Phantom_Wan_S2V"
"""What their own programs call their pipelines."""
NAMES = {PHANTOM: re.compile("phantom", re.IGNORECASE), V3: re.compile("skyreels.?v3.*r2v", re.IGNORECASE)}
MOST = 4
V3_SIDES = (
    *((588, 1568), (628, 1466), (666, 1388), (678, 1356), (698, 1318), (706, 1306), (720, 1280)),
    *((758, 1212), (784, 1176), (832, 1110), (960, 960), (1108, 832), (1176, 784), (1280, 720)),
    *((1320, 698), (1358, 680), (1386, 666)),
)
"""Height and width of its program's videos (720P), of which it takes those of the first reference's shape,
rounded down to 16."""


def told(base: Base, references: int | None) -> Base:
    """`base` with its pipeline's name in the index, where names or a number of references tell it. Raises
    ConfigError for a name that is Bernini's, without the file that tells it."""
    part = base.part("transformer")
    same = part.config.get("in_channels") == part.config.get("out_channels", part.config.get("in_channels"))
    plain = part.config.get("_class_name") != VACE_CLASS and part.config.get("image_dim") is None
    if not (same and plain) or expands_timesteps(base) or is_v3(base) or is_bernini(base.root):
        return base
    if base.index.get("_class_name", "WanPipeline") != "WanPipeline":
        return base
    names = [part.config.get("_name_or_path"), *names_at(part.where)]
    if part.where.is_relative_to(base.where):  # else the folder is called after another transformer
        names += [base.index.get("_name_or_path"), *names_at(base.where)]
    if any("bernini" in str(name).lower() for name in names):
        raise ConfigError(
            f"{part.where} is called Bernini, which is told by a config.json with model_type "
            f"{RENDERER!r} at the root of its folder in diffusers' layout: put it there, or rename "
            "what is none"
        )
    if "transformer_2" in base.parts:
        return base
    found = [kind for kind, pattern in NAMES.items() if any(pattern.search(str(name)) for name in names)]
    if not found and references is None:
        return base
    if not found and is_whole(references, MOST):
        log.warning("%s: nothing calls it a Phantom, it is run as one because of the references", part.where)
    return replace(base, index={**base.index, "_class_name": (found or [PHANTOM])[0]})


def is_v3(base: Base) -> bool:
    """Whether a class of SkyReels-V3's is named in the transformer's config.json or in model_index.json."""
    entry = base.index.get("transformer")
    own = [base.part("transformer").config.get("_class_name"), *(entry if isinstance(entry, list) else [])]
    return base.index.get("_class_name") == V3 or any(kind in V3_TRANSFORMERS for kind in own)


def is_phantom(base: Base) -> bool:
    """Whether the index says so, see `told`."""
    return base.index.get("_class_name") == PHANTOM


def read_references(
    base: Base, transformer: TransformerConfig, adapter: ConceptConfig | None, references: int | None
) -> ConceptConfig | None:
    """How a base takes pictures that are frames of their own; None for any other.

    Args: references: how many each request has, None for the model's default.
    Raises: ConfigError, one line, for a number that cannot be, for another model that is given one, and for
        one that a pipeline's name says it is not.
    """
    v3, phantom = is_v3(base), is_phantom(base)
    if (own := control(base, transformer, adapter, references)) is not None:
        return own
    if not (v3 or phantom):
        if references is not None:
            raise ConfigError(
                f"{base.where} takes no number of references: VACE, Phantom and Bernini-R do; MAGREF takes 1 "
                "to 8 from any bundle"
            )
        pictures = transformer.image_dim is not None or transformer.in_channels != transformer.out_channels
        if base.index.get("_class_name") == IMAGE_PIPELINE and not (pictures or expands_timesteps(base)):
            raise ConfigError(
                f"{base.where} is of a {IMAGE_PIPELINE}, but its transformer has no channels for pictures: "
                "that of a text-to-video model is a WanPipeline"
            )
        return None
    refuse_adapter(base, adapter)
    model = "SkyReels-V3" if v3 else "Phantom"
    if transformer.image_dim is not None or transformer.in_channels != transformer.out_channels:
        raise ConfigError(
            f"{base.where} is a {model}, but its transformer has an image_dim or channels for pictures, and "
            "that of a text-to-video model has neither"
        )
    if v3 and references not in (None, MOST):
        raise ConfigError(
            f"SkyReels-V3 has room for {MOST} references, and requests have 1 to {MOST}: leave out references"
        )
    count = MOST if v3 else 1 if references is None else references
    if not is_whole(count, MOST):
        raise ConfigError(f"references must be 1 to {MOST} for {model}, got {count!r:.60}")
    return ConceptConfig(max_concepts=count, injection="none", given="behind", fewest=1 if v3 else None)


def own_size(base: Base, size: tuple[int, int]) -> str:
    """What to add where a base cannot make videos of this width and height: the size that its program would
    take, if it has a rule."""
    if not is_v3(base) or min(size) < 1:
        return ""
    height, width = min(V3_SIDES, key=lambda sides: abs(sides[0] / sides[1] - size[1] / size[0]))
    return f"; SkyReels-V3's own size of this shape is {width // 16 * 16}x{height // 16 * 16}"
