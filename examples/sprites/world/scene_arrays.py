"""Scenes as arrays: what drawing many of them at once needs, made by several processes ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from ..processes import new_pool
from .decoys import decoy, foreign
from .draw import paint_background
from .scenes import (
    ACCESSORIES,
    BACKGROUNDS,
    FRAMES,
    MAX_CONCEPTS,
    MOTIONS,
    NOUNS,
    TEXTURES,
    Identity,
    Scene,
    random_scene,
    tell_loosely,
)
from .vocabulary import build_tokenizer, tokenise

Arrays = dict[str, np.ndarray]
"""Of n scenes, which have up to N concepts. Each: count, background [n], caption and loose [n] (str; the
latter ``tell_loosely``'s). Each concept:
label [n,N] (str), noun, foreign_noun, motion, radius [n,N], path [n,N,F,2] in pixels, and two looks, its own
and, beginning with ``decoy_``, the decoy's: texture, accessory, period, angle [n,N], body, second, accent
[n,N,3]. Kinds are numbers in the order of ``scenes.py``'s."""

LOOKS = {"body": 3, "second": 3, "accent": 3, "period": 1, "angle": 1, "texture": 0, "accessory": 0}
"""Fields of a look; how many numbers, 0 where it is a kind."""
SCENES_PER_JOB = 512
"""Scenes in one job of a process."""
BLOCKS_AHEAD = 2
"""Blocks that are made ahead of time once a pool is full."""
BACKGROUNDS_PER_KIND = 2048
"""Backgrounds of each kind that scenes drawn on a device choose from."""


def scene_arrays(first: int, count: int, held_out: bool = False) -> Arrays:
    """The scenes of the seeds first … first + count - 1, with looks that are kept for judging (``held_out``),
    or with none of these."""
    return arrays_of([random_scene(first + row, held_out=held_out) for row in range(count)])


def arrays_of(scenes: Sequence[Scene]) -> Arrays:
    """Scenes as arrays."""
    count, shape = len(scenes), (len(scenes), MAX_CONCEPTS)
    arrays: Arrays = {name: np.zeros(count, np.int64) for name in ("count", "background")}
    arrays |= {name: np.zeros(shape, np.int64) for name in ("noun", "foreign_noun", "motion")}
    arrays |= {"radius": np.ones(shape, np.float32), "path": np.zeros((*shape, FRAMES, 2), np.float32)}
    for name, numbers in LOOKS.items():
        own = np.zeros((*shape, 3) if numbers == 3 else shape, np.float32 if numbers else np.int64)
        arrays |= {name: own, f"decoy_{name}": own.copy()}
    captions, loose, labels = [], [], np.full(shape, "", dtype=object)
    kinds = list(BACKGROUNDS)
    for row, scene in enumerate(scenes):
        other = np.random.Generator(np.random.Philox(key=[scene.seed, 13]))
        arrays["count"][row] = len(scene.actors)
        arrays["background"][row] = kinds.index(scene.background)
        captions.append(scene.caption)
        astray_told = np.random.Generator(np.random.Philox(key=[scene.seed, 19]))
        loose.append(tell_loosely(astray_told, scene.actors, scene.background))
        astray = decoy(scene, other).actors
        for n, actor in enumerate(scene.actors):
            labels[row, n] = actor.label
            arrays["noun"][row, n] = NOUNS.index(actor.noun)
            arrays["foreign_noun"][row, n] = NOUNS.index(foreign(actor, other).noun)
            arrays["motion"][row, n] = MOTIONS.index(actor.motion)
            arrays["radius"][row, n], arrays["path"][row, n] = actor.radius, actor.path()
            for prefix, look in (("", actor.identity), ("decoy_", astray[n].identity)):
                for name, value in look_numbers(look).items():
                    arrays[prefix + name][row, n] = value
    told = {"caption": np.array(captions, object), "loose": np.array(loose, object)}
    return arrays | told | {"label": labels}


def look_numbers(look: Identity) -> dict[str, object]:
    """The fields of a look in numbers, as ``LOOKS`` lists them."""
    kinds = {"texture": TEXTURES.index(look.texture), "accessory": ACCESSORIES.index(look.accessory)}
    return {name: kinds.get(name, getattr(look, name)) for name in LOOKS}


def tokenised(arrays: Arrays, text_tokens: int, label_tokens: int) -> Arrays:
    """The arrays with ``token_ids``, ``token_mask`` [n,T], the same of loose captions, ``label_ids`` and
    ``label_mask`` [n,N,L] in the place of captions and labels. An empty label has no token."""
    tokenizer, labels = build_tokenizer(), arrays["label"].ravel()
    ids, mask = tokenise(tokenizer, list(arrays["caption"]), text_tokens)
    loose_ids, loose_mask = tokenise(tokenizer, list(arrays["loose"]), text_tokens)
    label_ids, label_mask = tokenise(tokenizer, list(labels), label_tokens)
    label_mask &= (labels != "")[:, None]
    shape = (*arrays["label"].shape, label_tokens)
    told = {"token_ids": ids, "token_mask": mask, "loose_ids": loose_ids, "loose_mask": loose_mask}
    told |= {"label_ids": (label_ids * label_mask).reshape(shape), "label_mask": label_mask.reshape(shape)}
    return {name: value for name, value in arrays.items() if value.dtype != object} | told


def _job(job: tuple[int, int, bool, int, int]) -> Arrays:
    first, count, held_out, text_tokens, label_tokens = job
    return tokenised(scene_arrays(first, count, held_out), text_tokens, label_tokens)


def backgrounds(kind: str, count: int) -> np.ndarray:
    """So many backgrounds of one kind, float16 [count,SIZE,SIZE,3] in 0..1; the same every time."""
    rng = np.random.Generator(np.random.Philox(key=[list(BACKGROUNDS).index(kind), 17]))
    return np.stack([paint_background(kind, rng) for _ in range(count)]).astype(np.float16)


class SceneStream:
    """Blocks of ``size`` tokenised scenes, one after the other, that other processes make ahead of time: the
    first ``ahead`` at once, then one more than is asked for. ``how``: whether looks are held out, and how
    many tokens captions and labels have."""

    def __init__(
        self, size: int, first: int, ahead: int, how: tuple[bool, int, int], workers: int, bank: int
    ) -> None:
        self.size, self.how, self._next = size, how, first
        self._pool = new_pool(workers)
        self.banks = [self._pool.submit(backgrounds, kind, bank) for kind in BACKGROUNDS]
        self._waiting: list[list[Future[Arrays]]] = []
        for _ in range(ahead):
            self._ask()

    def _ask(self) -> None:
        seeds = range(self._next * self.size, (self._next + 1) * self.size, SCENES_PER_JOB)
        jobs = [(seed, min(SCENES_PER_JOB, seeds.stop - seed), *self.how) for seed in seeds]
        self._waiting.append([self._pool.submit(_job, job) for job in jobs])
        self._next += 1

    def blocks(self, count: int) -> Iterator[Arrays]:
        """The next ``count`` blocks."""
        for _ in range(count):
            parts = [future.result() for future in self._waiting.pop(0)]
            if len(self._waiting) < BLOCKS_AHEAD:
                self._ask()
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
