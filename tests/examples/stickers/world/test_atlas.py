import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.examples.stickers.world.atlas import BOX, TILE, cut_out, from_pictures, load, main_colour

from ..small import HELD_OUT, NOUNS, atlas, picture


def test_a_picture_is_cut_to_what_shows_and_fills_its_box():
    image = Image.new("RGBA", (100, 100))
    image.paste((255, 0, 0, 255), (10, 40, 60, 65))  # twice as wide as high
    tile = cut_out(image)
    assert tile is not None and tile.shape == (TILE, TILE, 4)
    shown = np.argwhere(tile[..., 3] > 128)
    assert np.ptp(shown[:, 1]) + 1 == BOX and abs(np.ptp(shown[:, 0]) + 1 - BOX / 2) <= 1
    assert np.allclose(main_colour(tile), (1, 0, 0), atol=0.01)


def test_of_a_picture_that_shows_nothing_there_is_no_tile():
    assert cut_out(Image.new("RGBA", (64, 64))) is None
    with pytest.raises(InputError, match="nothing is to be seen of the picture of 'air'"):
        from_pictures([("air", Image.new("RGBA", (64, 64)))], "mine")
    with pytest.raises(InputError, match="there is no picture"):
        from_pictures([], "mine")


def test_splits_share_neither_nouns_nor_sets():
    made = atlas()
    assert set(made.of("train")) == set(NOUNS) - set(HELD_OUT)
    assert set(made.of("nouns")) == set(HELD_OUT) and len(made.of("nouns")["moon"]) == 2
    assert {made.entries[k].set for pictures in made.of("sets").values() for k in pictures} == {"openmoji"}
    with pytest.raises(InputError, match="no split 'test'"):
        made.of("test")
    with pytest.raises(InputError, match="no picture of the split 'sets'"):
        from_pictures([("a", picture(0))], "mine").of("sets")


def test_an_atlas_comes_back_from_its_file(tmp_path):
    made = atlas()
    made.save(tmp_path / "atlas.npz")
    back = load(tmp_path / "atlas.npz")
    assert back.entries == made.entries
    shown = made.tiles[..., 3:] > 250
    difference = np.abs(back.tiles[..., :3].astype(int) - made.tiles[..., :3]) * shown
    assert difference.mean() < 4  # WebP loses a little


def test_what_is_no_atlas_is_named(tmp_path):
    with pytest.raises(
        InputError, match="missing: `python -m conceptmaster.examples.stickers fetch` makes it"
    ):
        load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(InputError, match="no atlas of pictures"):
        load(tmp_path / "bad.npz")
