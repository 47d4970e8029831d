"""The world's command line: what it prints, where it stops, and what it does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conceptmaster.examples.sprites.cli import main
from conceptmaster.runtime.request import Request

PROGRAM = [sys.executable, "-m", "conceptmaster.examples.sprites"]


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, cwd=folder, check=False)


def test_draw_as_a_program(tmp_path: Path) -> None:
    done = run("draw", "--seed", "7", "--output", "request", "--same-noun", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    request = Request.from_json(tmp_path / "request" / "request.json")
    assert done.stdout.splitlines() == ["request/request.json", request.prompt]
    assert len({concept.label.split()[-1] for concept in request.concepts}) == 1
    assert (tmp_path / "request" / "truth.mp4").stat().st_size > 1000


def test_score_as_a_program(tmp_path: Path) -> None:
    arguments = ["score", "--truth", "--seeds", "4:7", "--json", "--output", "o.json", "--sheet", "s.png"]
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stderr  # the bar
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "o.json").read_text("utf-8"))
    assert report["requests"] == 3 and report["pair_binding"] == report["noun"] == 1.0
    assert {"pair_binding_no_concepts", "pair_binding_swapped", "identity", "motion"} <= report.keys()
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_the_two_splits_differ(tmp_path: Path) -> None:
    draw = ["draw", "--seed", "7", "--no-truth", "--concepts", "1", "--output"]
    assert main([*draw, str(tmp_path / "a")]) == main([*draw, str(tmp_path / "b"), "--train-split"]) == 0
    first, second = (json.loads((tmp_path / name / "request.json").read_text()) for name in "ab")
    assert first["seed"] == second["seed"] and first["prompt"] != second["prompt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["tune", "dreambooth", "--base", "no", "--output", "x"], "cannot start from no"),
        (["tune", "dreambooth", "--base", "no", "--output", "x", "--seeds", "5:5"], "0 <= A < B"),
        (["tune", "dreambooth", "--base", "no", "--output", "x", "--seed", "-1"], "--seed must be 0 to"),
        (["train", "--output", "x", "--seed", "-1"], "--seed must be 0 to"),
        (["train", "--output", "file"], "cannot make the folder 'file'"),
        (["place", "--seeds", "5:5"], "0 <= A < B"),
        (["dance"], "invalid choice: 'dance'"),
        (["draw"], "required: --seed, --output"),
        (["draw", "--seed", "-1", "--output", "x"], "--seed must be 0 to"),
        (["draw", "--seed", "one", "--output", "x"], "invalid int value"),
        (["draw", "--seed", "1", "--output", "file"], "cannot make the folder 'file'"),
        (["draw", "--seed", "1", "--output", "x", "--concepts", "4"], "1 to 3 concepts, not 4"),
        (["draw", "--seed", "1", "--output", "x", "--concepts", "1", "--same-noun"], "at least 2"),
        (["score", "--seeds", "5"], "two numbers A:B"),
        (["score", "--seeds", "-1:5"], "--seeds"),
        (["score", "--seeds", "5:5"], "0 <= A < B"),
        (["score", "--seeds", f"0:{2**63 + 1}"], "0 <= A < B"),
        (["score", "--concepts", "0"], "1 to 3 concepts"),
        (["score", "--concepts", "1", "--same-noun"], "at least 2"),
        (["score", "--shuffled"], "--shuffled needs --truth"),
        (["score", "--truth", "--shuffled", "--seeds", "3:4"], "at least two"),
        (["score", "--steps", "0"], "steps must be 1 to 1000"),
        (["score", "--solver", "magic"], "unknown solver 'magic'"),
        (["score", "--workers", "0"], "workers must be"),
        (["score", "--bundle", "nowhere"], "no bundle 'nowhere'"),
        (["score", "--truth", "--output", "missing/x.json"], "folder 'missing' does not exist"),
        (["score", "--truth", "--sheet", "x.jpg"], "must end in .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sprites: error: ") and err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_as_a_program(tmp_path: Path) -> None:
    done = run("score", "--concepts", "9", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sprites: error: a scene of this world has 1 to 3 concepts, not 9\n"


def test_training_names_the_extra_it_needs(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from conceptmaster.examples.sprites.cli import main\n"
        "sys.exit(main(['train', '--output', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr
        == "sprites: error: `train` needs torch: in the project's folder, pip install '.[train]'\n"
    )


def test_drawing_and_scoring_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from conceptmaster.examples.sprites.cli import main\n"
        "assert main(['draw', '--seed', '1', '--output', '.']) == 0\n"
        "assert main(['score', '--truth', '--seeds', '0:1', '--quiet']) == 0\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'onnx', 'safetensors', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_curves_are_drawn_from_the_shipped_logs(tmp_path, capsys):
    assert main(["curves", "--output", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["curves", "--logs", str(tmp_path), "--output", str(tmp_path / "again.png")]) == 2
    assert "no log at" in capsys.readouterr().err and not (tmp_path / "again.png").exists()
