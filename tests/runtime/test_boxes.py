"""Boxes: what is refused, how they move, and which tokens they touch, held to exact fractions and to PIL."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from conceptmaster.cli import main
from conceptmaster.errors import BundleError, InputError
from conceptmaster.runtime import boxes
from conceptmaster.runtime.bundle_format import manifest as manifests
from conceptmaster.runtime.bundle_format.schema import Manifest
from conceptmaster.runtime.request import Concept, Request
from conceptmaster.runtime.workers.interface import Task

CAT, BALL = Concept("cat", "cat.png"), Concept("Ball", "ball.png")
WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.25, 0.5, 0.75), (0.5, 0.25, 1.0, 0.75)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"dog": LEFT}, "a box for 'dog', but no concept is labelled so: the labels are 'cat', 'Ball'"),
        ({"a cat": LEFT}, "no concept is labelled so"),
        ({3: LEFT}, "a box for 3, but no concept"),
        ({"cat": (0.1, 0.1, 1.1, 0.5)}, "0.1,0.1,1.1,0.5, is not inside the picture: .* fractions, 0 to 1"),
        ({"cat": (-0.1, 0, 1, 1)}, "is not inside the picture"),
        ({"cat": (0, 0, 384, 672)}, "is not inside the picture"),
        ({"cat": (0, 0, 10**400, 1)}, "is not inside the picture"),
        ({"cat": (0, float("nan"), 1, 1)}, "0,nan,1,1, is not inside the picture"),
        ({"cat": (0, 0, float("inf"), 1)}, "is not inside the picture"),
        ({"cat": (0.5, 0, 0.5, 1)}, "0.5,0,0.5,1, is empty: x0 must be less than x1, and y0 less than y1"),
        ({"cat": (0, 0.7, 1, 0.2)}, "is empty"),
        ({"cat": (0, 0, 1)}, r"must be a list of four numbers.*like \[0.1, 0.2, 0.5, 0.8\], not \(0, 0, 1\)"),
        ({"cat": ("0", "0", "1", "1")}, "must be a list of four numbers"),
        ({"cat": (False, 0, 1, True)}, "must be a list of four numbers"),
        ({"cat": "0,0,1,1"}, "must be a list of four numbers, .*not '0,0,1,1'"),
        ({"cat": b"\0\0\1\1"}, "must be a list of four numbers"),
        ({"cat": None}, "must be a list of four numbers"),
        ({"cat": {}}, "the boxes of 'cat' are none"),
        ({"cat": {-1: LEFT}}, "a frame is a number from 0 on, not -1"),
        ({"cat": {1.5: LEFT}}, "a frame is a number from 0 on, not 1.5"),
        ({"cat": {True: LEFT}}, "a frame is a number from 0 on"),
        ({"cat": {"first": LEFT}}, "a frame is a number from 0 on, not 'first'"),
        ({"cat": {9999999999: LEFT}}, "no video has so late a frame, 9999999999"),
        ({"cat": {"9" * 30: LEFT}}, "no video has so late a frame, 9{30}"),
        ({"cat": {0: (1, 1, 0, 0)}}, "is empty"),
        ({"cat": {0: LEFT, "0": RIGHT}}, "two boxes of 'cat' for frame 0: give one"),
        ({"cat": LEFT, "Cat": RIGHT}, "two boxes of 'cat' for frame 0"),
        (
            [("cat", LEFT)],
            r'boxes must be an object, {"cat": \[0.1, 0.2, 0.5, 0.8\]}',
        ),
    ],
)
def test_wrong_boxes(asked: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        Request("a cat and a ball", (CAT, BALL), boxes=asked)
    assert "\n" not in str(raised.value)


def test_a_box_without_any_concept() -> None:
    with pytest.raises(InputError, match="no concept is labelled so: there are no concepts"):
        Request("a cat", boxes={"cat": WHOLE})


def test_boxes_are_kept_by_the_labels_of_the_concepts() -> None:
    asked = {" CAT ": {"16": RIGHT, 2: np.array(LEFT)}, "ball": list(LEFT), "cat": {0: WHOLE}}
    request = Request("a cat and a ball", (CAT, BALL), boxes=asked)
    assert request.boxes == {"cat": {0: WHOLE, 2: LEFT, 16: RIGHT}, "Ball": {0: LEFT}}
    assert list(request.boxes["cat"]) == [0, 2, 16]
    assert dataclasses.replace(request, seed=3).boxes == request.boxes
    again = Request("a cat and a ball", (CAT, BALL), boxes=json.loads(json.dumps(request.boxes)))
    assert again == request and hash(again) == hash(request)
    assert request != Request("a cat and a ball", (CAT, BALL))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.1,0.2,0.5", "is written x0,y0,x1,y1 in fractions.*not '0.1,0.2,0.5'"),
        ("0.1,0.2,0.5,x", "is written x0,y0,x1,y1 in fractions.*not '0.1,0.2,0.5,x'"),
        ("", "is written"),
        ("0,0,1,1@", "a frame is a number from 0 on, not ''"),
        ("0,0,1,1@-3", "a frame is a number from 0 on, not '-3'"),
        ("0,0,1,1@1.5", "a frame is a number from 0 on"),
        ("0,0,1,1@9999999999", "no video has so late a frame, 9999999999"),
        ("0,0,1,1@3@4", "a frame is a number from 0 on"),
        ("nan,0,1,1", "is not inside the picture"),
        ("0,0,2,1", "is not inside the picture"),
    ],
)
def test_wrong_text(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        boxes.read([("cat", text)])


def test_text() -> None:
    texts = [("cat", "0,0.25,0.5,0.75"), ("cat", " 0.5, .25, 1, 75e-2 @ 16"), ("ball", "0,0,1,1@0000000004")]
    assert boxes.read(texts) == {"cat": {0: LEFT, 16: RIGHT}, "ball": {4: WHOLE}}
    with pytest.raises(InputError, match="two boxes of 'cat' for frame 0"):
        boxes.read([("cat", "0,0,1,1"), ("cat", "0,0,1,1@0")])


def test_a_bundle_that_cannot_and_frames_that_are_not_there(
    bundle: Path, placing: Callable[..., Path]
) -> None:
    asked = Request("a cat", (CAT,), boxes={"cat": {8: LEFT}})
    with pytest.raises(InputError, match="'fake' cannot place concepts: leave .* `export --boxes`"):
        asked.resolve(manifests.load(bundle))
    manifest = manifests.load(placing())
    assert asked.resolve(manifest)[0].boxes == asked.boxes
    late = Request("a cat", (CAT,), boxes={"cat": {0: LEFT, 9: LEFT}})
    with pytest.raises(
        InputError, match="a box of 'cat' at frame 9: the videos of 'fake' have the frames 0 to 8"
    ):
        late.resolve(manifest)


def test_a_bundle_of_another_number_of_tokens(
    placing: Callable[..., Path], edit_manifest: Callable[..., None]
) -> None:
    folder = placing()
    edit_manifest(folder, lambda data: data["model"]["transformer"].update(patch_size=[1, 2, 1]))
    with pytest.raises(BundleError, match=r"denoise wants 'boxes' as bool \[12, 3\], it gets bool \[6, 3\]"):
        manifests.load(folder)


# ---- which tokens

sides = st.tuples(st.integers(0, 999), st.integers(1, 1000)).filter(lambda pair: pair[0] < pair[1])


def exactly(box: tuple[Fraction, ...], height: int, width: int) -> np.ndarray:
    """The cells that share more than an edge with a box, in exact numbers: bool [h,w]."""
    x0, y0, x1, y1 = box
    rows = [Fraction(r + 1, height) > y0 and Fraction(r, height) < y1 for r in range(height)]
    columns = [Fraction(c + 1, width) > x0 and Fraction(c, width) < x1 for c in range(width)]
    return np.outer(rows, columns)


@given(x=sides, y=sides, height=st.integers(1, 90), width=st.integers(1, 160))
def test_a_box_touches_the_patches_that_it_covers_a_part_of(
    x: tuple[int, int], y: tuple[int, int], height: int, width: int
) -> None:
    """Thousandths, as people write them: floats near a patch's edge give no row more or less."""
    exact = tuple(Fraction(n, 1000) for n in (x[0], y[0], x[1], y[1]))
    written = np.array([[float(f"{n / 1000:.3f}") for n in (x[0], y[0], x[1], y[1])]])
    found = boxes.tokens(written, (1, height, width), [0])
    np.testing.assert_array_equal(found, exactly(exact, height, width)[None])


