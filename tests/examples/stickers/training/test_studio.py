import numpy as np
import pytest
import torch

from conceptmaster.examples.stickers.training.batches import SHARES, Pool, Told, filled_slots
from conceptmaster.examples.stickers.training.options import Dropped, Options, Supply
from conceptmaster.examples.stickers.training.studio import Studio
from conceptmaster.examples.stickers.world.scenes import Wish


@pytest.fixture(scope="module")
def artist(artist):
    artist.chunk = 2
    return artist


@pytest.mark.slow
def test_what_processes_make_ahead_is_what_is_made_when_it_is_asked_for(artist):
    how = {"supply": Supply(2, 4, 1), "told": Supply(2, 3, 2), "seed": 1}
    found = []
    for workers in (0, 2):
        studio = Studio(artist, Options(workers=workers, **how))
        pool, told = Pool(studio.clips, artist.config, how["supply"]), Told(studio.told, how["told"])
        for step in range(3):
            pool.at(step)
            told.at(step)
        studio.close()
        found.append(pool.held | {f"told {name}": value for name, value in told.held.items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_batches_of_one_size_have_as_many_concepts_whatever_they_hold(artist):
    pool = Pool(Studio(artist, Options(supply=Supply(1, 60, 1))).clips, artist.config, Supply(1, 60, 1))
    pool.at(0)
    wanted = [11, 24, 11, 4]
    for seed in range(3):
        batch = pool.batch(np.random.default_rng(seed), 50, Dropped(), apart=False)
        counts = batch.label_mask.any(-1).sum(1)
        assert torch.bincount(counts).tolist()[1:] == wanted
        assert batch.filled.tolist() == torch.nonzero(batch.label_mask.any(-1).flatten())[:, 0].tolist()
        few = pool.batch(np.random.default_rng(seed), 50, Dropped())
        assert few.label_mask.shape[1] in (2, 4)
    assert sum(SHARES) == pytest.approx(1)


def test_scenes_have_so_many_concepts_as_batches_take_for_granted(artist):
    counts = np.array([len(scene.actors) for scene in artist.scenes(range(400), Wish())])
    for number, share in enumerate(SHARES, 1):
        assert (counts == number).mean() == pytest.approx(share, abs=0.06)
    assert filled_slots(np.array([1, 2]), 2).tolist() == [0, 2, 3]
