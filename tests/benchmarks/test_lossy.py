"""What the report of lossy options holds, rehearsed with two steps; and that the committed one is whole."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from conceptmaster.benchmarks import lossy  # noqa: E402
from conceptmaster.runtime.backends.pytorch.options import TorchOptions  # noqa: E402


def test_every_option_is_held_to_the_exact_video(monkeypatch):
    options = TorchOptions(), TorchOptions(skip_guidance=0.5)
    monkeypatch.setattr(lossy, "OPTIONS", options)
    report = lossy.run(1, (2,))
    exact, skipped = report["rows"]
    assert (exact["options"], exact["evaluated"], exact["psnr_db"]) == ("exact", 1.0, None)
    assert skipped["options"] == "--skip-guidance 0.5" and skipped["evaluated"] == 0.75
    assert skipped["steps"] == 2 and skipped["mean_abs_255"] > 0 and skipped["psnr_db"] < 60
    assert json.loads(json.dumps(report)) == report and len(lossy.table(report).splitlines()) == 4


def test_the_difference_is_that_of_the_frames():
    exact = np.full((1, 2, 2, 2, 3), 100, np.uint8)
    assert lossy.difference(exact, exact) == {"mean_abs_255": 0.0, "psnr_db": None}
    found = lossy.difference(exact + np.uint8(10), exact)
    assert found["mean_abs_255"] == 10 and found["psnr_db"] == pytest.approx(20 * np.log10(25.5))


def test_the_committed_report_has_every_kind_of_option():
    report = json.loads(lossy.REPORT.read_text("utf-8"))
    named = [lossy.name_of(options).split()[0] for options in lossy.OPTIONS]
    assert {row["options"].split()[0] for row in report["rows"]} == set(named)
    assert {"machine", "commit", "videos", "manifest_sha256"} <= report.keys()
