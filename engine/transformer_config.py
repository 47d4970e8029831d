"""What decides the transformer's shape, in the names of diffusers' WanTransformer3DModel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .checked import MOST, WIDEST, check_choice, check_positive, check_types, is_whole, require

PREDICTIONS = ("velocity", "sample")


@dataclass(frozen=True)
class TransformerConfig:
    """The diffusion transformer, in the names of diffusers' WanTransformer3DModel.

    `position_channels` is this project's own: so many constant channels (sines and cosines of a latent
    position's frame, row and column, in equal parts) are appended to the latents before the patch embedding.
    0 is Wan. `prediction` is what the last projection tells: the `velocity` (Wan) or the `sample`, from which
    the transformer then computes the velocity. Wan's image-to-video models have `image_dim` (width of the
    picture encoder's tokens), `added_kv_proj_dim` (the transformer's own width) and, where a first and a last
    picture are told apart by place, `pos_embed_seq_len` (tokens of all pictures together); None elsewhere.
    VACE has `vace_layers` (the blocks that a hint of one of its own blocks is added behind, from 0 upwards)
    and `vace_in_channels` (of the control that these read), as diffusers' WanVACETransformer3DModel.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None
    vace_layers: tuple[int, ...] | None = None
    vace_in_channels: int | None = None
    position_channels: int = 0
    prediction: str = "velocity"

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that cannot be built."""
        patch = self.patch_size
        require(
            isinstance(patch, (tuple, list)) and len(patch) == 3 and all(is_whole(p, 64) for p in patch),
            f"TransformerConfig.patch_size must be three positive whole numbers, got {patch!r:.60}",
        )
        object.__setattr__(self, "patch_size", tuple(patch))
        check_positive(
            self, "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim"
        )
        check_positive(self, "freq_dim", "ffn_dim", "num_layers", "rope_max_seq_len")
        check_types(self)
        require(
            self.attention_head_dim % 2 == 0 and self.attention_head_dim >= 6,
            "TransformerConfig.attention_head_dim must be even and at least 6 (rotary pairs for three axes), "
            f"got {self.attention_head_dim}",
        )
        require(self.freq_dim % 2 == 0, f"TransformerConfig.freq_dim must be even, got {self.freq_dim}")
        require(self.width <= WIDEST, f"heads of {self.width} channels together are more than {WIDEST}")
        require(
            is_whole(self.position_channels, MOST["position_channels"], 0)
            and self.position_channels % 6 == 0,
            "TransformerConfig.position_channels must be 0 or a multiple of 6 (sine, cosine; three axes), "
            f"got {self.position_channels!r}",
        )
        check_choice(self, "qk_norm", ("rms_norm_across_heads",))
        check_choice(self, "prediction", PREDICTIONS)
        require(self.eps > 0, f"TransformerConfig.eps must be positive, got {self.eps}")
        self._check_pictures()
        self._check_vace()

    def _check_vace(self) -> None:
        """The fields of VACE fit each other."""
        layers = self.vace_layers
        if layers is None:
            channels = self.vace_in_channels
            require(
                channels is None, f"TransformerConfig.vace_in_channels ({channels!r:.60}) needs vace_layers"
            )
            return
        whole = isinstance(layers, (tuple, list)) and all(is_whole(n, self.num_layers - 1, 0) for n in layers)
        require(
            whole and list(layers[:1]) == [0] and all(a < b for a, b in itertools.pairwise(layers)),
            "TransformerConfig.vace_layers must be numbers of blocks from 0 upwards, "
            f"below {self.num_layers}, got {layers!r:.120}",
        )
        object.__setattr__(self, "vace_layers", tuple(layers))
        check_positive(self, "vace_in_channels")
        require(self.image_dim is None, "TransformerConfig.vace_layers are of a model without an image_dim")

    def _check_pictures(self) -> None:
        """The fields of image-to-video models fit each other."""
        if self.image_dim is None:
            for name in ("added_kv_proj_dim", "pos_embed_seq_len"):
                value = getattr(self, name)
                require(value is None, f"TransformerConfig.{name} ({value!r:.60}) needs an image_dim")
            return
        check_positive(self, "image_dim")
        require(
            self.added_kv_proj_dim == self.width,
            f"TransformerConfig.added_kv_proj_dim must be the transformer's width ({self.width}) where there "
            f"is an image_dim, got {self.added_kv_proj_dim!r:.60}",
        )
        if self.pos_embed_seq_len is not None:
            check_positive(self, "pos_embed_seq_len")

    @property
    def width(self) -> int:
        """D: heads times head width."""
        return self.num_attention_heads * self.attention_head_dim
