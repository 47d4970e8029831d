"""Placing: sprites are found where they are, and who follows boxes is told from who follows captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.cli import main
from conceptmaster.examples.sprites.scoring import place as placing
from conceptmaster.examples.sprites.scoring.locating import LOOKED_AT, locate
from conceptmaster.examples.sprites.scoring.place import TOLD, PlaceOptions, place, request_of
from conceptmaster.examples.sprites.scoring.score import judged_scene
from conceptmaster.examples.sprites.scoring.sheet import save_sheet
from conceptmaster.examples.sprites.world.draw import draw_clip, look_of
from conceptmaster.examples.sprites.world.scenes import FPS, PLACES
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video


@pytest.mark.parametrize("seed", range(5))
def test_a_sprite_is_found_where_it_is(seed: int) -> None:
    scene = judged_scene(seed, 2, False)
    frames = draw_clip(scene)[0][list(LOOKED_AT)]
    for actor in scene.actors:
        found = locate(frames, actor.noun, actor.identity, actor.radius, look_of(actor.motion))
        assert np.hypot(*(found - actor.path()[list(LOOKED_AT)]).T).max() < 1


@pytest.mark.parametrize("how", TOLD)
def test_captions_say_of_places_what_they_are_to(how: str) -> None:
    for seed in range(12):
        scene = judged_scene(seed, 2, False)
        request = request_of(scene, how, True, PlaceOptions())
        ground = request.prompt.rpartition(", ")[0]
        for actor in scene.actors:
            own = f"{actor.label} {PLACES[actor.cell]} "
            assert (own in ground) == (how == TOLD[0])
            told = any(f"{actor.label} {place} " in ground for place in PLACES.values())
            assert told == (how in (TOLD[0], TOLD[2]))
        assert ("stays still and" in ground or "still" in ground.split(" and ")[0]) or how != TOLD[3]
        assert request.boxes.keys() == {actor.label for actor in scene.actors}
        assert not request_of(scene, how, False, PlaceOptions()).boxes


class Follower:
    """Paints the scene where boxes say, or else where the caption does: without either, another scene."""

    def __init__(self, boxes: bool) -> None:
        self.boxes = boxes

    def __call__(self, request: Request) -> Video:
        scene = judged_scene(request.seed, 2, False)
        told = (self.boxes and request.boxes) or request.prompt == scene.caption
        shown = scene if told else judged_scene(request.seed + 100, 2, False)
        return Video(draw_clip(shown)[0], FPS, request.seed)


def test_who_follows_boxes_is_told_from_who_does_not(tmp_path: Path) -> None:
    options = PlaceOptions(range(4))
    report, rows = place(options, generate=Follower(boxes=True), keep=1)
    deaf, none = place(options, generate=Follower(boxes=False))
    assert (len(rows), none) == (1, [])
    for how in TOLD:
        for name, right in ((f"{how}, boxes", True), (f"{how}, without", how == TOLD[0])):
            found = report["shares"][name]
            assert (found["located"][0] == 1) == right and (found["pair_binding"][0] == 1) >= right
        assert deaf["shares"][f"{how}, boxes"] == deaf["shares"][f"{how}, without"]
    assert json.loads(json.dumps(report)) == report
    assert "located" in placing.table(report)
    save_sheet(rows, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 3 * 96


def test_what_cannot_be_placed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="A < B"):
        PlaceOptions(range(3, 3))
    assert main(["place", "--bundle", "sprites", "--seeds", "0:1", "--quiet", "--threads", "1"]) == 2
    assert "cannot place concepts" in capsys.readouterr().err
