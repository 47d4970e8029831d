"""Requests on disk: what `draw` writes is what the runtime reads and what is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.scoring.score import judged_scene
from conceptmaster.examples.sprites.world import requesting
from conceptmaster.examples.sprites.world.draw import draw_clip
from conceptmaster.examples.sprites.world.requesting import (
    PICTURE,
    concepts,
    references,
    write_request,
)
from conceptmaster.examples.sprites.world.scenes import (
    FRAMES,
    SIZE,
)
from conceptmaster.runtime.request import Request

SHIPPED = Path(requesting.__file__).parents[1] / "requests"
# folder: seed, concepts, same noun
EXAMPLES = {"first": (5, 2, False), "twins": (6, 2, True), "three": (0, 3, False)}


@pytest.mark.parametrize(("count", "same_noun"), [(1, False), (2, True), (3, False)])
def test_what_is_written_is_read_by_the_runtime(tmp_path: Path, count: int, same_noun: bool) -> None:
    scene = judged_scene(7, count, same_noun)
    path = write_request(scene, tmp_path / "new" / "folder", truth=False)
    request = Request.from_json(path)
    assert (request.prompt, request.seed) == (scene.caption, 7)
    assert [concept.label for concept in request.concepts] == [actor.label for actor in scene.actors]
    for concept, picture in zip(request.concepts, references(scene), strict=True):
        assert picture.shape == (PICTURE, PICTURE, 3) and picture.dtype == np.uint8
        np.testing.assert_array_equal(np.asarray(Image.open(str(concept.image))), picture)
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == sorted([*(f"{n}.png" for n in range(1, count + 1)), "request.json"])


def test_the_true_video_lies_beside(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    scene = judged_scene(2, 2, False)
    write_request(scene, tmp_path)
    with av.open(str(tmp_path / "truth.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (FRAMES, 4 * SIZE, 4 * SIZE, 3)  # enlarged to 256, as every small video
    assert np.abs(frames[:, 2::4, 2::4].astype(float) - draw_clip(scene)[0]).mean() < 2


def test_pictures_are_of_their_scene_and_given_in_order() -> None:
    scene = judged_scene(7, 3, False)
    pictures = references(scene)
    for one, again in zip(pictures, references(scene), strict=True):
        np.testing.assert_array_equal(one, again)
    found = concepts(scene, pictures[::-1])
    assert [(c.label, c.image is p) for c, p in zip(found, pictures[::-1], strict=True)] == [
        (actor.label, True) for actor in scene.actors
    ]


def test_a_folder_is_overwritten_name_by_name(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    write_request(judged_scene(1, 3, False), tmp_path, truth=False)
    path = write_request(judged_scene(2, 2, False), tmp_path, truth=False)
    assert Request.from_json(path).seed == 2
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_request(judged_scene(1, 2, False), tmp_path, truth=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(image: Image.Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(requesting, "save_png", fail)
    with pytest.raises(OSError, match="disk full"):
        write_request(judged_scene(2, 2, False), tmp_path, truth=False)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert Request.from_json(path).seed == 1


def test_a_folder_that_cannot_be_made_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot make the folder"):
            write_request(judged_scene(1, 1, False), folder)


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_requests_are_what_draw_writes(name: str, tmp_path: Path) -> None:
    seed, count, same_noun = EXAMPLES[name]
    drawn = write_request(judged_scene(seed, count, same_noun), tmp_path, truth=False)
    assert json.loads((SHIPPED / name / "request.json").read_text()) == json.loads(drawn.read_text())
    files = sorted(file.name for file in (SHIPPED / name).iterdir())
    assert files == sorted(file.name for file in tmp_path.iterdir())
    assert sum((SHIPPED / name / file).stat().st_size for file in files) < 60_000
    for file in files[:-1]:
        shipped, mine = (
            np.asarray(Image.open(folder / file)).astype(int) for folder in (SHIPPED / name, tmp_path)
        )
        assert np.abs(shipped - mine).max() <= 1  # another CPU may round the other way


def test_every_shipped_request_is_held_to_that() -> None:
    assert {folder.name for folder in SHIPPED.iterdir()} == set(EXAMPLES)
