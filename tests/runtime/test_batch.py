"""Batches: one load, whole files, what is made is not made again, wherever an earlier run was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from conceptmaster.cli import main
from conceptmaster.runtime.bundle_format import manifest as manifests
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.request import Request

Batch = Callable[..., dict[str, Any]]


def requests(*lines: object) -> None:
    """Writes r.jsonl; a string is a line as it is."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    Path("r.jsonl").write_text(text + "\n")


def cat(**more: object) -> dict[str, object]:
    return {"prompt": "a cat runs up", "concepts": [{"label": "cat", "image": "cat.png"}], **more}


def arguments(bundle: Path, *more: str, output: str = "out/{name}.npy") -> list[str]:
    given = ["--bundle", str(bundle), "--requests", "r.jsonl", "--output", output]
    return ["generate", *given, "--threads", "1", "--json", *more]


@pytest.fixture
def batch(bundle: Path, pictures: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> Batch:
    """batch(*arguments, code=0) → the report of one run; in a folder with ball.png, cat.png, out/."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()

    def batch(*more: str, code: int = 0, **how: str) -> dict[str, Any]:
        assert main(arguments(bundle, *more, **how)) == code
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1]) | {"said": captured.err}

    return batch


def statuses(report: dict[str, Any]) -> list[str]:
    return [line["status"] for line in report["requests"]]


def test_each_line_is_what_generate_makes_of_it(batch: Batch, bundle: Path, tmp_path: Path) -> None:
    requests(cat(seed=3, name="one"), "", {"prompt": "a ball rolls left", "samples": 2, "seed": 8})
    report = batch("--sheet", "out/{name}.png", "--frames", "out/f-{name}.npy", "--jobs", "2", "--steps", "2")
    assert (report["made"], report["failed"], report["said"]) == (2, 0, "")
    assert [(line["line"], line["name"], line["seeds"]) for line in report["requests"]] == [
        (1, "one", [3]),
        (3, "3", [8, 9]),
    ]
    assert {path.name for path in Path("out").iterdir() if path.name[0] != "."} == {
        *("one.npy", "one.png", "f-one.npy"),
        *("3-0.npy", "3-1.npy", "3-0.png", "3-1.png", "f-3.npy"),
    }
    pipeline = Pipeline.from_bundle(bundle, threads=1)
    one = Request.from_data(cat(seed=3, steps=2), tmp_path)
    np.testing.assert_array_equal(np.load("out/one.npy"), pipeline.generate(one)[0].frames)
    both = Request("a ball rolls left", samples=2, seed=8, steps=2)
    np.testing.assert_array_equal(np.load("out/f-3.npy"), [v.frames for v in pipeline.generate(both)])


def test_only_what_changed_is_made_again(batch: Batch, pictures: dict[str, Path]) -> None:
    requests(cat(seed=1), cat(seed=2), {"prompt": "a ball rolls left"})
    assert statuses(batch()) == ["made"] * 3
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert statuses(batch()) == ["kept"] * 3
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before
    assert statuses(batch("--jobs", "3", "--threads", "2", "--quiet")) == ["kept"] * 3  # no change of it
    Path("out/2.npy").write_bytes(Path("out/2.npy").read_bytes()[:-1])  # cut off
    assert statuses(batch()) == ["kept", "made", "kept"]
    Path("out/3.npy").unlink()
    assert statuses(batch()) == ["kept", "kept", "made"]
    Path("out/.1.npy.json").write_text("{")
    assert statuses(batch()) == ["made", "kept", "kept"]
    shutil.copy(pictures["ball"], "cat.png")  # the same name, another picture
    assert statuses(batch()) == ["made", "made", "kept"]
    requests(cat(seed=1), cat(seed=2, steps=3), {"prompt": "a ball rolls left"})
    assert statuses(batch()) == ["kept", "made", "kept"]
    assert statuses(batch("--guidance", "3")) == ["made"] * 3
    assert statuses(batch("--guidance", "3", "--frames", "out/f{name}.npy")) == ["made"] * 3
    assert statuses(batch("--guidance", "3", output="out/{name}.gif")) == ["made"] * 3
    assert (
        statuses(
            batch(
                "--guidance",
                "3",
                output="out/{name}.gif",
            )
        )
        == ["kept"] * 3
    )
    assert statuses(batch("--guidance", "3", "--scale", "2", output="out/{name}.gif")) == ["made"] * 3


def test_another_bundle_makes_all_again(batch: Batch, bundle: Path, tmp_path: Path) -> None:
    requests(cat())
    assert statuses(batch()) == ["made"]
    shutil.copytree(bundle, "other")
    assert statuses(batch("--bundle", "other")) == ["kept"]  # the same, by its hashes
    manifest = manifests.load(tmp_path / "other")
    manifests.save(replace(manifest, name="other"), tmp_path / "other")
    assert statuses(batch("--bundle", "other")) == ["made"]


def test_wrong_lines_stop_no_others_and_are_named(batch: Batch) -> None:
    Path("out/dir.npy").mkdir()
    shutil.copy("cat.png", "out/picture.npy")
    requests(
        cat(),
        "not json",
        cat(seed=-1),
        cat(steps="x"),
        {"prompt": "ball " * 20},
        {"prompt": "a cat", "concepts": [{"label": "cat", "image": "none.png"}]},
        {"prompt": "a cat", "concepts": [{"label": "cat", "image": "r.jsonl"}]},
        cat(name="../x"),
        cat(name=""),
        cat(name=7),
        cat(name="dir"),
        cat(name="1"),
        {"prompt": "a cat", "concepts": [{"label": "cat", "image": "out/picture.npy"}]},
        cat(name="picture"),
        cat(samples=2, name="a"),
        cat(name="a-1"),
        [],
        cat(dance=1),
        cat(name="last"),
        cat(name="\x1b[31mred"),
    )
    report = batch(code=1)
    made = [line["line"] for line in report["requests"] if line["status"] == "made"]
    assert made == [1, 13, 15, 19] and report["failed"] == 16
    reasons = {line["line"]: line["reason"] for line in report["requests"] if line["status"] == "failed"}
    for number, word in {
        2: "is not JSON",
        3: "seed must be",
        4: "steps must be",
        5: "12 are allowed",
        6: "none.png': No such file",
        7: "not a picture",
        8: "a name becomes part of a file's",
        9: "a name becomes",
        10: "a name becomes",
        11: "is a folder",
        12: "has the name '1', as line 1",
        14: "which is a picture of line 13",
        16: "would write 'out/a-1.npy', as line 15 does",
        17: "is not an object",
        18: "unknown key 'dance'",
        20: "a name becomes",
    }.items():
        assert word in reasons[number], (number, reasons[number])
        assert f"line {number}" in report["said"]
    left = {path.name for path in Path("out").iterdir() if path.suffix != ".json"}
    assert left == {"dir.npy", "picture.npy", "1.npy", "13.npy", "a-0.npy", "a-1.npy", "last.npy"}
    assert "x.npy" not in os.listdir()
    assert batch(code=1)["kept"] == len(made)


def test_warnings_are_of_a_line_and_strict_fails_it(batch: Batch) -> None:
    requests(cat(), {"prompt": "a ball rolls left", "concepts": [{"label": "cat", "image": "cat.png"}]})
    report = batch("--jobs", "2")
    (warning,) = report["requests"][1]["warnings"]
    assert report["requests"][0]["warnings"] == [] and "'cat'" in warning
    assert report["said"] == f"conceptmaster: warning: line 2: {warning}\n"
    report = batch("--strict", code=1)
    assert statuses(report) == ["made", "failed"] and warning in report["requests"][1]["reason"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--prompt", "x"], "--prompt is for one request"),
        (["--noise", "n.npy"], "--noise is for one request"),
        (["--request", "r.json"], "--request is for one request"),
        (["--jobs", "0"], "--jobs must be 1 to 64"),
        (["--output", "out/a.mp4"], "--output 'out/a.mp4' lacks {name}"),
        (["--sheet", "out/a.png"], "--sheet 'out/a.png' lacks {name}"),
        (["--output", "none/{name}.mp4"], "does not exist"),
        (["--output", "out/{name}.avi"], "must end in"),
        (["--requests", "none.jsonl"], "cannot read the requests 'none.jsonl': No such file"),
        (["--requests", "out"], "cannot read the requests 'out': Is a directory"),
        (["--requests", "empty.jsonl"], "holds no request"),
    ],
)
def test_what_cannot_work_is_one_line(batch: Batch, bundle: Path, capsys, more: list[str], word: str) -> None:
    requests(cat())
    Path("empty.jsonl").write_text("\n \n")
    assert main(arguments(bundle, *more)) == 2
    captured = capsys.readouterr()
    assert word in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(Path("out").iterdir()) == []


def start(folder: Path, bundle: Path, *more: str, output: str = "out/{name}.mp4") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "conceptmaster", *arguments(bundle, *more, output=output)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def check_whole(folder: Path) -> int:
    """Every video can be read to its end; how many there are."""
    videos = [path for path in folder.iterdir() if path.suffix == ".mp4" and path.name[0] != "."]
    for path in videos:
        with av.open(str(path)) as file:
            assert sum(1 for _ in file.decode(video=0)) == 9
    return len(videos)


def test_an_interrupt_keeps_what_is_made(batch: Batch, bundle: Path, tmp_path: Path) -> None:
    requests(*(cat(seed=seed) for seed in range(60)))
    for number, word in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
        process = start(tmp_path, bundle, "--jobs", "2")
        assert process.stdout is not None and process.stdout.readline().startswith("out/")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (128 + number, f"conceptmaster: error: {word}\n")
        report = json.loads(out.splitlines()[-1])
        assert report["made"] + report["kept"] == check_whole(tmp_path / "out") and report["left"] > 0
    assert report["kept"] > 0
    assert not [name for name in os.listdir("out") if ".part" in name]


def test_killed_at_any_time_it_goes_on(batch: Batch, bundle: Path, tmp_path: Path) -> None:
    requests(*(cat(seed=seed) for seed in range(12)))
    made = 0
    for part in range(4):
        process = start(tmp_path, bundle)
        time.sleep(0.45 + 0.06 * part)
        process.kill()
        process.communicate()
        assert check_whole(tmp_path / "out") >= made
        made = check_whole(tmp_path / "out")
    report = batch(output="out/{name}.mp4")
    assert report["made"] + report["kept"] == 12 == check_whole(tmp_path / "out")
    assert batch(output="out/{name}.mp4")["kept"] == 12
    records = {f".{number}.mp4.json" for number in range(1, 13)}
    assert {path.name for path in Path("out").iterdir() if path.name[0] == "."} == records


def test_two_runs_at_once(batch: Batch, bundle: Path, tmp_path: Path) -> None:
    requests(*(cat(seed=seed) for seed in range(8)))
    hows = {"plain": (), "guided": ("--guidance", "3")}
    for how, more in hows.items():
        Path(how).mkdir()
        assert batch(*more, output=how + "/{name}.mp4")["made"] == 8

    def made(how: str) -> set[str]:
        files = tmp_path.glob("out/[!.]*.mp4")
        return {path.name for path in files if path.read_bytes() == (tmp_path / how / path.name).read_bytes()}

    runs = [start(tmp_path, bundle, *more) for more in hows.values()]  # the same names
    for process in runs:
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    assert check_whole(tmp_path / "out") == len(made("plain") | made("guided")) == 8
    for how, more in hows.items():
        batch(*more, output="out/{name}.mp4")  # what is of the other run, or has its record, is made again
        assert len(made(how)) == 8
        assert batch(*more, output="out/{name}.mp4")["kept"] == 8


def test_requests_on_standard_input(bundle: Path, pictures, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "conceptmaster", *arguments(bundle, "--requests", "-")],
        input=json.dumps(cat(name="é")) + "\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "out/é.npy").is_file()
