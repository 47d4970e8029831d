from __future__ import annotations

import hashlib
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conceptmaster.engine.checkpoints.safetensors_io import (  # noqa: E402
    load,
    load_model,
    load_strict,
    save,
    save_model,
)
from conceptmaster.engine.model import ConceptMaster  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402
from conceptmaster.hashed import sha256_file  # noqa: E402


def test_a_model_comes_back_as_it_was(tiny, randomise, request_for, tmp_path):
    config = tiny(injection="shared_query", frames=9)
    model = randomise(ConceptMaster(config))
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    assert again.config == config and not again.training
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    request = request_for(config)
    with torch.no_grad():
        assert torch.equal(again.velocity(**request), model.velocity(**request))


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "a.safetensors"
    weight = torch.randn(3, 4)
    state = {"b": torch.arange(3, dtype=torch.int64), "w": weight, "tied": weight, "view": weight.T}
    save(path, state, {"format": "test"})
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    tensors, metadata = load(path)
    assert metadata == {"format": "test"}
    assert set(tensors) == {"b", "w", "view"}
    assert torch.equal(tensors["view"], weight.T) and tensors["b"].dtype == torch.int64


def test_saving_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save(path, {"w": torch.zeros(2)}, {"format": 1})  # metadata must be text
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_are_not_what_they_should_be(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load(path)
    save(path, {"w": torch.ones(2)})
    with pytest.raises(WeightsError, match="not written by save_model"):
        load_model(path)
    save(path, {"w": torch.ones(2)}, {"config": "{"})
    with pytest.raises(WeightsError, match="unusable model configuration"):
        load_model(path)
    save(path, {"w": torch.ones(2)}, {"config": json.dumps(tiny().to_dict())})
    with pytest.raises(WeightsError, match="unexpected: w"):
        load_model(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load(path)


def test_one_error_lists_everything():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {**before, "0.weight": torch.zeros(3, 3), "2.weight": torch.zeros(1)}
    del state["1.bias"], state["0.bias"]
    with pytest.raises(WeightsError) as error:
        load_strict(module, state)
    assert "2 missing: 0.bias; 1.bias" in str(error.value)
    assert "1 unexpected: 2.weight" in str(error.value)
    assert "1 mis-shaped: 0.weight is (3, 3), expected (3, 2)" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    load_strict(module, before)


def test_tied_weights_need_one_name(tiny):
    model = ConceptMaster(tiny())
    state = model.state_dict()
    load_strict(model, state)
    tied = "text_encoder.model.encoder.embed_tokens.weight"
    assert tied in state
    load_strict(model, {name: value for name, value in state.items() if name != tied})
