"""A file is replaced whole or not at all; links, permissions and what is no file are left as they are."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from conceptmaster import atomic_write
from conceptmaster.atomic_write import check_output, replacing
from conceptmaster.errors import InputError


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_secret(path: Path) -> None:
    """As libraries do that write a file of their own, which only its owner may read, and move it."""
    with replacing(path) as temporary:
        own = temporary.with_name("own")
        own.touch(0o600)
        os.replace(own, temporary)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "link").symlink_to("below/further")
    (tmp_path / "below" / "further").symlink_to("file")
    for text in ("made", "replaced"):  # at first it leads nowhere
        write(check_output(tmp_path / "link", ("",)), text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "below" / "further").is_symlink()
        assert (tmp_path / "below" / "file").read_text() == text
    assert len(list(tmp_path.rglob("*"))) == 4


def test_permissions_stay_and_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
        assert mode(tmp_path / "new") == 0o640
        for permissions in (0o600, 0o666, 0o755):
            (tmp_path / "new").chmod(permissions)
            write(tmp_path / "new", "again")
            assert mode(tmp_path / "new") == permissions
            write_secret(tmp_path / "new")
            assert mode(tmp_path / "new") == permissions
        write_secret(tmp_path / "other")
        assert mode(tmp_path / "other") == 0o640
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_leaves_a_file_to_its_owner(tmp_path: Path) -> None:
    write(tmp_path / "new")
    os.chown(tmp_path / "new", 1234, 2345)
    write(tmp_path / "new", "again")
    assert ((tmp_path / "new").stat().st_uid, (tmp_path / "new").stat().st_gid) == (1234, 2345)


def test_what_is_no_file_or_read_only_is_refused_before_and_after_the_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "device.npy").symlink_to("/dev/null")
    (tmp_path / "loop.npy").symlink_to("loop.npy")
    (tmp_path / "lost.npy").symlink_to("none/lost.npy")
    (tmp_path / "locked.npy").touch(0o444)
    (tmp_path / "linked.npy").symlink_to("locked.npy")
    names = {path.name: os.lstat(path).st_mode for path in tmp_path.iterdir()}
    for name, words in (
        ("fifo", "it is no regular file"),
        ("folder", "it is a folder"),
        ("device", "it is no regular file"),
        ("loop", "symbolic links"),
        ("lost", "none' does not exist"),
        ("locked", "it is read-only"),
        ("linked", "it is read-only"),
        ("nul\0", "null byte"),
        ("surrogate\udcff/x\ud800", "surrogates not allowed"),
        ("long" * 100, "too long"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            check_output(tmp_path / f"{name}.npy", (".npy",))
        assert str(caught.value).startswith("cannot write '") and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no regular file"), replacing(tmp_path / "late.npy") as temporary:
        temporary.touch()
        os.mkfifo(tmp_path / "late.npy")
    (tmp_path / "late.npy").unlink()
    assert {path.name: os.lstat(path).st_mode for path in tmp_path.iterdir()} == names


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere: for others, os.access says so."""
    write(tmp_path / "old.npy")
    monkeypatch.setattr(os, "access", lambda path, kind: False)
    with pytest.raises(InputError, match="is not writable"):
        check_output(tmp_path / "new.npy", (".npy",))
    with pytest.raises(InputError, match="old.npy': there is no permission to"):
        check_output(tmp_path / "old.npy", (".npy",))


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "new", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "new") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "new").read_text() == "old" and os.listdir(tmp_path) == ["new"]


def test_the_next_writer_sweeps_what_a_dead_one_left_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / ("n" * 250 + ".mp4")  # as long as a name may be
    script = (
        "import os, sys; from pathlib import Path; from conceptmaster.atomic_write import replacing\n"
        "with replacing(Path(sys.argv[1])) as path: path.write_text('half'); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script, place], env=environment).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".mp4" and left.read_text() == "half"
    with replacing(place) as first:
        first.write_text("first")
        write(place, "second")  # a living writer's file is left alone
        assert place.read_text() == "second" and first.read_text() == "first"
    assert place.read_text() == "first" and os.listdir(tmp_path) == [place.name]


def test_a_writer_that_has_ended_leaves_the_next_one_s_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment its file is moved, another writer may take the name that it had."""
    path, sync = tmp_path / "out.json", atomic_write.sync
    with ExitStack() as second:

        def begun_meanwhile(place: Path) -> None:
            sync(place)
            if place == tmp_path and path.exists():
                monkeypatch.setattr(atomic_write, "sync", sync)
                begun.append(second.enter_context(atomic_write.replacing(path)))

        begun: list[Path] = []
        monkeypatch.setattr(atomic_write, "sync", begun_meanwhile)
        with atomic_write.replacing(path) as first:
            first.write_text("first")
        assert begun == [first] and first.exists() and path.read_text() == "first"
        begun[0].write_text("second")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_though_numpy_forgets_why(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*frames.npy'") as caught:
            with replacing(tmp_path / "frames.npy") as temporary, temporary.open("wb") as file:
                np.save(file, np.zeros(100_000, np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == 27 and os.listdir(tmp_path) == []


def test_errors_of_other_files_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="picture.png"), replacing(tmp_path / "new"):
        (tmp_path / "picture.png").read_bytes()
