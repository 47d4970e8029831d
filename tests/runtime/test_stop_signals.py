"""Ctrl-C and SIGTERM at any time: one line, the signal's exit code, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conceptmaster.cli import main
from conceptmaster.runtime import stop_signals


def unignored() -> None:
    """What a shell starts in the background ignores interrupts, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """The same for this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder: Path, *arguments: str, code: str | None = None) -> subprocess.Popen[bytes]:
    """The command line in a process of its own, or `code`, which may use sys.argv."""
    how = ["-m", "conceptmaster"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *how, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=unignored,
    )


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_while_steps_run(bundle: Path, tmp_path: Path, number: int, word: str) -> None:
    prompt = ["--prompt", "a ball rolls left", "--threads", "1", "--progress"]
    process = start(
        tmp_path, "generate", "--bundle", str(bundle), *prompt, "--samples", "64", "--steps", "1000"
    )
    assert process.stderr is not None
    while not (text := process.stderr.read1(4096)).strip().startswith(b"steps"):  # type: ignore[attr-defined]
        assert text, "it ended before it began"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err.decode().replace("\r", "\n").splitlines()[-1].strip() == f"conceptmaster: error: {word}"
    assert list(tmp_path.iterdir()) == []


# A module that takes long to load, as an extension does that turns an interrupt into an error of its own.
LOADING = """
import builtins, sys, time
real = builtins.__import__

def slow(name, *arguments, **more):
    if name == "onnxruntime" and name not in sys.modules:
        print("loading", flush=True)
        try:
            time.sleep(0.5)
        except BaseException:
            raise ImportError("initialization failed") from None
    return real(name, *arguments, **more)

builtins.__import__ = slow
from conceptmaster.cli import main
sys.exit(main())
"""


def test_a_signal_while_a_module_loads(bundle: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--bundle", str(bundle), "--prompt", "a ball rolls left"]
    process = start(tmp_path, *arguments, code=LOADING)
    assert process.stdout is not None
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"conceptmaster: error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_signals_at_any_time(bundle: Path, tmp_path: Path) -> None:
    """From the moment that the program is there until it is done: never a traceback, never half a video."""
    arguments = ["generate", "--bundle", str(bundle), "--prompt", "a ball rolls left", "--threads", "1"]
    code = (
        "import sys; from conceptmaster.runtime import stop_signals as s\n"
        "def program():\n print('here', flush=True)\n from conceptmaster.cli import main\n"
        " return main(sys.argv[1:])\n"
        "sys.exit(s.guarded('conceptmaster', True, program))"
    )
    for part in range(8):
        process = start(tmp_path, *arguments, code=code)
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        time.sleep(0.08 * part)
        process.send_signal(signal.SIGTERM if part % 2 else signal.SIGINT)
        _, err = process.communicate(timeout=30)
        said = b"conceptmaster: error: " + (b"terminated\n" if part % 2 else b"interrupted\n")
        number = signal.SIGTERM if part % 2 else signal.SIGINT
        assert (process.returncode, err) in ((128 + number, said), (0, b""), (-number, b""))
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"out.mp4"} and (left == {"out.mp4"} or process.returncode)
        (tmp_path / "out.mp4").unlink(missing_ok=True)


def test_what_is_swallowed_comes_again() -> None:
    """Python drops what a destructor raises: the signal is raised again."""

    class Stubborn:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)

    with stop_signals.raised(False), pytest.raises(stop_signals.Stopped) as caught:
        thing = Stubborn()
        del thing
        start = time.monotonic()
        time.sleep(2)
    assert time.monotonic() - start < 1
    assert caught.value.exit_code == 143


def test_a_second_signal_does_not_disturb_the_cleaning_up() -> None:
    cleaned = False
    with stop_signals.raised(False), pytest.raises(stop_signals.Stopped):
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
        finally:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            cleaned = True
    assert cleaned


def test_callers_get_their_handlers_back_and_ignored_signals_stay_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        with stop_signals.raised(False):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is not interrupt
        assert main(["dance"]) == 2
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
