"""How many threads there are by default, and how many one may ask for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from conceptmaster.errors import InputError
from conceptmaster.runtime import cpus
from conceptmaster.runtime.pipeline import Pipeline


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "rubbish"}, None),
        ({"cpu.max": "1 0"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "20000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_a_containers_share_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], most: int | None
) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpus.usable(tmp_path) == (most or 8)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no processes to CPUs")
def test_what_the_process_is_bound_to_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpus.usable() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2", 10**5, 10**30])
def test_threads_beyond_reason_are_an_error_before_the_bundle_is_read(threads: object) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError, match="threads must be a positive integer"):
        Pipeline.from_bundle("no such bundle", threads=threads)  # type: ignore[arg-type]
    assert time.perf_counter() - start < 0.5


def test_threads_that_wait_sleep() -> None:
    from conceptmaster.runtime.backends.onnxruntime_module import session_options

    options = session_options(3)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 3
