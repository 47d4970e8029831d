"""Everything that decides the model's shape: frozen dataclasses, validated once, stored with the weights."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from .checked import MOST, check_choice, check_entries, check_positive, check_types, require
from .concept_config import PATCH, ConceptConfig
from .transformer_config import TransformerConfig

VAES = ("wan", "blocks")
RULES = ("linear", "projected")
"""How guidance branches are added up: `projected` is guidance.py's."""

MOST_TABLE = 2**25
"""Numbers in a rotary table, and in the position channels; 81 frames of 832x480 need 4 million."""


@dataclass(frozen=True)
class ModelConfig:
    """The whole model and the one video shape that it is built for.

    `text_encoder`, `image_encoder` (empty where the injection is `none`) and `vae` are the arguments of
    transformers' UMT5Config and CLIPVisionConfig and of diffusers' AutoencoderKLWan; with `"kind": "blocks"`
    in it `vae` is that of this project's BlockVAE. boundary: of a base of two transformers, experts for high
    and for low noise, the time in 0..1 from which on, upwards, the first runs; None for one transformer.
    guidance_rule: how guidance branches are added up, one of RULES.
    Change a field with `dataclasses.replace`, which validates again.
    """

    name: str
    transformer: TransformerConfig
    concept: ConceptConfig
    text_encoder: dict[str, Any]
    image_encoder: dict[str, Any]
    vae: dict[str, Any]
    text_tokens: int = 512
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    boundary: float | None = None
    guidance_rule: str = "linear"
    latent_shape: tuple[int, int, int, int] = field(init=False, compare=False)
    """Channels, frames, height and width of one video's latents (Cz, F, H, W)."""
    denoised_shape: tuple[int, int, int, int] = field(init=False, compare=False)
    """Those of the latents that steps make: with the frames that stand beside the video's."""

    def __post_init__(self) -> None:
        """Raises ConfigError where parts do not fit each other, or the video shape does not fit the VAE."""
        check_types(self)
        check_positive(self, "text_tokens", "frames", "height", "width")
        require(0.01 <= self.fps <= MOST["fps"], f"ModelConfig.fps must be 0.01 to 1000, got {self.fps}")
        require(
            self.boundary is None or 0 < self.boundary < 1,
            f"ModelConfig.boundary must be between 0 and 1, got {self.boundary}",
        )
        check_choice(self, "guidance_rule", RULES)
        require(isinstance(self.vae, dict), f"the vae must be an object, got {self.vae!r:.60}")
        kind = self.vae.get("kind", "wan")
        require(kind in VAES, f"vae['kind'] must be one of {', '.join(VAES)}, got {kind!r:.60}")
        check_entries("text_encoder", self.text_encoder)
        check_entries("image_encoder", self.image_encoder)
        check_entries("vae of Wan's" if kind == "wan" else "vae of blocks", self.vae)
        require(self._entry("text_encoder", "vocab_size") > 1, "vocab_size needs room for padding and end")
        concept, transformer = self.concept, self.transformer
        require(
            concept.label_tokens <= self.text_tokens,
            f"label_tokens ({concept.label_tokens}) must not exceed text_tokens ({self.text_tokens})",
        )
        self._match("text_encoder", "d_model", transformer.text_dim, "transformer.text_dim")
        require(
            (concept.injection == "base") == (transformer.image_dim is not None),
            "concept.injection must be 'base' where there is a transformer.image_dim, and nowhere else, got "
            f"{concept.injection!r} with {transformer.image_dim!r}",
        )
        if concept.takes_pictures:
            self._check_pictures()
        if concept.keys == "text":
            require(
                concept.width == transformer.width,
                f"concept.width must be the transformer's ({transformer.width}) where keys are the text's, "
                f"got {concept.width}",
            )
        if concept.encoder == "grounded":
            require(
                concept.picture_dim % concept.heads == 0,
                f"concept.picture_dim ({concept.picture_dim}) must be a multiple of concept.heads "
                f"({concept.heads}) for 'grounded'",
            )
        if concept.injection == "base":
            self._check_base()
        if concept.given in ("none", "clean", "control", "behind", "grids"):
            self._match("vae", "z_dim", transformer.in_channels, "transformer.in_channels")
        else:
            self._check_given()
        if concept.given == "clean":
            self._check_clean()
        if concept.given in ("behind", "grids"):
            self._check_tokens()
        self._check_control()
        self._match("vae", "z_dim", transformer.out_channels, "transformer.out_channels")
        z = self._entry("vae", "z_dim")
        for name in ("latents_mean", "latents_std"):
            require(len(self._entry("vae", name)) == z, f"vae[{name!r}] must have z_dim ({z}) entries")
        require(all(s > 0 for s in self.vae["latents_std"]), "vae['latents_std'] must be positive")
        latents = self._latent_grid()
        beside = concept.max_concepts if concept.given == "control" else 0
        denoised = (latents[0] + beside, *latents[1:])
        channels, head = transformer.position_channels, transformer.attention_head_dim
        behind = concept.max_concepts if concept.given == "behind" else 0
        shown = (denoised[0] + behind, *denoised[1:])
        tokens = math.prod(n // p for n, p in zip(shown, transformer.patch_size, strict=True))
        tokens += concept.max_concepts * ((concept.side or 0) // PATCH) ** 2
        require(
            max(channels * math.prod(denoised), head * tokens) <= MOST_TABLE,
            f"a video of {self.frames} frames of {self.width}x{self.height} is too large: {tokens} tokens",
        )
        object.__setattr__(self, "latent_shape", (z, *latents))
        object.__setattr__(self, "denoised_shape", (z, *denoised))

    @property
    def conditioning_channels(self) -> int:
        """Channels that hold the conditioned frames: a mask for each video frame of a latent one (`clean`:
        for a latent one), then latents. `control`: latents of what is kept and of what is made anew, then a
        mask for each pixel of a latent one. `behind`: latents alone. `grids`: which picture is where, then
        latents. 0 where no pictures are frames."""
        if self.concept.given == "none":
            return 0
        if self.concept.given == "behind":
            return int(self._entry("vae", "z_dim"))
        if self.concept.given == "control":
            return int(2 * self._entry("vae", "z_dim") + self._entry("vae", "scale_factor_spatial") ** 2)
        masks = 1 if self.concept.given in ("clean", "grids") else self._entry("vae", "scale_factor_temporal")
        return int(masks + self._entry("vae", "z_dim"))

    def _check_pictures(self) -> None:
        """The picture encoder gives what the concept part reads."""
        concept = self.concept
        self._match("image_encoder", "image_size", concept.picture_size, "concept.picture_size")
        hidden = concept.pictures in ("hidden", "layers")
        width = "hidden_size" if hidden else "projection_dim"
        self._match("image_encoder", width, concept.picture_dim, "concept.picture_dim")
        grid = concept.picture_size // self._entry("image_encoder", "patch_size")
        layers = concept.picture_layers or (0,)
        most = self._entry("image_encoder", "num_hidden_layers")
        require(layers[-1] <= most, f"concept.picture_layers must be at most {most}, got {layers}")
        tokens = 1 if concept.encoder == "image_embedding" else (grid * grid + int(hidden)) * len(layers)
        require(
            concept.picture_tokens == tokens,
            f"concept.picture_tokens must be {tokens}, got {concept.picture_tokens}",
        )

    def _check_base(self) -> None:
        """The pictures' tokens that an image-to-video base reads fit it."""
        concept, transformer = self.concept, self.transformer
        for name in ("picture_dim", "width"):
            value = getattr(concept, name)
            require(
                value == transformer.image_dim,
                f"concept.{name} ({value}) must equal transformer.image_dim ({transformer.image_dim})",
            )
        tokens = transformer.pos_embed_seq_len
        require(
            tokens is None or tokens == concept.concept_tokens,
            f"transformer.pos_embed_seq_len ({tokens}) must equal the pictures' tokens "
            f"({concept.concept_tokens})",
        )

    def _check_given(self) -> None:
        """The frames that an image-to-video base's pictures are fit it."""
        concept, transformer = self.concept, self.transformer
        require(self.vae.get("kind", "wan") == "wan", "an image-to-video base needs Wan's VAE")
        wanted = self._entry("vae", "z_dim") + self.conditioning_channels
        require(
            transformer.in_channels == wanted,
            f"transformer.in_channels must be {wanted} for this VAE (noise, mask, pictures), got "
            f"{transformer.in_channels}",
        )
        least = 1 + self._entry("vae", "scale_factor_temporal") * (concept.min_latent_frames - 1)
        require(
            self.frames >= least,
            f"frames must be at least {least}, of which the pictures give some, got {self.frames}",
        )

    def _check_clean(self) -> None:
        """A picture can be the first latent frame, and leaves others to be made."""
        require(self.vae.get("kind", "wan") == "wan", "a given picture needs Wan's VAE")
        require(self.transformer.patch_size[0] == 1, "a given picture needs patches of one latent frame")
        require(self.frames > 1, f"frames must be more than the given one, got {self.frames}")

    def _check_tokens(self) -> None:
        """A picture can be embedded by itself."""
        require(self.vae.get("kind", "wan") == "wan", "pictures behind the video need Wan's VAE")
        require(self.transformer.patch_size[0] == 1, "pictures behind it need patches of one latent frame")
        require(
            self.transformer.position_channels == 0, "pictures behind the video need no position_channels"
        )
        if self.concept.given == "grids":
            space, patch = self._entry("vae", "scale_factor_spatial"), self.transformer.patch_size[1:]
            whole = all(space * side == PATCH for side in patch)
            require(whole, f"pictures of their own size need patches of {PATCH} pixels a side")
            require(not self.vae.get("is_residual"), "pictures of their own size need Wan2.1's VAE")
            most = PATCH * self.transformer.rope_max_seq_len
            require((self.concept.side or 0) <= most, f"ConceptConfig.side must be {most} at most")

    def _check_control(self) -> None:
        """What VACE's blocks read is what pictures give."""
        transformer, control = self.transformer, self.concept.given == "control"
        require(
            control == (transformer.vace_layers is not None),
            "concept.given must be 'control' where there are transformer.vace_layers, and nowhere else, got "
            f"{self.concept.given!r} with {transformer.vace_layers!r:.60}",
        )
        if control:
            require(self.vae.get("kind", "wan") == "wan", "a control needs Wan's VAE")
            require(transformer.patch_size[0] == 1, "a control needs patches of one latent frame")
            require(
                transformer.vace_in_channels == self.conditioning_channels,
                f"transformer.vace_in_channels must be {self.conditioning_channels} for this VAE (twice its "
                f"channels and a mask of its pixels), got {transformer.vace_in_channels}",
            )

    def _entry(self, part: str, name: str) -> Any:
        values = getattr(self, part)
        require(name in values, f"ModelConfig.{part} must have an entry {name!r}")
        return values[name]

    def _match(self, part: str, name: str, wanted: int, source: str) -> None:
        value = self._entry(part, name)
        require(value == wanted, f"{part}[{name!r}] ({value}) must equal {source} ({wanted})")

    def _latent_grid(self) -> tuple[int, int, int]:
        time, space = self._entry("vae", "scale_factor_temporal"), self._entry("vae", "scale_factor_spatial")
        if self.vae.get("kind", "wan") == "wan":
            self._check_wan_vae(time, space)
        else:
            fold = self.vae.get("fold", 2)
            require(
                space % fold == 0,
                f"vae['scale_factor_spatial'] must be a multiple of its fold ({fold}), got {space}",
            )
            for name in ("width", "layers"):
                self._entry("vae", name)
        require(
            (self.frames - 1) % time == 0, f"frames must be 1 plus a multiple of {time}, got {self.frames}"
        )
        for name in ("height", "width"):
            value = getattr(self, name)
            require(value % space == 0, f"{name} must be a multiple of {space}, got {value}")
        grid = ((self.frames - 1) // time + 1, self.height // space, self.width // space)
        for size, patch in zip(grid, self.transformer.patch_size, strict=True):
            require(
                size % patch == 0,
                f"the latents {grid} must divide into patches {self.transformer.patch_size}",
            )
        return grid

    def _check_wan_vae(self, time: int, space: int) -> None:
        self._entry("vae", "base_dim")
        built = 2 ** (len(self._entry("vae", "dim_mult")) - 1) * (self.vae.get("patch_size") or 1)
        require(
            space == built,
            f"vae['scale_factor_spatial'] ({space}) must be {built} for these dim_mult and patch",
        )
        built = 2 ** sum(self._entry("vae", "temperal_downsample"))
        require(
            time == built,
            f"vae['scale_factor_temporal'] ({time}) must be {built} for this temperal_downsample",
        )

    def to_dict(self) -> dict[str, Any]:
        """This configuration as JSON-ready nested dictionaries; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        del values["latent_shape"], values["denoised_shape"]
        if self.boundary is None:  # so that what has one transformer is stored as ever
            del values["boundary"]
        values["concept"] = self.concept.told()
        if self.guidance_rule == "linear":
            del values["guidance_rule"]
        own = values["transformer"]
        own["patch_size"] = list(self.transformer.patch_size)
        for name in ("vace_layers", "vace_in_channels"):  # and what is no VACE
            if own[name] is None:
                del own[name]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ConfigError for unknown or missing entries as for wrong values."""
        require(isinstance(values, dict), f"the configuration must be an object, got {values!r:.60}")
        values = dict(values)
        for name, part in (("transformer", TransformerConfig), ("concept", ConceptConfig)):
            require(isinstance(values.get(name), dict), f"the configuration must have an object {name!r}")
            values[name] = _build(part, values[name])
        return _build(cls, values)


def _build(cls: Any, values: dict[str, Any]) -> Any:
    fields = [f for f in dataclasses.fields(cls) if f.init]
    unknown = sorted(set(values) - {f.name for f in fields})
    require(not unknown, f"{cls.__name__} has no field {', '.join(unknown):.200}")
    needed = {f.name for f in fields if f.default is dataclasses.MISSING}
    missing = needed - set(values)
    require(not missing, f"{cls.__name__} needs the field {', '.join(sorted(missing))}")
    return cls(**values)
