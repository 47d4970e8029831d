"""Weights on disk against the same weights in memory."""

from __future__ import annotations

import weakref

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conceptmaster.engine.checkpoints import lazy_weights  # noqa: E402
from conceptmaster.engine.checkpoints.lazy_weights import faked, settle, stored_weights, stream  # noqa: E402
from conceptmaster.engine.checkpoints.lora import merge_lora  # noqa: E402
from conceptmaster.engine.checkpoints.safetensors_io import save  # noqa: E402
from conceptmaster.engine.checkpoints.weight_files import stored_tensors  # noqa: E402
from conceptmaster.engine.model import ConceptMaster  # noqa: E402
from conceptmaster.errors import WeightsError  # noqa: E402


@pytest.fixture(autouse=True)
def threshold(monkeypatch):
    monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", 64)


@pytest.fixture
def memory(tiny, randomise):
    return randomise(ConceptMaster(tiny())).eval()


@pytest.fixture
def disk(memory, tmp_path):
    """`memory` with its large weights in tmp_path/"part"; tied ones there once."""
    part = tmp_path / "part"
    part.mkdir()
    save(part / "model.safetensors", memory.state_dict())
    return streaming(memory.config, part)


def streaming(config, part):
    with torch.device("meta"):
        model = ConceptMaster(config)
    stream(model, stored_tensors(part))
    return model.eval()


def inputs(config):
    g = torch.Generator().manual_seed(0)
    c = config.concept
    return (
        torch.randn(2, *config.latent_shape, generator=g),
        torch.tensor([300.0, 800.0]),
        torch.randint(2, 512, (2, config.text_tokens), generator=g),
        torch.ones(2, config.text_tokens, dtype=torch.bool),
        torch.randn(2, c.max_concepts, 3, c.picture_size, c.picture_size, generator=g),
        torch.randint(2, 512, (2, c.max_concepts, c.label_tokens), generator=g),
        torch.ones(2, c.max_concepts, c.label_tokens, dtype=torch.bool),
        torch.tensor([[True, False, True], [True, True, True]]),
    )


@torch.no_grad()
def test_a_model_on_disk_computes_what_it_does_in_memory_and_keeps_nothing(memory, disk):
    names = set(stored_weights(disk))
    assert {name for name, p in disk.named_parameters(remove_duplicate=False) if p.is_meta} == names
    assert len(names) > 50 and "transformer.blocks.0.ffn.net.2.weight" in names
    values = inputs(memory.config)
    assert disk.velocity(*values).equal(memory.velocity(*values))
    assert all(parameter.is_meta == (name in names) for name, parameter in disk.named_parameters())


@torch.no_grad()
def test_a_layer_that_fails_lets_go_of_its_weights_too(disk):
    layer = disk.transformer.blocks[0].ffn.net[2]
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3))
    assert layer.weight.is_meta


@torch.no_grad()
def test_faked_weights_give_shapes_alone_and_go_again(memory, disk):
    values = inputs(memory.config)
    with faked(disk, disk.transformer) as mode, mode:
        found = disk.velocity(*(mode.from_tensor(value) for value in values))
        assert type(found).__name__ == "FakeTensor"
    assert found.shape == values[0].shape
    assert disk.velocity(*values).equal(memory.velocity(*values))


