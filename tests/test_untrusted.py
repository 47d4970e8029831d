"""What others wrote is read with bounds and shown in a way that a terminal and a shell take as text."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conceptmaster.cli import main
from conceptmaster.untrusted import parse_json, printable, read_json, shell_word


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a ball — ×2 日本", "a ball — ×2 日本"),
        ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
        ("a\nb\r\x00\x7f\x9b31m", r"a\nb\r\x00\x7f\x9b31m"),
        ("\u202egnp.exe\ud800\U000e0041", r"\u202egnp.exe\ud800\U000e0041"),
        ("x" * 5000, "x" * 4000 + "…"),
    ],
)
def test_what_is_shown_is_one_line_of_text(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()  # and can be written


@pytest.mark.parametrize("word", ["-rf", "a b", "$(touch x)", "it's", "--", "a;b", "/plain/path"])
def test_what_is_pasted_is_one_word_and_no_option(word: str) -> None:
    done = subprocess.run(["sh", "-c", f"printf %s {shell_word(word)}"], capture_output=True, text=True)
    (found,) = shlex.split(shell_word(word))
    assert done.stdout == found and not found.startswith("-") and os.path.normpath(found) == word


def test_plain_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match="is not a regular file"):
            read_json(place)
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)
    with pytest.raises(ValueError, match="is not JSON"):  # and does not wait for somebody to write
        read_json(tmp_path / "pipe", pipes=True)
    (tmp_path / "large").write_bytes(b" " * 101)
    with pytest.raises(ValueError, match="is larger than 100 bytes"):
        read_json(tmp_path / "large", 100)


def test_a_pipe_with_a_writer_is_read_to_its_end() -> None:
    reader, writer = os.pipe()

    def write() -> None:
        with open(writer, "wb") as file:
            file.write(b'{"a":')
            file.flush()
            file.write(b" " * 100_000 + b"1}")  # more than a pipe holds

    thread = threading.Thread(target=write)
    thread.start()
    assert read_json(Path(f"/dev/fd/{reader}"), pipes=True) == {"a": 1}
    thread.join()
    os.close(reader)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ('{"a":' * 10**5, "nested too deeply"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        ('{"a": -' + "1" * 5000 + "}", "holds a number of thousands of digits"),
        ("[1, -Infinity]", "holds -Infinity"),
        ('["\\ud83d\\ude00", "\\ud800"]', "half of a surrogate pair"),
        ("1" * 5000, "digits"),
    ],
)
def test_json_that_is_refused(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_json(text)
    with pytest.raises(ValueError, match=word):
        parse_json(text.encode())


def test_json_that_is_read() -> None:
    assert parse_json('["\\ud83d\\ude00", 1.5]') == ["😀", 1.5]
    assert parse_json("[" * 64 + "]" * 64)
    many = "{" + ",".join(f'"{i}":0' for i in range(10**5)) + "}"
    assert len(parse_json(many)) == 10**5


def test_escapes_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "\x1b]0;x\x07")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.rstrip("\n").isprintable() and "x1b]0;x" in error


def test_a_request_from_a_shell_s_pipe(tmp_path: Path) -> None:
    """`<(…)`, which is no regular file."""
    code = "import sys; from conceptmaster.runtime.request import Request; "
    code += "print(Request.from_json(sys.argv[1]))"
    text = shlex.quote('{"prompt": "a ball"}')
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <(printf %s {text})"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "prompt='a ball'" in done.stdout, done.stderr
