"""The memory that a step takes with pictures of their own size: held to the plan."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")


def test_the_plan_holds_what_a_step_keeps_alive(peak_memory):
    """Of pictures that fill their squares; smaller ones take less."""
    from conceptmaster.engine.dit import ConceptDiT
    from conceptmaster.engine.fused import fuse
    from conceptmaster.engine.presets import preset
    from conceptmaster.engine.step import Condition, DenoiseStep
    from conceptmaster.runtime.backends.pytorch import memory_plan
    from conceptmaster.runtime.bundle_format.schema import Shapes

    config = preset("bernini-r-1.3b")
    sizes = {"num_attention_heads": 2, "ffn_dim": 1024, "num_layers": 4, "text_dim": 16}
    config = dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, **sizes),
        concept=dataclasses.replace(config.concept, max_concepts=3, side=256),
        text_encoder=config.text_encoder | {"d_model": 16},
        frames=17,
        height=128,
        width=256,
    )
    c, latent = config.concept, config.latent_shape
    with torch.inference_mode():
        model = fuse(ConceptDiT(config).eval())
        kv = dict(zip(("text_keys", "text_values"), Condition(model)(torch.randn(3, 512, 16)), strict=True))
        given = torch.ones(1, 17, 3, 32, 32)
        mask = torch.tensor([[False] * 3, [True] * 3, [True] * 3])
        inputs = [torch.randn(4, *latent), torch.ones(1), torch.ones(3), torch.eye(5)[:4], mask, given]
        kv["kept"] = torch.arange(3 * 16 * 16)
        with peak_memory([*model.parameters(), *model.buffers(), *inputs, *kv.values()]) as mode:
            DenoiseStep(model).velocity(*inputs, **kv)
    shapes = Shapes(3, c.picture_size, 512, 16, 16, c.queries, c.width, 3, 4, latent, 17, 128, 256)
    demand = memory_plan.Demand(
        config.to_dict(), shapes, {"transformer": 1, "vae": 1}, "float32", graphs=False
    )
    planned = memory_plan.plan(demand)
    assert 0.5 * planned["step"] < mode.most < 1.5 * planned["step"]
