"""Boxes: which concepts a query may see at all, beside the mask that all queries of a batch row share.

With N concepts of Q = C // N keys each, query s of batch row b attends to key c where boxes[b, s, c // Q]
holds, and mask[b, c] does if there is one (MS-Diffusion, arXiv 2406.07209, has such a mask, drawn from a box
for each subject). A query without any key left gets exactly zero.

Letters: B batch, S video tokens, N concepts, C concept tokens.
"""

from __future__ import annotations

from torch import Tensor

from .common import require


def by_query(boxes: Tensor, mask: Tensor | None, keys: int) -> Tensor:
    """Which of so many keys each query may see: boxes bool [B or 1,S,N], mask bool [B,C] or None -> bool
    [B or 1,S,C]."""
    found = boxes.repeat_interleave(keys // boxes.shape[2], dim=2)  # [B or 1,S,C]
    return found if mask is None else found & mask[:, None]  # [B,S,C]


def check_boxes(op: str, keys: Tensor, boxes: Tensor | None) -> None:
    """Raises ValueError unless there is a whole number of the keys [B,C,A,E] for each of N concepts."""
    if boxes is not None:
        count, concepts = keys.shape[1], boxes.shape[2]
        require(op, count % concepts == 0, f"boxes of {concepts} concepts do not divide {count} keys")