@given(
    box=st.tuples(*[st.floats(0, 1)] * 4).filter(lambda b: b[0] < b[2] and b[1] < b[3]),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_any_box_touches_a_patch(box: tuple[float, ...], size: tuple[int, int]) -> None:
    assert boxes.tokens(np.array([box]), (1, *size), [0]).any()


def test_as_pil_draws_them() -> None:
    """Boxes on whole patches, as a rectangle of pixels."""
    for x0, y0, x1, y1 in [(0, 0, 3, 2), (1, 1, 8, 5), (7, 4, 8, 5), (2, 0, 4, 5)]:
        image = Image.new("1", (8, 5))
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=1)
        box = np.array([[x0 / 8, y0 / 5, x1 / 8, y1 / 5]])
        np.testing.assert_array_equal(boxes.tokens(box, (1, 5, 8), [0])[0], np.array(image))


def brute(request: Request, manifest: Manifest) -> np.ndarray:
    """[S,N], pixel by pixel of every video frame: a token may see what has a box over one of its pixels."""
    s, (time, rows, columns) = manifest.shapes, manifest.model["transformer"]["patch_size"]
    frames = [[0], *([1 + 4 * i + j for j in range(4)] for i in range(s.latent[1] - 1))]  # of a latent frame
    found = []
    for f in range(0, s.latent[1], time):
        of_token = [frame for latent in range(f, f + time) for frame in frames[latent]]
        for r in range(s.latent[2] // rows):
            for c in range(s.latent[3] // columns):
                found.append([touched(request, n, of_token, r, c, manifest) for n in range(s.concepts)])
    return np.array(found)


def touched(request: Request, n: int, frames: list[int], r: int, c: int, manifest: Manifest) -> bool:
    label = request.concepts[n].label if n < len(request.concepts) else ""
    if label not in request.boxes:
        return True
    s, (_, rows, columns) = manifest.shapes, manifest.model["transformer"]["patch_size"]
    high, wide = rows * s.space, columns * s.space
    for frame in frames:
        x0, y0, x1, y1 = between(request.boxes[label], frame)
        for py in range(r * high, (r + 1) * high):
            for px in range(c * wide, (c + 1) * wide):
                if (
                    x0 * s.width < px + 1
                    and px < x1 * s.width
                    and y0 * s.height < py + 1
                    and py < y1 * s.height
                ):
                    return True
    return False


def between(keys: dict[int, Any], frame: int) -> list[float]:
    """By hand: on the line between the keys around a frame."""
    before = max((key for key in keys if key <= frame), default=min(keys))
    after = min((key for key in keys if key >= frame), default=max(keys))
    part = 0.0 if after == before else min(max((frame - before) / (after - before), 0.0), 1.0)
    return [a + part * (b - a) for a, b in zip(keys[before], keys[after], strict=True)]


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 1, 2), (3, 2, 1)])
def test_boxes_that_move_are_drawn_over_the_tokens_of_their_frames(
    placing: Callable[..., Path], patch: tuple[int, int, int]
) -> None:
    manifest = manifests.load(placing(patch))
    moving = {2: (0.0, 0.0, 0.3, 0.5), 6: (0.6, 0.4, 1.0, 1.0), 7: (0.0, 0.0, 0.25, 0.25)}
    for asked in ({"cat": moving}, {"cat": LEFT, "Ball": {5: RIGHT}}, {}, {"Ball": {0: LEFT, 8: RIGHT}}):
        request = Request("a cat and a ball", (CAT, BALL), boxes=asked)
        found = boxes.drawn(request, manifest)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, brute(request, manifest))
        assert found[:, 2].all()  # the place that no concept has


