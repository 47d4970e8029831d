import numpy as np
import pytest
import torch

from conceptmaster.examples.stickers.training import train
from conceptmaster.examples.stickers.training.artist import Artist
from conceptmaster.examples.stickers.training.batches import Pool
from conceptmaster.examples.stickers.training.components import doubled, halved
from conceptmaster.examples.stickers.training.options import Dropped, Supply
from conceptmaster.examples.stickers.training.scenery import disc
from conceptmaster.examples.stickers.world.captions import tell
from conceptmaster.examples.stickers.world.scenes import Wish
from conceptmaster.examples.stickers.world.tokens import END_ID, build_tokenizer

from ..small import atlas, small_config


@pytest.fixture(scope="module")
def artist():
    config = small_config()
    vae = doubled(config.vae, train.SPRITES / "vae.safetensors")
    return Artist(atlas(), build_tokenizer(atlas(), captions=300), config, halved(vae))


EIGHT = Supply(blocks=2, size=4, every=2)


def pool(artist, supply=EIGHT):
    def draw(number):
        first = number * supply.size
        return artist.draw(artist.scenes(range(first, first + supply.size), Wish()), first)

    return Pool(draw, artist.config, supply)


def test_any_word_in_any_case_has_tokens_that_its_caption_has_too(artist):
    for word in ("Zorblax", "naïve", "лиса", "狐", "🦊"):
        label = artist.tokenizer.encode(word).ids
        caption = artist.tokenizer.encode(f"A {word.upper()} moves left.").ids
        assert label[-1] == END_ID
        assert any(caption[k : k + len(label) - 1] == label[:-1] for k in range(len(caption)))


def test_a_batch_has_what_its_clips_tell(artist):
    made = pool(artist)
    made.at(0)
    batch = made.batch(np.random.default_rng(0), 8, Dropped(0, 0, 0))
    slots = batch.concept_mask.shape[1]
    assert batch.latents.shape == batch.decoys.shape == (8, 192, 5, 8, 8)
    assert batch.pixels.shape == (8, slots, 3, 64, 64) and batch.portraits.shape == (8, slots, 3, 32, 32)
    assert batch.coverage.shape == (8, slots, 5, 8, 8)
    assert torch.equal(batch.concept_mask, batch.label_mask.any(-1))
    assert batch.concept_mask[:, 0].all() and batch.concept_mask.any(0).all()
    assert not torch.allclose(batch.latents, batch.decoys)


def test_tracks_are_those_of_the_frames_that_are_seen_and_spots_as_the_caption_tells_them(artist):
    made, frames = pool(artist), slice(1, 3)
    made.at(0)
    clips = np.arange(8)
    batch = made.of(clips, np.random.default_rng(0), Dropped(0, 0, 0), frames)
    scenes = artist.scenes(range(8), Wish())
    for row, scene in enumerate(scenes):
        tracks = [torch.from_numpy(actor.track()[1:9]).view(2, 4, 4) for actor in scene.actors]
        shown = list(batch.track[row][batch.concept_mask[row]])
        assert all(any(torch.equal(track, own) for own in shown) for track in tracks)
        spots = batch.spot[row].tolist()
        assert [spot >= 9 for spot in spots[: len(tracks)]] == [a.cell is not None for a in scene.actors]
        assert spots[len(tracks) :] == [-1] * (4 - len(tracks))
        for spot, actor in zip(spots, scene.actors, strict=False):
            if actor.cell is not None:  # told places are those of the ninths
                assert spot == 9 + actor.cell[0] + 3 * actor.cell[1]
    silent = made.of(clips, np.random.default_rng(0), Dropped(concepts=0, caption=1, both=0), frames)
    assert (silent.spot == -1).all()


def test_captions_and_concepts_are_left_out_as_often_as_told(artist):
    made = pool(artist)
    made.at(0)
    rng = np.random.default_rng(0)
    nothing = made.batch(rng, 8, Dropped(concepts=0, caption=0, both=1))
    assert not nothing.concept_mask.any() and (nothing.token_mask.sum(1) == 1).all()
    assert (nothing.token_ids[:, 0] == END_ID).all()
    silent = made.batch(rng, 8, Dropped(concepts=0, caption=1, both=0))
    assert silent.concept_mask.any(1).all() and (silent.token_mask.sum(1) == 1).all()
    told = made.batch(rng, 8, Dropped(concepts=1, caption=0, both=0))
    assert not told.concept_mask.any() and (told.token_mask.sum(1) > 1).all()


def test_what_is_there_at_a_step_does_not_depend_on_how_it_came_to_be(artist):
    walked, jumped = (pool(artist, Supply(blocks=2, size=3, every=1)) for _ in range(2))
    for step in range(3):
        walked.at(step)
    jumped.at(2)
    one, other = (p.batch(np.random.default_rng(1), 16, Dropped()) for p in (walked, jumped))
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def test_captions_alone_tell_where_their_concepts_are(artist):
    captions = artist.captions(range(12), Wish())
    scenes = artist.scenes(range(12), Wish())
    assert captions.coverage.shape == (12, 4, 5, 8, 8)
    for row, scene in enumerate(scenes):
        assert (captions.coverage[row].amax((1, 2, 3)) > 0.5).sum() == len(scene.actors)
        x, y = (int(v / 8) for v in scene.actors[0].track()[0, :2])
        assert captions.coverage[row, 0, 0, y, x] > 0.4 or scene.actors[0].size == "small"
    assert disc(scenes[0].actors[0], 8).shape == (5, 8, 8)


def test_a_caption_too_long_for_the_model_is_drawn_again(artist, monkeypatch):
    from conceptmaster.examples.stickers.training import scenery

    refused = []

    def fits(tokenizer, texts, length):
        refused.append(texts)
        return len(refused) > 2

    monkeypatch.setattr(scenery, "fits", fits)
    (scene,) = artist.scenes(range(5, 6), Wish())
    assert tell(scene) != refused[0][0]
