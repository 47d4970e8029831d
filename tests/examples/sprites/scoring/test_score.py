"""Scoring: the right videos are generated, judged against the original, and added up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.scoring.judging import Result
from conceptmaster.examples.sprites.scoring.measures import MEASURES
from conceptmaster.examples.sprites.scoring.score import Options, check_bundle, judged_scene, score, summary
from conceptmaster.examples.sprites.scoring.sheet import GAP, TILE, Row, draw_sheet, save_sheet
from conceptmaster.examples.sprites.world.draw import draw_clip
from conceptmaster.examples.sprites.world.requesting import references
from conceptmaster.examples.sprites.world.scenes import FPS, TEXTURES, random_identity
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video


class Painter:
    """A model that does as it is told: paints the scene of the seed with the looks that the pictures show."""

    def __init__(self, concepts: int, same_noun: bool = False) -> None:
        self.concepts, self.same_noun = concepts, same_noun
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Video:
        self.requests.append(request)
        scene = judged_scene(request.seed, self.concepts, self.same_noun)
        assert request.prompt == scene.caption
        shown = references(scene)
        rng = np.random.default_rng(request.seed)
        actors = []
        for actor in scene.actors:
            look = random_identity(rng, held_out=False)  # without a picture: any
            for concept in request.concepts:
                if concept.label == actor.label:
                    (index,) = (
                        i for i, p in enumerate(shown) if np.array_equal(p, np.asarray(concept.image))
                    )
                    look = scene.actors[index].identity
            actors.append(dataclasses.replace(actor, identity=look))
        frames = draw_clip(dataclasses.replace(scene, actors=tuple(actors)))[0]
        return Video(frames, FPS, request.seed)


@pytest.mark.parametrize(("concepts", "same_noun"), [(1, False), (2, True), (3, False)])
def test_a_model_that_follows_its_pictures(concepts: int, same_noun: bool) -> None:
    painter = Painter(concepts, same_noun)
    options = Options(range(3, 6), concepts, same_noun, steps=7, guidance=2.0, solver="euler")
    report, results = score(options, generate=painter, keep=2)
    assert [result.seed for result in results] == [3, 4, 5]
    assert [len(result.videos) for result in results] == [2 + (concepts > 1)] * 2 + [0]
    assert len(painter.requests) == 3 * (2 + (concepts > 1))
    asked = {(request.steps, request.guidance, request.solver) for request in painter.requests}
    assert asked == {(7, 2.0, "euler")}
    assert [len(request.concepts) for request in painter.requests[:2]] == [concepts, 0]
    assert report["requests"] == 3 and report["concepts"] == concepts and report["bundle"] is None
    assert min(report[measure] for measure in MEASURES[concepts == 1 :]) == 1.0
    if concepts == 1:
        assert report["pair_binding"] is None and report["pair_binding_swapped"] is None
    else:
        assert report["pair_binding_swapped"] == 0.0
    assert report["identity_no_concepts"] < 1.0


def test_without_controls_one_video_each() -> None:
    painter = Painter(2)
    report, _ = score(Options(range(2), controls=False), generate=painter)
    assert len(painter.requests) == 2
    assert report["pair_binding_no_concepts"] is None and report["pair_binding_swapped"] is None


def test_truth_and_shuffled() -> None:
    truth, _ = score(Options(range(4), source="truth"))
    shuffled, results = score(Options(range(4), source="shuffled"), keep=4)
    assert all(truth[measure] == 1.0 for measure in MEASURES)
    assert all(shuffled[measure] < 0.8 for measure in MEASURES)
    for result, next_seed in zip(results, [1, 2, 3, 0], strict=True):
        np.testing.assert_array_equal(result.videos[""], draw_clip(judged_scene(next_seed, 2, False))[0])


def test_textures_are_counted_by_kind() -> None:
    class Stripes(Painter):
        """Paints as asked, but every body in stripes."""

        def __call__(self, request: Request) -> Video:
            scene = judged_scene(request.seed, self.concepts, self.same_noun)
            striped = tuple(
                dataclasses.replace(a, identity=dataclasses.replace(a.identity, texture="stripes"))
                for a in scene.actors
            )
            return Video(draw_clip(dataclasses.replace(scene, actors=striped))[0], FPS, request.seed)

    report, results = score(Options(range(8), controls=False), generate=Stripes(2))
    asked = [actor.identity.texture for r in results for actor in judged_scene(r.seed, 2, False).actors]
    assert report["texture_of"].keys() == set(TEXTURES) and "stripes" in asked and "rings" in asked
    assert {kind: share for kind, share in report["texture_of"].items() if share is not None} == {
        kind: float(kind == "stripes") for kind in asked
    }
    assert report["texture"] == asked.count("stripes") / len(asked)


def test_workers_give_the_same() -> None:
    alone, results = score(Options(range(3), source="truth"))
    together, others = score(Options(range(3), source="truth", workers=2))
    assert [result.won for result in results] == [result.won for result in others]
    assert all(alone[measure] == together[measure] for measure in MEASURES)


def test_a_worker_says_what_went_wrong() -> None:
    with pytest.raises(InputError, match="no bundle"):
        score(Options(range(2), bundle="nowhere", workers=2))


def test_shares_and_standard_errors() -> None:
    def result(seed: int, *pair: bool) -> Result:
        won = {measure: list(pair) for measure in MEASURES} | {"pair_binding": []}
        return Result(seed, {"": won}, [], {})

    found = summary([result(0, True, True), result(1, True, False), result(2, False, False)], 2)
    assert found["identity"] == 0.5 and found["identity_swapped"] is None
    assert found["standard_errors"]["identity"] == pytest.approx(0.5 / 3**0.5, abs=1e-4)
    assert found["pair_binding"] is None and found["standard_errors"]["pair_binding"] is None
    assert found["chance"]["identity"] == pytest.approx(1 / 9, abs=1e-4)
    assert summary([result(0, True)], 1)["standard_errors"]["identity"] is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seeds": range(0)}, "seeds must be A:B"),
        ({"seeds": range(5, 3)}, "seeds must be A:B"),
        ({"seeds": range(-1, 3)}, "seeds must be A:B"),
        ({"seeds": range(2**63, 2**63 + 1)}, "seeds must be A:B"),
        ({"seeds": range(0, 2**62)}, "more than"),
        ({"seeds": range(1), "source": "shuffled"}, "at least two"),
        ({"concepts": 0}, "1 to 3 concepts"),
        ({"concepts": 4}, "1 to 3 concepts"),
        ({"concepts": 1, "same_noun": True}, "at least 2"),
        ({"source": "dream"}, "source must be"),
        ({"steps": 0}, "steps must be"),
        ({"guidance": -1.0}, "guidance must be"),
        ({"concept_guidance": float("nan")}, "concept_guidance must be"),
        ({"solver": "magic"}, "unknown solver"),
        ({"workers": 0}, "workers must be"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Options(**fields)


@pytest.mark.parametrize(
    ("name", "shape", "fine"),
    [
        ("sprites", (17, 64, 64), True),
        ("sprites-int8", (17, 64, 64), True),
        ("wan", (17, 64, 64), False),
        ("sprites", (5, 64, 64), False),
        ("sprites", (17, 32, 64), False),
    ],
)
def test_bundles_of_other_worlds_are_refused(name: str, shape: tuple[int, int, int], fine: bool) -> None:
    shapes = SimpleNamespace(frames=shape[0], height=shape[1], width=shape[2])
    manifest = SimpleNamespace(name=name, shapes=shapes)
    if fine:
        check_bundle(manifest)  # type: ignore[arg-type]
    else:
        with pytest.raises(InputError, match="of another world: this world's bundles are named sprites"):
            check_bundle(manifest)  # type: ignore[arg-type]


def test_the_sheet_shows_everything(tmp_path: Path) -> None:
    red, blue = (np.full((17, 64, 64, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    row = Row("a caption", [np.zeros((128, 128, 3), np.uint8)] * 2, {"truth": red, "as asked": blue})
    save_sheet([row, row], tmp_path / "sheet.png")
    image = Image.open(tmp_path / "sheet.png")
    assert image.size == draw_sheet([row, row]).size
    colours = {colour: count for count, colour in image.getcolors(2**24)}
    assert colours[(255, 0, 0)] == colours[(0, 0, 255)] == 2 * 3 * TILE**2
    assert image.size[0] >= 8 * (TILE + GAP)