def test_a_box_is_held_before_its_first_key_and_behind_its_last() -> None:
    found = boxes.along({2: (0.0, 0.0, 0.2, 0.2), 4: (0.4, 0.0, 0.6, 1.0)}, 7)
    np.testing.assert_allclose(found[:, 0], [0, 0, 0, 0.2, 0.4, 0.4, 0.4])
    np.testing.assert_allclose(found[:, 3], [0.2, 0.2, 0.2, 0.6, 1, 1, 1])


def test_means(placing: Callable[..., Path]) -> None:
    manifest = manifests.load(placing())
    request = Request("a cat and a ball", (CAT, BALL), boxes={"Ball": {0: LEFT, 8: RIGHT}})
    found = boxes.means(request, manifest)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [WHOLE, (0.25, 0.25, 0.75, 0.75), WHOLE])


# ---- from a request to the graph


def test_the_graphs_get_what_is_drawn(
    placing: Callable[..., Path], bundle: Path, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from conceptmaster.runtime.pipeline import Pipeline

    pipe, seen = Pipeline.from_bundle(placing(), threads=1), []
    run = pipe.backend.run

    def heard(graph: str, inputs: Any) -> Any:
        seen.append((graph, inputs))
        return run(graph, inputs)

    monkeypatch.setattr(pipe.backend, "run", heard)
    concepts = [Concept("cat", pictures["cat"])]
    asked = {"cat": {0: LEFT, 8: RIGHT}}
    video = pipe("a cat runs left", concepts, boxes=asked, steps=2)
    request = Request("a cat runs left", concepts, boxes=asked)
    given = [inputs["boxes"] for graph, inputs in seen if graph == "denoise"]
    assert len(given) == 2
    for each in given:
        np.testing.assert_array_equal(each, brute(request, pipe.manifest))
    (box,) = (inputs["box"] for graph, inputs in seen if graph == "qformer")
    np.testing.assert_allclose(box[0], (0.25, 0.25, 0.75, 0.75))
    # another box is another video, though the pictures are known; without boxes it is that of before
    others = [
        pipe("a cat runs left", concepts, steps=2, **more).frames for more in ({}, {"boxes": {"cat": LEFT}})
    ]
    assert (video.frames != others[0]).any() and (video.frames != others[1]).any()
    np.testing.assert_array_equal(
        video.frames, pipe("a cat runs left", concepts, boxes=asked, steps=2).frames
    )


def frames_of(folder: Path, *arguments: str) -> np.ndarray:
    out = Path("made.npy")
    assert (
        main(
            [
                "generate",
                "--bundle",
                str(folder),
                "--output",
                str(out),
                "--threads",
                "1",
                "--quiet",
                *arguments,
            ]
        )
        == 0
    )
    return np.load(out)


def test_every_way_in_gives_the_same_video(
    placing: Callable[..., Path],
    pictures: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from conceptmaster.runtime.pipeline import Pipeline

    monkeypatch.chdir(tmp_path)
    folder, prompt = placing(), "a cat runs left"
    told = {"prompt": prompt, "concepts": [{"label": "cat", "image": "cat.png"}]}
    asked = {"cat": {0: LEFT, 8: RIGHT}}
    pipe = Pipeline.from_bundle(folder, threads=1)
    expected = pipe(prompt, [Concept("cat", pictures["cat"])], boxes=asked).frames
    plain = pipe(prompt, [Concept("cat", pictures["cat"])]).frames
    assert (expected != plain).any()
    boxes_by_option = ["--box", "cat", "0,0.25,0.5,0.75", "--box", "cat", "0.5,0.25,1,0.75@8"]
    by_option = ["--prompt", prompt, "--concept", "cat", str(pictures["cat"]), *boxes_by_option]
    np.testing.assert_array_equal(frames_of(folder, *by_option), expected)
    Path("request.json").write_text(json.dumps(told | {"boxes": asked}))
    np.testing.assert_array_equal(frames_of(folder, "--request", "request.json"), expected)
    Path("request.json").write_text(json.dumps(told | {"boxes": {"cat": RIGHT}}))
    np.testing.assert_array_equal(frames_of(folder, "--request", "request.json", *boxes_by_option), expected)
    Path("r.jsonl").write_text(f"{json.dumps(told | {'boxes': asked, 'name': 'one'})}\n")
    batch = [
        "generate",
        "--bundle",
        str(folder),
        "--requests",
        "r.jsonl",
        "--output",
        "{name}.npy",
        "--threads",
        "1",
    ]
    assert main(batch) == 0 and "1 made" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load("one.npy"), expected)
    assert main(batch) == 0 and "1 kept" in capsys.readouterr().out
    for other in ({"boxes": {"cat": LEFT}}, {}):  # other boxes, none: another video
        Path("r.jsonl").write_text(f"{json.dumps(told | {'name': 'one'} | other)}\n")
        assert main(batch) == 0 and "1 made" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load("one.npy"), plain)
    assert main([*batch, "--box", "cat", "0,0,1,1"]) == 2
    assert "--box is for one request" in capsys.readouterr().err


