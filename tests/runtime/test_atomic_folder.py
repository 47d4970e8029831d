"""A folder is replaced whole or not at all, whoever interferes, and whenever the writer is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conceptmaster.errors import InputError
from conceptmaster.runtime import atomic_folder
from conceptmaster.runtime.atomic_folder import replacing_folder

WRITER = """
import json, sys
from pathlib import Path
from conceptmaster.runtime import atomic_folder

def files(folder):
    return json.loads((folder / "index").read_text())

if sys.argv[3] == "renames":
    atomic_folder._exchange = lambda one, other: False
with atomic_folder.replacing_folder(Path(sys.argv[1]), files, replace=True) as new:
    (new / "below").mkdir()
    for name in ("a", "below/b"):
        (new / name).write_text(sys.argv[2])
    (new / "index").write_text('["a", "below/b", "index"]')
    if sys.argv[2] == "fail":
        raise SystemExit(3)
"""
CALLS = ("mkdir", "flock", "rename", "renameat2", "fsync", "unlink", "rmdir", "chmod")


def files(folder: Path) -> list[str]:
    if not (folder / "index").is_file():
        raise InputError(f"{folder} is none of ours")
    return json.loads((folder / "index").read_text())


def write(target: Path, text: str = "new", replace: bool = True) -> None:
    with replacing_folder(target, files, replace=replace) as new:
        (new / "a").write_text(text)
        (new / "index").write_text('["a", "index"]')


def found(folder: Path) -> dict[str, str]:
    """What is in a folder, hidden files too."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def whole(target: Path) -> str:
    """Of a folder that WRITER wrote: what it wrote."""
    texts = found(target)
    assert texts.pop("index") == '["a", "below/b", "index"]'
    assert set(texts) == {"a", "below/b"} and len(set(texts.values())) == 1
    return texts["a"]


def command(target: Path, text: str, how: str = "swap") -> list[str]:
    return [sys.executable, "-S", "-c", WRITER, str(target), text, how]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which `python -S`, which starts at once, finds the package and nothing else."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "conceptmaster").symlink_to(Path(atomic_folder.__file__).parents[1])
    return os.environ | {"PYTHONPATH": str(tmp_path / "path"), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def target(tmp_path: Path, environment: dict[str, str]) -> Path:
    """A folder that WRITER has written, "old"."""
    place = tmp_path / "home" / "target"
    place.parent.mkdir()
    subprocess.run(command(place, "old"), env=environment, check=True)
    return place


def killed_and_recovered(
    target: Path, environment: dict[str, str], run: list[str], after: float = 60
) -> bool:
    """Kills a writer at a moment, lets the next one fail, and looks. Returns whether it was killed; after:
    how many seconds it may take."""
    if whole(target) != "old":
        subprocess.run(command(target, "old"), env=environment, check=True)
    with subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL) as writer:
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(after)
        writer.kill()
    swaps = run[-1] == "swap"
    if swaps:
        assert whole(target) in ("old", "new")
    assert subprocess.run(command(target, "fail", run[-1]), env=environment).returncode == 3
    assert whole(target) in ("old", "new") and os.listdir(target.parent) == ["target"]
    return writer.returncode != 0


@pytest.mark.parametrize("how", ["swap", pytest.param("renames", marks=pytest.mark.slow)])
def test_killed_at_every_system_call(target: Path, environment: dict[str, str], how: str) -> None:
    run, log = command(target, "new", how), target.parent.parent / "log"
    strace = ["strace", "-f", "-qq", "-e", "signal=none", "-e", f"trace={','.join(CALLS)}"]
    if shutil.which("strace") is None:
        pytest.skip("strace is not there")
    if subprocess.run([*strace, "-o", log, *run], env=environment).returncode:
        pytest.skip("strace may trace nothing here")
    made = log.read_text().splitlines()
    calls = {name: sum(f" {name}(" in line for line in made) for name in CALLS}
    assert calls["renameat2"] == (how == "swap") and calls["fsync"] >= 5 and calls["unlink"] >= 4
    killed = 0
    for name, count in calls.items():
        for number in range(1, count + 1):
            inject = ["-e", f"inject={name}:signal=KILL:when={number}", "-o", "/dev/null"]
            killed += killed_and_recovered(target, environment, [*strace, *inject, *run])
    assert killed >= sum(calls.values()) - 1


