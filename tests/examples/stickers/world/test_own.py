import numpy as np

from conceptmaster.examples.stickers.world import own
from conceptmaster.examples.stickers.world.atlas import cut_out
from conceptmaster.examples.stickers.world.nouns import Noun


def test_sprites_have_their_nouns_and_whole_pictures():
    found = list(own.sprites())
    nouns = {noun for noun, _ in found}
    assert len(found) == own.EACH_SPRITE * len(nouns) and {"cat", "house", "robot"} <= nouns
    alphas = [np.asarray(picture)[..., 3] for _, picture in found]
    assert all(alpha.max() == 255 for alpha in alphas)
    assert not any(alpha[0].any() or alpha[-1].any() or alpha[:, 0].any() for alpha in alphas)


def test_cut_outs_are_different_figures_under_words_that_are_trained_on():
    found = list(own.cut_outs())
    assert not any(Noun(name, ()).held_out for name, _ in found)
    tiles = [cut_out(picture) for _, picture in found]
    assert all(tile is not None for tile in tiles)
    assert len({tile.tobytes() for tile in tiles}) == own.CUT_OUT_COUNT
