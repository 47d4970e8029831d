"""Training batches on an accelerator: the whole pool lives there, and a batch is gathered in a few calls.

On a GPU a step of this world takes tens of milliseconds; choosing its clips one by one on the CPU and sending
them over takes longer than that. A clip with its pictures is 0.1 MB, so a hundred thousand of them fit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from conceptmaster.engine.encoders import CLIP_MEAN, CLIP_STD

from ..world.scenes import MAX_CONCEPTS
from ..world.vocabulary import tokenise
from .batches import Batch, Dropped, LatentPool, Pictures


def pool_on(
    device: str, folder: Path, tokenizer: Tokenizer, text_tokens: int, label_tokens: int
) -> LatentPool:
    """The pool whose batches come fastest for a model on this device."""
    if torch.device(device).type == "cpu":
        return LatentPool(folder, tokenizer, text_tokens, label_tokens)
    return ResidentPool(device, folder, tokenizer, text_tokens, label_tokens)


def generator(rng: np.random.Generator, device: str) -> torch.Generator:
    """Random numbers on a device that follow from the state of ``rng``, which moves on."""
    return torch.Generator(device).manual_seed(int(rng.integers(2**62)))


class ResidentPool(LatentPool):
    """A ``LatentPool`` whose arrays are on ``device``: the same batches, chosen by other random numbers."""

    def __init__(
        self, device: str, folder: Path, tokenizer: Tokenizer, text_tokens: int, label_tokens: int
    ) -> None:
        self.device = device
        self._all: dict[str, Tensor] = {}
        self._taken = 0
        super().__init__(folder, tokenizer, text_tokens, label_tokens)
        empty = tokenise(tokenizer, [""], text_tokens)
        self._no_caption = [torch.from_numpy(part).to(device) for part in empty]  # [1,T] each

    def refresh(self) -> int:
        """Take up shards that have been encoded since, to the device; returns how many there are."""
        found = super().refresh()
        parts = [self._arrays(k) for k in range(self._taken, found)]
        if parts:
            parts = [self._all, *parts] if self._all else parts
            self._all = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._taken = found
        return found

    def _arrays(self, k: int) -> dict[str, Tensor]:
        shard = self.shards[k]
        label_ids = np.zeros((len(shard.labels), MAX_CONCEPTS, self.label_tokens), np.int64)
        label_mask = np.zeros(label_ids.shape, bool)
        for row, labels in enumerate(shard.labels):
            for n, text in enumerate(labels):
                label_ids[row, n], label_mask[row, n] = self.label(text)
        arrays = {
            "latents": self.latents[k],
            "decoys": self.decoys[k],
            "foreign": shard.foreign,
            "token_ids": self.tokens[k][0],
            "token_mask": self.tokens[k][1],
            "references": shard.references,
            "coverage": shard.coverage,
            "portraits": self.portraits[k],
            "traits": self.traits[k],
            "patterns": self.patterns[k],
            "label_ids": label_ids,
            "label_mask": label_mask,
            "count": np.array([len(labels) for labels in shard.labels]),
        }
        return {name: torch.from_numpy(np.array(value)).to(self.device) for name, value in arrays.items()}

    def batch(self, rng: np.random.Generator, size: int, dropped: Dropped) -> Batch:
        """A random batch on the device; the same generator state gives the same batch."""
        g, everything, device = generator(rng, self.device), self._all, self.device
        clips = torch.randint(len(everything["count"]), (size,), generator=g, device=device)
        count = everything["count"][clips]
        # which[b,slot]: the concept in that slot; one beyond the clip's last stands for an empty slot
        which = torch.rand(size, MAX_CONCEPTS, generator=g, device=device).argsort(1)
        filled = which < count[:, None]
        rows = clips[:, None].expand(-1, MAX_CONCEPTS)
        views = everything["references"].shape[2]
        view = torch.randint(views, (size, MAX_CONCEPTS), generator=g, device=device)
        fate = torch.rand(size, generator=g, device=device)
        no_concepts = fate < dropped.concepts + dropped.both
        some = dropped.concepts + dropped.both + dropped.caption
        no_caption = ((fate >= dropped.concepts) & (fate < some))[:, None]
        ids, mask = self._no_caption

        def slots(name: str, empty: float = 0) -> Tensor:
            """[B,N,…] of an array, with ``empty`` where no concept is."""
            value = everything[name][rows, which]
            return torch.where(filled.view(*filled.shape, *[1] * (value.ndim - 2)), value, empty)

        foreign = (torch.rand(size, MAX_CONCEPTS, generator=g, device=device) < dropped.foreign) & filled
        own, strangers = everything["references"][rows, which, view], everything["foreign"][rows, which]
        pixels = torch.where(foreign[..., None, None, None], strangers, own) * filled[..., None, None, None]
        mean, deviation = self._on(self.mean), self._on(self.std)
        latents, decoys = (
            (everything[name][clips].float() - mean) / deviation for name in ("latents", "decoys")
        )
        return Batch(
            latents,
            decoys,
            torch.where(no_caption, ids, everything["token_ids"][clips]),
            torch.where(no_caption, mask, everything["token_mask"][clips]),
            self._for_clip(pixels),
            foreign,
            slots("label_ids"),
            slots("label_mask").bool(),
            filled & ~no_concepts[:, None],
            slots("coverage").float() / 255,
            _minus_one_to_one(slots("portraits")),
            slots("traits").long(),
            slots("patterns", torch.nan),
        )

    def pictures(self, rng: np.random.Generator, size: int) -> Pictures:
        """Random references alone, on the device."""
        g, everything, device = generator(rng, self.device), self._all, self.device
        clips = torch.randint(len(everything["count"]), (size,), generator=g, device=device)
        concept = (torch.rand(size, generator=g, device=device) * everything["count"][clips]).long()
        view = torch.randint(everything["references"].shape[2], (size,), generator=g, device=device)
        return Pictures(
            self._for_clip(everything["references"][clips, concept, view]),
            everything["label_ids"][clips, concept],
            everything["label_mask"][clips, concept],
            _minus_one_to_one(everything["portraits"][clips, concept]),
            everything["traits"][clips, concept].long(),
            everything["patterns"][clips, concept],
        )

    def _on(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _for_clip(self, pixels: Tensor) -> Tensor:
        """uint8 [...,H,W,3] -> float32 [...,3,H,W], normalised as CLIP's pictures are."""
        mean, std = (torch.tensor(values, device=self.device) for values in (CLIP_MEAN, CLIP_STD))
        return ((pixels.float() / 255 - mean) / std).movedim(-1, -3)


def _minus_one_to_one(pixels: Tensor) -> Tensor:
    """uint8 [...,H,W,3] -> float32 [...,3,H,W] in -1..1."""
    return (pixels.float() / 127.5 - 1).movedim(-1, -3)
