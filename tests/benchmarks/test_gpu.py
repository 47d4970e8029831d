"""The GPU script, rehearsed on the CPU at small sizes: its cases fit together, and it never times what is
wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.benchmarks import gpu, gpu_cases  # noqa: E402
from conceptmaster.kernels import modulate  # noqa: E402


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 2)


def test_every_case_is_right_and_timed():
    lines: list[str] = []
    report = gpu.run(gpu_cases.Shapes("cpu", small=True), 1e9, lines.append)
    assert report["ok"] and report["left_out"] == [] and len(report["cases"]) == 7
    for row in report["cases"].values():
        assert (
            row["timing"]["ours"]["p20_ms"]
            <= row["timing"]["ours"]["p50_ms"]
            <= row["timing"]["ours"]["p80_ms"]
        )
        assert len(row["timing"]) > 1  # a rival in the same run
    assert {"processor", "torch", "python"} <= report["hardware"].keys()
    assert json.loads(json.dumps(report)) == report


def test_nothing_is_timed_while_one_is_wrong(monkeypatch):
    right = modulate.residual_reference
    monkeypatch.setattr(
        modulate,
        "residual_reference",
        lambda x, *rest: right(x, *rest) * (1 if x.dtype == torch.float64 else 1.2),
    )
    lines: list[str] = []
    report = gpu.run(gpu_cases.Shapes("cpu", small=True), 1e9, lines.append)
    assert not report["ok"] and "roofline" not in report
    assert not any("timing" in row for row in report["cases"].values())
    assert lines[-1] == "a check is red: nothing is timed" and not any(" ms" in line for line in lines)


def test_a_case_without_time_is_named():
    report = gpu.run(gpu_cases.Shapes("cpu", small=True), 0.0, lambda line: None)
    assert report["left_out"] == list(report["cases"])


def test_an_unwritten_element_is_wrong():
    case = next(gpu._each(gpu_cases.Shapes("cpu", small=True)))
    out = case.ours()
    out[0, -1, 0, 0] = float("nan")
    broken = gpu_cases.Case(**{**vars(case), "ours": lambda: out})
    assert gpu.check(case)["ok"] and not gpu.check(broken)["ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    command = [sys.executable, "-m", "conceptmaster.benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "make gpu" in done.stderr
