from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.kernels import self_attention as attending  # noqa: E402
from conceptmaster.kernels.cross_attention import attention  # noqa: E402
from conceptmaster.kernels.flash_attention_3 import LIBRARY, flash_attention_3  # noqa: E402
from conceptmaster.kernels.self_attention import choose, heads_first_attention, self_attention  # noqa: E402


def tensors():
    """q, k, v [B,S,A,E]."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 40, 2, 16, generator=g) for _ in range(3))


def test_it_is_attention(assert_close):
    q, k, v = tensors()
    right = attention(q.double(), k.double(), v.double())
    assert_close(self_attention(q, k, v), right)
    assert_close(heads_first_attention(q, k, v), right)
    assert heads_first_attention(q, k, v).is_contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 40, 2, 16, dtype=torch.float16)}, "q is float32, k float16"),
        ({"v": torch.zeros(2, 39, 2, 16)}, r"v must be \[2,40,2,16\], not"),
    ],
)
def test_bad_input_is_one_clear_error(change, words):
    with pytest.raises(ValueError, match=words):
        self_attention(**dict(zip("qkv", tensors(), strict=True)) | change)


def chosen(milliseconds, **functions):
    """What is taken of fakes that each take so many milliseconds; functions: what they compute."""
    clock, rivals = {}, {}
    for name in milliseconds:
        given = functions.get(name, attention)

        def run(q, k, v, name=name, given=given):
            clock["now"] = milliseconds[name]
            return given(q, k, v)

        rivals[name] = run

    def time(call):
        call()
        return clock["now"]

    return choose(rivals, *tensors(), time)


def test_the_fastest_is_taken_where_it_gains():
    assert chosen({"a": 10.0, "b": 9.0, "c": 11.0}) == ("b", {"a": 10.0, "b": 9.0, "c": 11.0})
    assert chosen({"a": 10.0, "b": 9.9})[0] == "a"  # by less than what a second run may turn round


def test_what_is_wrong_or_fails_is_not_taken():
    def fails(q, k, v):
        raise RuntimeError("CUDA out of\nmemory")

    found, about = chosen(
        {"a": 10.0, "b": 1.0, "c": 1.0, "d": 1.0},
        b=lambda q, k, v: 1.01 * attention(q, k, v),
        c=fails,
        d=lambda q, k, v: attention(q, k, v) * float("nan"),
    )
    assert found == "a"
    assert about == {"a": 10.0, "b": "wrong by 0.01", "c": "CUDA out of memory", "d": "wrong by nan"}


@pytest.fixture
def on_cuda(monkeypatch):
    """Lets tensors of the CPU pass for those of a GPU, with rivals that are counted."""
    calls = []

    def way(name):
        def run(q, k, v):
            calls.append(name)
            return attention(q, k, v)

        return run

    milliseconds = {"pytorch": 2.0, "pytorch-heads-first": 3.0, "flash-attention-3": 1.0}

    def time(call):
        call()
        return milliseconds[calls[-1]]

    class NoDevice:
        def __init__(self, device):
            pass

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(attending, "served", lambda *_: True)
    monkeypatch.setattr(attending, "ways", lambda q: {name: way(name) for name in milliseconds})
    monkeypatch.setattr(attending, "pytorch_attention", way("pytorch"))
    monkeypatch.setattr(attending, "_milliseconds", time)
    monkeypatch.setattr(attending, "_chosen", {})
    monkeypatch.setattr(attending, "FEW_TOKENS", 10)
    monkeypatch.setattr(torch.cuda, "device", NoDevice)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def test_it_is_measured_once_and_kept_to(on_cuda, caplog):
    caplog.set_level("INFO")
    self_attention(*tensors())
    measured = len(on_cuda)
    assert measured == 1 + 2 + 3 * attending.ROUNDS + 1 and on_cuda[-1] == "flash-attention-3"
    self_attention(*tensors())
    assert len(on_cuda) == measured + 1 and on_cuda[-1] == "flash-attention-3"
    assert [record.getMessage() for record in caplog.records] == [
        "self-attention [2, 40, 2, 16]: takes flash-attention-3 "
        "(pytorch 2.000 ms, pytorch-heads-first 3.000 ms, flash-attention-3 1.000 ms)"
    ]


def test_nothing_is_measured_in_a_capture_nor_where_it_is_said(on_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    self_attention(*tensors())
    self_attention(*tensors(), way="pytorch-heads-first")
    assert on_cuda == ["pytorch", "pytorch-heads-first"] and not attending._chosen
    with pytest.raises(
        ValueError, match=r"self_attention: there is no 'fast' here: choose one of pytorch, p"
    ):
        self_attention(*tensors(), way="fast")


def test_without_hopper_there_is_no_flash_attention_3():
    assert flash_attention_3(tensors()[0].bfloat16()) is None


BUILD = LIBRARY.parent / "build.sh"


def test_its_build_without_nvcc_is_one_line(tmp_path):
    done = subprocess.run(
        ["/bin/sh", BUILD], capture_output=True, text=True, env={"PATH": str(tmp_path), "NVCC": "nvcc"}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no nvcc: ") and done.stderr.count("\n") == 1


def test_its_build_without_its_sources_is_one_line(tmp_path):
    for tool in ("git", "mktemp", "rm", "dirname"):
        (tmp_path / tool).symlink_to(Path(shutil.which(tool)))
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    environment = {"PATH": str(tmp_path), "FLASH_ATTENTION": str(tmp_path / "none"), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["/bin/sh", BUILD], capture_output=True, text=True, env=environment | {"TMPDIR": os.fspath(tmp_path)}
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: cannot fetch commit 0251105a2fb1")
