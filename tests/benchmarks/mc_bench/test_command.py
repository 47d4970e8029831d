"""Scoring a folder: what is kept, what is skipped, what goes on, and the files that come of it."""

from __future__ import annotations

import json

import pytest
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("skvideo")

from conceptmaster.benchmarks.mc_bench import measures, summary  # noqa: E402
from conceptmaster.benchmarks.mc_bench.__main__ import main  # noqa: E402
from conceptmaster.benchmarks.mc_bench.samples import Sample, read_samples  # noqa: E402
from conceptmaster.benchmarks.mc_bench.scoring import Scored  # noqa: E402

from .conftest import moving, save_video  # noqa: E402


@pytest.fixture
def made(gallery, tmp_path):
    """Four samples of two scenarios, with their videos, called as another system may."""
    requests = tmp_path / "set.jsonl"
    options = ["--scenario", "livings", "--scenario", "persons", "--each", "2"]
    assert main(["samples", "--pictures", str(gallery), "--output", str(requests), *options]) == 0
    (tmp_path / "videos").mkdir()
    suffixes = [".mp4", ".webm", ".mp4", ".gif"]
    for seed, (sample, suffix) in enumerate(zip(read_samples(requests), suffixes, strict=True)):
        save_video(tmp_path / "videos" / f"{sample.name}{suffix}", moving(5, seed, seed=seed))
    return tmp_path


def run(made, *options: str) -> int:
    return main(
        [
            *("score", "--requests", str(made / "set.jsonl"), "--videos", str(made / "videos")),
            *("--output", str(made / "out"), "--quiet", *options),
        ]
    )


def report(made):
    return json.loads((made / "out" / "report.json").read_text())


def counted(monkeypatch) -> list[str]:
    """The names of samples whose motion is measured from now on."""
    seen: list[str] = []
    inner = measures.Motion.measure

    def measure(self, watched):
        seen.append(watched.sample.name)
        return inner(self, watched)

    monkeypatch.setattr(measures.Motion, "measure", measure)
    return seen


def test_without_any_weights(made, capsys):
    assert run(made, "--json") == 0
    told = report(made)
    assert set(told["summary"]) == {"persons", "livings", "all"}
    assert set(told["summary"]["all"]) == {"motion smoothness", "dynamic degree", "moves", "NIQE"}
    assert told["summary"]["all"]["NIQE"]["samples"] == 4 and not told["skipped"]
    for name, entry in told["summary"]["all"].items():
        values = [sample[name] for sample in told["samples"].values()]
        assert entry["mean"] == pytest.approx(sum(values) / 4, abs=1e-4)
        assert min(values) - 1e-4 <= entry["low"] <= entry["mean"] + 1e-4
        assert entry["mean"] - 1e-4 <= entry["high"] <= max(values) + 1e-4
    assert told["machine"]["python"] and "commit" in told and told["models"] == {}
    assert "| NIQE ↓ |" in (made / "out" / "table.md").read_text()
    for name in ("best.png", "worst.png"):
        with Image.open(made / "out" / name) as image:
            assert image.width > 300 and image.height > 600
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"] == told["summary"]


def test_what_is_known_is_not_computed_again(made, monkeypatch):
    seen = counted(monkeypatch)
    assert run(made) == 0 and len(seen) == 4
    first = report(made)["samples"]
    assert run(made) == 0 and len(seen) == 4
    assert report(made)["samples"] == first
    save_video(made / "videos" / "persons-01.mp4", moving(5, 7))
    assert run(made) == 0 and seen[4:] == ["persons-01"]
    assert report(made)["samples"]["persons-01"] != first["persons-01"]
    (made / "out" / "samples" / "livings-01.json").write_text("{")
    assert run(made) == 0 and seen[5:] == ["livings-01"]


