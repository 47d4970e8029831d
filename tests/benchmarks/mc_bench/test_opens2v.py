"""OpenS2V-Eval's layout, there and back, and its motion score."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("cv2")

from conceptmaster.benchmarks.mc_bench.__main__ import main  # noqa: E402
from conceptmaster.benchmarks.mc_bench.opens2v import read_eval  # noqa: E402
from conceptmaster.benchmarks.mc_bench.samples import read_samples  # noqa: E402

from .conftest import moving, save_video, textured  # noqa: E402

EVAL = {
    "singleobj_1": {
        "img_paths": ["Images/singleobject/cup/52.jpg"],
        "prompt": "The video begins with a cup.",
        "synthesis_flag": "wrong",
        "class_label": ["Cup"],
    },
    "multihuman_2": {
        "img_paths": ["Images/a.png", "Images/b.png", "Images/c.png"],
        "prompt": "Two men and a woman.",
        "synthesis_flag": "wrong",
        "class_label": ["Man", "Woman", "Man"],
    },
}


def test_their_prompts_become_requests(tmp_path):
    path = tmp_path / "theirs" / "Open-Domain_Eval.json"
    path.parent.mkdir()
    path.write_text(json.dumps(EVAL))
    output = tmp_path / "set.jsonl"
    assert main(["opens2v-requests", "--eval", str(path), "--output", str(output)]) == 0
    one, two = read_samples(output)
    assert (one.name, one.caption, one.labels) == ("singleobj_1", "The video begins with a cup.", ("cup",))
    assert two.labels == ("first man", "woman", "second man")
    assert two.pictures[1].resolve() == (path.parent / "Images/b.png").resolve()


def test_a_set_of_ours_in_their_layout(gallery, tmp_path):
    requests = tmp_path / "set.jsonl"
    main(["samples", "--pictures", str(gallery), "--output", str(requests), "--each", "1"])
    assert main(["opens2v-layout", "--requests", str(requests), "--output", str(tmp_path / "x")]) == 0
    found = json.loads((tmp_path / "x" / "MC-Bench_Eval.json").read_text())
    for sample, (name, entry) in zip(read_samples(requests), found.items(), strict=True):
        assert (sample.name, sample.caption) == (name, entry["prompt"])
        assert set(entry) == set(EVAL["singleobj_1"])
        copies = [(tmp_path / "x" / image).read_bytes() for image in entry["img_paths"]]
        assert copies == [picture.read_bytes() for picture in sample.pictures]
    again = read_eval(tmp_path / "x" / "MC-Bench_Eval.json")
    assert [s.labels for s in again] == [s.labels for s in read_samples(requests)]


def test_motion(tmp_path, capsys):
    wide = textured(128, 224)
    shifted = np.stack([wide[:, 3 * i : 3 * i + 192] for i in range(5)])
    save_video(tmp_path / "singleobj_1.mp4", shifted, scale=1)
    save_video(tmp_path / "still.mp4", np.repeat(moving(1), 5, 0))
    (tmp_path / "broken.mp4").write_bytes(b"x")
    output = tmp_path / "motionscore.json"
    assert main(["opens2v-score", "--videos", str(tmp_path), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert set(found) == {"singleobj_1", "still"}
    assert found["singleobj_1"]["motion_fb"] == pytest.approx(1.5, abs=0.3)  # 3 to the left, none down
    assert found["still"]["motion_fb"] == pytest.approx(0, abs=0.01)
    assert "skipped broken: it cannot be decoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "is no evaluation file of OpenS2V-Eval"),
        ('{"a": {"prompt": "x"}}', "'a' must have prompt, img_paths and as many names in class_label"),
        ('{"a": {"prompt": "x", "img_paths": ["b"], "class_label": []}}', "'a' must have"),
        ("{", "x.json"),
    ],
)
def test_files_that_are_none(text, told, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main(["opens2v-requests", "--eval", str(path), "--output", str(tmp_path / "a.jsonl")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
