from __future__ import annotations

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conceptmaster.engine.checkpoints.adapter import adapter_keys, load_adapter, read_adapter, save_adapter  # noqa: E402
from conceptmaster.engine.checkpoints.safetensors_io import load, save  # noqa: E402
from conceptmaster.engine.concept_config import INJECTIONS  # noqa: E402
from conceptmaster.engine.model import ConceptMaster  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402


@pytest.mark.parametrize("injection", INJECTIONS)
def test_an_adapter_goes_from_one_model_to_another(tiny, randomise, request_for, tmp_path, injection):
    config = tiny(injection=injection)
    trained, other = (randomise(ConceptMaster(config), seed) for seed in (0, 1))
    save_adapter(trained, tmp_path / "adapter.safetensors")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    load_adapter(other, tmp_path / "adapter.safetensors")
    keys = adapter_keys(other)
    assert {key.partition(".")[0] for key in keys} == {"qformer", "dam", "transformer"}
    for name, value in other.state_dict().items():
        assert torch.equal(value, (trained.state_dict() if name in keys else before)[name]), name
    adapter = read_adapter(tmp_path / "adapter.safetensors")
    assert adapter.concept == config.concept and set(adapter.tensors) == keys


@torch.no_grad()
@pytest.mark.parametrize("injection", ["standalone", "shared_query"])
def test_any_adapter_is_silent_without_a_concept(tiny, randomise, request_for, tmp_path, injection):
    config = tiny(injection=injection)
    base = randomise(ConceptMaster(config), 1)
    fresh = ConceptMaster(config)
    load_adapter(base, _saved(fresh, tmp_path / "fresh.safetensors"))
    request = request_for(config)
    seen, unseen = request["concept_mask"], torch.zeros_like(request["concept_mask"])
    without = base.velocity(**request | {"concept_mask": unseen})
    assert torch.equal(base.velocity(**request), without)  # untrained: silent with concepts, too
    load_adapter(base, _saved(randomise(ConceptMaster(config), 2), tmp_path / "trained.safetensors"))
    assert torch.equal(base.velocity(**request | {"concept_mask": unseen}), without)
    assert not torch.allclose(base.velocity(**request | {"concept_mask": seen}), without, atol=1e-3)


@torch.no_grad()
def test_an_adapter_of_two_experts_has_both(tiny, randomise, tmp_path):
    one, two = tiny(), dataclasses.replace(tiny(), boundary=0.9)
    trained, other = (randomise(ConceptMaster(two), seed) for seed in (0, 1))
    path = _saved(trained, tmp_path / "two.safetensors")
    load_adapter(other, path)
    keys = adapter_keys(other)
    for expert in ("transformer", "transformer_2"):
        assert {key for key in keys if key.startswith(f"{expert}.")} == {
            f"{expert}.{key}" for key in trained.transformer.concept_keys()
        }
    assert all(torch.equal(other.state_dict()[key], trained.state_dict()[key]) for key in keys)
    single = _saved(randomise(ConceptMaster(one)), tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match="has no modules for transformer_2: an adapter has them for each"):
        load_adapter(other, single)
    with pytest.raises(WeightsError, match="has modules for transformer_2, which the base does not have"):
        load_adapter(ConceptMaster(one), path)


def _saved(model, path):
    save_adapter(model, path)
    return path


def test_an_adapter_for_another_base_is_refused(tiny, tmp_path):
    path = _saved(ConceptMaster(tiny()), tmp_path / "adapter.safetensors")
    for changes, message in (
        ({"num_attention_heads": 4}, "for another base than tiny: its width is 24, not 48, its heads is 2"),
        ({"num_layers": 3}, "its layers is 2, not 3"),
        ({"queries": 3}, "other concept modules than the model: its queries is 2, not 3"),
    ):
        model = ConceptMaster(tiny(**changes))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(WeightsError, match=message) as error:
            load_adapter(model, path)
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(WeightsError, match="it takes no concepts"):
        save_adapter(ConceptMaster(tiny(injection="none", image_encoder={})), tmp_path / "none.safetensors")


def test_files_that_are_no_adapter(tiny, tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = ConceptMaster(tiny())
    save_adapter(model, path)
    tensors, metadata = load(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    for changes, message in (
        ({"format": "pt"}, "is no adapter: its format is 'pt'"),
        ({"concept": "{"}, "unusable metadata"),
        ({"concept": "{}", "base": "[]"}, "no object 'base'"),
        ({"concept": '{"magic": 1}'}, "unusable metadata.*magic"),
        ({"concept": '{"queries": 0}'}, "queries must be a positive"),
        ({"concept": '{"injection": "none"}'}, "injection is not 'none'"),
        ({"base": json.dumps({"width": 24})}, "unusable metadata"),
    ):
        save(path, tensors, metadata | changes)
        with pytest.raises(WeightsError, match=message):
            load_adapter(model, path)
    name = next(name for name in tensors if name.startswith("dam."))
    save(
        path,
        {key: value for key, value in tensors.items() if key != name} | {"more": torch.ones(1)},
        metadata,
    )
    with pytest.raises(WeightsError, match=f"1 missing: {name}; 1 unexpected: more"):
        load_adapter(model, path)
    torch.save(tensors, tmp_path / "adapter.bin")
    with pytest.raises(WeightsError, match="adapter.bin is a pickle"):
        load_adapter(model, tmp_path / "adapter.bin")
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "nothing.safetensors")
