"""From the sprites' model to the beginning of this one: all that sees and draws, but nothing that reads.

Their text encoder knows two dozen words so well that it tells others badly apart: of labels of any words it
finds a quarter again in a caption, one with fresh weights nearly all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from conceptmaster.engine.checkpoints.safetensors_io import load, save
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.examples.sprites.training.starting import start_from

from .reading import look_near


def start_from_sprites(model: ConceptMaster, weights: Path) -> list[str]:
    """Take over the weights of the file ``weights`` but the text encoder's; returns what else stays fresh."""
    kept = {name: value for name, value in load(weights)[0].items() if not name.startswith("text_encoder.")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(path, kept)
        fresh = start_from(model, path)
    look_near(model.text_encoder)
    return [name for name in fresh if not name.startswith("text_encoder.")]
