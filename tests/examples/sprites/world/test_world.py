"""The world: the same from the same seed, split by look, told truly."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptmaster.examples.sprites.training.train import RANGES
from conceptmaster.examples.sprites.world.draw import draw_clip, draw_reference, look_of, paint_along
from conceptmaster.examples.sprites.world.requesting import concepts
from conceptmaster.examples.sprites.world.scenes import (
    ACCESSORIES,
    BACKGROUNDS,
    FRAMES,
    MIN_COLOUR_DISTANCE,
    MIN_DISTANCE,
    MOTION_WORDS,
    MOTIONS,
    NOUNS,
    PLACES,
    SIZE,
    TEXTURES,
    Scene,
    random_identity,
    random_scene,
)
from conceptmaster.examples.sprites.world.vocabulary import KNOWN
from conceptmaster.runtime.bundle_format import strict_json
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.tokenizer import Tokenizer
from conceptmaster.runtime.vocabulary import remarks

SEEDS = st.integers(0, 2**63 - 1)


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 99]))


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
def test_a_seed_is_a_scene_is_a_clip(seed: int) -> None:
    scene = random_scene(seed, held_out=True)
    assert scene == random_scene(seed, held_out=True)
    assert scene != random_scene(seed, held_out=False)
    (clip, masks), (again, masks_again) = draw_clip(scene), draw_clip(scene)
    assert clip.dtype == np.uint8 and clip.shape == (FRAMES, SIZE, SIZE, 3)
    np.testing.assert_array_equal(clip, again)
    np.testing.assert_array_equal(masks, masks_again)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, held_out=st.booleans())
def test_the_split_never_mixes(seed: int, held_out: bool) -> None:
    assert random_identity(generator(seed), held_out).held_out == held_out
    scene = random_scene(seed, held_out=held_out)
    assert [actor.identity.held_out for actor in scene.actors] == [held_out] * len(scene.actors)


def test_the_split_goes_by_look_alone() -> None:
    looks = [random_identity(generator(seed), held_out=True) for seed in range(20)]
    for look in looks:  # what is not part of the cell does not move a look to the other side
        other = dataclasses.replace(look, accent=(0.1, 0.2, 0.3), period=0.6, angle=1.0)
        assert other.held_out


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, concepts=st.sampled_from([1, 2, 3]), twins=st.booleans(), held_out=st.booleans())
def test_scenes_are_as_wished_and_told_plainly(seed: int, concepts: int, twins: bool, held_out: bool) -> None:
    twins = twins and concepts > 1
    scene = random_scene(seed, held_out=held_out, concepts=concepts, same_noun=twins, plainly=True)
    labels = [actor.label for actor in scene.actors]
    nouns = [actor.noun for actor in scene.actors]
    assert len(set(labels)) == len(labels) == concepts
    assert len(set(nouns)) == concepts - twins
    for actor in scene.actors:
        article = "the" if nouns.count(actor.noun) > 1 else "a"
        told = f"{article} {actor.label} {PLACES[actor.cell]} {MOTION_WORDS[actor.motion][0]}"
        assert told in scene.caption
        assert actor.label.split()[-1] == actor.noun
    assert scene.caption.endswith(f", {BACKGROUNDS[scene.background]}")
    for one, other in itertools.combinations(scene.actors, 2):
        assert np.hypot(*(one.path() - other.path()).T).min() >= MIN_DISTANCE
        assert np.linalg.norm(np.subtract(one.identity.body, other.identity.body)) >= MIN_COLOUR_DISTANCE


def test_everything_occurs() -> None:
    scenes = [random_scene(seed, held_out=False) for seed in range(400)]
    actors = [actor for scene in scenes for actor in scene.actors]
    assert {len(scene.actors) for scene in scenes} == {1, 2, 3}
    assert {actor.noun for actor in actors} == set(NOUNS)
    assert {actor.motion for actor in actors} == set(MOTIONS)
    assert {actor.cell for actor in actors} == set(PLACES)
    assert {actor.identity.texture for actor in actors} == set(TEXTURES)
    assert {actor.identity.accessory for actor in actors} == set(ACCESSORIES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert any(len({a.noun for a in scene.actors}) < len(scene.actors) for scene in scenes)


@pytest.mark.parametrize(
    "wish", [{"concepts": 0}, {"concepts": 4}, {"concepts": 1, "same_noun": True}], ids=str
)
def test_impossible_wishes_are_refused(wish: dict) -> None:
    with pytest.raises(ValueError):
        random_scene(0, held_out=True, **wish)


@pytest.mark.parametrize("seed", range(6))
def test_masks_say_what_is_visible(seed: int) -> None:
    scene = random_scene(seed, held_out=True, concepts=3)
    clip, masks = draw_clip(scene)
    assert masks.shape == (3, FRAMES, SIZE, SIZE) and masks.min() >= 0
    assert masks.sum(0).max() <= 1 + 1e-5
    free = masks.sum(0) == 0
    background = np.where(free[..., None], clip, 0).max(0)
    assert (np.where(free[..., None], clip, background) == background).all()  # it does not move
    top = scene.actors[-1]
    alpha = paint_along(top.noun, top.identity, top.radius, top.path(), look_of(top.motion))[1]
    np.testing.assert_array_equal(masks[-1], alpha)  # nothing is drawn over the last one
    alone = draw_clip(Scene(scene.caption, scene.actors[:1], scene.background, scene.seed))[1]
    assert (masks[0] <= alone[0] + 1e-6).all()


def test_a_mask_is_where_its_actor_matters() -> None:
    scene = random_scene(4, held_out=True, concepts=2)
    clip, masks = draw_clip(scene)
    shy = dataclasses.replace(scene.actors[0], identity=random_identity(generator(1), held_out=True))
    other, _ = draw_clip(dataclasses.replace(scene, actors=(shy, scene.actors[1])))
    changed = (clip != other).any(-1)
    reach = paint_along("ball", shy.identity, 1.5 * shy.radius, shy.path())[1] > 0
    assert changed.any() and not (changed & ~reach).any()
    assert not changed[masks[1] > 0.999].any()


def test_references_show_the_look_in_another_pose() -> None:
    actor = random_scene(0, held_out=True).actors[0]
    plain = dataclasses.replace(
        actor, noun="ball", identity=dataclasses.replace(actor.identity, texture="plain", accessory="none")
    )
    rng = generator(0)
    pictures = [draw_reference(plain, rng) for _ in range(4)]
    assert all(picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert all((a != b).any() for a, b in itertools.combinations(pictures, 2))
    colour = np.asarray(plain.identity.body) * 255
    clip, _ = draw_clip(Scene("", (plain,), "wall", 0))
    for picture in pictures:
        assert (np.abs(picture - colour).max(-1) < 1).sum() > 200  # its colour, and much of it
        assert not any((picture == frame).all() for frame in clip)
    np.testing.assert_array_equal(draw_reference(plain, generator(0)), pictures[0])


def test_painting_is_cut_off_at_the_frame() -> None:
    look = random_identity(generator(3), held_out=False)
    path = np.array([[32, 32], [0, 32], [-40, 32]], np.float32)
    rgb, alpha = paint_along("ball", look, 10.0, path)
    areas = alpha.sum((1, 2))
    assert areas[2] == 0 and areas[0] * 0.45 < areas[1] < areas[0] * 0.55
    assert (rgb <= alpha[..., None] + 1e-6).all()
    np.testing.assert_allclose(alpha[1, :, :16], alpha[0, :, 32:48], atol=1e-6)


@pytest.mark.parametrize("name", ["sprites", "sprites-int8"])
def test_the_shipped_bundles_know_this_world(name: str) -> None:
    """All of it, and nothing that no caption says but "an"."""
    weights = Path(__file__).parents[4] / "examples" / "sprites" / "weights"
    for kind, told in (("vocabulary", KNOWN), ("ranges", RANGES)):
        assert json.loads((weights / f"{kind}.json").read_text()) == told
    bundle = Bundle.open(name)
    manifest, read = bundle.manifest, Tokenizer(bundle.tokenizer).read
    assert strict_json.encode(manifest.ranges) == RANGES
    known = strict_json.encode(manifest.vocabulary)
    assert known == KNOWN | {"open": False}
    unsaid = {*known["words"], *known["labels"], *itertools.chain(*known["phrases"].values())}
    for seed in range(300):
        scene = random_scene(seed, held_out=seed % 2 == 0)
        pictures = [np.zeros((1, 1), np.uint8)] * len(scene.actors)
        request, _ = Request(scene.caption, concepts(scene, pictures)).resolve(manifest)
        assert remarks(request, manifest, read) == [], scene.caption
        unsaid -= {entry for entry in unsaid if f" {entry} " in f" {scene.caption.replace(',', ' ,')} "}
    assert unsaid == {"an"}
