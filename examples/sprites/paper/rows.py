"""The rows of the paper's tables. Known without PyTorch: the command's help lists them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row: its name in folders and arguments, its title, the paper's tables that it stands in, the DINO-I
    that it has in the paper's first and second version (None where there is none), and the fields of
    ``ConceptConfig`` in which it differs from ours. system: whose concept part it has in the place of ours, a
    name of ``engine.rivals``. tuned: made anew for each request, by what. control_of: the row that is told as
    much as this one, so that they are compared, too."""

    name: str
    title: str
    tables: tuple[int, ...]
    paper: tuple[float | None, float | None]
    concept: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    tuned: str | None = None
    control_of: str | None = None


OURS = Row("ours", "ConceptMaster: Q-Former, DAM, an injector of its own", (1, 2, 3), (0.623, 0.584))
ROWS = (
    Row("ip_adapter", "IP-Adapter", (1,), (0.394, 0.492), system="ip-adapter"),
    Row("ssr_encoder", "SSR-Encoder", (1,), (0.517, 0.466), system="ssr-encoder"),
    Row("custom_diffusion", "CustomDiffusion", (1,), (0.531, 0.467), tuned="custom_diffusion"),
    Row("dreambooth", "DreamBooth", (1,), (0.440, None), tuned="dreambooth"),
    Row("ms_diffusion", "MS-Diffusion", (1,), (0.528, 0.487), {"mask": "boxes"}, system="ms-diffusion"),
    Row(
        "ours_boxes",
        "ours, with MS-Diffusion's boxes (a control)",
        (1,),
        (None, None),
        {"mask": "boxes"},
        control_of="ms_diffusion",
    ),
    Row(
        "merged",
        "joined to the caption, through its cross-attention",
        (2,),
        (0.367, None),
        {"injection": "merged"},
    ),
    Row(
        "shared_query",
        "own keys and values, the caption's query",
        (2,),
        (0.402, None),
        {"injection": "shared_query"},
    ),
    Row("no_qformer", "without Q-Former", (3,), (0.277, None), {"encoder": "joined_mlp"}),
    Row("no_dam", "without DAM", (3,), (0.394, None), {"binding": "none"}),
    Row("concat_mlp", "joined along channels", (3,), (0.546, None), {"binding": "concat_mlp"}),
    Row(
        "self_attention",
        "added, then attention within the pair",
        (3,),
        (0.581, None),
        {"binding": "self_attention_ffn"},
    ),
    OURS,
)
"""In the paper's order; ours stands last in every table."""


def row_of(name: str) -> Row:
    """The row of that name."""
    return next(row for row in ROWS if row.name == name)
