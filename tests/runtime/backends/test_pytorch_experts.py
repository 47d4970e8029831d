"""Two experts on the torch backend: what is planned, and that one can be loaded again. Their frames:
tests/export/test_experts.py."""

from __future__ import annotations

import copy
import dataclasses

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.checkpoints.lazy_weights import settle, stored_weights, stream  # noqa: E402
from conceptmaster.engine.checkpoints.safetensors_io import save  # noqa: E402
from conceptmaster.engine.checkpoints.weight_files import read_header  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.runtime.backends.pytorch import memory_plan  # noqa: E402
from conceptmaster.runtime.backends.pytorch.weights import count_weights  # noqa: E402
from conceptmaster.runtime.bundle_format.shapes import Shapes  # noqa: E402


def demand_for(name, **changes):
    """What a bundle of a preset asks for, of its own video."""
    config = preset(name)
    c = config.concept
    sizes = (c.max_concepts, c.picture_size, config.text_tokens, c.label_tokens, config.transformer.text_dim)
    video = (config.latent_shape, config.frames, config.height, config.width)
    shapes = Shapes(*sizes, c.tokens_per_concept, c.width, 2, 4, *video)
    return memory_plan.Demand(config.to_dict(), shapes, count_weights(config), "bfloat16", True, **changes)


def test_both_experts_are_counted_or_the_larger():
    two = demand_for("wan2.2-t2v-a14b")
    assert two.elements["transformer"] == two.elements["transformer_2"] > 14e9
    swapped = dataclasses.replace(two, swapped=True)
    both, alone = memory_plan.plan(two), memory_plan.plan(swapped)
    assert both["weights"] - alone["weights"] == 2 * two.elements["transformer_2"]
    assert both["keys and values"] * 2 == alone["keys and values"] * 3  # one more in the captured step
    wide = two.elements["vae"]  # stays in float32
    narrow = two.elements["transformer"] + two.elements["text_encoder"]
    assert alone["weights"] == 2 * narrow + 4 * wide


def test_both_are_held_where_they_fit():
    demand = demand_for("wan2.2-i2v-a14b")
    least = dataclasses.replace(demand, latent_frames=1)
    peak, alone = (memory_plan.plan(dataclasses.replace(least, swapped=s))["peak"] for s in (False, True))
    assert not demand.fastest(peak).swapped and demand.fastest(peak - 1).swapped
    assert demand.fastest(1 << 50) == dataclasses.replace(demand, latent_frames=memory_plan.AT_ONCE[0])
    found = demand.fastest(alone - 1)  # nothing fits, and that is what is told of
    assert found.swapped and found.latent_frames == 1
    assert demand.fastest(None).swapped  # nobody tells how much there is
    assert not demand_for("wan2.1-14b").fastest(1).swapped


def test_a_module_on_disk_can_be_loaded_again(tmp_path):
    """As the backend does where one expert is held at a time: a copy comes into memory, the rest stays."""
    layers = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 2))
    save(tmp_path / "a.safetensors", layers.state_dict(), {})
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 2))
    stream(module, read_header(tmp_path / "a.safetensors"))
    x = torch.ones(1, 1024)
    for _ in range(2):
        loaded = settle(copy.deepcopy(module), torch.device("cpu"))
        assert not stored_weights(loaded) and set(stored_weights(module)) == {"0.weight"}
        assert torch.equal(loaded(x), layers(x))
        loaded.requires_grad_(False)[0].weight.zero_()
    assert torch.equal(module(x), layers(x))
