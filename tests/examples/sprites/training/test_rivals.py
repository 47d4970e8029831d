"""Other systems' concept parts in training: what they start from, what they are told, what moves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conceptmaster.engine.checkpoints.adapter import adapter_keys
from conceptmaster.engine.checkpoints.safetensors_io import load, load_model, save, save_model
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.rivals import SYSTEMS, like
from conceptmaster.errors import InputError
from conceptmaster.examples.sprites.training import batches, train_model

from ..small import small_config, train_small


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The weights of a model without its concept path, none of them zero."""
    torch.manual_seed(5)
    model = ConceptMaster(small_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    own = adapter_keys(model)
    save(path, {name: value for name, value in model.state_dict().items() if name not in own})
    return path


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_trains_from_a_base(system, base, pool, tmp_path):
    config = like(small_config(), system)
    how = {"steps": 2, "start": base, "bare": True, "freeze": ("text_encoder", "image_encoder")}
    train_small(pool, tmp_path, config=config, **how)
    model = load_model(tmp_path / "model.safetensors")
    assert model.config.concept == config.concept
    start, record = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert all("add" in n or n.startswith("qformer.") for n in start["fresh"])
    assert all(np.isfinite(v) for v in record.values()) and "layout" not in record
    assert ("selection" in record) == (system == "ssr-encoder")
    before, _ = load(base)
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before.get(name, value))
    }
    assert not any(name.startswith(("text_encoder.", "image_encoder.")) for name in moved)
    for n, block in enumerate(model.transformer.blocks):  # they started there, and have moved a little
        key = f"transformer.blocks.{n}.attn2.to_v.weight"
        added, text = block.attn2.add_v_proj.weight, before[key]
        alike = torch.cosine_similarity(added.flatten(), text.flatten(), dim=0)
        assert 0.9 < float(alike.detach()) and not torch.equal(added, text)


def test_heads_ask_what_has_tokens_of_its_own(pool, tmp_path):
    train_small(pool, tmp_path, config=like(small_config(), "ms-diffusion"), steps=1)
    (record,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert {"layout", "story", "portrait"} <= set(record)


def test_what_needs_heads_is_refused_without_them(pool, tmp_path):
    for how in ({"bare": True}, {"config": like(small_config(), "ip-adapter")}):
        with pytest.raises(InputError, match="learned with heads"):
            train_small(pool, tmp_path, steps=1, picture_steps=1, **how)


def test_pictures_and_labels_of_a_dropped_concept_are_not_in_the_loss(pool):
    trainee = train_model.Trainee(like(small_config(), "ip-adapter"))
    batch = pool.batch(np.random.default_rng(3), 8, batches.Dropped(concepts=1.0))
    assert not batch.concept_mask.any()
    sigma, noise = torch.full((8,), 0.5), torch.randn_like(batch.latents)
    with torch.no_grad():
        found = trainee(batch, noise, sigma, sigma)["flow"]
        batch.pixels = batch.pixels + 1.0
        assert torch.equal(found, trainee(batch, noise, sigma, sigma)["flow"])


def test_a_box_is_around_what_is_covered_in_the_frames_that_show_it():
    coverage = torch.zeros(1, 3, 4, 8, 10)
    coverage[0, 0, 0, 2:4, 5:8] = 0.3
    coverage[0, 0, 2, 4:6, 7:10] = 1.0
    coverage[0, 1, 3, 0, 0] = 0.01
    boxes = batches.boxes_of(coverage)
    assert boxes[0, 0].tolist() == pytest.approx([0.6, 3 / 8, 0.9, 5 / 8])
    assert boxes[0, 1].tolist() == pytest.approx([0.0, 0.0, 0.1, 1 / 8])
    assert boxes[0, 2].tolist() == [0.0] * 4


def test_grounding_is_dropped_and_changes_nothing_else_of_a_batch(pool):
    usual = pool.batch(np.random.default_rng(0), 64, batches.Dropped())
    dropped = pool.batch(np.random.default_rng(0), 64, batches.Dropped(grounding=0.3))
    assert all(
        torch.equal(getattr(usual, name).nan_to_num(), getattr(dropped, name).nan_to_num())
        for name in vars(usual)
        if name != "box"
    )
    filled = usual.label_mask.any(-1)
    assert torch.equal(usual.box, batches.boxes_of(usual.coverage))
    gone = ~dropped.box.any(-1)
    assert torch.equal(dropped.box[~gone], usual.box[~gone])
    assert float(gone[filled].float().mean()) == pytest.approx(0.3, abs=0.15)


def test_whatever_ends_the_weights_of_a_trained_system_are_kept(base, pool, tmp_path):
    """Keys that have been trained do not start as the text's again."""
    config = like(small_config(), "ms-diffusion")
    torch.manual_seed(1)
    trained = ConceptMaster(config)
    with torch.no_grad():
        trained.transformer.blocks[0].attn2.add_k_proj.weight.fill_(0.25)
    save_model(trained, tmp_path / "model.safetensors")
    other = ConceptMaster(config)
    assert train_model.start_from(other, tmp_path / "model.safetensors") == []
    assert torch.equal(
        other.transformer.blocks[0].attn2.add_k_proj.weight,
        trained.transformer.blocks[0].attn2.add_k_proj.weight,
    )
