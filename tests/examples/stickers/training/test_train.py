import json
import shutil

import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load, load_model
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training.learning import CheckpointError
from conceptmaster.examples.stickers.training import seeing, train
from conceptmaster.examples.stickers.training.components import doubled
from conceptmaster.examples.stickers.training.options import Options, Supply
from conceptmaster.examples.stickers.training.packing import pack_folder
from conceptmaster.examples.stickers.world import grounds
from conceptmaster.examples.stickers.world.tokens import build_tokenizer

from ..small import atlas, small_config

SMALL = {"batch_size": 4, "captions": 4, "reading": 2, "seeing": 1, "supply": Supply(2, 4, 1), "log_every": 1}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a tokenizer and a VAE: what takes longest to make."""
    folder = tmp_path_factory.mktemp("words")
    build_tokenizer(atlas(), captions=100).save(str(folder / "tokenizer.json"))
    config = small_config()
    train.write_vae(doubled(config.vae, train.SPRITES / "vae.safetensors"), folder, config.vae)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "preset", lambda name: small_config())
    monkeypatch.setattr(train, "ANALYSED", 16)
    monkeypatch.setattr(train, "PROBED", 4)
    monkeypatch.setattr(seeing, "PICTURES", 4)
    monkeypatch.setattr(train, "build_tokenizer", lambda atlas: build_tokenizer(atlas, captions=100))
    monkeypatch.setattr(grounds, "EACH", 2)


def run(folder, steps, start=None, made=None):
    if made is not None:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    train.train(atlas(), folder, Options(steps=steps, **SMALL), start)
    return load(folder / "model.safetensors")[0]


def test_interrupted_training_goes_on_exactly(tmp_path, monkeypatch, words):
    whole = run(tmp_path / "whole", 7, made=words)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        drawn = train.Drawn.of
        patched.setattr(train.Drawn, "of", lambda *a: stop() if a[-1] == 6 else drawn(*a))
        run(tmp_path / "parts", 7, made=words)
    assert (tmp_path / "parts" / "model.safetensors").exists()  # written after the fifth step
    parts = run(tmp_path / "parts", 7)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_training_logs_probes_and_goes_on_from_a_checkpoint_with_a_fresh_optimizer(tmp_path):
    run(tmp_path / "first", 1)
    lines = [json.loads(line) for line in (tmp_path / "first" / "log.jsonl").read_text().splitlines()]
    assert [line.get("phase") for line in lines[:3]] == ["start", "see", "read"]
    assert lines[-1]["step"] == 1 and {"with", "without", "swapped"} == lines[-1]["probe_sets"].keys()
    assert load_model(tmp_path / "first" / "model.safetensors").config == small_config()
    run(tmp_path / "second", 1, start=tmp_path / "first")
    for name in ("tokenizer.json", "vae.json"):
        assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()
    pack_folder(tmp_path / "first", tmp_path / "packed")
    run(tmp_path / "third", 1, start=tmp_path / "packed")
    for folder in ("second", "third"):
        told = json.loads((tmp_path / folder / "log.jsonl").read_text().splitlines()[0])
        assert told == {"phase": "start", "fresh": []}


def test_a_broken_checkpoint_is_named(tmp_path, words):
    run(tmp_path, 1, made=words)
    (tmp_path / "training.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="training.safetensors is not a whole checkpoint"):
        run(tmp_path, 2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"minutes": 0}, "--minutes must be above 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"decoys": 2}, "--decoys must lie between 0 and 1"),
        ({"lr": 0}, "--lr must lie between 0 and 1"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Options(**wrong)


def test_the_rate_rises_stays_and_falls():
    rates = [train.rate(done) for done in (0, 0.01, 0.02, 0.6, 0.8, 1.0)]
    assert rates == pytest.approx([0.005, 0.5, 1, 1, 0.52, 0.04])


def test_a_start_without_a_model_is_refused(tmp_path, words):
    shutil.copytree(words, tmp_path / "start")
    with pytest.raises(InputError, match="model.safetensors is missing"):
        run(tmp_path / "new", 1, start=tmp_path / "start")
