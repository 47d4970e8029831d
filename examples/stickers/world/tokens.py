"""The world's tokenizer: byte-level BPE of its captions and nouns, so that any word in any script has tokens.

Case does not count: what is capital in a caption is the same word as in a label.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from conceptmaster.examples.sprites.world.vocabulary import END, PAD, tokenise

from .atlas import Atlas
from .captions import tell
from .scenes import Wish, random_scene

VOCABULARY = 2048
END_ID = 1
"""The number of the token that ends every text."""


def build_tokenizer(atlas: Atlas, captions: int = 12000) -> Tokenizer:
    """Learn the tokenizer from captions of what is trained on; the same result every time. Takes seconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    wish = Wish(foreign=0.0)
    texts = [tell(random_scene(seed, atlas, wish)) for seed in range(captions)]
    tokenizer.train_from_iterator([*texts, *atlas.of("train")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tokenizer


def fits(tokenizer: Tokenizer, texts: list[str], length: int) -> bool:
    """Whether every text takes at most ``length`` tokens."""
    return all(len(encoding.ids) <= length for encoding in tokenizer.encode_batch(texts))


__all__ = ["END", "PAD", "END_ID", "VOCABULARY", "build_tokenizer", "fits", "tokenise"]
