"""The paper's tables in small: what is fair about them, and that a stop loses nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conceptmaster.engine.checkpoints.adapter import adapter_keys
from conceptmaster.engine.checkpoints.safetensors_io import load, load_strict, save
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.cli import main
from conceptmaster.examples.sprites.paper import command, report, rows, sampling, tuned, unit
from conceptmaster.examples.sprites.paper.boxes import seen_tokens, told_boxes
from conceptmaster.examples.sprites.paper.judging import judge, request_scene
from conceptmaster.examples.sprites.paper.pool import ClipPool, clips_of, draw
from conceptmaster.examples.sprites.paper.setting import paper_config, pixel_weights, row_config
from conceptmaster.examples.sprites.paper.trainee import Trainee
from conceptmaster.examples.sprites.training.train_vae import new_vae
from conceptmaster.examples.sprites.training.tuning_options import TuneOptions
from conceptmaster.examples.sprites.world.draw import draw_clip
from conceptmaster.examples.sprites.world.scenes import SIZE

ROOT = Path(__file__).resolve().parents[4]
RESULTS = ROOT / "benchmarks" / "results" / "paper_tables.json"
BUDGET = unit.Budget(steps=2, batch=2, requests=1)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A base by chance, in which nothing is silent."""
    torch.manual_seed(5)
    model = ConceptMaster(paper_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    own = adapter_keys(model)
    base = {name: value for name, value in model.state_dict().items() if name not in own}
    vae = new_vae(paper_config().vae).eval()
    return unit.Ground(base, vae, ClipPool(tmp_path_factory.mktemp("pool"), paper_config(), vae, clips=4))


@pytest.fixture(autouse=True)
def few_are_watched(monkeypatch):
    monkeypatch.setattr(unit, "WATCHED", 2)


def row_trainee(ground, name, seed=0):
    return Trainee(row_config(rows.row_of(name)), ground.base, pixel_weights(ground.vae), seed)


def test_rows_that_are_compared_bring_as_many_tokens():
    fair = [row_config(row).concept for row in rows.ROWS if {2, 3} & set(row.tables)]
    assert {concept.tokens_per_concept for concept in fair} == {16}
    assert len({dataclasses.astuple(row_config(row).concept) for row in rows.ROWS if not row.tuned}) == len(
        [row for row in rows.ROWS if not row.tuned]
    )


def test_every_row_of_tables_2_and_3_differs_from_ours_in_one_field():
    ours = paper_config().concept
    for row in rows.ROWS:
        if row is not rows.OURS and {2, 3} & set(row.tables):
            concept = row_config(row).concept
            fields = [f.name for f in dataclasses.fields(concept)]
            assert sum(getattr(concept, name) != getattr(ours, name) for name in fields) == 1, row.name


def test_self_attention_has_the_feed_forward_of_dam(ground):
    dam, other = (row_trainee(ground, name).model.dam for name in ("ours", "self_attention"))
    assert [p.shape for p in dam.ffn.parameters()] == [p.shape for p in other.ffn.parameters()]


@pytest.mark.parametrize("row", [row for row in rows.ROWS if not row.tuned], ids=lambda row: row.name)
def test_a_row_trains_its_own_modules_and_no_bit_of_the_base(ground, row):
    trainee = row_trainee(ground, row.name)
    model, own = trainee.model, adapter_keys(trainee.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clips = ground.pool.batch([0, 1, 2])
    for _ in range(2):  # a silent start passes a gradient on from the second step
        optimizer.zero_grad()
        trainee.loss(clips, torch.ones_like(clips.latents), torch.full((3,), 0.8)).backward()
        optimizer.step()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    after = model.state_dict()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (name not in own) or name in own, name
    for name, value in ground.base.items():
        assert torch.equal(after[name], value), name
    moved = {name.split(".")[0] for name in own if not torch.equal(after[name], before[name])}
    assert moved == {name.split(".")[0] for name in own}


def test_a_unit_that_is_stopped_goes_on_to_the_same_weights(ground, tmp_path, monkeypatch):
    whole = unit.run_unit(rows.OURS, 0, ground, BUDGET, tmp_path / "whole")
    batch, met = ground.pool.batch, []

    def stopped(numbers):
        met.append(list(numbers))
        if len(met) == 1:
            signal.raise_signal(signal.SIGINT)
        return batch(numbers)

    monkeypatch.setattr(ground.pool, "batch", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            unit.run_unit(rows.OURS, 0, ground, BUDGET, tmp_path / "parts")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(met) == 1 and not (tmp_path / "parts" / "result.json").exists()
    again = unit.run_unit(rows.OURS, 0, ground, BUDGET, tmp_path / "parts")
    assert len(met) == 2  # only the step that was left
    first, second = (load(tmp_path / name / "adapter.safetensors")[0] for name in ("whole", "parts"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert again["requests"] == whole["requests"]
    monkeypatch.setattr(unit, "draw", None)  # and one that is done is only read
    assert unit.run_unit(rows.OURS, 0, ground, BUDGET, tmp_path / "parts") == again


def test_without_concepts_every_row_makes_the_same_video_from_the_same_noise(ground):
    scenes = [request_scene(3)]
    asked = clips_of(draw(scenes, paper_config(), ground.vae), paper_config()).without_concepts()
    made = [
        sampling.sample(row_trainee(ground, name, seed), asked, ground.pool.no_caption, [3])
        for name, seed in (("ours", 0), ("merged", 1), ("ip_adapter", 2))
    ]
    assert made[0].std() > 0
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], rtol=2e-2, atol=2e-2)  # bfloat16, in another order


def test_a_pool_that_was_stopped_is_the_same_pool(ground, tmp_path, monkeypatch):
    from conceptmaster.examples.sprites.paper import pool

    monkeypatch.setattr(pool, "PART", 2)
    drawn, parts = pool.draw, []

    def stopped(scenes, *about):
        parts.append(len(scenes))
        if len(parts) == 2:
            raise KeyboardInterrupt
        return drawn(scenes, *about)

    monkeypatch.setattr(pool, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        ClipPool(tmp_path, paper_config(), ground.vae, clips=4)
    again = ClipPool(tmp_path, paper_config(), ground.vae, clips=4)
    assert parts == [2, 2, 2]
    monkeypatch.setattr(pool, "draw", drawn)
    at_once = ClipPool(tmp_path / "other", paper_config(), ground.vae, clips=4)
    for name, value in vars(again.batch(range(4))).items():
        assert torch.equal(value, getattr(at_once.batch(range(4)), name)), name
    order = at_once.order(1, steps=4, size=2)
    assert sorted(order[:2].ravel()) == sorted(order[2:].ravel()) == [0, 1, 2, 3]
    assert (order != at_once.order(2, steps=4, size=2)).any()


def test_the_judge_finds_true_videos_right_and_others_at_chance():
    scenes = [request_scene(seed) for seed in range(4)]
    true = [draw_clip(scene)[0] for scene in scenes]
    right, wrong = judge(scenes, true), judge(scenes, [*true[2:], *true[:2]])
    assert min(right["pair_binding"] + right["identity"]) == 1 and np.mean(right["margin"]) > 0.8
    assert np.mean(wrong["margin"]) < 0.4 and np.mean(wrong["pair_binding"]) < 1
    labels = [sorted(actor.noun for actor in scene.actors) for scene in scenes]
    assert [first == second for first, second in labels] == [False, True] * 2


def test_boxes_say_what_the_caption_says():
    scene = request_scene(4)
    config = paper_config()
    clips = clips_of(draw([scene], config, new_vae(config.vae)), config)
    boxes = told_boxes(clips.path)  # [1,N,F,4]
    shaken = told_boxes(clips.path + 1.4 - 0.7 * torch.arange(2).float())
    moved = clips.path[0, 0] / SIZE
    inside = (boxes[0, 0, :, :2] < moved) & (moved < boxes[0, 0, :, 2:])
    assert inside.all()
    start = clips.path[:, :2, :1]
    near = ((start - SIZE / 2) / 20 - ((start - SIZE / 2) / 20).round()).abs() * 20 < 0.1
    assert torch.equal(shaken[:, :2], boxes[:, :2]) or not near.all()
    drawn = seen_tokens(boxes, config)
    assert drawn.shape == (1, 80, 3) and 0 < drawn[0, :, 0].float().mean() < 0.8


def made_up(name, seed, mean, requests=40, spread=0.05):
    rng = np.random.default_rng([seed, len(name)])
    values = {m: list(rng.normal(mean, spread, requests)) for m in report.MEASURES}
    return {
        "row": name,
        "seed": seed,
        "training_seconds": 100,
        "seconds_per_request": 0.5,
        "requests": unit.written(values),
    }


def test_tables_say_what_was_run_and_mark_what_separates():
    found = {row.name: [] for row in rows.ROWS}
    assert report.tables(found).count("not run") == sum(len(row.tables) for row in rows.ROWS)
    for seed in range(3):
        found["ours"].append(made_up("ours", seed, 0.5))
        found["merged"].append(made_up("merged", seed, 0.1))
        found["shared_query"].append(made_up("shared_query", seed, 0.5, spread=0.3))
        alternating = [1.0, 0.25] * 20  # request 0 is of two nouns, 1 of one
        found["merged"][seed]["requests"] |= unit.written({"pair_binding": alternating})
        found["ms_diffusion"].append(made_up("ms_diffusion", seed, 0.7))
        found["ours_boxes"].append(made_up("ours_boxes", seed, 0.9))
    first, table = report.tables(found).split("**Table ")[1:3]
    assert "\n`ours_boxes` less `ms_diffusion`: **+" in first and " less `" not in table
    lines = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert "| **+4" in lines["merged"] or "| **+3" in lines["merged"]
    assert "**" not in lines["shared_query"] and "**" not in lines["ours"]
    assert "| 0.367 |" in lines["merged"] and "| 3 | 100 | 0.50 |" in lines["merged"]
    assert "| 100.0 | 25.0 |" in lines["merged"]
    assert "Kendall's tau with the paper's v1, 3 rows" in table


def test_a_curve_is_of_what_every_unit_was_watched_at():
    """A unit that was stopped has been watched there, too."""

    def points(*watched):
        return {"curve": [{"samples": n, "with": 0.5, "swapped": gap} for n, gap in watched]}

    found = {row.name: [] for row in rows.ROWS}
    found["ours"] = [points((64, 0.6), (128, 0.7)), points((32, 0.9), (64, 0.8), (128, 0.8))]
    found["merged"] = [points((64, 0.5), (128, 0.5))]
    found["dreambooth"] = [{}]
    assert report.curves(found).splitlines() == [
        "|  | 64 | 128 |",
        "| --- | --- | --- |",
        "| `merged` | 0.0 | 0.0 |",
        "| `ours` | -200.0 | -250.0 |",
    ]


@pytest.mark.parametrize("name", ["custom_diffusion", "dreambooth"])
def test_a_tuned_row_tunes_each_request_once_and_leaves_the_base(ground, tmp_path, monkeypatch, name):
    before = {name: value.clone() for name, value in ground.base.items()}
    monkeypatch.setattr(tuned, "REQUESTS", 2)
    few = {"steps": 2, "views": 2, "prior": 2, "lr": 0.05}
    monkeypatch.setattr(tuned, "TuneOptions", lambda seed: TuneOptions(seed=seed, **few))
    kept, judged = [], tuned.judge

    def stopped(scenes, videos):
        kept.append(videos)
        if len(kept) == 2:
            raise KeyboardInterrupt
        return judged(scenes, videos)

    monkeypatch.setattr(tuned, "judge", stopped)
    row, budget = rows.row_of(name), dataclasses.replace(BUDGET, requests=5)
    with pytest.raises(KeyboardInterrupt):
        tuned.run_tuned(row, 0, ground, budget, tmp_path)
    found = tuned.run_tuned(row, 0, ground, budget, tmp_path)
    assert len(kept) == 3 and (kept[1] == kept[2]).all()  # the first request was not made again
    assert len(unit.read(found["requests"]["margin"])) == 2 and found["seconds_per_request"] > 0
    assert all(torch.equal(value, ground.base[name]) for name, value in before.items())
    trainee = Trainee(paper_config(), ground.base, torch.ones(1), 0)
    asked = clips_of(draw([request_scene(0)], paper_config(), ground.vae), paper_config()).without_concepts()
    untuned = sampling.sample(trainee, asked, ground.pool.no_caption, [0])
    assert (kept[0] != sampling.frames(untuned, ground.vae, paper_config())).any()


def test_the_command_from_base_to_tables(ground, tmp_path, monkeypatch, capsys):
    base, output = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save(base / "model.safetensors", {name: value.bfloat16() for name, value in ground.base.items()})
    save(base / "vae.safetensors", ground.vae.state_dict())
    monkeypatch.setattr(command, "Budget", lambda steps, requests: unit.Budget(steps, 2, requests=requests))
    asked = ["paper", "--base", str(base), "--output", str(output), "--clips", "4", "--requests", "2"]
    sheet = tmp_path / "rows.png"
    assert main([*asked, "--steps", "1", "--only", "no_dam", "--seeds", "1", "--sheet", str(sheet)]) == 0
    pixels = np.asarray(Image.open(sheet))  # pictures, truth, base, the row
    tiles = [pixels[48:144, left : left + 96] for left in (224, 344, 464)]
    assert pixels.shape[1] == 580 and all(tile.std() > 5 for tile in tiles)
    assert (tiles[1] != tiles[2]).any()
    written = json.loads((output / "paper_tables.json").read_text())
    assert [u["seed"] for u in written["rows"]["no_dam"]] == [1] and written["rows"]["ours"] == []
    assert not (output / "no_dam-1" / "training.safetensors").exists()
    shutil.copytree(output / "no_dam-1", output / "no_dam-1-mine")  # no unit
    assert [u["seed"] for u in report.finished(output)["no_dam"]] == [1]
    assert "`no_dam`: without DAM" in capsys.readouterr().out
    with pytest.raises(InputError, match="has units with steps 1, not 2"):
        command.run(_parsed([*asked, "--steps", "2"]))
    with pytest.raises(InputError, match="has units with steps 1, not 512; clips 4, not 128"):
        command.run(_parsed([*asked, "--clips", "128"]))  # a pool of another size stays as it is
    assert np.load(output / "pool" / "count.npy").shape == (4,)
    shutil.rmtree(output / "pool")
    assert main([*asked, "--steps", "1", "--only", "no_dam", "--seeds", "1"]) == 0
    assert not (output / "pool").exists()  # nothing was left to train: nothing is drawn
    settings = (output / "settings.json").read_text()
    for content in ("[]", "null", "{"):
        (output / "settings.json").write_text(content)
        with pytest.raises(InputError, match=r"settings.json is damaged, .*: choose another --output"):
            command.run(_parsed([*asked, "--steps", "1"]))
    (output / "settings.json").write_text(settings)
    for name in ("pool", "ours-0"):
        (tmp_path / f"with-{name}").mkdir()
        (tmp_path / f"with-{name}" / name).write_text("mine")
        with pytest.raises(InputError, match=f"{name} is no folder: choose another --output"):
            command.run(_parsed([*asked, "--output", str(tmp_path / f"with-{name}")]))
        assert [path.name for path in (tmp_path / f"with-{name}").iterdir()] == [name]
    wrong = tmp_path / "wrong"
    document = tmp_path / "some.md"
    document.write_text("<!-- tables -->\nwhat else there is")
    for options, told in (
        (["--seeds", "1", "1"], "--seeds must be different"),
        (["--seeds", str(2**64)], "--seeds must be different"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--requests", "0"], "--requests must be at least 1"),
        (["--clips", "-1"], "--clips must be at least 1"),
        (["--document", str(tmp_path / "none.md")], "there is no document"),
        (["--document", str(document)], "must have the lines"),
        (["--sheet", str(tmp_path / "x.jpg")], "must end in .png"),
        (["--sheet", str(sheet), "--only", "dreambooth"], "--only has tuned ones alone"),
        (["--results", str(tmp_path / "none" / "x.json")], "does not exist"),
        (["--base", str(tmp_path)], "cannot start from"),
        (["--output", str(document)], "cannot make the folder"),
    ):
        with pytest.raises(InputError, match=told):
            command.run(_parsed([*asked, "--output", str(wrong), *options]))
    save(base / "model.safetensors", {"transformer.scale": torch.ones(1)})
    with pytest.raises(InputError, match="cannot start from"):
        command.run(_parsed([*asked, "--output", str(wrong)]))
    assert not wrong.exists() and document.read_text() == "<!-- tables -->\nwhat else there is"


def test_the_document_says_what_the_results_say():
    found = json.loads(RESULTS.read_text("utf-8"))
    document = (ROOT / "docs" / "paper.md").read_text("utf-8")
    assert report.filled(document, found["rows"]) == document
    base = command.sha256_file(ROOT / "examples" / "sprites" / "paper-base" / "model.safetensors")
    assert found["settings"]["base_sha256"] == base


def _parsed(argv):
    import argparse

    from conceptmaster.examples.sprites.paper.cli import add_paper_arguments

    parser = argparse.ArgumentParser()
    add_paper_arguments(parser)
    return parser.parse_args(argv[1:])


def test_the_base_that_is_shipped_is_what_rows_stand_on():
    from conceptmaster.examples.sprites.paper.cli import BASE

    tensors = load(BASE / "model.safetensors")[0]
    model = ConceptMaster(paper_config())
    own = adapter_keys(model)
    load_strict(model, {**tensors, **{n: v for n, v in model.state_dict().items() if n in own}})
    assert all(value.dtype == torch.bfloat16 for value in tensors.values())
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 10_000_000


def test_the_base_as_weights_is_what_tuning_starts_from(tmp_path, capsys):
    from conceptmaster.examples.sprites.paper.cli import BASE
    from conceptmaster.examples.sprites.training.tuning import open_base

    output = tmp_path / "base"
    assert main(["paper-weights", "--output", str(output)]) == 0
    own, found = load(BASE / "model.safetensors")[0], open_base(output)
    state = found.model.state_dict()
    for name in own.keys() & state.keys():
        assert torch.equal(state[name], own[name].half().float()), name
    assert len(own.keys() & state.keys()) > 100
    assert found.model.config == paper_config(injection="none")
    for name, value in load(BASE / "vae.safetensors")[0].items():
        torch.testing.assert_close(found.vae.state_dict()[name].half(), value.half())
    (output / "tokenizer.json").write_text("mine")
    assert main(["paper-weights", "--output", str(output)]) == 2  # and nothing is lost
    assert (output / "tokenizer.json").read_text() == "mine"
    assert main(["paper-base", "--weights", str(output), "--output", str(tmp_path / "new")]) == 2
    assert f"cannot start from {output}: the weights do not fit ImageEncoder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    before = (output / "model.safetensors").read_bytes()
    assert main(["paper-base", "--output", str(output)]) == 2
    assert "is there, and not of this command" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"seed": 0}', '{"seed": 0, "requests": {"margin": "x"}}', '{"seed": 0, "requests": 1}'],
)
def test_a_damaged_result_is_told_of(tmp_path, content):
    folder = tmp_path / "ours-0"
    folder.mkdir()
    (folder / "result.json").write_text(content)
    with pytest.raises(InputError, match=r"ours-0/result\.json is damaged, .*: delete it"):
        report.finished(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda unit: unit["curve"][0].pop("swapped"),
        lambda unit: unit["curve"][0].update({"with": "much"}),
        lambda unit: unit.update(curve=3),
        lambda unit: unit.update(seed="0"),
        lambda unit: unit.update(seconds_per_request=None),
        lambda unit: unit["requests"].update(margin="1 2 3"),
    ],
)
def test_a_result_spoiled_in_one_place_is_told_of(tmp_path, spoil):
    one = json.loads(RESULTS.read_text("utf-8"))["rows"]["ours"][0]
    folder = tmp_path / "ours-0"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(one))
    assert report.finished(tmp_path)["ours"] == [one]
    spoil(one)
    (folder / "result.json").write_text(json.dumps(one))
    with pytest.raises(InputError, match=r"ours-0/result\.json is damaged, .*: delete it"):
        report.finished(tmp_path)
