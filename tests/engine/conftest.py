"""What the engine's tests share: small configurations, random weights, random requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(position_channels=0, injection="merged", …)`: the tiny preset with fields replaced."""
    from conceptmaster.engine.presets import preset

    def build(**changes: Any) -> Any:
        config = preset("tiny")
        parts = {}
        for part in ("transformer", "concept"):
            known = {f.name for f in dataclasses.fields(getattr(config, part))} & set(changes)
            parts[part] = dataclasses.replace(getattr(config, part), **{k: changes.pop(k) for k in known})
        return dataclasses.replace(config, **parts, **changes)

    return build


@pytest.fixture(scope="session")
def randomise() -> Callable[..., Any]:
    """`randomise(module, seed=0)`: every parameter drawn anew, so that nothing is zero or one; the module."""
    torch = pytest.importorskip("torch")

    def draw(module: Any, seed: int = 0, std: float = 0.2) -> Any:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g) * std)
        return module.eval()

    return draw


@pytest.fixture(scope="session")
def request_for() -> Callable[..., dict[str, Any]]:
    """`request_for(config, batch=2, seed=0)`: random arguments of velocity(), the last slot padded."""
    torch = pytest.importorskip("torch")

    def build(config: Any, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        c = config.concept
        n, labels, tokens = c.max_concepts, c.label_tokens, config.text_tokens
        vocabulary = config.text_encoder["vocab_size"]
        mask = (torch.arange(n) < n - 1).repeat(batch, 1)
        return {
            "latents": torch.randn(batch, *config.latent_shape, generator=g),
            "time": torch.rand(batch, generator=g) * 1000,
            "token_ids": torch.randint(2, vocabulary, (batch, tokens), generator=g),
            "token_mask": (torch.arange(tokens) < tokens // 2).repeat(batch, 1),
            "pixels": torch.randn(batch, n, 3, c.picture_size, c.picture_size, generator=g),
            "label_ids": torch.randint(2, vocabulary, (batch, n, labels), generator=g),
            "label_mask": mask[:, :, None] & (torch.arange(labels) < 3),
            "concept_mask": mask,
        }

    return build


@pytest.fixture(scope="session")
def tiny_base() -> Callable[..., Any]:
    """`tiny_base("references", pictures=3)`: the tiny preset as an image-to-video base of Wan's."""
    from conceptmaster.engine.presets import preset

    def build(given: str = "first", pictures: int = 1, positions: bool = False, **changes: Any) -> Any:
        config = preset("tiny")
        transformer = dataclasses.replace(
            config.transformer,
            in_channels=12,
            image_dim=16,
            added_kv_proj_dim=24,
            pos_embed_seq_len=5 * pictures if positions else None,
            position_channels=0,
        )
        concept = dataclasses.replace(
            config.concept, max_concepts=pictures, picture_tokens=5, injection="base", given=given
        )
        changes = {"frames": 1 + 4 * pictures} | changes
        return dataclasses.replace(config, transformer=transformer, concept=concept, **changes)

    return build
