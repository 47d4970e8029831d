"""MAGREF: a Wan2.1 image-to-video model, unchanged, whose first frame is a canvas of references.

Its keys, its shapes and its class (WanModel, of the model_type i2v) are those of Wan2.1's I2V-14B, so that
its own loader reads either: what tells the two apart is what they are called. Such a transformer is MAGREF's
where that name is part of the file's, or of its folder's, or of that of the base (the Hub's, too), or of the
`_name_or_path` that diffusers writes into a configuration. Published are MAGREF-Video/MAGREF and, for
ComfyUI, Wan2_1-Wan-I2V-MAGREF-14B_fp8_e4m3fn.safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .base import Base

NAME = "magref"  # in letters of any case


def is_magref(base: Base) -> bool:
    """Whether `base` is an image-to-video model of a first frame that is called MAGREF."""
    part = base.parts.get("transformer")
    if part is None or part.config.get("image_dim") is None:
        return False
    if part.config.get("pos_embed_seq_len") is not None:
        return False
    said: list[Any] = [part.config.get("_name_or_path"), base.index.get("_name_or_path")]
    names = [*said, *names_at(part.where), *names_at(base.where)]
    return any(isinstance(name, str) and NAME in name.lower() for name in names)


def names_at(where: Path) -> list[str]:
    """What a folder is called, or a file and its folder; of a transformer/ what that lies in, too; of a
    snapshot of the Hub the model."""
    found: list[str] = []
    for path in (Path(os.path.abspath(where)), where.resolve()):  # as it is called, and behind links
        folder = path.parent if where.is_file() else path
        found += [path.name, folder.name]
        if folder.name in ("transformer", "transformer_2"):
            folder = folder.parent
            found.append(folder.name)
        if folder.parent.name == "snapshots":
            found.append(folder.parent.parent.name)
    return found
