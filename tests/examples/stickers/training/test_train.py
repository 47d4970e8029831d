import json
import shutil
import signal

import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load, load_model
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training.learning import CheckpointError, saved_progress
from conceptmaster.examples.sprites.training.loop import LoopOptions
from conceptmaster.examples.stickers.training import seeing, train
from conceptmaster.examples.stickers.training.components import doubled
from conceptmaster.examples.stickers.training.options import Options, Supply
from conceptmaster.examples.stickers.training.packing import pack_folder, state_of
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


def run(folder, steps, start=None, made=None, **how):
    if made is not None:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    train.train(atlas(), folder, Options(steps=steps, **SMALL | how), start)
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


def test_a_signal_is_followed_after_the_step_and_its_checkpoint(tmp_path, monkeypatch, words):
    drawn = train.Drawn.of

    def signalled(*args):
        if args[-1] == 1:
            signal.raise_signal(signal.SIGINT)
        return drawn(*args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(train.Drawn, "of", signalled)
            run(tmp_path, 9, made=words)
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved_progress(tmp_path / "training.safetensors")["step"] == 2
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["share"] > 0 and last["tflop"] > 0
    packed, whole = state_of(tmp_path / train.PACKED), state_of(tmp_path)
    assert packed.keys() == whole.keys()
    assert all((packed[name] - whole[name]).abs().max() <= 0.01 * whole[name].abs().max() for name in whole)


def test_other_options_and_a_training_that_is_over_are_told_in_a_line(tmp_path, caplog, words):
    run(tmp_path, 1, made=words)
    caplog.clear()
    train.train(atlas(), tmp_path, Options(steps=1, **SMALL))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{tmp_path} has had its 1 steps, at step 1: ask for more"
    caplog.clear()
    train.train(atlas(), tmp_path, Options(steps=2, **SMALL | {"lr": 0.01}))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{tmp_path} goes on with other options, not as it would have: lr 0.01 (so far 0.008)"


def test_a_folder_from_before_boxes_goes_on_with_them_and_says_so(tmp_path, caplog, words):
    run(tmp_path, 1, made=words, boxes=0.0)
    assert load_model(tmp_path / "model.safetensors").config == small_config()
    path = tmp_path / "options.json"
    told = json.loads(path.read_text())
    assert told.pop("boxes") == 0
    path.write_text(json.dumps(told))
    caplog.clear()
    run(tmp_path, 2, boxes=0.0)
    assert not caplog.records
    run(tmp_path, 3, boxes=0.5)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{tmp_path} goes on with other options, not as it would have: boxes 0.5 (so far 0.0)"
    assert saved_progress(tmp_path / "training.safetensors")["step"] == 3
    assert load_model(tmp_path / "model.safetensors").config == train.boxed(small_config())


def test_weights_of_others_are_not_trained_over(tmp_path):
    (tmp_path / "model.safetensors").write_text("somebody's")
    with pytest.raises(InputError, match="holds weights that no training there made: choose another"):
        run(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "somebody's"


def test_the_time_for_the_last_checkpoint_is_kept_free():
    how = LoopOptions("train", 1, minutes=2.0)
    assert how.part({"step": 5.0, "seconds": 60.0}) == 0.5
    assert how.part({"step": 5.0, "seconds": 60.0, "saving": 40.0}) == 1.0


def test_training_logs_probes_and_goes_on_from_a_checkpoint_with_a_fresh_optimizer(tmp_path):
    run(tmp_path / "first", 1)
    lines = [json.loads(line) for line in (tmp_path / "first" / "log.jsonl").read_text().splitlines()]
    assert [line.get("phase") for line in lines[:3]] == ["start", "see", "read"]
    assert lines[-1]["step"] == 1 and {"with", "without", "swapped"} == lines[-1]["probe_sets"].keys()
    assert load_model(tmp_path / "first" / "model.safetensors").config == train.boxed(small_config())
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
        ({"boxes": -0.1}, "--boxes must lie between 0 and 1"),
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
