"""The kernels as compiled for Hopper: the committed report, and, slowly, the compiler again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from conceptmaster.benchmarks import sm90  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report():
    return json.loads(sm90.REPORT.read_text("utf-8"))


def test_no_kernel_spills_and_every_kernel_fits(report):
    assert report["kernels"] and sm90.bad(report["kernels"]) == []
    assert not any(row["serialised"] for row in report["kernels"])
    assert report["max_shared_bytes"] == sm90.MAX_SHARED == 232_448


def test_the_report_is_of_these_kernels(report):
    assert report["sources"] == sm90.sources(), f"run: {report['command']}"


def test_every_kernel_is_in_the_report(report):
    defined = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("def ") and line.split("(")[0].endswith("_kernel"):
                defined.add(line.removeprefix("def ").split("(")[0])
    assert defined == {row["kernel"] for row in report["kernels"]}


def test_the_tensor_cores_are_used(report):
    products = ("cross_attention_kernel", "concept_weights_kernel")
    rows = [row for row in report["kernels"] if row["kernel"] in products and "float32" not in row["case"]]
    assert rows and all(row["wgmma"] for row in rows)


def test_hoppers_kernel_multiplies_and_copies_as_hopper_can(report):
    rows = [row for row in report["kernels"] if row["kernel"] == "hopper_attention_kernel"]
    assert {row["case"].split(", ")[-1] for row in rows} == {"bfloat16", "float16"}
    assert all(row["wgmma"] and row["tma"] and row["registers"] == 168 for row in rows)


def test_a_row_that_spills_or_does_not_fit_is_told(report):
    row = report["kernels"][0]
    assert sm90.bad([row | {"spill_bytes": 8}]) and sm90.bad([row | {"shared_bytes": 232_449}])
    assert sm90.bad([row | {"spill_bytes": 0, "shared_bytes": 232_448}]) == []


@pytest.mark.slow
def test_compiling_again_gives_no_spill():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "conceptmaster.benchmarks.sm90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "no spills, all fit"
