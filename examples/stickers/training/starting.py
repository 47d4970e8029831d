"""From the sprites' model to the beginning of this one: its weights, and its words for the new tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.weights import load
from conceptmaster.examples.sprites.starting import start_from

EMBEDDING = "text_encoder.model.shared.weight"


def start_from_sprites(model: ConceptMaster, weights: Path, new: Tokenizer) -> list[str]:
    """Take over the weights of ``weights/model.safetensors``; returns the names of what stays fresh.

    A token of the tokenizer ``new`` begins as the mean of the tokens into which the old one cuts it.
    """
    fresh = start_from(model, weights / "model.safetensors")
    old = Tokenizer.from_file(str(weights / "tokenizer.json"))
    known = load(weights / "model.safetensors")[0]
    name = next(name for name in known if name.endswith(("shared.weight", "embed_tokens.weight")))
    table = known[name].float()
    with torch.no_grad():
        shared = model.text_encoder.model.shared.weight
        for token, row in new.get_vocab().items():
            shared[row] = _meaning(token, old, table)
    return [each for each in fresh if "shared" not in each and "embed_tokens" not in each]


def _meaning(token: str, old: Tokenizer, table: Tensor) -> Tensor:
    """The old embedding of a token, or the mean of those of its parts."""
    known = old.get_vocab()
    if token in known:
        return table[known[token]]
    parts = old.model.tokenize(token)
    return table[[part.id for part in parts]].mean(0)
