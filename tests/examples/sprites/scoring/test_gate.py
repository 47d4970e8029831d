"""The gate: a bundle that keeps the picture passes, one that does not fails and is told what fell."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.cli import main
from conceptmaster.examples.sprites.scoring import gate
from conceptmaster.examples.sprites.scoring.gate import (
    ROWS,
    Line,
    Scores,
    compare,
    load,
    measure_bundle,
    verdict,
)
from conceptmaster.examples.sprites.scoring.judging import Generate
from conceptmaster.examples.sprites.scoring.measures import MEASURES
from conceptmaster.examples.sprites.scoring.reports import write_json
from conceptmaster.examples.sprites.scoring.score import Options, judged_scene, score
from conceptmaster.runtime.request import Request
from conceptmaster.runtime.video import Video

SEEDS = range(2, 4)


def scores(seeds: range = range(100), **digits: str) -> Scores:
    """Scores that won everything, but for measures whose digits are given."""
    won = {measure: digits.get(measure, "2" * len(seeds)) for measure in MEASURES}
    shares = {measure: sum(map(int, text)) / len(text) / 2 for measure, text in won.items()}
    every = {row: won for row in ROWS}
    return Scores(
        1, "sprites", "b", "fp32", {}, {}, (seeds.start, seeds.stop), dict.fromkeys(ROWS, shares), every
    )


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`judges(generate)`: from here on the gate scores that instead of a bundle."""
    return lambda generate: monkeypatch.setattr(gate, "score", functools.partial(stubbed, generate))


def stubbed(stub: Generate, options: Options, *, generate: Generate | None, progress: bool) -> Any:
    assert generate is None and not options.controls
    return score(options, generate=stub, progress=progress)


@pytest.fixture
def perfect(tmp_path: Path) -> Path:
    """A baseline that won every contest."""
    write_json(tmp_path / "baseline.json", dataclasses.asdict(scores(SEEDS)))
    return tmp_path / "baseline.json"


def test_the_truth_passes_and_both_rows_are_scored(truth: Generate, perfect: Path) -> None:
    asked: list[Request] = []

    def generate(request: Request) -> Video:
        asked.append(request)
        return truth(request)

    now = measure_bundle(Options(SEEDS, steps=3, solver="euler"), generate=generate)
    captions = [judged_scene(seed, 2, same).caption for same in (False, True) for seed in SEEDS]
    assert [request.prompt for request in asked] == captions
    assert {(request.steps, request.solver, len(request.concepts)) for request in asked} == {(3, "euler", 2)}
    lines = compare(load(perfect), now)
    assert [(line.row, line.measure) for line in lines] == [(row, m) for row in ROWS for m in MEASURES]
    assert all(line.ok and line.now == line.baseline == 1 and line.difference == 0 for line in lines)
    assert verdict(lines, 0.02) == "the picture is kept: nothing fell by more than 2 points"


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = scores(identity="0" * 50 + "12" * 25)
    write_json(tmp_path / "b.json", dataclasses.asdict(written))
    assert load(tmp_path / "b.json") == written


def test_noise_fails_and_is_told_what_fell(noise: Generate, perfect: Path) -> None:
    lines = compare(load(perfect), measure_bundle(Options(SEEDS), generate=noise))
    said = verdict(lines, 0.02)
    assert "not kept" in said and all(f"identity ({row}) by" in said for row in ROWS)
    assert {line.measure for line in lines if not line.ok} >= {"identity", "noun", "texture"}


def test_the_tolerance_ends_where_it_says() -> None:
    before = scores()
    two_points, more = scores(noun="2" * 98 + "00"), scores(noun="2" * 97 + "100")
    assert all(line.ok for line in compare(before, two_points, 0.02))
    fallen = [line for line in compare(before, more, 0.02) if not line.ok]
    assert [(line.row, line.measure, line.difference) for line in fallen] == [
        (r, "noun", -0.025) for r in ROWS
    ]
    assert all(line.ok for line in compare(more, before, 0.0))  # rising is no failure


def test_requests_are_compared_with_themselves() -> None:
    before = scores(range(10, 18), motion="02" * 4)
    same = scores(range(13, 17), motion="2020")  # seeds 13 to 16 of the baseline
    line = next(line for line in compare(before, same) if line.measure == "motion")
    assert (line.baseline, line.now, line.difference, line.standard_error) == (0.5, 0.5, 0.0, 0.0)
    other = scores(range(13, 17), motion="0202")
    line = next(line for line in compare(before, other) if line.measure == "motion")
    differences = [-1.0, 1.0, -1.0, 1.0]
    assert line.difference == 0 and line.ok
    assert line.standard_error == pytest.approx(np.std(differences, ddof=1) / 2, abs=1e-4)


