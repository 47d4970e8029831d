"""What decides how pictures and labels become concept tokens, and where these enter the transformer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .checked import DEEPEST, MOST, check_choice, check_positive, check_types, is_number, is_whole, require

ENCODERS = ("qformer", "mlp", "joined_mlp")
RIVALS = ("image_embedding", "label_selected", "grounded")
"""Encoders of other systems, see rival_encoders.py: IP-Adapter's, SSR-Encoder's and MS-Diffusion's."""
ENCODER_INPUTS: dict[str, tuple[str, ...]] = {
    "label_selected": ("label_text",),
    "grounded": ("label_text", "label_mask", "box"),
}
"""What an encoder reads beside a picture's tokens, in the order in which it takes it."""
KEYS = ("own", "text")
POOLED = ("class", "mean")
MOST_TILED = 8
BINDINGS = ("dam", "none", "concat_mlp", "self_attention", "self_attention_ffn")
INJECTIONS = ("standalone", "shared_query", "merged")
MASKS = ("none", "boxes")
ENCODED = ("first", "first_last", "references", "canvas")
"""How pictures are frames of a base with a picture encoder."""
ALONE = ("none", "first_last", "clean", "control", "behind", "grids")
"""Of a base without one."""
PATCH = 16
"""Pixels of a side of a patch, where pictures keep their own size: Bernini rounds their sides to it."""


