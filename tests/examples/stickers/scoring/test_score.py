from types import SimpleNamespace

import numpy as np
import pytest

from conceptmaster.errors import InputError
from conceptmaster.examples.stickers.cli import main
from conceptmaster.examples.stickers.scoring import score as scoring
from conceptmaster.examples.stickers.scoring.measures import Judge
from conceptmaster.examples.stickers.scoring.options import Options
from conceptmaster.examples.stickers.scoring.score import check_bundle, score, worst_rows
from conceptmaster.examples.stickers.world.captions import tell
from conceptmaster.examples.stickers.world.requesting import drawn_boxes, references, true_video
from conceptmaster.examples.stickers.world.scenes import FPS
from conceptmaster.runtime.video import Video

from ..small import NOUNS, atlas, picture


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    monkeypatch.setattr(scoring, "_pictures", lambda file, folder: atlas())


def options(count=4, **how):
    return Options(**({"seeds": range(count), "split": "all"} | how))


@pytest.mark.parametrize("how", [{}, {"same_noun": True}, {"concepts": 3, "made_up_labels": True}])
def test_true_videos_win_nearly_everything(how):
    report, results = score(options(3, source="truth", **how))
    assert len(results) == 3
    assert min(report[measure] for measure in ("pair_binding", "identity", "motion")) >= 0.9


def test_videos_of_other_requests_win_by_chance_alone():
    report, _ = score(options(6, source="shuffled"))
    assert report["pair_binding"] < 0.9 and report["identity"] < 0.6 and report["motion"] < 0.5
    assert report["chance"] == {"pair_binding": 0.5, "identity": 0.1111, "motion": 0.0909}


def test_without_places_it_is_only_asked_whether_concepts_are_to_be_seen():
    report, results = score(options(2, source="truth", places=False, concepts=1))
    assert results[0].won[""].keys() == {"visible"} and report["visible"] >= 0.5


def test_boxes_hold_what_is_drawn_and_true_videos_are_placed():
    scene = options().scene(0, atlas())
    boxes = drawn_boxes(scene, atlas())
    assert boxes.shape == (2, 17, 4) and 0 <= boxes.min() and boxes.max() <= 1
    assert (boxes[..., :2] < boxes[..., 2:]).all()
    for actor, box in zip(scene.actors, boxes, strict=True):
        middle = actor.track()[:, :2] / 64
        assert ((box[:, :2] < middle) & (middle < box[:, 2:])).all()
    truth, _ = score(options(3, source="truth", boxes=True))
    other, _ = score(options(3, source="shuffled", boxes=True))
    assert truth["placed"] >= 0.8 > other["placed"] and truth["identity"] >= 0.8
    assert truth["chance"]["placed"] is None


def test_with_boxes_no_caption_tells_places_and_one_control_has_none():
    asked = []

    def generate(request):
        asked.append(request)
        shown = options().scene(request.seed + (not request.boxes), atlas())  # follows boxes alone
        return Video(true_video(shown, atlas()), FPS, request.seed)

    scene = options().scene(1, atlas())
    report, results = score(options(boxes=True, seeds=range(1, 2)), generate=generate, keep=1)
    assert {request.prompt for request in asked} == {tell(scene, places=False)}
    assert [len(request.concepts) for request in asked] == [2, 0, 2, 2]
    assert [len(request.boxes) for request in asked] == [2, 0, 2, 0]
    own = asked[0].boxes[scene.actors[0].label]
    assert list(own) == list(range(17)) and own[3] == tuple(drawn_boxes(scene, atlas())[0, 3])
    assert report["placed"] == 1 > report["placed_no_boxes"]
    assert list(results[0].videos) == ["", "_no_concepts", "_swapped", "_no_boxes"]


def test_controls_are_the_same_request_without_and_with_swapped_pictures():
    asked = []

    def generate(request):
        asked.append(request)
        scene = options().scene(request.seed, atlas())
        assert request.prompt == tell(scene)
        return Video(true_video(scene, atlas()), FPS, request.seed)

    report, results = score(options(1), generate=generate, keep=1)
    assert [len(request.concepts) for request in asked[:3]] == [2, 0, 2]
    one, other = (np.asarray(concept.image) for concept in asked[0].concepts)
    assert np.array_equal(one, np.asarray(asked[2].concepts[1].image))
    assert np.array_equal(other, np.asarray(asked[2].concepts[0].image))
    assert report["pair_binding"] == report["pair_binding_swapped"] == 1.0
    assert list(results[0].videos) == ["", "_no_concepts", "_swapped"]