def test_an_interrupted_run_goes_on(made, monkeypatch):
    seen = counted(monkeypatch)
    inner = measures.Imaging.measure

    def stopped(self, watched):
        if len(seen) == 3:
            raise KeyboardInterrupt
        return inner(self, watched)

    monkeypatch.setattr(measures.Imaging, "measure", stopped)
    assert run(made) == 130 and len(seen) == 3
    assert not (made / "out" / "report.json").exists()
    monkeypatch.setattr(measures.Imaging, "measure", inner)
    assert run(made) == 0 and len(seen) == 4  # of the third, motion was kept before naturalness stopped
    assert len(report(made)["samples"]) == 4


def test_what_cannot_be_scored_is_named(made, capsys):
    (made / "videos" / "persons-01.mp4").write_bytes(b"no video at all")
    (made / "videos" / "persons-02.webm").unlink()
    (made / "videos" / "livings-01.mp4").unlink()
    save_video(made / "videos" / "livings-01.mp4", moving(3)[:, :8, :8], scale=1)
    assert run(made) == 0
    told = capsys.readouterr().out
    assert (
        "skipped persons-01: it cannot be decoded" in told and "skipped persons-02: there is no video" in told
    )
    assert "skipped livings-01: its frames are of 8×8" in told
    assert set(report(made)["skipped"]) == {"persons-01", "persons-02", "livings-01"}
    assert set(report(made)["samples"]) == {"livings-02"}


def test_learned_measures_of_masks(made, models):
    options = [*("--clip", str(models["clip"])), *("--dino", str(models["dino"])), "--frames", "2"]
    assert run(made, *options, "--clipseg", str(models["clipseg"])) == 0
    told = report(made)
    v2 = {"CLIP-cap", "CLIP-tag", "CLIP-I", "DINO-I", "CLIP-tag_dis", "found"}
    assert v2 < set(told["summary"]["all"])
    assert set(told["models"]) == {"clip", "dino", "clipseg"}
    assert len(told["models"]["clip"]["files"]["model.safetensors"]) == 64
    assert not any(name.startswith("decoupling") for name in told["summary"]["all"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--clip", "{dino}"], "is a model of the kind 'dinov2': clip is needed here"),
        (["--clip", "nowhere"], "no folder at 'nowhere'"),
        (["--clip", "{clip}", "--aesthetic", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--aesthetic", "x"], "give --clip, too"),
        (["--sam2", "{sam2}"], "give --owlv2, too"),
        (["--owlv2", "{owlv2}"], "--clip or --dino"),
        (["--dino", "{dino}"], "--owlv2 or --clipseg"),
        (["--sheet-by", "beauty"], "--sheet-by must be one of"),
        (["--videos", "{clip}"], "has no video of any sample: they are called NAME.mp4"),
        (["--videos", "nowhere"], "no folder of videos"),
        (["--requests", "nowhere.jsonl"], "cannot read the requests"),
    ],
)
def test_wrong_input_is_one_line(made, models, options, told, capsys):
    paths = {name: str(path) for name, path in models.items()}
    assert run(made, *(option.format(**paths) for option in options)) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (made / "out" / "report.json").exists()


def test_two_videos_of_a_sample_are_refused(made, capsys):
    save_video(made / "videos" / "persons-01.webm", moving(3))
    assert run(made) == 2
    assert "several videos of 'persons-01'" in capsys.readouterr().err


def test_intervals_hold_the_mean_and_shrink_with_samples():
    low, high = summary.interval([1.0] * 5)
    assert low == high == 1.0
    few, many = ([0.0, 1.0] * n for n in (5, 100))
    (a, b), (c, d) = summary.interval(few), summary.interval(many)
    assert a < c < 0.5 < d < b
    # of a share of 1/2 in 200: 1.96 standard errors each way
    assert (c, d) == pytest.approx((0.5 - 0.0693, 0.5 + 0.0693), abs=0.01)


def test_best_and_worst():
    scored = [
        Scored(Sample(str(n), "", (), (), 0), values={"DINO-I": n / 10, "NIQE": n}) for n in range(1, 4)
    ]
    assert [one.sample.name for one in summary.ranked(scored, "DINO-I")] == ["3", "2", "1"]
    assert [one.sample.name for one in summary.ranked(scored, "NIQE")] == ["1", "2", "3"]
    assert summary.ranked(scored, "CLIP-I") == []
