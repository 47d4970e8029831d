"""The commands of README.md and docs/, taken out of the files and run in order on a fresh clone.

A fenced block of sh or python is run unless the line before it is `<!-- not run: REASON -->`. Blocks of one
file share a shell; a Python block is run after those before it in the file.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, *DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```$", re.M | re.S
)
PROGRAMS = {
    ("conceptmaster",): "conceptmaster.cli",
    ("python", "-m", "conceptmaster.examples.data"): "conceptmaster.examples.data.cli",
    ("python", "-m", "conceptmaster.benchmarks.mc_bench"): "conceptmaster.benchmarks.mc_bench.__main__",
    ("python", "-m", "conceptmaster.examples.sprites"): "conceptmaster.examples.sprites.cli",
    ("python", "-m", "conceptmaster.examples.stickers"): "conceptmaster.examples.stickers.cli",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and why it is not run, if it is not."""

    place: str
    language: str
    text: str
    reason: str | None


def blocks_of(document: Path) -> list[Block]:
    """The blocks of a document, in order."""
    source = document.read_text(encoding="utf-8")
    return [
        Block(
            f"{document.relative_to(ROOT)}:{source.count(chr(10), 0, found.start('text'))}",
            found["language"],
            found["text"],
            found["reason"],
        )
        for found in FENCE.finditer(source)
    ]


def commands_of(block: Block) -> list[list[str]]:
    """The words of every command line of a shell block; without the brackets of what may be left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.replace("[", " ").replace("]", " "), comments=True) for line in lines]


@pytest.mark.parametrize("document", [README, *DOCUMENTS], ids=lambda path: path.name)
def test_every_block_is_of_a_language_that_is_run_or_shown(document):
    fences = re.findall(r"^```(\w*)$", document.read_text(encoding="utf-8"), re.M)
    assert set(fences) <= {"", "sh", "python", "mermaid", "json", "text"}
    assert len(blocks_of(document)) == sum(fence in ("sh", "python") for fence in fences)


@pytest.mark.parametrize("document", [README, *DOCUMENTS], ids=lambda path: path.name)
def test_every_option_that_a_document_names_is_one_of_the_command(document, capsys):
    from importlib import import_module

    for block in blocks_of(document):
        if block.language != "sh":
            continue
        for words in commands_of(block):
            for program, module in PROGRAMS.items():
                if tuple(words[: len(program)]) != program or words[len(program) :][:1] in ([], ["--help"]):
                    continue
                with pytest.raises(SystemExit, match="0"):
                    import_module(module).main([words[len(program)], "--help"])
                known = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
                named = {word.partition("=")[0] for word in words if word.startswith("--")}
                assert named <= known, f"{block.place}: {' '.join(words)}"


def test_the_python_blocks_pass_a_type_checker(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "conceptmaster").symlink_to(ROOT)
    for document in (README, ROOT / "docs" / "python.md"):
        files = {"run": ""}
        for number, block in enumerate(block for block in blocks_of(document) if block.language == "python"):
            name = "run" if block.reason is None else f"program_{number}"
            files[name] = files.get(name, "") + block.text
        for name, text in files.items():
            (tmp_path / f"{document.stem}_{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "README_type.py").write_text(
        "from README_run import video\nfrom conceptmaster import Video\none: Video = video\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}/cache"]
    command += ["--follow-imports=silent", "--ignore-missing-imports", *map(str, tmp_path.glob("*.py"))]
    environment = os.environ | {"MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_names_every_word_that_the_shipped_model_was_taught():
    from conceptmaster.runtime.bundle_format import DEFAULT
    from conceptmaster.runtime.bundle_format.find import Bundle

    phrases = Bundle.open(DEFAULT).manifest.vocabulary.phrases
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert all(ground in text for ground in phrases["backgrounds"] if "plain" not in ground.split())
    words = {word for kind in phrases.values() for phrase in kind for word in phrase.split()}
    assert words <= set(re.findall(r"\w+", text))


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone of what is committed."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, and the repository's own folder")
    place = tmp_path_factory.mktemp("documents") / "a clone"  # a folder's name may hold a space
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(place)], check=True)
    return place


@pytest.fixture(scope="module")
def installed(clone) -> Path:
    """The clone, with what the README's own commands install."""
    run(clone, [Block("make", "sh", "make video", None)])
    return clone


def end_all_with(variable: str) -> None:
    """Ends what was started with this in its environment and is still there, as Ray's nodes are."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if variable.encode() in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


def run(clone: Path, blocks: list[Block], before: str = "") -> None:
    """Runs the blocks in one shell, in the clone; the place of one that fails is in the error."""
    script, python = [f"set -euo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n{before}"], ""
    for block in blocks:
        if block.reason is not None:
            continue
        script.append(f"echo {shlex.quote('::: ' + block.place)} >&2")
        if block.language == "python":
            python += block.text
            name = re.sub(r"\W", "-", block.place) + ".py"
            (clone / "out").mkdir(exist_ok=True)
            (clone / "out" / name).write_text(python, encoding="utf-8")
            script.append(f"python out/{name}")
        else:
            script.append(block.text)
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_CURRENT_TEST", "MYPYPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["CONCEPTMASTER_DOCUMENT"] = mark = secrets.token_hex(16)
    command = ["bash", "-c", "\n".join(script)]
    try:
        done = subprocess.run(
            command, cwd=clone, env=environment, capture_output=True, text=True, timeout=3600
        )
    finally:
        end_all_with(f"CONCEPTMASTER_DOCUMENT={mark}")
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
def test_the_readmes_blocks_run_from_the_top(clone):
    run(clone, blocks_of(README))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_blocks_of_a_document_run(document, installed):
    run(installed, blocks_of(document), ". .venv/bin/activate && pip install -q -e '.[export,tensorrt-rtx]'")


def places_of(minor: int) -> list[str]:
    """Where a Python 3.minor may be: on the path, or one of pyenv's."""
    found = shutil.which(f"python3.{minor}")
    own = sorted(map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")))
    return own if found is None else [found, *own]


def runs(python: str, minor: int) -> str | None:
    """`python`, where it is one of this version; a shim of pyenv's may lead nowhere."""
    check = f"import sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
    return None if subprocess.run([python, "-c", check], capture_output=True).returncode else python


@pytest.mark.slow
@pytest.mark.parametrize("minor", range(11, 15))
def test_a_video_is_made_with_every_python_that_is_installed(minor, clone):
    python = next(filter(None, (runs(place, minor) for place in places_of(minor))), None)
    if python is None:
        pytest.skip(f"no Python 3.{minor} here")
    environment = f"VENV=.venv-3.{minor} PYTHON={shlex.quote(python)}"
    run(clone, [Block(f"python3.{minor}", "sh", f"make video {environment}", None)])
    assert (clone / "out" / "video.mp4").stat().st_size > 1000
