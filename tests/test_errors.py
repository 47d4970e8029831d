"""What says that memory is short is told from what is missing, broken, or wrongly asked for."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from conceptmaster.errors import (
    BundleError,
    InputError,
    MissingDependency,
    OutOfMemory,
    is_out_of_memory,
    memory_errors,
    not_loaded,
)


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


SHORT = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory", "a.safetensors"),
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
    RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 262144"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("can't start new thread"),
    caused(RuntimeError("Failed to import diffusers"), MemoryError()),
]
OTHER = [
    ValueError("out of range"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.png"),
    InputError("there is nothing at 'out of memory'"),
    ImportError("cannot import name 'x' from partially initialized module"),
    ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"),
]


@pytest.mark.parametrize("error", SHORT, ids=repr)
def test_memory_that_is_short(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemory, match="^out of memory while weights were read"):
        with memory_errors("weights were read"):
            raise error
    assert isinstance(not_loaded("onnxruntime", "pip install onnxruntime", error), OutOfMemory)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_what_is_something_else(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        with memory_errors("weights were read"):
            raise error


def test_a_package_that_does_not_load() -> None:
    missing = not_loaded("onnxruntime", "pip install onnxruntime", OTHER[-1])
    assert isinstance(missing, MissingDependency)
    assert str(missing) == (
        "onnxruntime does not load, onnxruntime is not installed: pip install onnxruntime"
    )
    broken = not_loaded("onnxruntime", "pip install onnxruntime", OTHER[-2])
    assert isinstance(broken, MissingDependency) and "pip" not in str(broken)
    assert str(broken).startswith("onnxruntime is installed but does not load: cannot import name 'x'")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
@pytest.mark.parametrize("megabytes", [150, 240])
def test_generate_in_too_little_memory(tmp_path: Path, megabytes: int) -> None:
    """While libraries load, and (here) while a graph is loaded."""
    words = ["generate", "--prompt", "a ball rolls left", "--threads", "1", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "conceptmaster", *words, "--output", str(tmp_path / "out.npy")],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # whose buffers, one for each CPU, come first
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20)),
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("conceptmaster: error: out of memory")
    assert not any(word in done.stderr for word in ("pip", "export", "bad bundle"))
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_not_bad_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptmaster.runtime.backends import open_backend
    from conceptmaster.runtime.backends.onnxruntime_module import onnxruntime
    from conceptmaster.runtime.bundle_format.find import Bundle

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Exception during initialization: std::bad_alloc")

    backend = open_backend(Bundle.open("sprites"), "cpu", 1)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(OutOfMemory, match="^out of memory in the graph dam"):
        backend.load(["dam"])


def test_a_graph_that_does_not_run_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    from conceptmaster.runtime.backends import open_backend
    from conceptmaster.runtime.bundle_format.find import Bundle

    backend = open_backend(Bundle.open("sprites"), "cpu", 1)
    ids = np.full((1, 48), 10**9, np.int64)
    with pytest.raises(BundleError, match="the graph text_encoder does not run: .*conceptmaster export"):
        backend.run("text_encoder", {"token_ids": ids, "token_mask": np.ones((1, 48), bool)})
    assert capfd.readouterr().err == ""
