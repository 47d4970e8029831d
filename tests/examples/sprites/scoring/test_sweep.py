"""The step sweep: every way is scored once, an interrupted one goes on, the cheapest good row is found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.cli import main
from conceptmaster.examples.sprites.scoring import sweep as sweeping
from conceptmaster.examples.sprites.scoring.judging import Generate
from conceptmaster.examples.sprites.scoring.measures import MEASURES
from conceptmaster.examples.sprites.scoring.plot import plot_sweep
from conceptmaster.examples.sprites.scoring.score import Options
from conceptmaster.examples.sprites.scoring.sweep import Row, cheapest, make_ways, sweep
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video

ONE = Options(range(1))
CHANCE = dict.fromkeys(MEASURES, 0.1)


class Judged:
    """Stands in for a model: the truth from 10 steps on, noise with fewer; stops after `most` requests."""

    def __init__(self, truth: Generate, noise: Generate, most: int = 99) -> None:
        self.truth, self.noise, self.most = truth, noise, most
        self.asked: list[tuple[str | None, int | None, float | None]] = []

    def __call__(self, request: Request) -> Video:
        if len(self.asked) == self.most:
            raise KeyboardInterrupt
        self.asked.append((request.solver, request.steps, request.guidance))
        assert request.steps is not None
        return (self.truth if request.steps >= 10 else self.noise)(request)


def row(steps: int, solver: str = "euler", guidance: float = 1.0, **scores: float) -> Row:
    """A row that won 0.9 of everything but what is given."""
    shares = dict.fromkeys(MEASURES, 0.9) | scores
    return Row(solver, steps, guidance, shares, dict.fromkeys(MEASURES, 0.01), 0.5, 1)


def without_times(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    for found in record["rows"]:
        assert found.pop("seconds_per_video") >= 0
    return record


def test_an_interrupted_sweep_goes_on_and_ends_the_same(
    truth: Generate, noise: Generate, tmp_path: Path
) -> None:
    ways = make_ways(ONE, ["unipc", "euler"], [4, 10], [1.0])
    whole = Judged(truth, noise)
    record = sweep(ways, tmp_path / "whole.json", generate=whole)
    order = [("euler", 10, 1.0), ("euler", 4, 1.0), ("unipc", 10, 1.0), ("unipc", 4, 1.0)]
    assert whole.asked == order == [(r.solver, r.steps, r.guidance) for r in record.rows]
    assert [r.scores["identity"] for r in record.rows] == [1.0, 0.0] * 2

    parts = tmp_path / "parts.json"
    with pytest.raises(KeyboardInterrupt):
        sweep(ways, parts, generate=Judged(truth, noise, most=1))
    assert len(json.loads(parts.read_text())["rows"]) == 1
    with pytest.raises(InputError, match="there already: go on with --resume"):
        sweep(ways, parts, generate=whole)
    rest, seen = Judged(truth, noise), list[Row]()
    sweep(ways, parts, resume=True, generate=rest, done=seen.append)
    assert rest.asked == order[1:] and len(seen) == 3
    assert without_times(parts) == without_times(tmp_path / "whole.json")

    before = parts.read_bytes()
    sweep(ways, parts, resume=True, generate=Judged(truth, noise, most=0))  # nothing is left to do
    assert parts.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"whole.json", "parts.json"}


def write(path: Path, **changes: Any) -> None:
    """The file of a sweep of `ONE` by a stub, done with all but what is changed."""
    empty = sweeping._empty(make_ways(ONE, ["euler"], [4], [1.0]), opened=False)
    record = dataclasses.asdict(dataclasses.replace(empty, rows=(row(4),)))
    record["settings"] |= changes.pop("settings", {})
    path.write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"seeds": [0, 2]}}, r"other settings: seeds is \[0, 2\] there and \[0, 1\] now"),
        ({"settings": {"same_noun": True}}, "other settings: same_noun"),
        ({"settings": {"manifest_sha256": "ab"}}, "other settings: manifest_sha256 is 'ab' there"),
        ({"settings": {"more": 1}}, "other settings: more"),
        ({"versions": {"conceptmaster": "0.0.1"}}, "other settings: conceptmaster is '0.0.1' there"),
        ({"world": "wan"}, "other settings: world"),
        ({"rows": [{"solver": "euler"}]}, "bad sweep: .*lacks the key"),
        ({"rows": [dataclasses.asdict(row(4)) | {"scores": {}}]}, "bad sweep: .*lacks a measure"),
        ({"rows": 3}, "bad sweep: .*must be a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_something_else_is_not_gone_on_with(
    changes: dict, words: str, truth: Generate, tmp_path: Path
) -> None:
    path = tmp_path / "sweep.json"
    write(path, **changes)
    before = path.read_bytes()
    with pytest.raises(InputError, match=words):
        sweep(make_ways(ONE, ["euler"], [4], [1.0]), path, resume=True, generate=truth)
    assert path.read_bytes() == before
    write(path)  # unchanged it would have been
    assert len(sweep(make_ways(ONE, ["euler"], [4], [1.0]), path, resume=True, generate=truth).rows) == 1


def test_rows_of_other_ways_are_kept(truth: Generate, tmp_path: Path) -> None:
    write(tmp_path / "sweep.json")
    ways = make_ways(ONE, ["euler"], [10], [1.0])
    assert [r.steps for r in sweep(ways, tmp_path / "sweep.json", resume=True, generate=truth).rows] == [
        10,
        4,
    ]


def test_ways_are_every_combination_once() -> None:
    ways = make_ways(ONE, ["unipc", "euler", "euler"], [4, 50, 4], [2.5, 1])
    found = [(way.solver, way.guidance, way.steps) for way in ways]
    assert found == [(s, g, n) for s in ("euler", "unipc") for g in (1, 2.5) for n in (50, 4)]
    assert all(way.concepts == 2 and not way.controls for way in ways)
    for wrong in ((["magic"], [4], [1.0]), (["euler"], [0], [1.0]), (["euler"], [4], [-1.0])):
        with pytest.raises(InputError):
            make_ways(ONE, *wrong)


def test_the_cheapest_row_that_loses_nothing() -> None:
    rows = [
        row(50, "euler", noun=0.5),
        row(50, "unipc", noun=0.8),  # the reference: the better of those with most steps
        row(20, "unipc", noun=0.7905),
        row(10, "unipc", noun=0.79),  # exactly the tolerance below it
        row(10, "euler", noun=0.795),  # as few steps, better
        row(6, "unipc", noun=0.95, motion=0.88),  # better on the whole, but not in everything
        row(4, "unipc", noun=0.789),
    ]
    assert cheapest(rows) == (rows[4], rows[1])
    assert cheapest(rows, tolerance=0.02)[0] is rows[6]
    assert cheapest(rows, tolerance=0.0)[0] is rows[1]
    assert cheapest(rows[:1]) == (rows[0], rows[0])
    with pytest.raises(ValueError, match="no rows"):
        cheapest([])


def test_the_plot_draws_every_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(n, s, g) for n in (50, 10, 4) for s in ("euler", "unipc") for g in (1.0, 2.5)]
    plot_sweep(rows, CHANCE, tmp_path / "all.png")
    plot_sweep(rows[:2], CHANCE, tmp_path / "few.png")
    everything, few = (np.asarray(Image.open(tmp_path / name)) for name in ("all.png", "few.png"))
    assert everything.shape == few.shape and everything.shape[1] > 1000
    assert (everything != few).any()
    assert {path.name for path in tmp_path.iterdir()} == {"all.png", "few.png"}


# The command line.


def test_the_command(
    truth: Generate,
    noise: Generate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score, empty = sweeping.score, sweeping._empty
    judged = Judged(truth, noise)
    monkeypatch.setattr(sweeping, "score", lambda way, **others: score(way, generate=judged))
    monkeypatch.setattr(sweeping, "_empty", lambda ways, opened: empty(ways, False))
    arguments = ["sweep", "--output", str(tmp_path / "s.json"), "--seeds", "0:1", "--workers", "1", "--quiet"]
    arguments += ["--steps", "20", "10", "4", "--solvers", "unipc", "--guidance", "1"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == [
        f"unipc, {steps} steps, guidance 1" for steps in (20, 10, 4)
    ]
    reference, best = "(unipc, 20 steps, guidance 1)", "unipc, 10 steps, guidance 1"
    assert lines[3:] == [f"cheapest within 1 point of {reference}: {best}"]
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[3:]
    assert len(judged.asked) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "x.txt"], "must end in .json"),
        (["--plot", "x.jpg"], "must end in .png"),
        (["--seeds", "3"], "two numbers A:B"),
        (["--solvers", "magic"], "unknown solver 'magic'"),
        (["--steps", "0"], "steps must be"),
        (["--bundle", "nowhere"], "no bundle 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--output", "x.json", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert list(tmp_path.iterdir()) == []


def test_another_world(other_world: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--output", str(tmp_path / "x.json")]) == 2
    assert "of another world" in capsys.readouterr().err


def test_guidance_that_the_bundle_has_not_shows_before_the_first_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = Bundle.open("sprites").manifest
    shapes = dataclasses.replace(shipped.shapes, branches=1)
    bundle = SimpleNamespace(manifest=dataclasses.replace(shipped, shapes=shapes))
    monkeypatch.setattr("conceptmaster.runtime.bundle_format.find.Bundle.open", lambda name: bundle)
    assert main(["sweep", "--output", str(tmp_path / "x.json")]) == 2
    assert "no guidance branch: guidance must be 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_named_before_the_sweep(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from conceptmaster.examples.sprites.cli import main\n"
        "sys.exit(main(['sweep', '--output', 'x.json', '--plot', 'x.png']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr
        == "sprites: error: a plot needs matplotlib: in the project's folder, pip install '.[dev]'\n"
    )
    assert list(tmp_path.iterdir()) == []
