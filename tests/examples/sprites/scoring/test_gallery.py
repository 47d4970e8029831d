"""The gallery shows the first seeds as they are, and the worst of a search in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.cli import main
from conceptmaster.examples.sprites.scoring import gallery as showing
from conceptmaster.examples.sprites.scoring.gallery import gallery, worst
from conceptmaster.examples.sprites.scoring.judging import Generate, Result
from conceptmaster.examples.sprites.scoring.measures import MEASURES
from conceptmaster.examples.sprites.scoring.score import Options, judged_scene
from conceptmaster.examples.sprites.scoring.sheet import LINE, Row, draw_sheet
from conceptmaster.examples.sprites.world.draw import draw_clip
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Row]]:
    """The rows of every sheet that is written, by file name."""
    written: dict[str, list[Row]] = {}
    save = showing.save_sheet

    def record(rows: list[Row], path: Path) -> None:
        written[path.name] = rows
        save(rows, path)

    monkeypatch.setattr(showing, "save_sheet", record)
    return written


def test_the_first_seeds_and_the_worst(
    truth: Generate, noise: Generate, sheets: dict[str, list[Row]], tmp_path: Path
) -> None:
    def generate(request: Request) -> Video:  # of the search only seed 9 fails
        return (noise if request.seed == 9 else truth)(request)

    folder = tmp_path / "new"
    paths = gallery(Options(range(3, 4)), folder, search=range(8, 10), failures=4, generate=generate)
    names = ["two-concepts.png", "same-noun.png", "three-concepts.png", "failures.png"]
    assert [path.name for path in paths] == names == list(sheets)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name, (concepts, same_noun) in showing.SHEETS.items():
        scene = judged_scene(3, concepts, same_noun)
        (row,) = sheets[name]
        assert row.caption == f"seed 3: {scene.caption}"
        assert list(row.videos) == ["truth", "as asked", "no concepts", "pictures swapped"]
        assert len(row.pictures) == concepts
        np.testing.assert_array_equal(row.videos["truth"], draw_clip(scene)[0])
    (row,) = sheets["failures.png"]
    first, second = row.caption.split("\n")
    assert first.startswith("seed 9 lost ") and "identity" in first
    assert second == judged_scene(9, 2, False).caption
    np.testing.assert_array_equal(row.videos["truth"], draw_clip(judged_scene(9, 2, False))[0])
    assert list(row.videos) == ["truth", "as asked", "no concepts", "pictures swapped"]
    assert Image.open(folder / "failures.png").height == Image.open(folder / "same-noun.png").height + LINE


def test_where_nothing_fails_there_is_no_sheet_of_failures(truth: Generate, tmp_path: Path) -> None:
    (tmp_path / "failures.png").write_text("of an earlier model")
    paths = gallery(Options(range(1)), tmp_path, search=range(1), generate=truth)
    assert len(paths) == 3 and not (tmp_path / "failures.png").exists()


def test_the_worst_come_first() -> None:
    def result(seed: int, **lost: tuple[int, ...]) -> Result:
        won = {m: [i not in lost.get(m, ()) for i in range(2)] for m in MEASURES}
        return Result(seed, {"": won, "_swapped": {m: [False, False] for m in MEASURES}}, [], {})

    results = [
        result(4),
        result(5, noun=(1,)),
        result(6, noun=(0, 1), motion=(1,)),
        result(7, texture=(0,)),
    ]
    labels = [actor.label for actor in judged_scene(6, 2, False).actors]
    found = worst(Options(range(4, 8)).scene, results)
    assert [seed for seed, _ in found] == [6, 5, 7]
    assert found[0][1] == f"seed 6 lost 3 of 10: {labels[0]}: noun; {labels[1]}: noun, motion"


def test_captions_may_have_several_lines() -> None:
    pixels = np.zeros((3, 64, 64, 3), np.uint8)
    one, two = (Row(text, [pixels[0]], {"truth": pixels}) for text in ("a", "a\nb"))
    assert draw_sheet([one, two]).height == draw_sheet([one, one]).height + 2 * LINE


def test_impossible_wishes(truth: Generate, tmp_path: Path) -> None:
    for options, wrong, words in [
        (Options(range(1)), {"failures": -1}, "failures must be 0 to 64"),
        (Options(range(65)), {}, "at most 64 seeds"),
        (Options(range(1)), {"search": range(3, 3)}, "seeds must be A:B"),
    ]:
        with pytest.raises(InputError, match=words):
            gallery(options, tmp_path / "new", generate=truth, **wrong)
    assert not (tmp_path / "new").exists()


def test_the_command_refuses_before_it_makes_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, words in [
        (["--bundle", "nowhere"], "no bundle 'nowhere'"),
        (["--failures", "65"], "failures must be 0 to 64"),
        (["--search", "4"], "--search: must be two numbers A:B"),
    ]:
        assert main(["gallery", "--output", "new", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and words in err
    assert list(tmp_path.iterdir()) == []


def test_another_world(other_world: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gallery", "--output", str(tmp_path / "new")]) == 2
    assert "of another world" in capsys.readouterr().err


def test_the_command_prints_what_it_wrote(
    truth: Generate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = showing.gallery
    monkeypatch.setattr(showing, "gallery", lambda *args, **named: real(*args, **named, generate=truth))
    arguments = ["--seeds", "0:1", "--search", "0:1", "--failures", "1", "--quiet"]
    assert main(["gallery", "--output", str(tmp_path), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [str(tmp_path / name) for name in showing.SHEETS]
    assert lines[3:] == ["no request of 0:1 lost a contest: no failures.png"]
