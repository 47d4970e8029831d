"""The variants that the paper compares. Known without PyTorch: the command's help lists them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from conceptmaster.engine.config import ModelConfig

FIELDS = ("encoder", "binding", "injection")
"""The fields of ``ConceptConfig`` in which variants differ."""


@dataclass(frozen=True)
class Variant:
    """A row: its name in folders and arguments, its title, the paper's tables that it stands in, the DINO-I
    that it has there, and the fields of ``ConceptConfig`` in which it may differ from ours."""

    name: str
    title: str
    tables: tuple[int, ...]
    dino_i: float
    encoder: str = "qformer"
    binding: str = "dam"
    injection: str = "standalone"

    def config(self, base: ModelConfig) -> ModelConfig:
        """The model of this variant, all else as in a base."""
        concept = {name: getattr(self, name) for name in FIELDS}
        return dataclasses.replace(base, concept=dataclasses.replace(base.concept, **concept))


OURS = Variant("ours", "standalone, with DAM", (2, 3), 0.623)
VARIANTS = (
    Variant("merged", "joined to the caption", (2,), 0.367, injection="merged"),
    Variant("shared_query", "the caption's query, own keys", (2,), 0.402, injection="shared_query"),
    Variant("no_qformer", "without Q-Former", (3,), 0.277, encoder="mlp"),
    Variant("no_dam", "without DAM", (3,), 0.394, binding="none"),
    Variant("concat_mlp", "joined along channels", (3,), 0.546, binding="concat_mlp"),
    Variant("self_attention", "added, then attention within the pair", (3,), 0.581, binding="self_attention"),
    OURS,
)
"""In the paper's order; ours stands last in both tables."""
