"""Deltas (delta_file.py) and models: merged into one, and made of what was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial as bound
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...delta_file import Delta, added, check_base, check_fits, fingerprint, words_of
from ...errors import InputError
from ...tokenizer_file import add_words, parse_tokenizer
from ..dit import ConceptDiT
from ..encoders import TextEncoder
from ..model import ConceptMaster
from .lazy_weights import Stored, grow_stored, stored_weights

KEYS_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")


@torch.no_grad()
def merge_deltas(model: ConceptMaster, tokenizer: str, deltas: Sequence[Delta]) -> str:
    """Changes a model's weights by deltas, in place, and gives its text encoder their words.

    tokenizer: the text of its tokenizer.json; returns it with the words. Weights on disk are changed whenever
    they are read. Raises: InputError, one line, for a delta that is for another model; no weight has then
    changed.
    """
    config = model.config
    check_fits(deltas, config.concept.injection, config.transformer.text_dim, model.experts())
    check_bases(model, deltas)
    words = words_of(deltas)
    rust, _ = parse_tokenizer(tokenizer.encode(), config.text_encoder["vocab_size"])
    there = [rust.token_to_id(word) for word in words]
    try:  # a bundle's tokenizer has the words already that its weights are to have
        first = add_words(rust, list(words)).start if there[0] is None else there[0]
    except ValueError as error:
        raise InputError(f"{deltas[0]}: {error}") from None
    for name, transformer in model.experts().items():
        state, later = transformer.state_dict(), stored_weights(transformer)
        for weight, change in added(deltas, name).items():
            if weight in later:
                later[weight].changes.append(bound(_add, change=torch.from_numpy(change)))
            else:
                _add(state[weight], torch.from_numpy(change))
    give_words(model, torch.from_numpy(np.stack(list(words.values()))), first)
    return rust.to_str()


def check_bases(model: ConceptMaster, deltas: Sequence[Delta]) -> None:
    """Raises InputError, one line, for a delta that is for other weights than the model's."""
    for name, transformer in model.experts().items():
        check_base(deltas, name, _shapes(transformer), _readers(transformer))


def give_words(model: ConceptMaster, rows: Tensor, first: int) -> None:
    """Puts rows [n,Dt] into the text encoder's table, from id `first` on; it grows where that is its end."""
    config = model.config
    size = put_words(model.text_encoder, config.text_encoder["vocab_size"], rows, first)
    grown = replace(config, text_encoder=config.text_encoder | {"vocab_size": size})
    model.config = grown
    for transformer in model.experts().values():
        transformer.config = grown


def put_words(encoder: TextEncoder, old: int, rows: Tensor, first: int) -> int:
    """What `give_words` does to a text encoder of `old` ids; how many it then has."""
    size = max(old, first + len(rows))
    change = bound(with_rows, rows=rows, first=first)
    made: dict[int, nn.Parameter] = {}  # of tied ones, which stay so
    for layer in encoder.modules():
        if not isinstance(layer, nn.Embedding) or len(layer.weight) != old:
            continue
        weight, later = layer.weight, grow_stored(layer, "weight", change, (size, rows.shape[1]))
        if id(weight) not in made:
            value = change(weight.detach()) if later is None else later
            made[id(weight)] = nn.Parameter(value, weight.requires_grad)
        layer.weight, layer.num_embeddings = made[id(weight)], size
    return size


def with_rows(table: Tensor, rows: Tensor, first: int) -> Tensor:
    """A copy of a table [n,Dt] with these rows from `first` on."""
    rows = rows.to(table)
    return torch.cat((table[:first], rows, table[first + len(rows) :]))


def delta_of(
    path: Path,
    before: ConceptMaster,
    changes: Mapping[str, Mapping[str, Tensor]],
    words: Mapping[str, Tensor],
) -> Delta:
    """A delta that adds `changes` [out,in], by transformer and by name there, to a model's weights, and
    brings `words` [Dt] each. Stored in float16."""
    experts = before.experts()
    bases = {n: fingerprint(_readers(experts[n]), part) for n, part in changes.items()}
    flat = {f"{n}.{weight}": value for n, part in changes.items() for weight, value in part.items()}
    return Delta(
        path,
        before.config.concept.injection,
        bases,
        {word: row.detach().float().numpy() for word, row in words.items()},
        {weight: value.detach().half().numpy() for weight, value in flat.items()},
    )


def text_keys_values(transformer: ConceptDiT) -> list[str]:
    """The names of the weights that make the text's keys and values, of every block."""
    return [name for name, _ in transformer.named_parameters() if name.endswith(KEYS_VALUES)]


def _add(weight: Tensor, change: Tensor) -> None:
    weight.copy_(weight.float() + change)


def _shapes(transformer: ConceptDiT) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in transformer.named_parameters()}


def _readers(transformer: ConceptDiT) -> dict[str, Callable[[], np.ndarray]]:
    """What gives a transformer's weights, float32."""
    later = stored_weights(transformer)
    return {name: bound(_values, later.get(name, value)) for name, value in transformer.named_parameters()}


def _values(weight: Tensor | Stored) -> np.ndarray:
    tensor = weight.read() if isinstance(weight, Stored) else weight.detach().float()
    return tensor.numpy()
