"""The command line: exit codes, one line for every mistake, files whole or not there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conceptmaster.cli import main
from conceptmaster.runtime import video_file
from conceptmaster.runtime.pipeline import Pipeline
from conceptmaster.runtime.request import Concept, Request
from conceptmaster.runtime.video import Video

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(bundle: Path, pictures: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> Run:
    """run(*arguments) → exit code, standard output, standard error; in a folder with ball.png, cat.png."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main([argument.replace("BUNDLE", str(bundle)) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


BALL = ("generate", "--bundle", "BUNDLE", "--threads", "1", "--prompt", "a ball and a cat roll left")
CAT = ("--concept", "cat", "cat.png")


def test_generate_writes_what_the_pipeline_makes(run: Run, bundle: Path, pictures, tmp_path: Path) -> None:
    code, out, err = run(
        *BALL,
        *CAT,
        "--concept",
        "ball",
        "ball.png",
        "--seed",
        "3",
        "--steps",
        "5",
        "--guidance",
        "2",
        "--solver",
        "euler",
        "--shift",
        "2",
        "--negative",
        "bad",
        "--frames",
        "f.npy",
        "--sheet",
        "s.png",
        "--scale",
        "4",
        "--json",
    )
    assert (code, err) == (0, "")
    report = json.loads(out.splitlines()[-1])
    assert report["outputs"] == ["out.mp4"] and report["sheets"] == ["s.png"] and report["frames"] == "f.npy"
    assert report["bundle"] == "fake" and report["seed"] == 3 and report["scale"] == 4
    stages = {"open", "load", "encode", "condition", "denoise", "decode", "write", "total"}
    assert set(report["seconds"]) == stages and all(value >= 0 for value in report["seconds"].values())
    expected = Pipeline.from_bundle(bundle)(
        "a ball and a cat roll left",
        [Concept(name, pictures[name]) for name in ("cat", "ball")],
        seed=3,
        steps=5,
        guidance=2.0,
        solver="euler",
        shift=2.0,
        negative="bad",
    )
    assert isinstance(expected, Video)
    np.testing.assert_array_equal(np.load("f.npy"), expected.frames)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ball.png", "cat.png", "out.mp4", "s.png", "f.npy"}


def test_samples_are_numbered_or_named_by_seed(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(
        *BALL,
        "--samples",
        "2",
        "--seed",
        "8",
        "--output",
        "v.gif",
        "--sheet",
        "s-{seed}.png",
        "--frames",
        "f.npy",
        "--json",
        "--quiet",
    )
    assert code == 0 and len(out.splitlines()) == 1
    report = json.loads(out)
    assert report["outputs"] == ["v-0.gif", "v-1.gif"] and report["sheets"] == ["s-8.png", "s-9.png"]
    assert report["seeds"] == [8, 9] and np.load("f.npy").shape == (2, 9, 8, 8, 3)
    assert all((tmp_path / name).is_file() for name in report["outputs"] + report["sheets"])


def test_noise_file(run: Run) -> None:
    from conceptmaster.runtime import noise

    np.save("n.npy", noise.from_seed(6, (4, 3, 2, 2)))
    assert run(*BALL, "--noise", "n.npy", "--frames", "a.npy", "--quiet")[0] == 0
    assert run(*BALL, "--seed", "6", "--frames", "b.npy", "--quiet")[0] == 0
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))


def test_a_request_file_and_flags_that_override_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.move("cat.png", "in/cat.png")
    request = {"prompt": "a cat", "concepts": [{"label": "cat", "image": "cat.png"}], "seed": 1, "steps": 2}
    (tmp_path / "in/r.json").write_text(json.dumps(request))
    common = ("generate", "--bundle", "BUNDLE", "--request", "in/r.json", "--quiet", "--json")
    assert json.loads(run(*common)[1])["seed"] == 1
    assert json.loads(run(*common, "--seed", "5")[1])["seed"] == 5


