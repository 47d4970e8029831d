"""The world's words: what its captions say, and its tokenizer, byte-level BPE learned from them, so that any
word has tokens, whether the model knows it or not."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .scenes import BACKGROUNDS, MOTION_WORDS, NOUNS, ORDINALS, PLACES, random_scene

VOCABULARY = 512
PAD, END = "<pad>", "</s>"
KNOWN: dict[str, Any] = {
    "words": ["a", "an", "the", "and", *ORDINALS[:2]],  # no scene has three of a noun
    "labels": list(NOUNS),
    "phrases": {
        "places": list(PLACES.values()),
        "motions": [words for wordings in MOTION_WORDS.values() for words in wordings],
        "backgrounds": list(BACKGROUNDS.values()),
    },
}
"""What a model of this world is taught to read: the weights' vocabulary.json. No caption says "an", which
does no harm."""


@functools.cache
def build_tokenizer(captions: int = 4000) -> Tokenizer:
    """Learn the tokenizer from the training split's captions; the same result every time.

    Takes seconds, so it is done once: leave the result as it is.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (random_scene(seed, held_out=False).caption for seed in range(captions)), trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [n, length] padded with 0, and their mask. Raises ValueError for a text that is too
    long."""
    ids, mask = np.zeros((len(texts), length), np.int64), np.zeros((len(texts), length), bool)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        if len(encoding.ids) > length:
            raise ValueError(f"{texts[row]!r} takes {len(encoding.ids)} tokens, more than {length}")
        ids[row, : len(encoding.ids)] = encoding.ids
        mask[row, : len(encoding.ids)] = True
    return ids, mask