@pytest.mark.parametrize("times", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_time(target: Path, environment: dict[str, str], times: int) -> None:
    start, numbers = time.monotonic(), random.Random(times)
    subprocess.run(command(target, "old"), env=environment, check=True)
    longest = 1.2 * (time.monotonic() - start)
    for _ in range(times):
        killed_and_recovered(target, environment, command(target, "new"), longest * numbers.random())


def test_an_interrupt_leaves_one_of_the_two(target: Path, environment: dict[str, str]) -> None:
    """Ctrl-C on every rename; the one that swaps, too."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not there")
    for how in ("swap", "renames"):
        for call in ("rename", "renameat2"):
            for number in (1, 2):
                inject = f"inject={call}:signal=INT:when={number}"
                strace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
                run = [*strace, *command(target, "new", how)]
                subprocess.run(run, env=environment, stderr=subprocess.DEVNULL)
                assert whole(target) in ("old", "new") and os.listdir(target.parent) == ["target"]


def test_a_second_writer_is_told_and_the_first_one_wins(target: Path) -> None:
    (target / "below/b").unlink()
    (target / "index").write_text('["a", "index"]')
    with replacing_folder(target, files, replace=True) as new:
        (new / "index").write_text('["index"]')
        with pytest.raises(InputError, match="another process is writing .*target': wait"):
            write(target)
    assert found(target) == {"index": '["index"]'} and os.listdir(target.parent) == ["target"]


def test_a_living_writer_is_left_alone(target: Path, environment: dict[str, str]) -> None:
    wait = WRITER.replace("raise SystemExit(3)", "print(flush=True); input()")
    run = [sys.executable, "-S", "-c", wait, str(target), "fail", "swap"]
    with subprocess.Popen(
        run, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None and one.stdout.readline() == "\n"
        with pytest.raises(InputError, match="another process"):
            write(target)
        one.communicate("\n")
        assert one.returncode == 0
    assert whole(target) == "fail" and os.listdir(target.parent) == ["target"]


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    place = tmp_path / "target"
    for make in (
        lambda: [place.mkdir(), (place / "thesis.txt").write_text("a year of work")],
        lambda: place.write_text("a file"),
        lambda: place.symlink_to(tmp_path),
    ):
        with pytest.raises(InputError, match="target"), replacing_folder(place, files, replace=True) as new:
            (new / "index").write_text('["index"]')
            make()
        assert os.listdir(tmp_path) == ["target"]
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()


@pytest.mark.parametrize("name", ["note", "below/note", "empty/note"])
@pytest.mark.parametrize("swapped", [True, False])
def test_a_file_of_others_stops_it(
    target: Path, name: str, swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work, during it, and between the last look and the swap."""

    def add() -> None:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("mine")

    real = atomic_folder._exchange
    if not swapped:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda one, other: False)
    before = found(target)
    with pytest.raises(InputError, match=f"did not write there, and would be lost: '{name}'; move"):
        with replacing_folder(target, files, replace=True) as new:
            (new / "index").write_text('["index"]')
            add()
    with pytest.raises(InputError, match="would be lost"):
        write(target)
    assert found(target) == before | {name: "mine"}
    (target / name).unlink()

    def late(one: Path, other: Path) -> bool:
        add() if not (target / name).exists() and one.name == "gone" and not (one / name).exists() else None
        return real(one, other) if swapped else False

    monkeypatch.setattr(atomic_folder, "_exchange", late)
    with pytest.raises(InputError, match="would be lost"):
        write(target)
    assert found(target) == before | {name: "mine"} and os.listdir(target.parent) == ["target"]


def test_links_are_files_of_others_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_text("mine")
    place = tmp_path / "target"
    write(place)
    (place / "index").write_text('["a", "index", "linked/a", "../outside/a"]')
    (place / "linked").symlink_to(outside)
    with pytest.raises(InputError, match="would be lost: 'linked'"):
        write(place)
    (place / "linked").unlink()
    write(place, "again")
    assert found(place)["a"] == "again" and (outside / "a").read_text() == "mine"


def test_what_may_be_replaced(tmp_path: Path) -> None:
    write(tmp_path / "new", replace=False)
    with pytest.raises(InputError, match="is there already: --overwrite replaces it"):
        write(tmp_path / "new", replace=False)
    with pytest.raises(InputError, match="there already: choose another place"):
        with replacing_folder(tmp_path / "new"):
            pass
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", replace=False)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").touch()
    with pytest.raises(InputError, match="none of ours"):
        write(tmp_path / "app")
    (tmp_path / "link").symlink_to("new")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(InputError, match="something that is no folder"):
            write(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        write(tmp_path / "none" / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty", "app", "link", "file"}


def test_permissions_of_the_folder_stay(tmp_path: Path) -> None:
    write(tmp_path / "new")
    (tmp_path / "new").chmod(0o700)
    write(tmp_path / "new", "again")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_name_that_leaves_no_room_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        atomic_folder.check_target(tmp_path / ("a" * 252), None, replace=False)
    assert atomic_folder.check_target(tmp_path / ("a" * 249), None, replace=False) is None


def test_what_is_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / ".new.part").symlink_to(tmp_path)
    with pytest.raises(InputError, match="'.*new.part' is in the way: move it"):
        write(tmp_path / "new")


def test_without_locks_a_leftover_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_folder, "lock", lambda opened: None)
    write(tmp_path / "new")
    (tmp_path / ".new.part").mkdir()
    with pytest.raises(InputError, match="or delete '.*new.part' if none is"):
        write(tmp_path / "new", "again")
    assert found(tmp_path / "new")["a"] == "new"


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    """The limit of a file's size is the disk that may be filled here; NumPy's error has no reason."""
    write(tmp_path / "new", "old")

    def fail(last: bool) -> None:
        with replacing_folder(tmp_path / "new", files, replace=True) as new, (new / "a").open("wb") as file:
            np.zeros(100_000, np.uint8).tofile(file) if last else os.write(file.fileno(), bytes(10_001))
            os.write(file.fileno(), b"more")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for last in (False, True):
            with pytest.raises(OSError, match=f"File too large: '{tmp_path}/new'$"):
                fail(last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found(tmp_path / "new")["a"] == "old" and os.listdir(tmp_path) == ["new"]