@dataclass(frozen=True)
class ConceptConfig:
    """How pictures and labels become concept tokens, and where these enter the transformer.

    encoder: `qformer` (learned queries), `mlp` (the paper's row "without Q-Former"), `joined_mlp` (the
    same with as many tokens as there are queries: neighbours of a row are joined first), or one of RIVALS:
    `image_embedding` (IP-Adapter: tokens of CLIP's image embedding, which its class token gives; where
    `pooled` is `mean` that of the patch tokens, for a picture encoder that was taught so), `label_selected`
    (SSR-Encoder: what each of the label's tokens looks for, in each of the picture encoder's
    `picture_layers`) or `grounded` (MS-Diffusion: queries made of label and box, and `layers` that read the
    picture). binding: `dam`, `none` (without DAM, labels unused), `concat_mlp`, `self_attention` or
    `self_attention_ffn` (with the feed-forward that `dam` has, too). injection: `standalone` (an injector of
    its own in every block), `shared_query` (own keys and values beside the text's, same query), `merged`
    (concept tokens behind the caption's, through the text cross-attention), `none` (the base alone: it takes
    no concepts and has none of the modules above) or `base` (an image-to-video base alone: pictures through
    its own keys and values beside the text's; labels say nothing to it).

    given: a base's frame conditioning, how pictures are also frames of the video. For `base`: `first` (the
    one picture is the first frame), `first_last` (two, at both ends), `references` (each leads the video in a
    latent frame of its own, which is then left out, as in SkyReels-A2), `canvas` (all of a request's pictures
    on one canvas, which is the first frame, and the one picture that the picture encoder sees; the frames
    around it are then left out: MAGREF). For `none`, where pictures are frames alone: `first_last`, of which
    a request may leave out the last (Wan2.2's I2V-A14B, which has no picture encoder), `clean` (the one
    picture, which a request may leave out, is the first latent frame, at time 0 while the others have the
    step's: Wan2.2's TI2V-5B, diffusers' `expand_timesteps`), `control` (each of `max_concepts` pictures is a
    latent frame of its own beside the video's, told to VACE's own blocks, and is not decoded), `behind` (each
    is a clean latent frame behind the video's, see references.py: Phantom's and SkyReels-V3's), `grids` (each
    of at most `max_concepts` keeps its own size, on a grid of its own: Bernini-R's), or `none`, as for every
    other injection.

    mask: what of the video may see a concept at all: `none` (all of it) or `boxes` (in each latent frame the
    patches that the concept's box touches, as a request tells: MS-Diffusion, arXiv 2406.07209), for the
    injections `standalone` and `shared_query`. No weight depends on it: any can be so.

    fewest: of `behind` how many pictures a request has at least, where places without one are zero latents;
    None for all of them. side: of `grids` the pixels that the longer side of a picture has at most; None for
    others.

    keys: where the injection is `shared_query`, `own` keys and values, which start silent, or `text`: they
    start as the text's, without a bias (IP-Adapter). scale: what the concepts' attention is multiplied with
    (its lambda). tiled: None, or how many pictures a request may have at most, all put on one picture, which
    is the one concept that the model sees (as the paper ran IP-Adapter): labels say nothing to it.
    """

    max_concepts: int = 4
    picture_size: int = 224
    picture_tokens: int = 256
    picture_dim: int = 768
    label_tokens: int = 16
    queries: int = 16
    layers: int = 4
    heads: int = 12
    width: int = 768
    encoder: str = "qformer"
    binding: str = "dam"
    injection: str = "standalone"
    given: str = "none"
    fewest: int | None = None
    side: int | None = None
    keys: str = "own"
    scale: float = 1.0
    picture_layers: tuple[int, ...] | None = None
    tiled: int | None = None
    pooled: str = "class"
    mask: str = "none"

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that cannot be built."""
        check_positive(self, "max_concepts", "picture_size", "picture_tokens", "picture_dim", "label_tokens")
        check_positive(self, "queries", "layers", "heads", "width")
        check_types(self)
        check_choice(self, "encoder", (*ENCODERS, *RIVALS))
        check_choice(self, "binding", BINDINGS)
        check_choice(self, "injection", (*INJECTIONS, "none", "base"))
        check_choice(self, "given", tuple(dict.fromkeys((*ALONE, *ENCODED))))
        check_choice(self, "mask", MASKS)
        require(
            self.mask == "none" or self.injection in INJECTIONS[:2],
            f"ConceptConfig.mask {self.mask!r} is for the injections {' and '.join(INJECTIONS[:2])}, not for "
            f"{self.injection!r}",
        )
        kinds = {"base": ENCODED, "none": ALONE}.get(self.injection, ("none",))
        require(
            self.given in kinds,
            f"ConceptConfig.given must be {' or '.join(map(repr, kinds))} where the injection is "
            f"{self.injection!r}, got {self.given!r}",
        )
        places = {"first": 1, "first_last": 2, "clean": 1, "canvas": 1}.get(self.given, self.max_concepts)
        require(
            self.max_concepts == places,
            f"ConceptConfig.max_concepts must be {places} for {self.given!r}, got {self.max_concepts}",
        )
        fewest = self.fewest is None or (self.given == "behind" and is_whole(self.fewest, self.max_concepts))
        require(
            fewest,
            f"ConceptConfig.fewest must be 1 to {self.max_concepts} for 'behind' and None for others, got "
            f"{self.fewest!r:.60}",
        )
        side = self.side is not None and is_whole(self.side, MOST["picture_size"]) and self.side % PATCH == 0
        require(
            side if self.given == "grids" else self.side is None,
            f"ConceptConfig.side must be a multiple of {PATCH} up to {MOST['picture_size']} for 'grids' and "
            f"None for others, got {self.side!r:.60}",
        )
        require(
            self.encoder != "joined_mlp" or self.picture_tokens % self.queries == 0,
            f"ConceptConfig.picture_tokens ({self.picture_tokens}) must be a multiple of "
            f"ConceptConfig.queries ({self.queries}) for 'joined_mlp'",
        )
        require(
            self.width % self.heads == 0,
            f"ConceptConfig.width ({self.width}) must be a multiple of ConceptConfig.heads ({self.heads})",
        )
        self._check_injection()
        self._check_rival()

    def _check_injection(self) -> None:
        """Keys, scale and tiled are there where they mean something."""
        check_choice(self, "keys", KEYS)
        require(
            self.keys == "own" or self.injection == "shared_query",
            f"ConceptConfig.keys must be 'own' where the injection is {self.injection!r}, got {self.keys!r}",
        )
        scaled = self.injection in ("standalone", "shared_query")
        require(
            self.scale == 1 or (scaled and is_number(self.scale, 100) and self.scale > 0),
            "ConceptConfig.scale must be above 0, at most 100, and 1 unless the injection is standalone or "
            f"shared_query, got {self.scale}",
        )
        alone = self.max_concepts == 1 and self.has_modules and not self.reads_labels and self.mask == "none"
        require(
            self.tiled is None or (alone and is_whole(self.tiled, MOST_TILED)),
            f"ConceptConfig.tiled must be None, or 1 to {MOST_TILED} where max_concepts is 1 and no label or "
            f"box is read, got {self.tiled!r:.60}",
        )

    def _check_rival(self) -> None:
        """What the encoders of other systems need."""
        check_choice(self, "pooled", POOLED)
        require(
            self.pooled == "class" or self.encoder == "image_embedding",
            f"ConceptConfig.pooled must be 'class' for {self.encoder!r}, got {self.pooled!r}",
        )
        layers = self.picture_layers
        require(
            (layers is not None) == (self.encoder == "label_selected"),
            "ConceptConfig.picture_layers must be there for 'label_selected' and nowhere else, got "
            f"{layers!r:.60}",
        )
        if self.encoder in ENCODER_INPUTS:
            require(
                self.binding == "none",
                f"ConceptConfig.binding must be 'none' for {self.encoder!r}, which reads the label itself, "
                f"got {self.binding!r}",
            )
        if layers is None:
            return
        whole = isinstance(layers, (tuple, list)) and all(is_whole(layer, DEEPEST) for layer in layers)
        require(
            whole and len(layers) > 0 and sorted(set(layers)) == list(layers),
            f"ConceptConfig.picture_layers must be numbers of layers, upwards from 1, got {layers!r:.60}",
        )
        object.__setattr__(self, "picture_layers", tuple(layers))
        tokens = len(layers) * self.label_tokens
        require(
            self.queries == tokens,
            f"ConceptConfig.queries must be {tokens}, one for each label token and each of picture_layers, "
            f"got {self.queries}",
        )

    @property
    def tokens_per_concept(self) -> int:
        """Q: tokens that one concept brings into the transformer; of `mlp` every picture token."""
        return self.queries if self.has_modules and self.encoder != "mlp" else self.picture_tokens

    @property
    def reads_labels(self) -> bool:
        """Whether labels say anything to the concept modules."""
        return self.binding != "none" or self.encoder in ENCODER_INPUTS

    @property
    def masks_tokens(self) -> bool:
        """Whether a concept's tokens are masked one by one: token q is of the label's token q % L, and a
        label's padding gives none. A mask of concepts [K,N] is then one of tokens, [K,C]."""
        return self.encoder == "label_selected"

    @property
    def tokens_per_entry(self) -> int:
        """How many tokens one entry of a mask of concepts is for."""
        return 1 if self.masks_tokens else self.tokens_per_concept

    @property
    def has_modules(self) -> bool:
        """Whether there are an encoder and a binding, not a base alone."""
        return self.injection not in ("none", "base")

    @property
    def takes_pictures(self) -> bool:
        """Whether there is a picture encoder."""
        return self.injection != "none"

    @property
    def pictures(self) -> str:
        """What the picture encoder gives of a picture, see encoders.py: `patches`, `hidden`, `embedding`,
        `mean` or `layers`."""
        if self.injection == "base":
            return "hidden"
        embedding = "embedding" if self.pooled == "class" else "mean"
        return {"image_embedding": embedding, "label_selected": "layers", "grounded": "hidden"}.get(
            self.encoder, "patches"
        )

    @property
    def min_latent_frames(self) -> int:
        """The fewest latent frames of a video of which pictures leave one to be made."""
        if self.given in ("none", "control", "behind", "grids"):
            return 1
        return 1 + (self.max_concepts if self.takes_pictures else 1)

    @property
    def concept_tokens(self) -> int:
        """C: tokens of all concepts together, max_concepts * tokens_per_concept."""
        return self.max_concepts * self.tokens_per_concept

    def told(self) -> dict[str, Any]:
        """The fields as JSON-ready values, without those that say nothing new: a model of before is stored as
        ever."""
        values = dataclasses.asdict(self)
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("fewest", "side", "keys", "scale", "picture_layers", "tiled", "pooled", "mask"):
            if values[name] == fields[name]:
                del values[name]
        if self.picture_layers is not None:
            values["picture_layers"] = list(self.picture_layers)
        return values
