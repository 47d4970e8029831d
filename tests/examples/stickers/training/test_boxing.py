"""Boxes of clips: where they are, what of the clip goes with them, and that the runtime draws the same."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch

from conceptmaster.examples.sprites.training.batches import tokens_in
from conceptmaster.examples.stickers.training.batches import Pool
from conceptmaster.examples.stickers.training.boxing import ROOM, Boxing, boxes_around
from conceptmaster.examples.stickers.training.options import Dropped, Supply
from conceptmaster.examples.stickers.training.placing import told_by_boxes
from conceptmaster.examples.stickers.world.captions import tell
from conceptmaster.examples.stickers.world.requesting import drawn_boxes
from conceptmaster.examples.stickers.world.scenes import Wish
from conceptmaster.examples.stickers.world.words import PLACES
from conceptmaster.runtime.boxes import tokens

CLIPS = 24
KEPT = Dropped(0, 0, 0)
STARTS = [0, 1, 5, 9, 13]
"""The first video frame of each latent one."""


@pytest.fixture(scope="module")
def scenes(artist):
    return artist.scenes(range(CLIPS), Wish())


@pytest.fixture(scope="module")
def pool(artist, scenes):
    found = artist.draw(scenes, 0)
    made = Pool(lambda _: found, artist.config, Supply(1, CLIPS, 1))
    made.at(0)
    return made


def all_boxed(share=1.0):
    return Boxing.random(np.random.default_rng(5), CLIPS, share)


def batch_of(pool, boxing, dropped=KEPT, frames=None):
    return pool.of(np.arange(CLIPS), np.random.default_rng(0), dropped, frames, boxing)


def told_box(boxing, batch, row, slot, number):
    """Of one concept in each latent frame, [F,4]."""
    room = torch.from_numpy(boxing.room[row, number])[None, None]
    whole = torch.tensor([[bool(boxing.whole[row, number])]])
    return boxes_around(batch.coverage[row, slot][None, None], room, whole)[0, 0].double().numpy()


def of_slots(batch, scenes):
    """Row, slot and the number of its actor."""
    labels = {}
    for row, scene in enumerate(scenes):
        for number, actor in enumerate(scene.actors):
            track = torch.from_numpy(actor.track())
            for slot in range(batch.track.shape[1]):
                if batch.label_mask[row, slot].any() and torch.equal(batch.track[row, slot, -1], track[-4:]):
                    labels[row, slot] = number
    assert len(labels) == sum(len(scene.actors) for scene in scenes)
    return labels


@pytest.mark.parametrize("frames", [None, slice(1, 5)])
def test_tokens_are_those_that_the_runtime_draws_of_the_same_boxes(pool, scenes, frames):
    """The box of a latent frame is that of each of its video frames."""
    boxing = all_boxed()
    batch, full = batch_of(pool, boxing, frames=frames), batch_of(pool, boxing)
    count = 5 if frames is None else 4
    seen = batch.boxes.view(CLIPS, count, 4, 4, -1)
    for (row, slot), number in of_slots(batch, scenes).items():
        if not boxing.concepts[row, number]:
            assert seen[row, ..., slot].all()
            continue
        own = told_box(boxing, full, row, slot, number)[frames or slice(None)]  # [F,4]
        first = 1 if frames is None else 4
        video = np.concatenate([np.repeat(own[:1], first, 0), np.repeat(own[1:], 4, 0)])
        starts = STARTS if frames is None else [0, 4, 8, 12]
        np.testing.assert_array_equal(seen[row, ..., slot].numpy(), tokens(video, (count, 4, 4), starts))


def test_a_box_holds_all_that_is_drawn_and_not_much_more(pool, artist, scenes):
    """Against the pixels of the clip at its full size, whatever hides of it."""
    boxing = all_boxed()
    batch = batch_of(pool, boxing)
    larger = []
    for (row, slot), number in of_slots(batch, scenes).items():
        if not boxing.concepts[row, number]:
            continue
        drawn = drawn_boxes(scenes[row], artist.atlas)[number]  # [17,4]
        told = told_box(boxing, batch, row, slot, number)
        for frame, start in enumerate(STARTS):
            own = drawn if boxing.whole[row, number] else drawn[start : 1 if frame == 0 else start + 4]
            low, high = own[:, :2].min(0), own[:, 2:].max(0)
            if number == len(scenes[row].actors) - 1:  # nothing lies over it
                assert (told[frame, :2] <= low + 1 / 64).all() and (told[frame, 2:] >= high - 1 / 64).all()
            # A latent cell is an eighth of the picture, and what is covered is told in whole ones.
            most = 1 / 8 + ROOM * (high - low + 2 / 8)
            larger.append(np.stack([low - told[frame, :2], told[frame, 2:] - high]) / most)
    assert np.max(larger) <= 1 and np.mean(larger) > 0.1


def test_room_is_a_share_of_what_is_drawn_at_every_side():
    coverage = torch.zeros(1, 1, 1, 8, 8)
    coverage[..., 2:4, 3:7] = 0.1  # a quarter high, half as wide as the picture
    own = torch.zeros(1, 1, dtype=torch.bool)
    exact = boxes_around(coverage, torch.zeros(1, 1, 4), own)
    assert exact.flatten().tolist() == [3 / 8, 2 / 8, 7 / 8, 4 / 8]
    room = torch.tensor([0.1, 0.2, 0.25, 0.0]).view(1, 1, 4)
    found = boxes_around(coverage, room, own).flatten().tolist()
    assert found == pytest.approx([3 / 8 - 0.05, 2 / 8 - 0.05, 1.0, 4 / 8])


def test_one_box_for_all_frames_is_around_all_that_is_drawn_in_any():
    coverage = torch.zeros(1, 3, 3, 8, 8)
    coverage[0, :2, 0, 2:4, 0:2] = 1  # goes right, and is hidden in the frame between
    coverage[0, :2, 2, 3:5, 5:7] = 1
    found = boxes_around(coverage, torch.zeros(1, 3, 4), torch.tensor([[True, False, True]]))[0]
    around = [0, 2 / 8, 7 / 8, 5 / 8]
    assert found[0].tolist() == [around] * 3
    assert found[1].tolist() == [[0, 2 / 8, 2 / 8, 4 / 8], [0] * 4, [5 / 8, 3 / 8, 7 / 8, 5 / 8]]
    assert not tokens_in(found[None, 2:], (3, 4, 4)).any()  # is drawn nowhere


def test_clips_and_concepts_have_boxes_as_often_as_told():
    found = Boxing.random(np.random.default_rng(0), 4000, 0.25)
    clips = found.concepts.any(1)
    assert clips.mean() == pytest.approx(0.25, abs=0.03)
    assert found.concepts[clips].mean() == pytest.approx(0.8, abs=0.03)
    assert found.loose[clips].mean() == pytest.approx(0.5, abs=0.05)
    assert found.whole[found.concepts].mean() == pytest.approx(0.5, abs=0.05)
    assert 0 <= found.room.min() and 0.24 < found.room.max() <= ROOM
    none = Boxing.random(np.random.default_rng(0), 100, 0.0)
    assert not none.loose.any() and not none.concepts.any()


def test_where_concepts_are_left_out_there_are_no_boxes_and_captions_tell_what_they_tell(pool):
    usual = batch_of(pool, None, Dropped(concepts=1, caption=0, both=0))
    found = batch_of(pool, all_boxed(), Dropped(concepts=1, caption=0, both=0))
    assert found.boxes.all()
    assert all(torch.equal(a, b) for a, b in zip(vars(usual).values(), vars(found).values(), strict=True))
    silent = batch_of(pool, all_boxed(), Dropped(concepts=0, caption=1, both=0))
    assert not silent.boxes.all() and (silent.token_mask.sum(1) == 1).all() and (silent.spot == -1).all()


def test_captions_of_some_boxed_clips_tell_no_places_and_the_noise_leaves_told_ones_alone(
    pool, artist, scenes
):
    boxing = all_boxed()
    batch = batch_of(pool, boxing)
    for row, scene in enumerate(scenes):
        ids = batch.token_ids[row][batch.token_mask[row]].tolist()
        told = tell(scene, places=not boxing.loose[row])
        assert ids == artist.tokenizer.encode(told).ids
        for number, actor in enumerate(scene.actors):
            by_caption = actor.cell is not None and not boxing.loose[row]
            assert (batch.spot[row, number] >= 9) == (by_caption or boxing.concepts[row, number])


def test_a_caption_without_places_says_all_else_alike(artist):
    told = 0
    for scene in artist.scenes(range(100, 180), Wish()):
        full, loose = (
            Counter(re.sub(r"[.,;:]", " ", tell(scene, places=places)).casefold().split())
            for places in (True, False)
        )
        cells = [actor.cell for actor in scene.actors if actor.cell is not None]
        ways = itertools.product(*(PLACES[cell] for cell in cells))
        assert any(full == loose + Counter(" ".join(way).split()) for way in ways)
        told += len(cells)
    assert told > 40


def test_spots_that_boxes_tell_are_told():
    spot = torch.tensor([[3, 12, -1, 7], [3, 12, -1, 7]])
    boxed = torch.tensor([[True, False, True, False]]).repeat(2, 1)
    found = told_by_boxes(spot, boxed, torch.tensor([[False], [True]]))
    assert found.tolist() == [[12, 12, -1, 7], [12, 3, -1, 7]]
