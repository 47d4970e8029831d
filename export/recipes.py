"""How a model's pictures are prepared, and where an image-to-video model's stand in the video.

Read in diffusers' WanImageToVideoPipeline, and for SkyReels-A2 in its infer.py and A2Pipeline: the first
reference is one frame, the others fill a latent frame each; two are padded with white, the third, a
background, is cut to shape; and so many frames as three latent frames stand for are left out at the end.
"""

from __future__ import annotations

from ..engine.config import ModelConfig
from ..engine.encoders import CLIP_MEAN, CLIP_STD
from ..runtime.manifest import Given, Pictures, Place

WHITE = (255, 255, 255)
A2_CLIP_SIDE = 512  # pixels that a reference is padded and scaled to, before CLIP's own preparation


def pictures_of(config: ModelConfig) -> Pictures:
    """How the picture encoder's pictures are prepared."""
    kinds = {
        "none": Pictures(CLIP_MEAN, CLIP_STD, WHITE),
        "references": Pictures(CLIP_MEAN, CLIP_STD, WHITE, "middle", A2_CLIP_SIDE),
    }
    return kinds.get(config.concept.given, Pictures(CLIP_MEAN, CLIP_STD, WHITE, "middle"))


def given_of(config: ModelConfig) -> Given | None:
    """Where the pictures of an image-to-video model stand; None for any other."""
    kind, following = config.concept.given, config.vae["scale_factor_temporal"]
    first = Place(0, 1, "stretched")
    if kind == "none":
        return None
    if kind == "first":
        return Given((first,), least=1, dropped=0)
    if kind == "first_last":
        return Given((first, Place(-1, 1, "stretched")), least=2, dropped=0)
    places = [Place(0, 1, "padded")]
    for latent_frame in range(1, config.concept.max_concepts):
        fit = "padded" if latent_frame < 2 else "cut"
        places.append(Place(1 + following * (latent_frame - 1), following, fit))
    return Given(tuple(places), least=1, dropped=following)
