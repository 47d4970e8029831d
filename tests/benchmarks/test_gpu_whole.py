"""Whole videos of `make gpu`, and what is around its parts: clocks, questions, refusals, the summary."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conceptmaster.benchmarks.gpu import card, case, cases, command, job, summary  # noqa: E402
from conceptmaster.benchmarks.gpu import model as gpu_model  # noqa: E402
from conceptmaster.benchmarks.gpu.questions import linear  # noqa: E402
from conceptmaster.benchmarks.gpu.questions.question import Missing, Question, ask  # noqa: E402
from conceptmaster.benchmarks.gpu.whole import base, making, videos, worker  # noqa: E402
from conceptmaster.benchmarks.gpu.whole.command_line import CommandFailed  # noqa: E402
from conceptmaster.errors import InputError  # noqa: E402

NVIDIA_SMI = """#!/bin/sh
case "$*" in
*clocks_event_reasons*) {newer} ;;
*) echo "1980 MHz, 2619 MHz, 350.5 W, 61" ;;
esac
"""


@pytest.fixture
def card_there(monkeypatch, tmp_path):
    """A GPU and its nvidia-smi, which answers the newer question with what it is given."""

    def make(newer):
        script = tmp_path / "nvidia-smi"
        script.write_text(NVIDIA_SMI.format(newer=newer), "utf-8")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(card, "PERIOD", 0.01)

    return make


def watched():
    found = {}
    with card.Watch() as watch, watch.during(found):
        deadline = time.monotonic() + 20
        while len(watch._readings) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    return found["clocks"]


def test_clocks_and_watts_are_read_while_something_runs(card_there):
    card_there('echo "1410 MHz, 2619 MHz, 698.10 W, 71, 0x0000000000000004"')
    found = watched()
    assert found["sm_mhz"] == [1410.0] * 3 and found["watts"] == [698.1] * 3 and found["readings"] >= 2
    assert found["held_back"] == {"power cap": 1.0} and found["celsius"] == 71
    assert card.clocks_in_words(found) == "1410 MHz (1410 to 1410), 698 W, power cap 100% of the time"


def test_an_older_driver_does_not_say_what_holds_clocks_back(card_there):
    card_there("exit 2")
    found = watched()
    assert found["sm_mhz"] == [1980.0] * 3 and "held_back" not in found


def test_what_is_not_told_is_not_made_up(card_there):
    card_there('echo "[N/A], 2619 MHz, [Not Supported], 61, [N/A]"')
    assert watched().keys() == {"readings", "memory_mhz", "celsius"}


def test_without_nvidia_smi_a_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with card.Watch() as watch:
        assert watch.between(0, math.inf)["missing"].startswith("no clocks and watts: nvidia-smi")


def test_a_card_without_fp8_is_named_and_has_no_case_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "8.0" in card.no_fp8() and "8.9" in card.no_fp8() and "\n" not in card.no_fp8()
    names = [group.family for group in cases.cases(case.Shapes("cpu", True, fp8=False))]
    assert names == ["cross-attention", "between products"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert card.no_fp8() is None


def test_of_the_ways_to_compute_the_same_only_right_ones_are_timed():
    def missing():
        raise Missing("no such library")

    def broken():
        raise RuntimeError("out of\nluck")

    exact = torch.arange(4.0)
    answers = {
        "plain": lambda: lambda: exact + 0,
        "wrong": lambda: lambda: exact + 1,
        "not a number": lambda: lambda: exact * math.nan,
        "missing": missing,
        "broken": broken,
    }
    given = job.Job("cpu", 3, lambda line: None)
    ask(Question("q", {}, answers, lambda out: gpu_model.relative_l2(out, exact), 1e-3, flops=8.0), given)
    timing = given.found["q"]["timing"]
    assert list(timing) == list(answers) and timing["plain"]["gain"] == 1.0 and timing["plain"]["tflops"] > 0
    assert timing["missing"] == {"missing": "no such library"}
    assert timing["broken"] == {"failed": "RuntimeError: out of luck"}
    assert all("wrong" in timing[name] and "p50_ms" not in timing[name] for name in ("wrong", "not a number"))


def test_every_product_that_is_asked_about_is_right():
    given = job.Job("cpu", 2, lambda line: None, small=True)
    with torch.no_grad():
        for question in linear.questions(given):
            ask(question, given)
    assert len(given.found) == 4
    for found in given.found.values():
        for name, entry in found["timing"].items():
            assert "missing" in entry if name.startswith("fp8") else "p50_ms" in entry


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--minutes", "2"], "3 at least"), (["--minutes", "nan"], "3 at least"), (["--minutes", "9"], None)],
)
def test_too_little_time_is_refused_in_one_line(monkeypatch, arguments, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = command._refused(command._parser().parse_args(arguments))
    assert found is None if word is None else word in found and "\n" not in found


@pytest.mark.parametrize(("disk", "memory", "word"), [(1, 1 << 40, "of disk"), (1 << 40, 1, "of memory")])
def test_a_base_that_does_not_fit_is_refused_in_one_line(monkeypatch, tmp_path, disk, memory, word):
    monkeypatch.setattr(base.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    monkeypatch.setattr(base, "free_memory", lambda: memory)
    with pytest.raises(InputError, match=f"{word}.* are free") as refused:
        base.Base(tmp_path / "new", gpu_model.SMALL).write(job.Job("cpu", 1))
    assert "\n" not in str(refused.value)


def made(**told):
    seconds = {"open": 1.0, "load": 2.0, "denoise": 3.0, "decode": 4.0, "total": 10.0}
    graphs = {
        "denoise": {"calls": 4, "total_ms": 3000.0, "first_ms": 900.0, "p50_ms": 700.0},
        "decode": {"calls": 1, "total_ms": 50.0, "first_ms": 50.0},
    }
    return {"from_start_s": 11.0, "seconds": seconds, "graphs": graphs, "clocks": {"missing": ""}, **told}


def test_the_summary_has_no_time_of_what_is_wrong():
    report = {
        "ok": False,
        "parts": ["whole", "forward"],
        "whole": {
            "4 steps": {"videos": {"cold": made()}, "wrong": "latents 1.0e+00 from those without"},
            "50 steps": {"videos": {"cold": made(), "warm": {"left_out": "no time was left"}}},
        },
        "cases": {
            "a": {"ok": False},
            "b": {"ok": True, "timing": {"ours": {"p50_ms": 2.0}, "r": {"times_ours": 0.5}}},
        },
        "forward": {"failed": "no luck"},
        "left_out": ["profile"],
    }
    lines = summary.summary(report)
    assert "whole, 4 steps: WRONG, latents 1.0e+00 from those without" in lines
    assert not any("4 steps, cold" in line for line in lines)
    (line,) = (line for line in lines if line.startswith("whole, 50 steps"))
    assert "4 steps 3.00, one 700.0 ms" in line and "decode 50.0" in line
    assert "kernels: 1 of 2 are right; RED: a" in lines and "  loses: b: r 0.50×" in lines
    assert lines[-3:] == ["failed: forward: no luck", "no time was left for: profile", "NOT ALL IS RIGHT"]


def test_a_video_that_there_is_no_time_for_is_left_out(monkeypatch, capsys):
    asked = []

    class Session:
        def __init__(self, order, watch):
            pass

        def make(self, video):
            asked.append(video["name"])
            if video["name"] == "broken":
                raise RuntimeError("out of luck")
            return made()

    monkeypatch.setattr(worker, "Session", Session)
    ordered = [
        making.Ordered("long", ("--steps", "50"), needs=1000.0),
        making.Ordered("spare", spare=1000.0),
        making.Ordered("short"),
        making.Ordered("broken"),
        making.Ordered("after"),
    ]
    worker.main({"until": time.time() + 100, "videos": [vars(video) for video in ordered]})
    told = {found.pop("video"): found for found in map(json.loads, capsys.readouterr().out.splitlines())}
    assert asked == ["short", "broken"] and list(told) == ["long", "spare", "short", "broken"]
    assert "left_out" in told["long"] and "left_out" in told["spare"] and "seconds" in told["short"]
    assert told["broken"] == {"failed": "RuntimeError: out of luck"}


def test_psnr_of_what_is_the_same_is_infinite():
    frames = np.arange(12, dtype=np.uint8)
    assert videos.psnr(frames, frames) == math.inf
    assert videos.psnr(frames + 1, frames) == pytest.approx(48.13, abs=0.01)


@pytest.mark.slow
def test_a_command_that_fails_says_why():
    with pytest.raises(CommandFailed, match="no-such-bundle"):
        making.make(
            "none", ["--bundle", "no-such-bundle", "--prompt", "a"], [making.Ordered("a")], job.Job("cpu", 1)
        )


@pytest.mark.slow
def test_the_whole_script_is_rehearsed(tmp_path):
    pytest.importorskip("diffusers")
    output = tmp_path / "report.json"
    options = [
        "--rehearse",
        "--output",
        str(output),
        "--scratch",
        str(tmp_path / "scratch"),
        "--minutes",
        "60",
    ]
    run = [sys.executable, "-m", "conceptmaster.benchmarks.gpu", *options]
    done = subprocess.run(run, capture_output=True, text=True)
    report = json.loads(output.read_text("utf-8"))
    failed = {name: found for name, found in report.items() if isinstance(found, dict) and "failed" in found}
    assert not failed and report["left_out"] == [], done.stdout + done.stderr
    assert set(report["done"]) == set(report["parts"])
    whole = report["whole"]
    assert whole["base"]["bytes"] > 0
    for title, steps in (("2 steps", 2), ("3 steps, guided", 3)):
        for name in ("cold", "warm"):
            told = whole[title]["videos"][name]
            assert told["graphs"]["denoise"]["calls"] == steps and told["seconds"]["total"] > 0
            assert told["graphs"].keys() >= {"text_encoder", "image_encoder", "qformer", "dam", "condition"}
        assert whole[title]["videos"]["warm"]["latents_from_first"] == 0
    assert whole["2 steps"]["videos"]["plain"]["latents_from_first"] < 1e-5
    assert report["sprites"]["torch on cpu"]["psnr_db"] == math.inf
    assert "missing" in report["sprites"]["onnxruntime on cuda"]
    # again, out of the report: nothing is made a second time
    again = subprocess.run([*run, "--resume"], capture_output=True, text=True, timeout=120)
    assert json.loads(output.read_text("utf-8"))["whole"] == whole, again.stdout + again.stderr
