"""What of the concepts a request's branches see, as the host knows it: the rest is cut away once per request.

A branch without concepts gets exactly nothing from them, and so does every branch from one that is masked. A
mask on the device tells nobody without waiting for it; that of a request is made on the host. So there the
tensors are cut: then no kernel meets a key that does not count, attention needs no mask, and a step's shapes,
by which captured graphs are told apart, say which branches see anything at all.

Letters: K guidance branches, N concepts; R and N' of them are left. Q tokens per concept, Dc concept width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .config import ModelConfig
from .references import AS_TOKENS


@dataclass(frozen=True)
class Seen:
    """mask: bool [R,N'] on the host, the last R of the branches; concepts: the N' that are left, of all.
    by_token: tokens are masked one by one, so N counts tokens, each a concept of Q = 1."""

    mask: Tensor
    concepts: list[int]
    by_token: bool = False

    @classmethod
    def of(cls, mask: Tensor, config: ModelConfig) -> Seen:
        """Of a mask bool [K,N] on the host. What is left are the branches from the first one on that sees any
        concept, and the concepts that any of them sees.

        Branches stay where the concepts' tokens are among the text's (`merged`), concepts where their place
        among them counts (a base with embedded positions); all stay where they are tokens of their own.
        """
        if config.concept.given in AS_TOKENS:
            return cls(mask, list(range(mask.shape[1])))
        branches, concepts = (mask.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
        first = branches[0] if branches else len(mask)
        if config.concept.injection == "merged":
            first = 0
        if config.transformer.pos_embed_seq_len is not None and branches:
            concepts = list(range(mask.shape[1]))
        return cls(mask[first:, concepts], concepts, config.concept.masks_tokens)

    @property
    def partly(self) -> bool:
        """Whether a mask is still needed: not every branch that is left sees every concept that is left."""
        return not bool(self.mask.all())

    def boxes(self, boxes: Tensor, tokens: int) -> Tensor | None:
        """Those of the concepts that are left, each of so many tokens, bool [S,N] on the host -> [S,N']; None
        where they hide nothing."""
        places = [place // tokens for place in self.concepts] if self.by_token else self.concepts
        left = boxes[:, places]  # [S,N']
        return None if left.all() else left

    def tokens(self, concept_tokens: Tensor) -> Tensor:
        """Those that are left, [N,Q,Dc] -> [N',Q,Dc]; as they are where all are."""
        if self.by_token:
            concept_tokens = concept_tokens.flatten(0, 1)[:, None]  # [C,1,Dc]
        return concept_tokens if len(self.concepts) == len(concept_tokens) else concept_tokens[self.concepts]