def test_the_worst_are_shown_worst_first_and_those_that_lost_nothing_not():
    def generate(request):
        wrong = request.seed if request.seed == 1 else 0  # of seed 1 it makes another request's video
        return Video(true_video(options().scene(request.seed + wrong, atlas()), atlas()), FPS, request.seed)

    asked = options(3, controls=False)
    _, results = score(asked, generate=generate)
    (row,) = worst_rows(asked, results, 8, generate=generate)
    lost, caption = row.caption.split("\n")
    assert lost.startswith("seed 1 lost ") and caption == f"seed 1: {tell(options().scene(1, atlas()))}"
    assert list(row.videos) == ["truth", "as asked", "no concepts", "pictures swapped"]


def test_a_request_has_words_that_the_bundle_takes(monkeypatch):
    """A long label is a scene of another seed: nothing else of the score is lost."""
    scene = scoring.Stickers(options()).scene(1)
    assert scene == options().scene(1, atlas())
    long, refused = scene.actors[0].label, []

    class Short:
        def encode(self, text, limit, what):
            if text == long:
                refused.append(what)
                raise InputError("too long")

    _, manifest = scoring._reader("stickers")
    monkeypatch.setattr(scoring, "_reader", lambda bundle: (Short(), manifest))
    other = scoring.Stickers(options()).scene(1)
    assert other.seed == 1 and refused and long not in {actor.label for actor in other.actors}
    assert scoring.Stickers(options(source="truth")).scene(1) == scene  # nobody reads it


def test_a_scene_has_the_same_pictures_and_video_every_time():
    scene = options().scene(3, atlas())
    assert np.array_equal(references(scene, atlas()), references(scene, atlas()))
    video = true_video(scene, atlas())
    assert video.shape == (17, 128, 128, 3) and video.dtype == np.uint8
    assert np.array_equal(video, true_video(scene, atlas()))


def test_frames_of_another_shape_are_refused():
    judge = Judge(options().scene(0, atlas()), atlas())
    with pytest.raises(ValueError, match="frames must be uint8"):
        judge(np.zeros((17, 64, 64, 3), np.uint8))


def test_bundles_of_another_world_are_refused():
    shapes = SimpleNamespace(frames=17, height=64, width=64)
    with pytest.raises(InputError, match="the bundle 'sprites' is of another world"):
        check_bundle(SimpleNamespace(name="sprites", shapes=shapes))
    with pytest.raises(InputError, match="this one makes 17 of 64×64"):
        check_bundle(SimpleNamespace(name="stickers-small", shapes=shapes))
    shapes = SimpleNamespace(frames=17, height=128, width=128)
    check_bundle(SimpleNamespace(name="stickers-int8", shapes=shapes))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"concepts": 5}, "1 to 4 concepts"),
        ({"concepts": 1, "same_noun": True}, "at least 2 concepts"),
        ({"split": "mine"}, "the split must be one of"),
        ({"source": "dream"}, "the source must be one of"),
        ({"seeds": range(1), "source": "shuffled"}, "at least two requests"),
        ({"seeds": range(3, 3)}, "A < B"),
        ({"boxes": True, "places": False}, "leave out --boxes or --no-places"),
        ({"workers": 0}, "workers must be 1 or more"),
        ({"steps": 0}, "steps"),
    ],
)
def test_what_cannot_be_scored_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Options(**wrong)


def test_a_folder_of_pictures_is_scored_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    for number, noun in enumerate(NOUNS[:6]):
        picture(number).save(tmp_path / f"my_{noun}.png")
    command = ["score", "--pictures", str(tmp_path), "--seeds", "0:2", "--truth", "--quiet", "--json"]
    assert main(command) == 0
    assert '"pair_binding": 1.0' in capsys.readouterr().out
    assert main(["score", "--pictures", str(tmp_path / "none"), "--truth", "--quiet"]) == 2
    assert "is no folder with PNG files" in capsys.readouterr().err
    assert main(["score", "--shuffled"]) == 2
    assert "--shuffled needs --truth" in capsys.readouterr().err