@torch.no_grad()
def test_a_lora_changes_what_is_read(memory, disk, tmp_path, monkeypatch):
    weight = memory.transformer.blocks[1].attn1.to_q.weight
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    name = "blocks.1.attn1.to_q"
    both = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save(tmp_path / "lora.safetensors", both | {"blocks.0.attn2.to_k.diff_b": torch.ones(24)})
    kron = {f"blocks.0.attn1.to_v.lokr_{w}": torch.randn(n, 24 // n) for w, n in (("w1", 4), ("w2", 6))}
    lengths = {f"{name}.lora_magnitude_vector": torch.rand(24) + 1}  # of what the first has changed
    save(tmp_path / "second.safetensors", both | lengths | kron)
    values = inputs(memory.config)
    before = disk.velocity(*values)
    for file in ("lora", "second"):
        path = tmp_path / f"{file}.safetensors"
        reports = [merge_lora(m.transformer, path, 0.5) for m in (memory, disk)]
        assert reports[0] == reports[1]
    assert disk.velocity(*values).equal(memory.velocity(*values))
    assert not before.equal(memory.velocity(*values))
    stored = stored_weights(disk.transformer)[f"{name}.weight"]
    assert stored.read().equal(weight) and stored.read().equal(weight)  # not added up


def test_what_does_not_fit_is_listed_before_anything_is_read(memory, tmp_path):
    state = dict(memory.state_dict())
    del state["transformer.proj_out.weight"]
    state["transformer.extra"] = torch.ones(2)
    state["transformer.proj_out.bias"] = torch.ones(3)
    save(tmp_path / "model.safetensors", state)
    with pytest.raises(WeightsError) as error:
        streaming(memory.config, tmp_path)
    expected = (
        "1 missing: transformer.proj_out.weight",
        "1 unexpected: transformer.extra",
        "is (3,), expected",
    )
    for words in expected:
        assert words in str(error.value)


@torch.no_grad()
def test_a_file_that_goes_away_is_an_error(disk, tmp_path):
    (tmp_path / "part" / "model.safetensors").unlink()
    with pytest.raises((WeightsError, FileNotFoundError)):
        disk.velocity(*inputs(disk.config))


@torch.no_grad()
def test_tied_weights_may_lie_there_twice_if_they_agree(memory, tmp_path):
    first, second = "text_encoder.model.shared.weight", "text_encoder.model.encoder.embed_tokens.weight"
    state = dict(memory.state_dict())
    state[second] = state[first].clone()
    save(tmp_path / "model.safetensors", state)
    values = inputs(memory.config)
    assert streaming(memory.config, tmp_path).velocity(*values).equal(memory.velocity(*values))
    state[second][3, 3] += 1
    save(tmp_path / "model.safetensors", state)
    with pytest.raises(WeightsError, match="one tensor for both"):
        streaming(memory.config, tmp_path)


def test_weights_go_to_another_device_one_by_one(disk, monkeypatch):
    read, before = lazy_weights.Stored.read, []

    def watched(stored, *arguments):
        assert all(tensor() is None for tensor in before), "the tensor before is still on the host"
        found = read(stored, *arguments)
        before.append(weakref.ref(found))
        return found

    monkeypatch.setattr(lazy_weights.Stored, "read", watched)
    different = {id(disk.get_parameter(name)) for name in stored_weights(disk)}
    settle(disk, torch.device("meta"))  # a device that there always is
    assert len(before) == len(different)  # a tied one once


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_settle_in_memory(memory, disk, tmp_path, dtype):
    settle(disk, torch.device("cpu"), dtype)
    assert not stored_weights(disk) and not any(m._forward_pre_hooks for m in disk.modules())
    for path in (tmp_path / "part").iterdir():  # nothing of it is the file
        path.write_bytes(bytes(path.stat().st_size))
    matrices = {name: p for name, p in memory.named_parameters() if p.ndim == 2 and p.numel() >= 64}
    for name, parameter in matrices.items():
        assert disk.get_parameter(name).equal(parameter.to(dtype or torch.float32)), name


@torch.no_grad()
def test_what_is_settled_computes_the_same(memory, disk):
    values = inputs(memory.config)
    assert settle(disk, torch.device("cpu")).velocity(*values).equal(memory.velocity(*values))


@torch.no_grad()
def test_a_lora_settles_in_full_precision(memory, disk, tmp_path):
    weight = memory.transformer.blocks[1].attn1.to_q.weight
    name = "blocks.1.attn1.to_q"
    both = {f"{name}.lora_A.weight": torch.randn(2, weight.shape[1]) * 1e-3}
    save(tmp_path / "lora.safetensors", both | {f"{name}.lora_B.weight": torch.randn(weight.shape[0], 2)})
    for model in (memory, disk):
        merge_lora(model.transformer, tmp_path / "lora.safetensors")
    settle(disk, torch.device("cpu"), torch.bfloat16)
    assert disk.transformer.blocks[1].attn1.to_q.weight.equal(weight.to(torch.bfloat16))


def test_another_file_in_their_place_is_not_read(memory, disk, tmp_path):
    path = tmp_path / "part" / "model.safetensors"
    save(path, {name: tensor * 2 for name, tensor in memory.state_dict().items()})
    with torch.inference_mode(), pytest.raises(WeightsError, match="model.safetensors was changed while it"):
        disk.velocity(*inputs(memory.config))