def test_one_line_says_that_a_bundle_cannot(
    bundle: Path, pictures: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt", "a cat runs", "--concept", "cat", str(pictures["cat"]), "--box", "cat", "0,0,0.5,1"]
    asked += ["--bundle", str(bundle), "--output", str(tmp_path / "x.npy")]
    assert main(["generate", *asked]) == 2
    assert capsys.readouterr().err == (
        "conceptmaster: error: the bundle 'fake' cannot place concepts: leave the boxes out, or export its "
        "weights with `export --boxes`\n"
    )


def test_a_worker_gets_them_with_its_task(tmp_path: Path) -> None:
    """As lines of JSON, like everything that it is told."""
    request = Request("a cat", (CAT,), boxes={"cat": {0: LEFT, 8: RIGHT}})
    named = {f.name: getattr(request, f.name) for f in dataclasses.fields(request) if f.name != "concepts"}
    line = json.dumps(Task("1", named, (("cat", Path("cat.png")),), tmp_path).to_json())
    heard = Task.from_json(json.loads(line))
    assert Request(concepts=(CAT,), **heard.request) == request


def test_inspect_says_so(
    placing: Callable[..., Path], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["inspect", str(placing())]) == 0
        and "\nboxes     where concepts may be: --box" in capsys.readouterr().out
    )
    assert main(["inspect", str(bundle)]) == 0 and "boxes" not in capsys.readouterr().out
