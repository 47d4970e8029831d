"""Checkpoints of PyTorch turned into safetensors; whatever else a pickle holds is named, and never run."""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.safetensors_io import load  # noqa: E402
from conceptmaster.export import convert, unpickling  # noqa: E402


class Runs:
    """A pickle of this asks for a program to be run."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return (os.system, self.arguments)


def a_state():
    """Every dtype that is read, empty and single ones, one that is not contiguous, and two that share."""
    g = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8)
    state = {str(kind): (torch.randn(3, 4, generator=g) * 9).to(kind) for kind in kinds}
    whole = torch.randn(6, 5, generator=g)
    state |= {"tied.a": whole, "tied.b": whole, "a part": whole[2:4], "transposed": whole.t()}
    return state | {
        "none": torch.ones(0, 3),
        "one": torch.tensor(2.5),
        "whole": torch.nn.Parameter(whole + 1),
    }


def unpickled(path, output):
    """What the child says, called in this process: another one would load torch each time."""
    return unpickling.main(str(path), str(output))


def check_same(found, state):
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert (
            found[name]
            .contiguous()
            .flatten()
            .view(torch.uint8)
            .equal(tensor.detach().contiguous().flatten().view(torch.uint8))
        )


def test_a_state_dict_is_the_same_in_safetensors(command, tmp_path, monkeypatch):
    state = a_state()
    torch.save(collections.OrderedDict(state) | {"epoch": 3}, tmp_path / "-a b.pth")
    monkeypatch.chdir(tmp_path)
    code, out, err = command("convert", "./-a b.pth", tmp_path / "a.safetensors")
    assert (code, err) == (0, "") and "13 tensors" in out and "left out: epoch\n" in out
    check_same(load(tmp_path / "a.safetensors")[0], state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["-a b.pth", "a.safetensors"]


def test_wrappers_old_files_and_replacing(command, tmp_path):
    state, output = a_state(), tmp_path / "a.safetensors"
    del state["torch.float8_e4m3fn"]  # which the old format has no storage for
    output.write_bytes(b"here")
    wrapped = {"model": {"module": state, "step": 1}, "optimizer": {"state": {0: {"a": torch.ones(1)}}}}
    torch.save(wrapped, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    code, out, err = command("convert", tmp_path / "a.ckpt", output)
    assert (code, out) == (2, "") and "is there already: --overwrite replaces it" in err
    assert output.read_bytes() == b"here"
    code, out, err = command("convert", tmp_path / "a.ckpt", output, "--overwrite")
    assert (code, err) == (0, "") and "left out: optimizer, model.step\n" in out
    check_same(load(output)[0], state)
    torch.save({"generator_ema": state, "step": 1}, tmp_path / "b.pt")
    assert unpickled(tmp_path / "b.pt", output)["left_out"] == ["step"]
    check_same(load(output)[0], state)


@pytest.mark.parametrize("new", [True, False])
def test_a_hostile_pickle_does_nothing(command, tmp_path, new):
    owned = tmp_path / "owned"
    pickled = {"a": torch.ones(2), "b": Runs(f"touch {owned}")}
    torch.save(pickled, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    if new:
        code, out, err = command("convert", tmp_path / "a.pth", tmp_path / "a.safetensors")
        assert (code, out) == (2, "") and err.count("\n") == 1 and len(err) < 400
    else:
        err = unpickled(tmp_path / "a.pth", tmp_path / "a.safetensors")["refused"]
    assert f"{os.system.__module__}.system" in err and "was not executed" in err
    assert not owned.exists() and [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_what_is_no_state_dict(command, tmp_path):
    ones, scripted = torch.ones(2), tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), scripted)
    cut = tmp_path / "cut.pth"
    torch.save({"a": torch.ones(1000)}, cut)
    cut.write_bytes(cut.read_bytes()[:-300])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_text("")
    for held, words in (
        (ones, "is no state dict: it is a Tensor"),
        ([ones], "it is a list"),
        ({"a": 1, "b": "c"}, "is no state dict: it has a, b"),
        ({}, "it has nothing"),
        ({"a": {"x": ones}, "b": {"y": ones}}, "is no state dict: it has a, b"),
        ({1: ones}, "is no state dict: it has the name 1"),
        (argparse.Namespace(a=ones), "holds argparse.Namespace, which is no tensor: it was not executed"),
        (torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear, which"),
        ({"a": ones.to(torch.complex64)}, "has a of complex64"),
        ({"a": torch.quantize_per_tensor(ones, 1.0, 0, torch.qint8)}, "has a of qint8"),
        ({"a": torch.ones(2, 2).to_sparse()}, "has a of float32, torch.sparse_coo"),
        (
            {"a": torch.ones(1).expand(10**13)},
            "has a of (10000000000000,), which it does not hold the numbers",
        ),
        (scripted, "is a TorchScript archive, which is code"),
        (cut, "is not a checkpoint of PyTorch"),
        (tmp_path / "text.pth", "is not a checkpoint of PyTorch"),
        (tmp_path / "empty.pth", "is not a checkpoint of PyTorch"),
    ):
        path = held
        if not isinstance(held, type(cut)):
            path = tmp_path / "held.pth"
            torch.save(held, path)
        answer = unpickled(path, tmp_path / "a.safetensors")
        assert words in answer["refused"] and "\n" not in answer["refused"] and len(answer["refused"]) < 400
    assert not (tmp_path / "a.safetensors").exists()


def test_wrong_files_are_told_before_a_process_is_started(command, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.subprocess, "run", None)
    file, output = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save({"a": torch.ones(1)}, file)
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "link.safetensors").symlink_to(file)
    (tmp_path / "b.safetensors").write_bytes(b"")
    for source, place, words in (
        (tmp_path / "none.pth", output, "No such file"),
        (tmp_path, output, "Is a directory"),
        (tmp_path / "pipe.pth", output, "not a regular file"),
        (file, file, "the output is the file that is converted"),
        (file, tmp_path / "link.safetensors", "the output is the file that is converted"),
        (tmp_path / "b.safetensors", output, "is safetensors already"),
        (file, tmp_path / "a.bin", "must end in .safetensors"),
        (file, tmp_path / "none" / "a.safetensors", "does not exist"),
    ):
        code, out, err = command("convert", source, place)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err


def test_a_full_disk(tmp_path, monkeypatch):
    file = tmp_path / "a.pth"
    torch.save({"a": torch.ones(10**6)}, file)
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6))
    answer = unpickled(file, tmp_path / "a.safetensors")
    assert answer == {"failed": "needs 4.0 MB on the disk, where 1.0 MB are free"}
    monkeypatch.undo()
    assert "could not be written" in unpickled(file, tmp_path / "none" / "a.safetensors")["failed"]


def test_a_child_that_dies_is_one_line(command, tmp_path, monkeypatch):
    file, output = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save({"a": torch.ones(1)}, file)
    child = tmp_path / "child.py"
    monkeypatch.setattr(convert, "CHILD", child)
    for program, words in (
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL, for which a lack of memory"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("raise ValueError('so it is')", "ended with exit code 1 (ValueError: so it is)"),
        ("", "ended with exit code 0"),
        ('print(\'{"missing": "torch"}\')', "`convert` needs torch: in the project's folder, pip install"),
        ('print(\'{"failed": "is full"}\')', "a.pth' is full"),
    ):
        child.write_text(program)
        code, out, err = command("convert", file, output)
        assert (code, out, err.count("\n")) == (1, "", 1) and words in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "child.py"]


def test_an_interrupt_ends_both_and_leaves_nothing(tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"a": torch.ones(1)}, file)
    child = tmp_path / "child.py"
    child.write_text(
        "import os, sys, time; open(sys.argv[1] + '.pid', 'w').write(str(os.getpid())); time.sleep(99)"
    )
    program = (
        "import sys, pathlib; from conceptmaster.export import convert; from conceptmaster.cli import main; "
        f"convert.CHILD = pathlib.Path({str(child)!r}); sys.argv[1:] = ['convert', {str(file)!r}, "
        f"{str(tmp_path / 'a.safetensors')!r}]; sys.exit(main())"
    )
    started = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    there = tmp_path / "a.pth.pid"
    while not (there.exists() and there.read_text()):
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)  # SIGINT may be ignored where the tests run
    assert (
        started.communicate(timeout=20)[1] == "conceptmaster: error: terminated\n"
        and started.returncode == 143
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(there.read_text()), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.pth.pid", "child.py"]