def test_a_request_on_standard_input(run: Run, bundle: Path, tmp_path: Path) -> None:
    """Its pictures are found from here."""
    request = {"prompt": "a cat", "concepts": [{"label": "cat", "image": "cat.png"}], "seed": 4}
    arguments = ["generate", "--bundle", str(bundle), "--request", "-", "--quiet", "--json", "--threads", "1"]
    for text, code, word in (
        (json.dumps(request), 0, '"seed": 4'),
        (json.dumps(request | {"seed": -1}), 2, "the request on standard input: seed must be"),
        ("", 2, "the request on standard input: is not JSON"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "conceptmaster", *arguments],
            input=text,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and word in done.stdout + done.stderr


def test_relative_paths_survive_chdir(bundle: Path, pictures, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(bundle.parent)
    pipeline = Pipeline.from_bundle(bundle.name, threads=1)
    (tmp_path / "r.json").write_text(
        '{"prompt": "a cat", "steps": 1, "concepts": [{"label": "cat", "image": "cat.png"}]}'
    )
    monkeypatch.chdir(tmp_path)
    request = Request.from_json("r.json")
    monkeypatch.chdir("/")
    assert len(pipeline.generate(request)) == 1


WRONG = [
    ((), "required: COMMAND"),
    (("dance",), "invalid choice: 'dance'"),
    (("generate",), "--prompt or --request"),
    (("generate", "--dance"), "unrecognized arguments"),
    ((*BALL, "--steps", "x"), "invalid int value: 'x'"),
    ((*BALL, "--st", "3"), "unrecognized arguments"),
    ((*BALL, "--steps", "0"), "steps must be 1 to 1000"),
    ((*BALL, "--guidance", "nan"), "guidance must be"),
    ((*BALL, "--concept-guidance", "2"), "3 guidance branches"),
    ((*BALL, "--solver", "magic"), "unknown solver"),
    ((*BALL, "--shift", "-1"), "shift must be"),
    ((*BALL, "--seed", "-1"), "seed must be"),
    ((*BALL, "--samples", "0"), "samples must be"),
    ((*BALL, "--threads", "0"), "threads must be"),
    ((*BALL, "--device", "abacus"), "unknown device"),
    ((*BALL, "--scale", "0"), "scale must be"),
    ((*BALL, "--chroma", "422"), "chroma must be 420 or 444"),
    ((*BALL, "--chroma", "444", "--output", "a.gif"), "no choice of chroma"),
    ((*BALL, "--concept", "cat"), "expected 2 arguments"),
    ((*BALL, "--concept", "", "cat.png"), "label is empty"),
    ((*BALL, *CAT, *CAT), "labels must differ"),
    ((*BALL, "--concept", "cat", "none.png"), "No such file"),
    ((*BALL, "--concept", "cat", "bad.txt"), "not a picture"),
    ((*BALL, "--prompt", " "), "prompt is empty"),
    ((*BALL, "--prompt", "ball " * 20), "takes 21 tokens, 12 are allowed"),
    ((*BALL, "--request", "r.json"), "leave out --prompt"),
    (("generate", "--request", "none.json"), "cannot read the request"),
    (("generate", "--request", "bad.txt"), "not JSON"),
    ((*BALL, "--bundle", "none"), "no bundle 'none'"),
    ((*BALL, "--bundle", "."), "has no manifest.json"),
    (("inspect", "none"), "no bundle"),
    ((*BALL, "--output", "a.avi"), "must end in"),
    ((*BALL, "--output", "none/a.mp4"), "does not exist"),
    ((*BALL, "--output", "dir.mp4"), "is a folder"),
    ((*BALL, "--sheet", "s.jpg"), "must end in .png"),
    ((*BALL, "--frames", "f.npz"), "must end in .npy"),
    ((*BALL, "--output", "a.png", "--sheet", "./a.png"), "written twice"),
    ((*BALL, *CAT, "--sheet", "cat.png"), "is an input"),
    ((*BALL, "--noise", "n.npy", "--frames", "n.npy"), "is an input"),
    ((*BALL, "--noise", "none.npy"), "cannot read the noise"),
    ((*BALL, "--noise", "bad.txt"), "not a .npy file"),
    ((*BALL, "--noise", "pickle.npy"), "not a .npy file"),
    ((*BALL, "--noise", "archive.npz"), "not a .npy file"),
    ((*BALL, "--noise", "liar.npy"), "not a .npy file"),
    ((*BALL, "--noise", "n.npy"), "noise must have the shape"),
    ((*BALL, "--noise", "large.npy"), "infinite in float32"),
    ((*BALL, "--noise", "loop.png"), "symbolic links"),
    ((*BALL, "--concept", "cat", "loop.png"), "symbolic links"),
    ((*BALL, "--output", "loop.png"), "symbolic links"),
    ((*BALL, "--sheet", "loop.png"), "symbolic links"),
    ((*BALL, "--bundle", "loop.png"), "no bundle"),
    (("generate", "--request", "loop.png"), "symbolic links"),
    (("generate", "--request", "null.json"), "must be a path"),
    (("inspect", "loop.png"), "no bundle"),
    (("inspect", "a\0b"), "holds a null byte"),
    ((*BALL, "--output", "a\0.mp4"), "holds a null byte"),
    ((*BALL, "--concept", "cat", "\0"), "holds a null byte"),
    ((*BALL, "--promt", "x"), "is --prompt meant? (see conceptmaster generate --help)"),
    ((*BALL, "--threads", "100000"), "threads must be"),
    ((*BALL, "--quiet", "--progress"), "not allowed with"),
]


def write_header(name: str, kind: str, shape: tuple[int, ...]) -> None:
    """A .npy file that promises more than it holds."""
    header = (str({"descr": kind, "fortran_order": False, "shape": shape}).ljust(117) + "\n").encode()
    Path(name).write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize(("arguments", "word"), WRONG, ids=[word for _, word in WRONG])
def test_wrong_input_is_one_line_and_code_2(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    Path("bad.txt").write_text("hello")
    Path("dir.mp4").mkdir()
    np.save("n.npy", np.zeros((1, 2, 3), np.float32))
    np.savez("archive.npz", np.zeros(3))
    np.save("large.npy", np.full((4, 3, 2, 2), 1e300))
    Path("null.json").write_text('{"prompt": "a", "concepts": [{"label": "a", "image": "a\\u0000.png"}]}')
    Path("loop.png").symlink_to("loop2.png")
    Path("loop2.png").symlink_to("loop.png")
    write_header("pickle.npy", "|O", (1,))
    write_header("liar.npy", "<f4", (1_000_000, 1_000_000, 1_000))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("conceptmaster: error: ") and err.count("\n") == 1 and word in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_scale_beyond_the_encoder_is_known_before_generating(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_file, "MOST_PIXELS", 8 * 8 * 16)
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("generated"))
    code, out, err = run(*BALL, "--scale", "5")
    assert (code, out) == (2, "") and "would be 40×40" in err and "scale can be at most 4" in err


def test_a_damaged_bundle_is_code_1(run: Run, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, "own")
    (tmp_path / "own/dam.onnx").write_bytes(b"")
    for arguments in (("inspect", "own"), (*BALL, "--bundle", "own")):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "") and err.count("\n") == 1 and "dam.onnx' has SHA-256" in err


def test_a_failing_disk_is_code_1(run: Run, tmp_path: Path, monkeypatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run(*BALL, "--quiet")
    assert code == 1 and err == "conceptmaster: error: 'out.mp4': No space left on device\n"
    assert {path.name for path in tmp_path.iterdir()} == {"ball.png", "cat.png"}


def test_inspect(run: Run) -> None:
    code, out, _ = run("inspect", "BUNDLE")
    assert code == 0 and "fp32 bundle" in out and "up to 3" in out and "denoise" in out
    code, out, _ = run("inspect", "BUNDLE", "--json")
    report = json.loads(out)
    assert code == 0 and report["shapes"]["latent"] == [4, 3, 2, 2] and report["bytes"]["denoise"] > 0
    code, out, _ = run("inspect", "sprites")
    assert "labels    ball, star" in out and "places    at the top left, " in out
    assert "made for  steps 2 to 50, guidance 1 to 2, concepts 0 to 3" in out
    code, out, _ = run("inspect", "sprites", "--json")
    report = json.loads(out)
    assert "ball" in report["vocabulary"]["labels"] and report["ranges"]["guidance"] == [1, 2]


def test_help_and_version(run: Run, capsys: pytest.CaptureFixture) -> None:
    for arguments, word in (
        (["--help"], "generate"),
        (["generate", "--help"], "--concept LABEL IMAGE"),
        (["inspect", "--help"], "BUNDLE"),
        (["--version"], "conceptmaster 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0 and word in capsys.readouterr().out


def test_warnings_are_shown_and_verbose_says_more(run: Run) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save("cat.gif", save_all=True, append_images=frames[1:])
    level = logging.getLogger("conceptmaster").level
    code, _, err = run(*BALL, "--concept", "cat", "cat.gif", "--verbose")
    assert logging.getLogger("conceptmaster").level == level  # the next call says no more than before
    assert code == 0 and "conceptmaster: warning: the picture of 'cat'" in err
    assert "conceptmaster: info: onnxruntime" in err


LEAN = """
import sys
import conceptmaster.runtime
light = [name for name in ("numpy", "PIL", "onnxruntime", "av", "tokenizers") if name in sys.modules]
assert not light, light
import conceptmaster.cli
code = conceptmaster.cli.main(sys.argv[1:])
heavy = [name for name in ("torch", "transformers", "diffusers", "onnx", "scipy") if name in sys.modules]
assert not heavy, heavy
ours = {name.split(".")[1] for name in sys.modules if name.startswith("conceptmaster.")}
assert not ours & {"engine", "export", "examples", "kernels"}, ours
sys.exit(code)
"""


def test_neither_import_nor_generate_loads_torch(bundle: Path, pictures, tmp_path: Path) -> None:
    arguments = [argument.replace("BUNDLE", str(bundle)) for argument in (*BALL, *CAT, "--sheet", "s.png")]
    done = subprocess.run(
        [sys.executable, "-c", LEAN, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "out.mp4 (seed 0, enlarged 32 times)" in done.stdout and (tmp_path / "out.mp4").is_file()


WITHOUT_TORCH = """
import runpy, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"torch", "onnx", "onnxscript", "transformers", "diffusers", "safetensors", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def without_torch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program where only what generating needs is installed."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("program", "command"),
    [
        *(
            ("conceptmaster", command)
            for command in ("export", "verify", "convert", "build", "export-triton")
        ),
        *(("conceptmaster.examples.sprites", command) for command in ("train", "paper", "paper-base")),
    ],
)
def test_help_needs_no_torch(tmp_path: Path, program: str, command: str) -> None:
    done = without_torch(tmp_path, program, command, "--help")
    assert (done.returncode, done.stderr) == (0, "") and f"{program} {command} [-h]" in done.stdout


@pytest.mark.parametrize("command", ["export", "verify", "build"])
def test_wrong_arguments_are_told_before_torch_is_missed(tmp_path: Path, command: str) -> None:
    done = without_torch(tmp_path, "conceptmaster", command, "none", "--outptu", "x")
    assert done.returncode == 2 and f"(see conceptmaster {command} --help)" in done.stderr
    if command != "export":
        done = without_torch(tmp_path, "conceptmaster", command, "none")
        assert done.returncode == 2 and "no bundle 'none'" in done.stderr


def test_commands_that_need_torch_say_so_without_it(tmp_path: Path) -> None:
    done = without_torch(tmp_path, "conceptmaster", "export", "preset:tiny", "--output", "x")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("in the project's folder, pip install '.[export]'\n")
    assert list(tmp_path.iterdir()) == []


def test_nothing_tells_to_install_this_project_from_an_index() -> None:
    """It is in none."""
    root = Path(__file__).resolve().parents[2]
    files = [*root.glob("*.md"), *root.glob("*.py")]
    for folder in ("docs", "kernels", "engine", "export", "runtime", "benchmarks", "examples"):
        files += [path for end in ("md", "py") for path in (root / folder).rglob(f"*.{end}")]
    wrong = re.compile(r"pip install ['\"]?conceptmaster")
    assert [str(path) for path in files if wrong.search(path.read_text("utf-8"))] == []
