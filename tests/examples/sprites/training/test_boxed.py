"""Training with boxes: which tokens see which concept, what captions then tell, and that it learns."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load_model
from conceptmaster.examples.sprites.training import batches, train_model
from conceptmaster.examples.sprites.world.draw import look_of, paint_along
from conceptmaster.examples.sprites.world.scenes import BACKGROUNDS, PLACES, SIZE, random_scene, tell_loosely
from conceptmaster.runtime import boxes as runtime_boxes

from ..small import small_config, train_small

BOXED = batches.Dropped(boxed=0.5)


def small_boxed():
    config = small_config()
    return dataclasses.replace(config, concept=dataclasses.replace(config.concept, mask="boxes"))


@pytest.mark.parametrize("grid", [(4, 4, 4), (4, 8, 5), (2, 3, 7)])
def test_tokens_are_those_of_the_runtime(grid):
    """The same boxes, of latent frames of one and then of four video frames each."""
    rng = np.random.default_rng(0)
    low, high = np.sort(rng.uniform(0, 1, (2, 6, 3, 4, 2)).round(2), axis=0)
    boxes = np.concatenate((low, high + 0.01), axis=-1).clip(0, 1)  # [B,N,F,4]
    found = batches.tokens_in(torch.from_numpy(boxes).float(), grid)
    video = boxes[:, :, [0, *np.repeat([1, 2, 3], 4)]]  # [B,N,13,4]
    starts = [max(0, 1 + 4 * (first - 1)) for first in range(0, 4, 4 // grid[0])]
    right = runtime_boxes.tokens(video, grid, starts).reshape(6, 3, -1).swapaxes(1, 2)  # [B,S,N]
    np.testing.assert_array_equal(found.numpy(), right)


def test_some_clips_see_concepts_inside_of_their_boxes_alone_and_nothing_else_changes(pool):
    usual = pool.batch(np.random.default_rng(0), 64, batches.Dropped())
    boxed = pool.batch(np.random.default_rng(0), 64, BOXED)
    assert usual.boxes.all() and usual.boxes.shape == (64, 5 * 4 * 4, 3)
    for name in vars(usual):
        if name != "boxes":
            assert torch.equal(getattr(usual, name).nan_to_num(), getattr(boxed, name).nan_to_num()), name
    some = ~boxed.boxes.flatten(1).all(1)
    assert float(some.float().mean()) == pytest.approx(0.5, abs=0.2)
    covered = boxed.coverage.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).amax((-3, -1)) > 0  # [B,N,F,4,4]
    for b in torch.nonzero(some)[:, 0]:
        for n in range(3):
            for f, seen in enumerate(boxed.boxes[b, :, n].view(5, 4, 4)):
                rows, columns = torch.nonzero(covered[b, n, f], as_tuple=True)
                right = torch.zeros(4, 4, dtype=torch.bool)
                if len(rows):
                    right[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
                assert torch.equal(seen, right)


def test_captions_of_boxed_clips_may_tell_places_loosely(pool, tokenizer):
    usual = pool.batch(np.random.default_rng(0), 64, BOXED)
    loose = pool.batch(np.random.default_rng(0), 64, dataclasses.replace(BOXED, loose=0.5))
    boxed, other = ~usual.boxes.flatten(1).all(1), (usual.token_ids != loose.token_ids).any(1)
    assert other.any() and boxed[other].all() and not other[boxed].all()

    def text(batch, row):
        return tokenizer.decode(batch.token_ids[row][batch.token_mask[row]].tolist()).strip()

    for row in torch.nonzero(other)[:, 0].tolist():
        assert re.sub(
            r" (at|on|in) the (top|bottom|left|right|middle)\w*( left| right)?", "", text(loose, row)
        )
        told = [place for place in PLACES.values() if place in text(loose, row)]
        assert len(told) <= int(loose.label_mask[row].any(-1).sum())


def test_loose_captions_leave_most_places_out_and_tell_the_rest():
    places, tellings = 0, 0
    for seed in range(200):
        scene = random_scene(seed, held_out=False)
        text = tell_loosely(np.random.default_rng(seed), scene.actors, scene.background)
        assert all(actor.label in text for actor in scene.actors)
        ground = BACKGROUNDS[scene.background]
        parts = text.removesuffix(f", {ground}").replace(" and ", ", ").split(", ")
        assert len(parts) == len(scene.actors)
        places += sum(any(place in part for place in PLACES.values()) for part in parts)
        tellings += len(parts)
    assert places / tellings == pytest.approx(0.3, abs=0.06)


def test_a_sprites_box_holds_what_is_painted():
    shares = []
    for seed in range(40):
        for actor in random_scene(seed, held_out=True, concepts=2).actors:
            alpha = paint_along(
                actor.noun, actor.identity, actor.radius, actor.path(), look_of(actor.motion)
            )[1]
            boxes = actor.boxes()
            assert boxes.shape == (17, 4) and (boxes[:, :2] < boxes[:, 2:]).all()
            assert boxes.min() >= 0 and boxes.max() <= 1
            x0, y0, x1, y1 = np.rint(boxes[8] * SIZE).astype(int)
            shares.append(alpha[8, y0:y1, x0:x1].sum() / alpha[8].sum())
    assert min(shares) > 0.8 and np.mean(shares) > 0.97


def test_it_trains_with_boxes_and_keeps_the_mask(pool, tmp_path):
    train_small(pool, tmp_path, steps=2, config=small_boxed(), boxes=0.7, loose=0.5, bare=True)
    model = load_model(tmp_path / "model.safetensors")
    assert model.config.concept.mask == "boxes"
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_token_outside_of_every_box_learns_nothing_from_pictures(pool):
    """Without any box the gradient does not reach the injector's keys; with one it does, and is finite."""
    torch.manual_seed(0)
    trainee = train_model.Trainee(small_boxed(), bare=True)
    with torch.no_grad():
        for parameter in trainee.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = pool.batch(np.random.default_rng(1), 4, batches.KEEP_ALL)
    sigma, noise = torch.full((4,), 0.5), torch.randn_like(batch.latents)
    keys = [p for name, p in trainee.model.named_parameters() if "injector.to_k" in name]
    assert keys
    found = []
    for boxes in (torch.zeros_like(batch.boxes), batch.boxes & (torch.arange(80) < 7)[:, None]):
        batch.boxes = boxes
        trainee.zero_grad()
        trainee(batch, noise, sigma, sigma)["flow"].backward()
        found.append(sum(float(key.grad.abs().sum()) if key.grad is not None else 0.0 for key in keys))
    assert found[0] == 0 and 0 < found[1] < float("inf")
