"""The judge: true videos win, others win by chance, and each measure answers for what it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from conceptmaster.examples.sprites.scoring.measures import (
    MEASURES,
    MIN_VISIBLE,
    SEARCH,
    Contest,
    Judge,
    Windows,
    estimate_background,
    prepare,
)
from conceptmaster.examples.sprites.world.draw import draw_clip, look_of, paint_along
from conceptmaster.examples.sprites.world.scenes import (
    FRAMES,
    NOUNS,
    SIZE,
    TEXTURES,
    Actor,
    Scene,
    random_scene,
)

CHANCE = {"pair_binding": 1 / 2, "identity": 1 / 9, "noun": 1 / 14, "texture": 1 / 5, "motion": 1 / 6}


def judged_scenes(count: int, concepts: int = 2, same_noun: bool = False, start: int = 0) -> list[Scene]:
    return [
        random_scene(seed, held_out=True, concepts=concepts, same_noun=same_noun, plainly=True)
        for seed in range(start, start + count)
    ]


def shares(judges: list[Judge], video: Callable[[int], np.ndarray]) -> dict[str, float]:
    """The share of contests won when judge i is shown ``video(i)``."""
    won = [judge(video(index)) for index, judge in enumerate(judges)]
    return {m: float(np.mean([entry for w in won for entry in w[m]])) for m in MEASURES}


@pytest.fixture(scope="module")
def world() -> tuple[list[Scene], list[np.ndarray], list[Judge]]:
    """24 scenes, half of different nouns and half of one noun twice; their true videos and judges."""
    scenes = judged_scenes(12) + judged_scenes(12, 2, True, start=100)
    return scenes, [draw_clip(scene)[0] for scene in scenes], [Judge(scene) for scene in scenes]


def test_true_videos_win(world: tuple) -> None:
    _, videos, judges = world
    found = shares(judges, lambda index: videos[index])
    assert min(found.values()) >= 0.93, found


def test_videos_of_other_requests_win_by_chance(world: tuple) -> None:
    _, videos, judges = world
    found = shares(judges, lambda index: videos[index - 1])
    for measure, chance in CHANCE.items():  # 48 contests
        assert abs(found[measure] - chance) < 3.5 * (chance * (1 - chance) / 48) ** 0.5, found


@pytest.mark.parametrize("kind", ["grey", "noise"])
def test_empty_videos_win_by_chance(world: tuple, kind: str) -> None:
    _, videos, judges = world
    rng = np.random.default_rng(0)
    video = (
        np.full_like(videos[0], 128) if kind == "grey" else rng.integers(0, 256, videos[0].shape, np.uint8)
    )
    found = shares(judges, lambda index: video)
    for measure, chance in CHANCE.items():
        assert found[measure] < chance + 3.5 * (chance * (1 - chance) / 48) ** 0.5, found


def test_a_shift_within_the_search_is_forgiven(world: tuple) -> None:
    _, videos, judges = world
    found = shares(judges[:6], lambda index: np.roll(videos[index], (SEARCH, -SEARCH), (1, 2)))
    assert min(found.values()) >= 0.9, found


def drawn_with(scene: Scene, change: Callable[[Actor], Actor]) -> np.ndarray:
    return draw_clip(replace(scene, actors=tuple(change(actor) for actor in scene.actors)))[0]


def test_swapped_looks_lose_the_pair(world: tuple) -> None:
    scenes, _, judges = world
    for scene, judge in list(zip(scenes, judges, strict=True))[:6]:
        one, other = scene.actors
        swapped = replace(one, identity=other.identity), replace(other, identity=one.identity)
        won = judge(draw_clip(replace(scene, actors=swapped))[0])
        assert won["pair_binding"] == [False, False]


def test_each_measure_sees_its_own_change(world: tuple) -> None:
    scenes, _, judges = world
    scene, judge = scenes[0], judges[0]

    def other_texture(actor: Actor) -> Actor:
        kind = TEXTURES[(TEXTURES.index(actor.identity.texture) + 1) % len(TEXTURES)]
        return replace(actor, identity=replace(actor.identity, texture=kind))

    def other_noun(actor: Actor) -> Actor:
        return replace(actor, noun=NOUNS[(NOUNS.index(actor.noun) + 1) % len(NOUNS)])

    def other_motion(actor: Actor) -> Actor:
        return replace(actor, motion="up" if actor.motion == "down" else "down")

    for measure, change in (("texture", other_texture), ("noun", other_noun), ("motion", other_motion)):
        won = judge(drawn_with(scene, change))
        assert won[measure] == [False, False], measure
    assert judge(drawn_with(scene, other_texture))["noun"] == [True, True]
    assert judge(drawn_with(scene, other_noun))["pair_binding"] == [True, True]


@pytest.mark.parametrize("concepts", [1, 3])
def test_any_number_of_concepts(concepts: int) -> None:
    for scene in judged_scenes(2, concepts):
        won = Judge(scene)(draw_clip(scene)[0])
        assert tuple(won) == MEASURES
        assert won.pop("pair_binding") == ([] if concepts == 1 else [True] * concepts)
        assert all(len(entries) == concepts for entries in won.values())


@pytest.mark.parametrize(
    "frames",
    [np.zeros((FRAMES, SIZE, SIZE, 3)), np.zeros((FRAMES - 1, SIZE, SIZE, 3), np.uint8)],
    ids=["float", "short"],
)
def test_other_frames_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"frames must be uint8 \[17, 64, 64, 3\]"):
        Judge(judged_scenes(1)[0])(frames)


def slow_error(video: np.ndarray, rgb: np.ndarray, alpha: np.ndarray, visible: np.ndarray) -> float:
    """The definition, offset by offset on whole frames: the template moves with its mask."""
    best, margin = np.inf, 24
    wide = ((0, 0), (margin, margin), (margin, margin))
    frames, inside = np.pad(video, (*wide, (0, 0))), np.pad(np.ones(video.shape[:3]), wide)
    colour = rgb / np.maximum(alpha, 1e-6)[..., None]
    weight = np.pad(visible, wide, constant_values=1) * alpha
    for dy in range(-SEARCH, SEARCH + 1):
        for dx in range(-SEARCH, SEARCH + 1):
            moved = np.roll(frames, (-dy, -dx), (1, 2))
            w = weight * np.roll(inside, (-dy, -dx), (1, 2))
            if w.sum() >= MIN_VISIBLE * alpha.sum():
                best = min(best, float((w * ((moved - colour) ** 2).sum(-1)).sum() / w.sum()))
    return best


@pytest.mark.parametrize("motion", ["left", "up", "jump"])
def test_errors_are_what_they_are_defined_to_be(motion: str) -> None:
    scene = judged_scenes(3)[2]  # in the upper corners: much of these paths lies outside the frame
    for actor in scene.actors:
        video = draw_clip(scene)[0].astype(np.float32) / 255
        visible = np.random.default_rng(0).random((FRAMES, SIZE, SIZE), np.float32)
        path = actor.path(motion=motion)
        windows = Windows(path, actor.radius)
        rgb, alpha = windows.paint(actor.noun, actor.identity, look_of(motion))
        weights = alpha * (1 - windows.sample(1 - visible))
        colours = rgb / np.maximum(alpha, 1e-6)[..., None]
        contest = Contest(windows, weights[None], colours[None], alpha.sum()[None])
        error = contest.errors(prepare(video))[0]
        wide = paint_along(actor.noun, actor.identity, actor.radius, path + 24, look_of(motion), SIZE + 48)
        expected = slow_error(video, wide[0], wide[1], visible)
        if np.isinf(expected):
            assert np.isinf(error)
        else:  # up to painting on 1/256 pixel
            assert error == pytest.approx(expected, rel=0.01)


def test_the_background_is_recovered() -> None:
    for scene in judged_scenes(2):
        video = draw_clip(scene)[0].astype(np.float32) / 255
        empty = draw_clip(replace(scene, actors=()))[0][0].astype(np.float32) / 255
        free = Judge(scene).free
        found, known = estimate_background(video, free), free.any(0)
        np.testing.assert_allclose(found[known], empty[known], atol=1 / 255)
        assert np.abs(found - empty).mean() < 0.03


def test_nothing_known_gives_some_background() -> None:
    video = np.ones((FRAMES, SIZE, SIZE, 3), np.float32)
    assert np.isfinite(estimate_background(video, np.zeros((FRAMES, SIZE, SIZE), bool))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("concepts", "same_noun"), [(1, False), (2, False), (2, True), (3, False), (3, True)]
)
def test_many_true_and_shuffled_videos(concepts: int, same_noun: bool) -> None:
    scenes = judged_scenes(150, concepts, same_noun)
    videos = [draw_clip(scene)[0] for scene in scenes]
    won, lost = [], []
    for index, scene in enumerate(scenes):
        judge = Judge(scene)
        won.append(judge(videos[index]))
        lost.append(judge(videos[index - 1]))
    for measure in MEASURES[concepts == 1 :]:
        chance = 1 / concepts if measure == "pair_binding" else CHANCE[measure]
        true, shuffled = (float(np.mean([e for w in side for e in w[measure]])) for side in (won, lost))
        assert true >= 0.97, measure
        assert abs(shuffled - chance) < 4 * (chance * (1 - chance) / (150 * concepts)) ** 0.5, measure
