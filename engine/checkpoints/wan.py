"""A Wan2.1 base: its parts' configurations as a ModelConfig, then its weights, whatever its layout (base.py).

Text-to-video and image-to-video; how the latter takes pictures is wan_image_to_video.py's.

What the engine cannot honour is refused, never guessed. Large weights stay on disk until a layer is called
(lazy_weights.py), so a model of any size takes about as much memory as its largest layer.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConfigError, WeightsError
from ..checked import MOST, WIDEST, is_number, is_whole
from ..concept_config import ConceptConfig
from ..concepts import concept_binder, concept_encoder
from ..config import ModelConfig
from ..dit import ConceptDiT
from ..model import ConceptMaster
from ..presets import preset
from ..sampling import Sampling
from ..transformer_config import TransformerConfig
from ..vae.wan_decoder import build_vae
from .base import Base, Part
from .bernini import own_grids
from .derived import VACE_CLASS
from .diffusers_folder import LAYOUT, SCHEDULER
from .lazy_weights import settle, stream, weight_of
from .releases import Release, release_of
from .safetensors_io import on_meta
from .wan_experts import read_boundary
from .wan_image_to_video import (
    A2_FPS,
    A2_TRANSFORMER,
    expands_timesteps,
    frames_alone,
    is_a2,
    read_concept,
    refuse_adapter,
)
from .wan_references import V3_TRANSFORMERS, own_size, read_references

if TYPE_CHECKING:
    from ..vae.wan_decoder import VAE

UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")

WIDEST_NEW = 2048  # channels of a new adapter; CLIP's largest has 1280
TEXT_TOKENS = 512  # of every Wan

# What diffusers takes where a transformer's config.json leaves it out; the rest has the same default here.
TRANSFORMER = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
VACE = {"vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96}
# What the first files of Wan's VAE leave out.
VAE_DEFAULTS = preset("wan2.1-14b").vae
VAE_ONLY = ("decoder_base_dim", "dropout", "is_residual", "in_channels", "out_channels", "patch_size")

# Of transformers' configurations what decides the model; they tell much else that does not.
TEXT_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
TEXT_OPTIONS = (
    "feed_forward_proj",
    "layer_norm_epsilon",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
IMAGE_SIZES = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
IMAGE_OPTIONS = ("hidden_act", "layer_norm_eps")

# The schedulers that a solver of the runtime gives the numbers of: its name, the entry that is the shift, and
# what the other entries must be where they are given.
_NO_SIGMAS = {f"use_{kind}_sigmas": False for kind in ("karras", "exponential", "beta")}
SCHEDULERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "UniPCMultistepScheduler": (
        "unipc",
        "flow_shift",
        {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "num_train_timesteps": 1000,
            "solver_order": 2,
            "solver_type": "bh2",
            "solver_p": None,
            "predict_x0": True,
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            "timestep_spacing": "linspace",
            "disable_corrector": [],
            "thresholding": False,
            "use_dynamic_shifting": False,
            "shift_terminal": None,
            **_NO_SIGMAS,
        },
    ),
    "FlowMatchEulerDiscreteScheduler": (
        "euler",
        "shift",
        {
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": False,
            "invert_sigmas": False,
            "shift_terminal": None,
            "stochastic_sampling": False,
            **_NO_SIGMAS,
        },
    ),
}


def read_sampling(base: Base) -> Sampling:
    """What scheduler/scheduler_config.json asks for; without such a file, what the release does.
    Raises ConfigError where no solver gives that.

    SkyReels-A2's programs put a scheduler of their own into its place, which this gives, as does a release's
    `own_scheduler`.
    """
    if is_a2(base):
        return Sampling("unipc", 8.0)
    path, release = base.where / SCHEDULER, release_of(base)
    if release.own_scheduler:
        return _sampling(release, release.solver, release.shift)
    if (values := base.scheduler) is None:
        if base.layout == LAYOUT:
            raise WeightsError(f"{path} is missing")
        return _sampling(release, release.solver, release.shift)
    kind = values.get("_class_name")
    if kind not in tuple(SCHEDULERS):  # a dictionary would want to hash it
        raise ConfigError(f"{path}: the scheduler must be {' or '.join(SCHEDULERS)}, got {kind!r:.80}")
    solver, shift, wanted = SCHEDULERS[kind]
    for name, value in wanted.items():
        # where diffusers' own default is another, an entry that is left out is wrong, too
        default = {"prediction_type": "epsilon", "use_flow_sigmas": False}.get(name, value)
        if (found := values.get(name, default)) != value:
            raise ConfigError(f"{path}: {name} must be {value!r} for the engine's solver, got {found!r:.80}")
    found = values.get(shift, 1.0)
    if not is_number(found) or not found > 0:
        raise ConfigError(f"{path}: {shift} must be a positive number, got {found!r:.80}")
    if release.boundary is None:  # diffusers' pipeline has the rest
        return Sampling(solver, float(found))
    return _sampling(release, solver, float(found))


def _sampling(release: Release, solver: str, shift: float) -> Sampling:
    """What a release has beside solver and shift."""
    return Sampling(
        solver,
        shift,
        release.steps,
        release.guidance,
        release.concept_guidance,
        release.negative,
        release.guidance_2,
        release.branches,
        release.scale_2,
    )


def read_config(
    base: Base,
    name: str,
    size: tuple[int, int],
    frames: int,
    concept: ConceptConfig | None = None,
    references: int | None = None,
    reference_side: int | None = None,
) -> ModelConfig:
    """The configuration of `base`, for videos of one shape.

    Args: name: the model's; size: width and height in pixels; frames: of the video; concept: the adapter's.
        Without it a base that has an image_encoder gets a new adapter as wide as its picture tokens, and one
        that has none takes no concepts. references: how many pictures a VACE or a Phantom takes (one);
        with reference_side, for a Bernini-R, see `own_grids`.
    Raises: ConfigError for what the engine cannot honour, and for a video that the base cannot make: that one
        names the nearest that it can; WeightsError for files that are missing or broken.
    """
    expands = _expands(base)
    transformer = _transformer(base.part("transformer"))
    second = base.parts.get("transformer_2")
    boundary = read_boundary(base, transformer, None if second is None else _transformer(second))
    vae = _vae(base.part("vae"))
    if (channels := vae["z_dim"]) != transformer.out_channels:
        raise ConfigError(
            f"{base.part('vae').where} is a VAE of {channels} latent channels, which must equal the "
            f"transformer's {transformer.out_channels}: Wan2.2's TI2V-5B has 48, every other Wan 16"
        )
    text_encoder = _encoder(base.part("text_encoder"), "umt5", TEXT_SIZES, TEXT_OPTIONS) | {
        "dropout_rate": 0.0
    }
    image_encoder: dict[str, Any] = {}
    if "image_encoder" in base.parts:
        image_encoder = _encoder(base.part("image_encoder"), "clip_vision_model", IMAGE_SIZES, IMAGE_OPTIONS)
    if (own := own_grids(base, concept, references, reference_side)) is not None:
        concept, image_encoder = own, {}
    elif (own := read_references(base, transformer, concept, references)) is not None:
        concept, image_encoder = own, {}
    elif transformer.image_dim is not None:
        concept = _own_concept(base, transformer, image_encoder, concept)
    elif is_a2(base):
        raise ConfigError(f"{base.where}: the transformer of SkyReels-A2 has an image_dim, this one has none")
    elif not expands and (own := frames_alone(base, transformer, vae)) is not None:
        refuse_adapter(base, concept)
        concept, image_encoder = own, {}
    elif image_encoder:
        concept = concept or _new_concept(image_encoder)
    elif concept is not None and concept.injection != "none":
        raise ConfigError(
            f"{base.where} has no image_encoder/: put there the CLIP that the adapter was trained with"
        )
    elif expands and frames > 1:
        concept = ConceptConfig(max_concepts=1, injection="none", given="clean")
    concept = concept or ConceptConfig(injection="none")
    patch_frames = transformer.patch_size[0]
    latent_frames = patch_frames * -(-concept.min_latent_frames // patch_frames)
    config = ModelConfig(
        name=name,
        transformer=transformer,
        concept=concept,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        vae=vae,
        # the smallest video of any base, until its true size is known to fit
        frames=1 + (latent_frames - 1) * vae["scale_factor_temporal"],
        height=transformer.patch_size[1] * vae["scale_factor_spatial"],
        width=transformer.patch_size[2] * vae["scale_factor_spatial"],
        fps=A2_FPS if concept.given == "references" else release_of(base).fps,
        boundary=boundary,
        guidance_rule="projected" if concept.given == "grids" else "linear",
    )
    _check_video(config, size, frames, own_size(base, size))
    return dataclasses.replace(config, width=size[0], height=size[1], frames=frames)


def load_base(base: Base, config: ModelConfig) -> ConceptMaster:
    """The model of `config` with the weights of `base`, in evaluation mode and float32 on the CPU.

    Large ones stay on disk and are read when they are used (lazy_weights.py): no file may change.
    Its concept part, if it has one, is new: it changes nothing in the video, unless its keys start as the
    text's. Raises WeightsError that names
    the part and lists every tensor that is missing, unexpected or mis-shaped.
    """
    model = on_meta(ConceptMaster, config, base.where)
    for expert, transformer in model.experts().items():
        _load(base, expert, transformer)
    _load(base, "text_encoder", model.text_encoder.model)
    if config.concept.takes_pictures:
        _load(base, "image_encoder", model.image_encoder.model)
    if config.concept.has_modules:
        model.qformer, model.dam = concept_encoder(config), concept_binder(config)
        for transformer in model.experts().values():
            transformer.initialise_concepts(weight_of)
    return model.eval()


def load_base_vae(base: Base, config: ModelConfig) -> VAE:
    """The VAE of `base`, in evaluation mode and float32 on the CPU. Raises as `load_base`."""
    vae = on_meta(build_vae, config, base.where)
    _load(base, "vae", vae)
    return vae


def _load(base: Base, name: str, module: torch.nn.Module) -> None:
    part = base.part(name)
    # transformers once saved this buffer, which its models make themselves
    stored = {k: v for k, v in part.tensors.items() if not k.endswith("embeddings.position_ids")}
    if isinstance(module, ConceptDiT):
        # nothing reads them, but every published image-to-video model has them; diffusers ignores them, too
        stored = {k: v for k, v in stored.items() if not UNUSED.fullmatch(k)}
    if name == "image_encoder" and not hasattr(module, "visual_projection"):
        # the tower alone: with or without the prefix that its file has as a part of a larger model
        tower = {k.removeprefix("vision_model."): v for k, v in stored.items()}
        stored = {k: v for k, v in tower.items() if k != "visual_projection.weight"}
    try:
        stream(module, stored, module.concept_keys() if isinstance(module, ConceptDiT) else frozenset())
        if name == "vae":  # small, and asked for its device, which on disk it does not have
            settle(module, torch.device("cpu"))
    except WeightsError as error:
        raise WeightsError(f"{part.where}: {error}") from error


def _expands(base: Base) -> bool:
    """As `expands_timesteps`; refuses that of a model of picture tokens or of two experts, which none is."""
    expands = expands_timesteps(base)
    if expands and base.part("transformer").config.get("image_dim") is not None:
        raise ConfigError(f"{base.where}: expand_timesteps is for a transformer without an image_dim")
    if expands and "transformer_2" in base.parts:
        raise ConfigError(f"{base.where}: expand_timesteps is for one transformer, and here are two")
    return expands


def _own(part: Part, kinds: tuple[str, ...], known: set[str]) -> dict[str, Any]:
    """The configuration of a part of one of the classes `kinds`, all of which must be known or empty."""
    path, values = part.told, part.config
    if (found := values.get("_class_name", kinds[0])) not in kinds:
        raise ConfigError(f"{path}: the model must be a {' or '.join(kinds)}, got {found!r:.80}")
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    for name, value in values.items():
        if name not in known and value is not None:
            raise ConfigError(f"{path}: {name} is {value!r:.80}, which the engine cannot honour")
    return {name: value for name, value in values.items() if name in known}


def _transformer(part: Part) -> TransformerConfig:
    path = part.told
    unknown = {"position_channels", "prediction"}  # this project's own
    defaults: dict[str, Any] = dict(TRANSFORMER)
    if part.config.get("_class_name") == VACE_CLASS:
        defaults |= VACE
    else:
        unknown |= VACE.keys()
    known = {field.name for field in dataclasses.fields(TransformerConfig)} - unknown
    kinds = ("WanTransformer3DModel", A2_TRANSFORMER, VACE_CLASS, *V3_TRANSFORMERS)
    values = defaults | _own(part, kinds, known)
    if values.get("out_channels", 0) is None:
        values["out_channels"] = values.get("in_channels", 16)
    if "cross_attn_norm" in values and not isinstance(values["cross_attn_norm"], bool):
        raise ConfigError(f"{path}: cross_attn_norm must be true or false")
    try:
        return TransformerConfig(**values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _vae(part: Part) -> dict[str, Any]:
    path = part.told
    values = VAE_DEFAULTS | _own(part, ("AutoencoderKLWan",), {*VAE_DEFAULTS, *VAE_ONLY})
    for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std", "attn_scales"):
        if not isinstance(values[name], list):
            raise ConfigError(f"{path}: {name} must be a list, got {values[name]!r:.80}")
    for name in ("z_dim", "base_dim", "num_res_blocks", "scale_factor_temporal", "scale_factor_spatial"):
        _require_size(path, name, values[name])
    _check_patches(path, values)
    return values


def _check_patches(path: Path, values: dict[str, Any]) -> None:
    """Frames in patches have as many channels more. Wan2.2's VAE has patches and shortcuts, Wan2.1's neither,
    and diffusers' module takes each alone."""
    patch, residual = values.get("patch_size"), values.get("is_residual", False)
    if patch is not None:
        _require_size(path, "patch_size", patch)
    if not isinstance(residual, bool):
        raise ConfigError(f"{path}: is_residual must be true or false, got {residual!r:.80}")
    wanted = 3 * (patch or 1) ** 2
    for name in ("in_channels", "out_channels"):
        if (found := values.get(name, 3)) != wanted:
            raise ConfigError(f"{path}: {name} must be {wanted} for this patch_size, got {found!r:.80}")