@pytest.mark.parametrize("seeds", [range(9, 12), range(15, 19), range(30, 40)], ids=str)
def test_only_the_seeds_of_the_baseline_can_be_compared(seeds: range) -> None:
    with pytest.raises(InputError, match="the baseline has the seeds 10:18"):
        compare(scores(range(10, 18)), scores(seeds))


def test_the_worst_is_named_first() -> None:
    lines = [
        Line("same noun", "noun", 1.0, 0.9, -0.1, None, False),
        Line("same noun", "texture", 0.6, 0.3, -0.3, None, False),
        Line("same noun", "motion", 1.0, 0.99, -0.01, None, True),
    ]
    said = verdict(lines, 0.02)
    assert said.endswith("2 points: texture (same noun) by 30.0, noun (same noun) by 10.0")


def damage(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(dataclasses.asdict(scores()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "is format 2"),
        ({"world": "wan"}, "of the world 'wan'"),
        ({"seeds": [5, 5]}, "impossible seeds"),
        ({"seeds": [0, 99]}, "lacks the contests won in 'pair_binding'"),
        ({"won": {}}, "lacks the contests won"),
        ({"won": {row: dict.fromkeys(MEASURES, "3" * 100) for row in ROWS}}, "lacks the contests won"),
        ({"shares": {}}, "do not add up"),
        ({"shares": {row: dict.fromkeys(MEASURES, 0.5) for row in ROWS}}, "do not add up"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_baseline_is_one_clear_error(changes: dict, words: str, tmp_path: Path) -> None:
    damage(tmp_path / "b.json", **changes)
    with pytest.raises(InputError, match="bad baseline: .*b.json.*record that of a good bundle") as raised:
        load(tmp_path / "b.json")
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_half_a_baseline_is_one_clear_error(perfect: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perfect.write_text(perfect.read_text()[:200])
    assert main(["gate", "nowhere", "--baseline", str(perfect)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is not JSON" in err


# The command line.


def test_exit_codes(
    judges: Any,
    truth: Generate,
    noise: Generate,
    perfect: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["gate", "some-bundle", "--baseline", str(perfect), "--quiet", "--seeds", "3:4"]
    judges(truth)
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("the picture is kept") and err == ""
    assert len(out.splitlines()) == 1 + 1 + len(ROWS) * len(MEASURES) + 1
    judges(noise)
    assert main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and "identity" in report["verdict"] and report["seeds"] == [3, 4]
    assert len(report["measures"]) == len(ROWS) * len(MEASURES)
    assert main([*arguments, "--tolerance", "1"]) == 0
    capsys.readouterr()
    for wrong, words in [
        (["--tolerance", "nan"], "tolerance must be 0 to 1"),
        (["--seeds", "0:4"], "has the seeds 2:4"),
        (["--steps", "0"], "steps must be"),
        (["--solver", "magic"], "unknown solver 'magic'"),
        (["--workers", "0"], "workers must be"),
    ]:
        assert main([*arguments, *wrong]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and words in err


def test_recording(judges: Any, truth: Generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new.json"
    arguments = ["gate", "some-bundle", "--baseline", str(path), "--quiet"]
    assert main(arguments) == 2  # not there yet
    assert "gate BUNDLE --record" in capsys.readouterr().err
    judges(truth)
    assert main([*arguments, "--record", "--seeds", "7:8"]) == 0
    assert load(path).seeds == (7, 8)
    assert main(arguments) == 0  # the baseline's seeds, if none are given
    assert [file.name for file in tmp_path.iterdir()] == ["new.json"]
    assert main([*arguments, "--record", "--baseline", str(tmp_path / "no" / "b.json")]) == 2


def test_a_bundle_of_another_world(
    other_world: None, perfect: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", "wan", "--baseline", str(perfect), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "'wan' is of another world" in err


def test_the_gate_needs_no_torch(perfect: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from conceptmaster.examples.sprites.cli import main\n"
        f"assert main(['gate', 'nowhere', '--baseline', {str(perfect)!r}]) == 2\n"
        "heavy = {'transformers', 'diffusers', 'onnx', 'safetensors', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "main(['gate', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no bundle 'nowhere'" in done.stderr and "--tolerance" in done.stdout
