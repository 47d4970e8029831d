"""Cuts, motion, light, what moves, boxes, masks and faces: on videos whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptmaster.examples.data import boxes, masks
from conceptmaster.examples.data.boxes import Found
from conceptmaster.examples.data.cuts import find_shots
from conceptmaster.examples.data.faces import face_finder
from conceptmaster.examples.data.films import Film, Unreadable
from conceptmaster.examples.data.motion import Sampled, filter_motion, measure
from conceptmaster.examples.data.moving import Moving
from conceptmaster.examples.data.nouns import Noun
from conceptmaster.examples.data.pairs import cut_out
from conceptmaster.examples.data.rectangles import box_of, iou
from conceptmaster.examples.data.thresholds import Thresholds
from conceptmaster.runtime.video import Video

from .small import clips, disc, write_drawn

OURS = Thresholds()
CAT, DOG = Noun("cat", "cat", "livings", ((0, 3),)), Noun("dog", "dog", "livings", ((4, 7),))
MAN = Noun("man", "man", "persons", ((0, 3),))


def film_of(frames: np.ndarray, folder: Path, fps: float = 10.0) -> Film:
    return Film(Video(frames, fps).save(folder / "film.mp4", scale=1))


def test_frames_are_those_of_the_file(tmp_path: Path) -> None:
    frames, _ = disc()
    film = film_of(frames, tmp_path)
    assert (film.width, film.height, film.fps) == (128, 96, 10.0)
    read = dict(film.frames(3, 7))
    assert list(read) == [3, 4, 5, 6]
    assert np.abs(read[5].astype(int) - frames[5]).mean() < 6  # 4:2:0 and a codec between
    assert film.some([9, 2]).keys() == {2, 9}
    assert film.some([0], side=64)[0].shape == (48, 64, 3)


def test_what_is_no_video_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(Unreadable, match="Invalid data"):
        Film(tmp_path / "a.mp4")


def test_cuts_are_found_where_they_are(tmp_path: Path) -> None:
    one, other = disc(20)[0], 255 - disc(20, seed=5)[0]
    film = film_of(np.concatenate([one, other, one[:3]]), tmp_path)
    shots, dropped = find_shots(film, replace(OURS, cuts="split"))
    assert [shot["frames"] for shot in shots] == [[0, 20], [20, 40]]
    assert [each["why"] for each in dropped] == ["too short"]
    assert find_shots(film, OURS) == ([], [{"why": "has cuts", "value": 2}])
    short, _ = find_shots(film, replace(OURS, cuts="split", longest=1.0))
    assert [shot["frames"] for shot in short] == [[0, 10], [20, 30]]


def test_flow_is_measured_in_diagonals_a_second(tmp_path: Path) -> None:
    frames, _ = disc(pan=3.0)  # all of the ground goes by
    film = film_of(frames, tmp_path)
    flow, contrast = measure(Sampled(film, 0, 20), film.fps)
    assert flow == pytest.approx(100 * 3 / 160 * 10, rel=0.15)  # 3 pixels a frame, of a diagonal of 160
    grey = [np.asarray(Image.fromarray(frame).convert("L")).std() / 255 for frame in frames]
    assert contrast == pytest.approx(np.mean(grey), rel=0.05)


def test_what_stands_still_or_is_dark_is_dropped(tmp_path: Path) -> None:
    frames, _ = disc()
    for video, why in ((frames[:1].repeat(20, 0), "low optical flow"), (frames // 20, "low light contrast")):
        film = film_of(video, tmp_path)
        sampled = {0: Sampled(film, 0, 20)}
        kept, dropped = filter_motion([{"shot": 0, "frames": [0, 20]}], film, sampled, OURS)
        assert (kept, dropped[0]["why"]) == ([], why)


@pytest.mark.parametrize("pan", [0.0, 2.0])
def test_what_moves_is_told_from_what_the_camera_does(tmp_path: Path, pan: float) -> None:
    frames, truth = disc(pan=pan)
    moving = Moving(Sampled(film_of(frames, tmp_path), 0, 20), OURS)
    for at in (4, 10, 15):
        (thing,) = moving.things([at])
        assert iou(box_of(thing.masks[at]), box_of(truth[at])) > 0.75
        assert (thing.masks[at] & truth[at]).sum() / (thing.masks[at] | truth[at]).sum() > 0.75


def test_things_are_followed(tmp_path: Path) -> None:
    (drawn,) = write_drawn(tmp_path, 9)  # a rocket and a cat, both move up
    moving = Moving(Sampled(Film(tmp_path / "0.mp4"), 0, 17), OURS)
    things = moving.things([3, 8, 13])
    assert len(things) == 2 and all(set(thing.masks) == {3, 8, 13} for thing in things)
    for thing in things:
        fits = [[iou(box_of(mask), own[at]) for at, mask in thing.masks.items()] for own in drawn.boxes]
        assert max(min(fit) for fit in fits) > 0.85 and min(max(fit) for fit in fits) < 0.1


def test_of_boxes_that_overlap_the_best_stays() -> None:
    best, double, other = (
        Found((0.1, 0.1, 0.5, 0.5), 0.9, "cat"),
        Found((0.12, 0.1, 0.5, 0.5), 0.8, "dog"),
        Found((0.6, 0.1, 0.9, 0.5), 0.3, "dog"),
    )
    assert boxes.suppress([other, double, best], 0.5) == [best, other]
    assert boxes.suppress([double, best], 0.95) == [best, double]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([Found((0.1, 0.1, 0.3, 0.3), 1, "cat")], "box below the least area"),
        ([Found((0.0, 0.0, 1.0, 0.95), 1, "cat")], "box above the greatest area"),
        ([Found((0, 0, 0.4, 0.9), 1, "cat"), Found((0.5, 0, 0.9, 0.9), 1, "cat")], "several boxes of it"),
        ([Found((0, 0, 0.4, 0.9), 1, "dog")], "no box"),
        ([], "no box"),
    ],
)
def test_why_a_noun_has_no_boxes_is_told(found: list[Found], why: str) -> None:
    frames = dict.fromkeys(range(4), np.zeros((10, 10, 3), np.uint8))
    concepts, dropped = boxes.clean(dict.fromkeys(range(4), found), frames, [CAT], OURS, None, {})
    assert (concepts, [each["why"] for each in dropped]) == ([], [why])


def test_boxes_are_kept_where_they_are_seen_often_enough_and_clip_agrees() -> None:
    good, frames = Found((0, 0, 0.5, 0.5), 1, "cat"), dict.fromkeys(range(4), np.zeros((10, 10, 3), np.uint8))
    found = {0: [good], 1: [good], 2: [], 3: []}
    (concept,), _ = boxes.clean(found, frames, [CAT, DOG], OURS, None, {})
    assert (concept["label"], list(concept["boxes"])) == ("cat", ["0", "1"])
    assert boxes.clean(found, frames, [CAT], replace(OURS, least_seen=0.6), None, {})[0] == []
    asked = []

    def agrees(picture: np.ndarray, name: str) -> bool:
        asked.append((picture.shape, name))
        return False

    _, (dropped,) = boxes.clean(found, frames, [CAT], OURS, agrees, {})
    assert dropped["why"] == "CLIP sees another class in the box" and asked == [((5, 5, 3), "cat")] * 2


@pytest.mark.parametrize(
    ("count", "frames", "wanted"), [(48, 480, 48), (48, 100, 10), (17, 17, 4), (3, 3, 3)]
)
def test_a_tenth_of_the_frames_gets_boxes(count: int, frames: int, wanted: int) -> None:
    chosen = boxes.choose(count, OURS, frames)
    assert len(chosen) == len(set(chosen)) == wanted and 0 <= min(chosen) <= max(chosen) < count
    assert len(set(np.diff(chosen))) <= 2  # equally far apart


def test_masks_are_refused_by_the_papers_rules() -> None:
    box, mask = (0.1, 0.1, 0.9, 0.9), np.zeros((100, 100), bool)
    mask[20:80, 20:80] = True
    assert masks.wrong(mask, box, OURS) is None
    assert masks.wrong(mask, box, replace(OURS, most_mask=0.3)) == "mask too large"
    assert masks.wrong(np.zeros_like(mask), box, OURS) == "mask too small"
    assert masks.wrong(mask & (np.arange(100) % 12 > 3), box, OURS) == "mask fragmented"


def test_grab_cut_finds_the_thing_in_its_box(tmp_path: Path) -> None:
    frames, truth = disc()
    film = film_of(frames, tmp_path)
    segment = masks.grab_cut(Moving(Sampled(film, 0, 20), OURS))
    mask = segment(10, film.some([10])[10], box_of(truth[10]))
    assert (mask & truth[10]).sum() / (mask | truth[10]).sum() > 0.85
    # where nothing moves, from the box alone
    segment = masks.grab_cut(Moving(Sampled(film_of(frames[:1].repeat(20, 0), tmp_path), 0, 20), OURS))
    mask = segment(10, frames[0], box_of(truth[0]))
    assert (mask & truth[0]).sum() / (mask | truth[0]).sum() > 0.7


def test_a_cut_out_shows_the_thing_alone() -> None:
    frames, truth = disc()
    picture = cut_out(frames[5], truth[5], box_of(truth[5]))
    assert picture.shape[2] == 4 and 40 <= min(picture.shape[:2])
    alpha = picture[..., 3]
    assert alpha[0].max() == 0 and alpha[alpha.shape[0] // 2, alpha.shape[1] // 2] == 255
    assert (picture[alpha == 0][:, :3] == 255).all()  # nothing of the ground shows
    assert (alpha > 127).sum() == pytest.approx(truth[5].sum(), rel=0.15)


def test_a_person_has_a_face_and_a_ball_has_none(tmp_path: Path) -> None:
    has_face = face_finder(OURS.face_side)
    shown = Film(clips() / "carphone_pristine.mp4").some([0, 30, 60])
    assert sum(has_face(frame) for frame in shown.values()) >= 2
    assert not any(has_face(frame) for frame in disc()[0][::5])


def test_persons_without_a_face_are_dropped() -> None:
    frames, truth = disc()
    box = list(box_of(truth[5]))
    concept = {"label": "man", "class": "man", "kind": "persons", "boxes": {"5": box}}

    def segment(number: int, frame: np.ndarray, box: object) -> np.ndarray:
        return truth[number]

    for kind, face, expected in (
        ("persons", False, "no face"),
        ("persons", True, None),
        ("stuffs", False, None),
    ):
        found = masks.choose(
            concept | {"kind": kind}, {5: frames[5]}, segment, lambda picture, face=face: face, None, OURS, 1
        )
        assert found[2] == expected and (found[1] == 5) == (expected is None)
