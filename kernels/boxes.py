"""Boxes: which concepts a query may see at all, beside the mask that all queries of a batch row share.

With N concepts of Q = C // N keys each, query s of batch row b attends to key c where boxes[b, s, c // Q]
holds, and mask[b, c] does if there is one (MS-Diffusion, arXiv 2406.07209, has such a mask, drawn from a box
for each subject). A query without any key left gets exactly zero.

The kernels read a query's boxes once, as the bits of a word; they take Q as a constant, EACH, 0 where there
are no boxes.

Letters: B batch, S video tokens, N concepts, C concept tokens, Q = C // N.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .common import power_of_two, require, tl, triton

MOST_CONCEPTS = 64
"""Whose boxes a word holds. Where there are more, as where each token of a concept counts as one, on CUDA too
the reference computes."""


def by_query(boxes: Tensor, mask: Tensor | None, keys: int) -> Tensor:
    """Which of so many keys each query may see: boxes bool [B or 1,S,N], mask bool [B,C] or None -> bool
    [B or 1,S,C]."""
    found = boxes.repeat_interleave(keys // boxes.shape[2], dim=2)  # [B or 1,S,C]
    return found if mask is None else found & mask[:, None]  # [B,S,C]


# Triton.


@triton.jit
def box_bits(boxes, there, count, BLOCK_N: tl.constexpr):
    """A word for each query of a tile, bit n set where it is in the box of concept n of `count`. boxes:
    pointers to each query's, [BLOCK_S,1]."""
    concepts = tl.arange(0, BLOCK_N)[None, :]
    inside = tl.load(boxes + concepts, mask=there[:, None] & (concepts < count), other=0) != 0
    if BLOCK_N > 32:
        bits = tl.where(inside, 1, 0).to(tl.int64) << concepts.to(tl.int64)
    else:
        bits = tl.where(inside, 1, 0) << concepts
    return tl.sum(bits, 1)


@triton.jit
def allowed_keys(kept, keys, bits, EACH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys each query may see, [BLOCK_S or 1, BLOCK_C]: those that are kept, and where it is in the box
    of their concept, of which each has EACH."""
    allowed = kept[None, :]
    if EACH > 0:
        concepts = (keys // EACH) & (BLOCK_N - 1)  # of keys that are not there anything
        allowed = allowed & (((bits[:, None] >> concepts[None, :]) & 1) != 0)
    return allowed


class Boxed(NamedTuple):
    """What a kernel gets of boxes: these, or any other tensor, which it does not look at; their steps from
    one batch row and from one query to the next; its constants EACH and BLOCK_N."""

    boxes: Tensor
    row_step: int
    step: int
    each: int
    block: int

    @classmethod
    def of(cls, boxes: Tensor | None, other: Tensor, keys: int) -> Boxed:
        """Of so many keys; other: what stands in for boxes that are not there."""
        if boxes is None:
            return cls(other, 0, 0, 0, 1)
        concepts = boxes.shape[2]
        row_step = boxes.stride(0) if len(boxes) > 1 else 0
        block = power_of_two(concepts, 1, MOST_CONCEPTS)
        return cls(boxes, row_step, boxes.stride(1), keys // concepts, block)


def beyond_a_word(boxes: Tensor | None) -> bool:
    """Whether the kernels do not take these boxes."""
    return boxes is not None and boxes.shape[2] > MOST_CONCEPTS


def check_boxes(op: str, keys: Tensor, boxes: Tensor | None) -> None:
    """Raises ValueError unless there is a whole number of the keys [B,C,A,E] for each of N concepts."""
    if boxes is not None:
        count, concepts = keys.shape[1], boxes.shape[2]
        require(op, count % concepts == 0, f"boxes of {concepts} concepts do not divide {count} keys")
