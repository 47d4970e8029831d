"""The paper's tables in small: every run starts alike, a stop loses nothing, and the table says what was
found."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load, load_model, save, save_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.presets import preset
from conceptmaster.engine.vae.wan_decoder import build_vae
from conceptmaster.errors import ConceptMasterError, InputError
from conceptmaster.examples.sprites.scoring.measures import MEASURES
from conceptmaster.examples.sprites.training import drawn, starting, train_model, variant_list, variants
from conceptmaster.examples.sprites.training.cli import add_variants_arguments

from ..small import small_config

SETTINGS = {
    "steps": 400,
    "batch_size": 32,
    "base_sha256": "0123456789abcdef",
    "base_concept": {"encoder": "qformer", "binding": "dam", "injection": "standalone"},
    "score_seeds": [0, 64],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The weights of a model that nothing initialises by chance, and an untrained VAE."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(77)
    model = ConceptMaster(small_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_model(model, folder / "model.safetensors")
    save(folder / "vae.safetensors", build_vae(small_config()).state_dict())
    return folder


@pytest.fixture(autouse=True)
def few_are_judged(monkeypatch):
    monkeypatch.setattr(drawn, "JUDGED", 8)


def arguments(base: Path, output: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_variants_arguments(parser)
    given = [
        "--base",
        str(base),
        "--output",
        str(output),
        "--device",
        "cpu",
        "--clips",
        "8",
        "--workers",
        "1",
    ]
    return parser.parse_args([*given, "--steps", "1", "--batch-size", "4", "--score-seeds", "0:3", *more])


def made_up(share: float, error: float | None = 0.03) -> dict:
    chance = dict.fromkeys(MEASURES, 0.125)
    errors = dict.fromkeys(MEASURES, error)
    return dict.fromkeys(MEASURES, share) | {"standard_errors": errors, "chance": chance}


def report(name: str, seed: int, different: float, same: float) -> dict:
    scores = {"different_nouns": made_up(different), "same_noun": made_up(same)}
    return {"variant": name, "seed": seed, "samples": 12800, "training_seconds": 100.0 + seed, **scores}


@pytest.fixture
def stubs(monkeypatch):
    """Export and score take no time; what was trained is counted. Returns the (folder's name, seed) pairs."""
    trained, whole = [], variants.train_model

    def counted(config, open_data, judge, output, options):
        trained.append((output.parent.name, options.seed))
        whole(config, open_data, judge, output, options)

    def bundle(source, output, overwrite):
        assert overwrite and isinstance(source.model, ConceptMaster)
        output.mkdir()

    def score(options, progress):
        assert (options.seeds, options.concepts, options.controls) == (range(3), 2, False)
        assert Path(options.bundle).is_dir()
        return made_up(0.25 if options.same_noun else 0.75), []

    monkeypatch.setattr(variants, "train_model", counted)
    monkeypatch.setattr(variants, "write_bundle", bundle)
    monkeypatch.setattr(variants, "score", score)
    return trained


def test_every_variant_differs_from_ours_in_one_field_and_can_be_built():
    ours = variant_list.OURS.config(small_config()).concept
    assert (ours.encoder, ours.binding, ours.injection) == ("qformer", "dam", "standalone")
    seen = set()
    for variant in variants.VARIANTS:
        concept = variant.config(small_config()).concept
        fields = [f.name for f in dataclasses.fields(concept)]
        other = [name for name in fields if getattr(concept, name) != getattr(ours, name)]
        assert len(other) == (variant is not variant_list.OURS), variant.name
        seen.add(concept)
    assert len(seen) == len({v.name for v in variants.VARIANTS}) == 7


def test_the_base_has_no_concept_tensors_and_every_variant_starts_from_it(base, tmp_path):
    whole, path = load_model(base / "model.safetensors"), tmp_path / "base.safetensors"
    variants.write_base(whole, path)
    kept = set(load(path)[0])
    for part in ("qformer.", "dam.", "injector.", "add_k_proj.", "concept_proj."):
        assert not any(part in name for name in kept)
    assert {name.partition(".")[0] for name in kept} == {"text_encoder", "image_encoder", "transformer"}
    own = whole.state_dict()
    new = {f"transformer.{name}" for name in whole.transformer.concept_keys()}
    plain = {n for n in own if n.startswith(("text_encoder.", "image_encoder.", "transformer."))} - new
    for variant in variants.VARIANTS:
        states = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            trainee = train_model.Trainee(variant.config(small_config()))
            starting.start_from(trainee.model, path)
            states.append(trainee.state_dict())
        first, again, other = states
        for name in plain:
            assert torch.equal(first[f"model.{name}"], own[name]), (variant.name, name)
            assert torch.equal(other[f"model.{name}"], own[name]), (variant.name, name)
        assert all(torch.equal(first[name], again[name]) for name in first)
        fresh = {name for name in first if name.removeprefix("model.") not in plain}
        drawn = {name for name in fresh if name.endswith("weight") and first[name].std() > 0}
        assert any(name.startswith("model.qformer.") for name in drawn)
        assert all(not torch.equal(first[name], other[name]) for name in drawn), variant.name


def test_a_variant_from_the_base_to_the_table(base, tmp_path, stubs, capsys):
    output = tmp_path / "out"
    assert variants.run(arguments(base, output, "--only", "no_qformer", "--seeds", "3")) == 0
    assert stubs == [("no_qformer-3", 3)]
    run = output / "no_qformer-3"
    found = json.loads((run / "score.json").read_text())
    assert (found["steps"], found["samples"], found["seed"]) == (1, 4, 3) and found["training_seconds"] > 0
    assert load_model(run / "weights" / "model.safetensors").config.concept.encoder == "mlp"
    assert not (run / "bundle").exists() and not (run / "model" / "training.safetensors").exists()
    table = (output / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| `no_qformer`: without Q-Former | 0.277 | 75.0 ± 3.0 | 25.0 ± 3.0 |" in table
    everything = json.loads((output / "variants.json").read_text())
    assert everything["variants"]["no_qformer"]["runs"] == [found]
    assert str(tmp_path) not in (output / "variants.json").read_text()


def test_a_finished_run_is_not_run_again_and_a_stopped_one_goes_on(base, tmp_path, stubs, monkeypatch):
    args = arguments(base, tmp_path, "--only", "ours", "merged", "--seeds", "0")
    (tmp_path / "merged-0").mkdir()
    (tmp_path / "merged-0" / "score.json").write_text(json.dumps(report("merged", 0, 0.5, 0.5)))
    with monkeypatch.context() as patch:
        patch.setattr(variants, "collect", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            variants.run(args)
    lines = (tmp_path / "ours-0" / "model" / "log.jsonl").read_text()
    assert variants.run(args) == variants.run(args) == 0
    assert stubs == [("ours-0", 0), ("ours-0", 0)]  # the second found its checkpoint and trained no more
    assert (tmp_path / "ours-0" / "model" / "log.jsonl").read_text() == lines
    assert "best first: ours 75.0; merged 50.0." in (tmp_path / "table.md").read_text()


def test_runs_go_seed_by_seed_and_another_budget_is_refused(base, tmp_path, monkeypatch):
    done = []

    def scored(variant, vae, seed, args, folder):
        done.append(folder.name)
        folder.mkdir()
        made = report(variant.name, seed, 0.5, 0.5)
        (folder / "score.json").write_text(json.dumps(made))

    monkeypatch.setattr(variants, "_train_and_score", scored)
    given = ["--only", "ours", "merged", "--seeds", "3", "0"]
    assert variants.run(arguments(base, tmp_path / "out", *given)) == 0
    assert done == ["merged-3", "ours-3", "merged-0", "ours-0"]
    everything = json.loads((tmp_path / "out" / "variants.json").read_text())
    assert [run["seed"] for run in everything["variants"]["ours"]["runs"]] == [0, 3]
    with pytest.raises(InputError, match="runs with steps 1, not 5: choose another --output"):
        variants.run(arguments(base, tmp_path / "out", "--steps", "5"))
    assert len(done) == 4


def test_a_run_that_fails_is_named(base, tmp_path, stubs, monkeypatch):
    def broken(*args, **options):
        raise ConceptMasterError("the gradient is not finite")

    monkeypatch.setattr(variants, "train_model", broken)
    with pytest.raises(ConceptMasterError, match="merged-0: the gradient is not finite"):
        variants.run(arguments(base, tmp_path, "--only", "merged"))


def test_the_table_has_means_spreads_and_the_papers_figures():
    found = {variant.name: [] for variant in variants.VARIANTS}
    found["ours"] = [report("ours", 0, 0.9, 0.8), report("ours", 1, 0.7, 0.7), report("ours", 2, 0.65, 0.6)]
    found["no_dam"] = [report("no_dam", 0, 0.4, 0.5)]
    lines = variants.render(found, SETTINGS).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    order = "merged shared_query ours no_qformer no_dam concat_mlp self_attention ours".split()
    assert [row.split("`")[1] for row in rows] == order
    paper = ["0.367", "0.402", "0.623", "0.277", "0.394", "0.546", "0.581", "0.623"]
    assert [row.split(" | ")[1] for row in rows] == paper
    assert rows[2] == rows[7]
    measures = "75.0 ± 12.5 | 70.0 ± 10.0 | " + " | ".join(["75.0 ± 12.5"] * 4)
    assert rows[2].endswith(f"| 0.623 | {measures} | 3 | 12,800 | 101 |")
    measures = "40.0 ± 3.0 | 50.0 ± 3.0 | " + " | ".join(["40.0 ± 3.0"] * 4)
    assert rows[4].endswith(f"| 0.394 | {measures} | 1 | 12,800 | 100 |")
    assert rows[0].endswith("| 0.367 | – | – | – | – | – | – | 0 | – | – |")
    assert {line.count("|") for line in lines if line.startswith("|")} == {12}
    assert "400 steps of 32 clips (12,800 samples)" in lines[-5] and "0123456789ab…" in lines[-5]
    assert "grew up with qformer, dam, standalone, which" in lines[-5]
    assert lines[-3] == "By identity, best first: ours 75.0; no_dam 40.0."
    assert lines[-1] == "In the paper, by DINO-I: ours 0.623; no_dam 0.394."


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--threads", "0"], "threads must be a positive integer"),
        (["--clips", "0"], "--clips must be at least 1"),
        (["--lr", "nan"], "--lr must lie between 0 and 1"),
        (["--seeds", "1", "1"], "--seeds must be different"),
        (["--score-seeds", "5:5"], "0 <= A < B"),
    ],
)
def test_wrong_arguments_are_named(more, words, base, tmp_path):
    with pytest.raises(InputError, match=words):
        variants.run(arguments(base, tmp_path, *more))


def test_a_base_of_another_world_is_refused(tmp_path):
    def refused(words):
        with pytest.raises(InputError, match=f"cannot start from .*{words}"):
            variants.run(arguments(tmp_path, tmp_path / "out"))

    refused("no weights file")
    save_model(ConceptMaster(preset("tiny")), tmp_path / "model.safetensors")
    refused("its VAE is not of blocks")
    save_model(ConceptMaster(small_config()), tmp_path / "model.safetensors")
    refused("no weights file")
    assert not (tmp_path / "out").exists()
