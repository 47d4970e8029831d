"""The set: the paper's numbers, made from a folder, the same each time, and read by `generate --requests`."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from conceptmaster.benchmarks.mc_bench.__main__ import main
from conceptmaster.benchmarks.mc_bench.samples import make_samples, read_pictures, read_samples, with_article
from conceptmaster.benchmarks.mc_bench.scenarios import SCENARIOS, SLOT, scenario_of
from conceptmaster.errors import InputError
from conceptmaster.runtime.request import Request


def test_the_papers_numbers():
    assert [s.samples for s in SCENARIOS] == [40, 40, 40, 30, 30, 30]
    assert [len(s.templates) for s in SCENARIOS] == [6, 11, 16, 4, 8, 5]
    texts = [text for s in SCENARIOS for text in s.templates]
    assert len(set(texts)) == 50
    assert {len(SLOT.findall(text)) for text in texts} == {2, 3}
    assert all(len(set(SLOT.findall(text))) == len(SLOT.findall(text)) for text in texts)


def test_samples_are_made_of_all_pictures_and_told_in_their_labels(gallery):
    pictures = read_pictures(gallery)
    samples = make_samples(pictures)
    assert samples == make_samples(pictures) != make_samples(pictures, seed=1)
    assert Counter(s.scenario for s in samples) == {s.name: s.samples for s in SCENARIOS}
    assert {p.label for p in pictures["persons"]} == {"young man", "woman", "old man"}
    assert {p.label for p in pictures["livings"]} == {"dog", "cat", "owl"}
    assert {p.label for p in pictures["stuffs"]} == {"red lamp", "ice cream", "bench"}
    for sample in samples:
        assert len(set(sample.labels)) == len(sample.labels) in (2, 3)
        places = [sample.caption.index(label) for label in sample.labels]
        assert places == sorted(places) and "{" not in sample.caption
        assert all(picture.is_file() for picture in sample.pictures)
    used = Counter(path for sample in samples for path in sample.pictures)
    assert set(used) == {p.path for kind in pictures.values() for p in kind}
    templates = Counter(s.caption.split()[-1] for s in samples if s.scenario == "livings")
    assert max(templates.values()) - min(templates.values()) <= 1  # 30 of 4 templates, in turn


@pytest.mark.parametrize(
    ("label", "told"), [("dog", "a dog"), ("owl", "an owl"), ("the moon", "the moon"), ("Anna", "Anna")]
)
def test_articles(label, told):
    assert with_article(label) == told


def test_lines_are_requests(gallery, tmp_path):
    path = tmp_path / "set.jsonl"
    assert main(["samples", "--pictures", str(gallery), "--output", str(path)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 210
    names = [line.pop("name") for line in lines]
    requests = [Request.from_data(line, path.parent) for line in lines]
    samples = read_samples(path)
    assert [s.name for s in samples] == names and scenario_of(names[0]) == "persons"
    assert [r.prompt for r in requests] == [s.caption for s in samples]
    made = make_samples(read_pictures(gallery))
    for sample, again in zip(made, samples, strict=True):
        assert (sample.labels, sample.seed) == (again.labels, again.seed)
        assert all(a.samefile(b) for a, b in zip(sample.pictures, again.pictures, strict=True))


def test_some_of_it(gallery, tmp_path):
    path = tmp_path / "set.jsonl"
    options = ["--scenario", "livings", "--scenario", "persons", "--each", "3"]
    assert main(["samples", "--pictures", str(gallery), "--output", str(path), *options]) == 0
    assert [s.name for s in read_samples(path)] == [
        *(f"persons-{n:02d}" for n in (1, 2, 3)),
        *(f"livings-{n:02d}" for n in (1, 2, 3)),
    ]


def test_folders_that_do_not_do(gallery, tmp_path, capsys):
    def refused(*options: str) -> str:
        assert main(["samples", "--output", str(tmp_path / "x.jsonl"), *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no folder of pictures" in refused("--pictures", str(tmp_path / "none"))
    (tmp_path / "some" / "persons").mkdir(parents=True)
    told = refused("--pictures", str(tmp_path / "some"))
    assert "has no folder 'livings'" in told and "persons-livings" in told and "--scenario" in told
    told = refused("--pictures", str(tmp_path / "some"), "--scenario", "persons")
    assert "pictures of 0 labels" in told
    assert "--each must be" in refused("--pictures", str(gallery), "--each", "0")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no request"),
        ("{", "line 1"),
        ('{"prompt": "a", "what": 1}', "line 1: unknown key 'what'"),
        ('{"prompt": "a", "name": "../x"}', "line 1: a name becomes part"),
        ('{"prompt": "a", "name": "b"}\n{"prompt": "a", "name": "b"}', "line 2 has the name 'b'"),
    ],
)
def test_lines_that_do_not_do(text, told, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        read_samples(path)
