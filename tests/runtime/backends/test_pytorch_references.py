"""The memory that a step takes with references, of VACE and behind the video: held to the plan."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["wan2.1-vace-1.3b", "phantom-wan-1.3b"])
def test_the_plan_holds_what_a_step_keeps_alive(peak_memory, name):
    from conceptmaster.engine.dit import ConceptDiT
    from conceptmaster.engine.fused import fuse
    from conceptmaster.engine.presets import preset
    from conceptmaster.engine.step import Condition, DenoiseStep
    from conceptmaster.runtime.backends.pytorch import memory_plan
    from conceptmaster.runtime.bundle_format.schema import Shapes

    config, vace = preset(name), "vace" in name
    sizes = {"num_attention_heads": 2, "ffn_dim": 1024, "num_layers": 4, "text_dim": 16}
    sizes |= {"vace_layers": (0, 2)} if vace else {}
    config = dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, **sizes),
        concept=dataclasses.replace(config.concept, max_concepts=3),
        text_encoder=config.text_encoder | {"d_model": 16},
        frames=17,
        height=128,
        width=256,
    )
    c, latent = config.concept, config.latent_shape
    with torch.inference_mode():
        model = fuse(ConceptDiT(config).eval())
        kv = Condition(model)(torch.randn(2, 512, 16))
        state = torch.randn(4, *config.denoised_shape)
        frames = config.denoised_shape[1] if vace else 3
        given = torch.randn(1, config.conditioning_channels, frames, *config.denoised_shape[2:])
        inputs = (
            state,
            torch.ones(1),
            torch.ones(2, 3, dtype=torch.bool),
            torch.ones(2),
            torch.ones(4, 5),
            given,
        )
        with peak_memory([*model.parameters(), *model.buffers(), *inputs, *kv]) as mode:
            DenoiseStep(model)(*inputs, *kv)
    shapes = Shapes(3, c.picture_size, 512, 16, 16, c.queries, c.width, 2, 4, latent, 17, 128, 256)
    demand = memory_plan.Demand(
        config.to_dict(), shapes, {"transformer": 1, "vae": 1}, "float32", graphs=False
    )
    planned = memory_plan.plan(demand)
    assert 0.5 * planned["step"] < mode.most < 1.5 * planned["step"]
    held = sum(tensor.numel() * tensor.element_size() for tensor in kv)
    assert held <= planned["keys and values"] < 3 * held
