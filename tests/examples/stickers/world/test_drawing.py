import numpy as np
import pytest
import torch

from conceptmaster.examples.stickers.world import drawing, grounds
from conceptmaster.examples.stickers.world.atlas import BOX, TILE
from conceptmaster.examples.stickers.world.looks import Look
from conceptmaster.examples.stickers.world.scenes import SIDE, Wish, random_scene

from ..small import atlas


@pytest.fixture(scope="module")
def tiles():
    return torch.from_numpy(atlas().tiles)


@pytest.fixture(scope="module")
def banks():
    return torch.from_numpy(grounds.banks(0, 32, each=2))


def clips(scenes, tiles, banks):
    cast = drawing.cast_of(scenes)
    stage = drawing.Stage.of(scenes, 2)
    return drawing.clips(drawing.dress(tiles, cast), cast.stretch, stage, banks, 32)


def test_a_natural_look_leaves_a_picture_as_it_is(tiles):
    cast = drawing.Cast.of([3], [Look()])
    own = tiles[3].permute(2, 0, 1).float() / 255
    dressed = drawing.dress(tiles, cast)[0]
    assert torch.allclose(dressed[3], own[3])
    assert torch.allclose(dressed[:3], own[:3] * own[3:], atol=1e-5)


def test_flips_and_patterns_show(tiles):
    looks = [Look(), Look(flip=True), Look(pattern="stripes", paint=(0, 0, 0), period=0.2)]
    plain, flipped, striped = drawing.dress(tiles, drawing.Cast.of([3] * 3, looks))
    assert torch.equal(flipped, plain.flip(2))
    assert torch.equal(striped[3], plain[3]) and (striped[:3] - plain[:3]).abs().mean() > 0.05


def test_a_picture_is_where_its_track_says(tiles):
    dressed = torch.ones(1, 4, TILE, TILE)
    edge = (TILE - BOX) // 2
    dressed[:, :, :edge] = dressed[:, :, -edge:] = 0
    dressed[:, :, :, :edge] = dressed[:, :, :, -edge:] = 0
    track = torch.tensor([[20.0, 40.0, 8.0, 0.0]])
    (drawn,) = drawing.place(dressed, track, torch.ones(1), int(SIDE))
    rows, columns = torch.nonzero(drawn[3] > 0.5, as_tuple=True)
    assert (int(columns.min()), int(columns.max())) == (12, 27)
    assert (int(rows.min()), int(rows.max())) == (32, 47)
    (wide,) = drawing.place(dressed, track, torch.tensor([1.25]), int(SIDE))
    rows, columns = torch.nonzero(wide[3] > 0.5, as_tuple=True)
    assert len(set(columns.tolist())) == 20 and len(set(rows.tolist())) in (12, 13, 14)


def test_turns_are_clockwise():
    dressed = torch.zeros(1, 4, TILE, TILE)
    dressed[:, :, TILE // 2 - 4 : TILE // 2 + 4, TILE - 20 : TILE - 8] = 1  # to the right
    track = torch.tensor([[32.0, 32.0, 16.0, torch.pi / 2]])
    (drawn,) = drawing.place(dressed, track, torch.ones(1), 64)
    rows, columns = torch.nonzero(drawn[3] > 0.5, as_tuple=True)
    assert rows.float().mean() > 40 and abs(columns.float().mean() - 31.5) < 1  # below


def test_clips_show_every_concept_over_those_before_it(tiles, banks):
    scenes = [random_scene(seed, atlas(), Wish(concepts=1 + seed % 3)) for seed in range(6)]
    video, visible = clips(scenes, tiles, banks)
    assert video.shape == (6, 3, 17, 32, 32) and 0 <= video.min() and video.max() <= 1.001
    assert visible.shape == (6, 4, 17, 8, 8)
    for row, scene in enumerate(scenes):
        there = visible[row].amax((1, 2, 3)) > 0.2
        assert there.tolist() == [n < len(scene.actors) for n in range(4)]


def test_scenes_drawn_together_look_as_each_does_alone(tiles, banks):
    scenes = [random_scene(seed, atlas(), Wish()) for seed in range(4)]
    together = clips(scenes, tiles, banks)
    for row, scene in enumerate(scenes):
        for whole, alone in zip(together, clips([scene], tiles, banks), strict=True):
            assert torch.allclose(whole[row], alone[0], atol=1e-5)


def test_references_and_upright_pictures_show_the_picture(tiles):
    cast = drawing.Cast.of([0, 1, 2], [Look()] * 3)
    dressed = drawing.dress(tiles, cast)
    seen = drawing.references(dressed, cast.stretch, torch.Generator().manual_seed(0))
    assert seen.shape == (3, 3, 64, 64) and seen.dtype == torch.uint8
    faces = drawing.upright(dressed, cast.stretch)
    assert faces.shape == (3, 3, 32, 32)
    assert (faces[:, :, 0, 0] == 128).all()  # grey where nothing is
    assert (faces.float() - 128).abs().mean() > 10


def test_every_background_is_painted():
    made = grounds.banks(3, 16, each=1)
    assert made.shape == (len(grounds.KINDS), 1, 16, 16, 3)
    assert len({image.tobytes() for image in made}) == len(made)
    assert np.array_equal(made, grounds.banks(3, 16, each=1))
    with pytest.raises(ValueError, match="no background is called 'moon'"):
        grounds.paint("moon", np.random.default_rng(0), 8)
