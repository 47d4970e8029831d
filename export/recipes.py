"""How a model's pictures are prepared, where an image-to-video model's stand in the video, how a large video
is decoded in tiles, and how much text the graphs take.

Read in diffusers' WanImageToVideoPipeline and WanVACEPipeline, in Phantom's, SkyReels-V3's and MAGREF's own
programs (MAGREF's leaves out the video's first four frames), and for SkyReels-A2 in its infer.py and
A2Pipeline: the first reference is one frame, the others fill a latent frame each; two are padded with white,
the third, a background, is cut to shape; and so many frames as three latent frames stand for are left out at
the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..engine.config import ModelConfig
from ..engine.encoders import CLIP_MEAN, CLIP_STD
from ..errors import InputError
from ..runtime.bundle_format.pictured import MOST_ON_CANVAS, FrameConditioning, FramePlacement, Pictures
from ..runtime.bundle_format.schema import Boxes
from ..runtime.bundle_format.shapes import Tile

WHITE = (255, 255, 255)
LEAST_TILE = 4  # latents of a side: a quarter of it, which tiles share, is one
A2_CLIP_SIDE = 512  # pixels that a reference is padded and scaled to, before CLIP's own preparation


def pictures_of(config: ModelConfig) -> Pictures:
    """How the picture encoder's pictures are prepared."""
    kinds = {
        "none": Pictures(CLIP_MEAN, CLIP_STD, WHITE),
        "references": Pictures(CLIP_MEAN, CLIP_STD, WHITE, "middle", A2_CLIP_SIDE),
        "canvas": Pictures(CLIP_MEAN, CLIP_STD, WHITE, "bicubic"),
    }
    found = kinds.get(config.concept.given, Pictures(CLIP_MEAN, CLIP_STD, WHITE, "middle"))
    return replace(found, tiled=config.concept.tiled or 0)


def conditioning_of(config: ModelConfig) -> FrameConditioning | None:
    """Where the pictures of an image-to-video model stand; None for any other."""
    kind, following = config.concept.given, config.vae["scale_factor_temporal"]
    first = FramePlacement(0, 1, "stretched")
    if kind == "none":
        return None
    if kind == "first":
        return FrameConditioning((first,), required=1, dropped_frames=0)
    if kind == "clean":
        return FrameConditioning((first,), required=0, dropped_frames=0)
    if kind == "control":  # each in front of the one before
        count = config.concept.max_concepts
        beside = tuple(FramePlacement(count - 1 - i, 1, "bilinear") for i in range(count))
        return FrameConditioning(beside, required=count, dropped_frames=0, beside=count)
    if kind == "grids":
        count = config.concept.max_concepts
        own = tuple(FramePlacement(number, 1, "own") for number in range(count))
        return FrameConditioning(own, 1, dropped_frames=0, kind=kind, side=config.concept.side or 0)
    if kind == "behind":
        count = config.concept.max_concepts
        behind = tuple(FramePlacement(number, 1, "centred") for number in range(count))
        return FrameConditioning(behind, config.concept.fewest or count, dropped_frames=0, kind=kind)
    if kind == "first_last":
        both = first, FramePlacement(-1, 1, "stretched")
        least = 2 if config.concept.takes_pictures else 1  # the mask tells Wan2.2 what there is
        return FrameConditioning(both, least, dropped_frames=0)
    if kind == "canvas":
        cells = (FramePlacement(0, 1, "centred"),) * MOST_ON_CANVAS
        return FrameConditioning(cells, required=1, dropped_frames=following, kind="canvas")
    places = [FramePlacement(0, 1, "padded")]
    for latent_frame in range(1, config.concept.max_concepts):
        fit = "padded" if latent_frame < 2 else "cut"
        places.append(FramePlacement(1 + following * (latent_frame - 1), following, fit))
    return FrameConditioning(tuple(places), required=1, dropped_frames=following)


def boxes_of(config: ModelConfig) -> Boxes | None:
    """Where a request may say where its concepts are: a box for each frame of patches; None for nowhere."""
    if config.concept.mask == "none":
        return None
    return Boxes(config.latent_shape[1] // config.transformer.patch_size[0], required=False)


def wording_of(config: ModelConfig) -> dict[str, Any]:
    """What stands in a prompt beside a caption, by the manifest's keys: Bernini's, read in its
    prompt_enhancer.py (the task r2v) and its test cases."""
    if config.concept.given != "grids":
        return {}
    prefix = "You are a helpful assistant specialized in subject-to-video generation."
    return {"prompt_prefix": prefix, "picture_name": "image"}


def tile_of(config: ModelConfig, size: tuple[int, int] | None) -> Tile | None:
    """The tiles that decode a video of `config`: `size` is their width and height in pixels, a quarter of
    which they share, as diffusers' do. None where no size is given, or the video is no larger than one.

    Raises InputError, which names the nearest that works, for sides that are not whole latents.
    """
    if size is None:
        return None
    space = config.vae["scale_factor_spatial"]
    nearest = tuple(space * max(LEAST_TILE, round(side / space)) for side in size)
    if nearest != size:
        raise InputError(
            f"a tile cannot be {size[0]}x{size[1]}: its sides must be multiples of {space} from "
            f"{LEAST_TILE * space} on; the nearest that works is {nearest[0]}x{nearest[1]}"
        )
    whole = config.latent_shape[2:]
    height, width = (min(side // space, most) for side, most in zip(reversed(size), whole, strict=True))
    if (height, width) == whole:
        return None
    return Tile((height, width), (max(1, height // 4), max(1, width // 4)))


def text_of(config: ModelConfig, tokens: int | None) -> tuple[ModelConfig, int | None]:
    """`config` with the text that the graphs take, and how many tokens text has for the model itself, where
    that is more: then one of `tokens` stands for all padding. None: as many as for the model.

    Raises InputError for a number of tokens that cannot be.
    """
    whole, concept = config.text_tokens, config.concept
    if tokens is None or tokens == whole:
        return config, None
    least = max(2, concept.label_tokens) if concept.has_modules else 2
    if not least <= tokens <= whole:
        raise InputError(
            f"--text-tokens {tokens}: choose {least} to {whole}, which is what this model reads; "
            "one of them stands for all padding"
        )
    if not concept.has_modules:  # which reads no labels
        config = replace(config, concept=replace(concept, label_tokens=min(concept.label_tokens, tokens)))
    return replace(config, text_tokens=tokens), whole