def _encoder(part: Part, kind: str, sizes: tuple[str, ...], options: tuple[str, ...]) -> dict[str, Any]:
    path, values = part.told, part.config
    if values.get("model_type") != kind:
        raise ConfigError(f"{path}: model_type must be {kind!r}, got {values.get('model_type')!r:.80}")
    for name in sizes:
        _require_size(path, name, values.get(name))
    return {name: values[name] for name in (*sizes, *options) if name in values}


def _require_size(path: Path, name: str, value: Any) -> None:
    if not is_whole(value, most := MOST.get(name, WIDEST)):
        what = f"a positive whole number of at most {most}"
        raise ConfigError(f"{path}: {name} must be {what}, got {value!r:.80}")


def _own_concept(
    base: Base, transformer: TransformerConfig, image_encoder: dict[str, Any], adapter: ConceptConfig | None
) -> ConceptConfig:
    """How an image-to-video base takes pictures, which no adapter can change."""
    refuse_adapter(base, adapter)
    if not image_encoder:
        raise ConfigError(
            f"{base.where} has no image_encoder/, which an image-to-video model reads pictures with"
        )
    return read_concept(base, transformer, image_encoder, TEXT_TOKENS)


def _new_concept(image_encoder: dict[str, Any]) -> ConceptConfig:
    """A new adapter's: as wide as the picture tokens, with heads of 64 where that divides."""
    width, side = image_encoder["projection_dim"], image_encoder["image_size"] // image_encoder["patch_size"]
    if width > WIDEST_NEW:
        raise ConfigError(f"an adapter as wide as the image_encoder's projection_dim, {width}, is too large")
    return ConceptConfig(
        picture_size=image_encoder["image_size"],
        picture_tokens=side * side,
        picture_dim=width,
        width=width,
        heads=width // 64 if width % 64 == 0 else 1,
    )


def _check_video(config: ModelConfig, size: tuple[int, int], frames: int, more: str) -> None:
    """Raises ConfigError with the nearest video that works, and with more, if this one does not."""
    transformer, vae = config.transformer, config.vae
    time, space = vae["scale_factor_temporal"], vae["scale_factor_spatial"]
    pf, ph, pw = transformer.patch_size

    def nearest(wanted: float, patch: int, least: int = 1) -> int:
        """The latent length that is closest to `wanted`."""
        return patch * min(max(-(-least // patch), round(wanted / patch)), transformer.rope_max_seq_len)

    width, height = (space * nearest(n / space, patch) for n, patch in zip(size, (pw, ph), strict=True))
    length = 1 + time * (nearest((frames - 1) / time + 1, pf, config.concept.min_latent_frames) - 1)
    if (width, height, length) != (*size, frames):
        raise ConfigError(
            f"the base cannot make {frames} frames of {size[0]}x{size[1]}: the width must be a multiple of "
            f"{space * pw}, the height of {space * ph}, and the frames {1 + time * (pf - 1)} plus a multiple "
            f"of {time * pf}; the nearest that works is {length} frames of {width}x{height}{more}"
        )
