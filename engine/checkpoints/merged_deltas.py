"""Several deltas made into one by CustomDiffusion's closed form (Kumari et al., arXiv 2212.04488).

Its keys and values say of each delta's captions what that delta says, and of all others, as nearly as can be,
what the base says. Adding deltas up, as handing in several does, lets each disturb the others' words.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...delta_file import Delta, check_fits, words_of
from ...errors import InputError
from ...tokenizer_file import add_words, encode, parse_tokenizer
from ..encoders import TextEncoder
from ..model import ConceptMaster
from .deltas import check_bases, delta_of, put_words

RIDGE = 1e-8
"""Of the regular captions' second moments, in parts of their mean: few captions leave directions out."""


def constrained(weight: Tensor, regular: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """The matrix W' [o,i] nearest to `weight` [o,i] on regular features [n,i], by the sum of the squares of
    (W' - W) x, among those with W' x = wanted for the targets' x: targets [m,i], wanted [m,o]; m <= i.

    W' = W + (V - W C^T)(d C^T)^-1 d with d = C (R^T R)^-1, in float64. Targets may say the same thing twice.
    """
    w, r, c, v = (value.double() for value in (weight, regular, targets, wanted))
    moments = r.T @ r  # [i,i]
    moments += RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    d = torch.linalg.solve(moments, c.T).T  # [m,i]
    gap = v.T - w @ c.T  # [o,m]
    return (w + gap @ torch.linalg.pinv(d @ c.T, rtol=1e-12) @ d).to(weight.dtype)


@torch.no_grad()
def merge_into_one(
    path: str | Path,
    model: ConceptMaster,
    tokenizer: str,
    deltas: Sequence[Delta],
    captions: Sequence[Sequence[str]],
    regular: Sequence[str],
) -> Delta:
    """One delta with the words of all, which `write_delta` can write to `path`.

    Args: model, tokenizer: the base that they were made for, which stays as it is, and the text of its
        tokenizer.json; captions: for each delta texts with its words, "a <fox-1> fox"; regular: texts that
        are to mean what they meant, some hundred. Raises InputError for deltas of another base, and for
        captions that do not say a delta's word.
    """
    config = model.config
    check_fits(deltas, config.concept.injection, config.transformer.text_dim, model.experts())
    check_bases(model, deltas)
    for delta, texts in zip(deltas, captions, strict=True):
        if unsaid := [word for word in delta.words if not any(word in text for text in texts)]:
            raise InputError(f"no caption of {delta} says its word {unsaid[0]}")
    words = words_of(deltas)
    known = config.text_encoder["vocab_size"] + len(words)
    rust, _ = parse_tokenizer(tokenizer.encode(), known)
    first = add_words(rust, list(words)).start
    encoder = copy.deepcopy(model.text_encoder)
    rows = torch.from_numpy(np.stack(list(words.values())))
    put_words(encoder, config.text_encoder["vocab_size"], rows, first)
    texts_of = (text for part in (*captions, regular) for text in part)
    hidden = {text: _read(encoder, encode(rust, text, known)) for text in texts_of}  # [T,Dt] each
    found: dict[str, dict[str, Tensor]] = {}
    for name, transformer in model.experts().items():
        own = [delta.of(name) for delta in deltas]
        features = {text: transformer.condition_embedder.text_embedder(x) for text, x in hidden.items()}
        kept = torch.cat([features[text] for text in regular])  # [n,D]
        targets = [torch.cat([features[text] for text in part]) for part in captions]  # [m,D] each
        found[name] = {}
        for weight in sorted({key for part in own for key in part}):
            base = transformer.get_parameter(weight).detach()
            theirs = [base + _change(part, weight, base) for part in own]
            wanted = [x @ each.T for x, each in zip(targets, theirs, strict=True)]  # [m,o] each
            best = constrained(base, kept, torch.cat(targets), torch.cat(wanted))
            found[name][weight] = best - base
    changes = {name: part for name, part in found.items() if part}
    return delta_of(Path(path), model, changes, {word: torch.from_numpy(row) for word, row in words.items()})


def _read(encoder: TextEncoder, ids: Sequence[int]) -> Tensor:
    """Token ids -> text [T,Dt]."""
    tokens = torch.tensor([ids])
    return encoder(tokens, torch.ones_like(tokens, dtype=torch.bool))[0]


def _change(part: Mapping[str, np.ndarray], weight: str, base: Tensor) -> Tensor:
    return torch.from_numpy(part[weight]).to(base) if weight in part else torch.zeros_like(base)
