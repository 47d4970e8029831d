"""Wan2.1's stages beside the steps, one by one, with random weights, each in the dtype that the torch backend
runs it in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from conceptmaster.engine.config import ModelConfig

from .job import Job
from .model import Size
from .questions.decode import LATER, fused
from .timing import Call, guarded, in_turn

STAGE_SECONDS = 8.0
"""Without so many no stage is begun."""


def stages(size: Size, job: Job) -> None:
    """Milliseconds of every stage beside the steps, one after the other, each with its peak memory."""
    for name, make in _makers(size.config, job.device):
        found = {"failed": "no time was left"}
        if job.left() >= STAGE_SECONDS:
            found = guarded(functools.partial(_stage, make, job.rounds))
        job.found[name] = found
        job.say(f"stage: {name:30} {found.get('failed') or format(found['p50_ms'], '.2f') + ' ms'}")


def _stage(make: Callable[[], Call], rounds: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = in_turn({"stage": make()}, rounds, graphs=False, seconds=2)["stage"]
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {})


def _makers(config: ModelConfig, device: str) -> Iterator[tuple[str, Callable[[], Call]]]:
    """(stage, what builds it with random weights and gives its call)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield "text encoder", functools.partial(_text, config, device, dtype)
    if config.concept.injection != "none":
        yield "image encoder", functools.partial(_image, config, device, dtype)
        yield "Q-Former and DAM", functools.partial(_concepts, config, device, dtype)
    yield "condition", functools.partial(_condition, config, device)
    yield "decode, first latent frame", functools.partial(_decode, config, device, "float32", 0)
    for name in ("float32", "float16"):
        yield f"decode, four others, {name}", functools.partial(_decode, config, device, name, LATER)


def _placed(build: Callable[[], torch.nn.Module], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Built on the device in its dtype, so that billions of weights are never there in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build().eval().requires_grad_(False).to(device)  # constants are made on the CPU
    finally:
        torch.set_default_dtype(before)


def _text(config: ModelConfig, device: str, dtype: torch.dtype) -> Call:
    from conceptmaster.engine.encoders import TextEncoder

    model = _placed(lambda: TextEncoder(config.text_encoder), device, dtype)
    ids = torch.ones((1, config.text_tokens), dtype=torch.int64, device=device)
    return lambda: model(ids, ids.bool())


def _image(config: ModelConfig, device: str, dtype: torch.dtype) -> Call:
    from conceptmaster.engine.encoders import ImageEncoder

    model = _placed(lambda: ImageEncoder(config.image_encoder), device, dtype)
    c = config.concept
    pixels = torch.randn(c.max_concepts, 3, c.picture_size, c.picture_size, device=device, dtype=dtype)
    return lambda: model(pixels)


def _concepts(config: ModelConfig, device: str, dtype: torch.dtype) -> Call:
    from conceptmaster.engine.concepts import concept_binder, concept_encoder

    encoder = _placed(lambda: concept_encoder(config), device, dtype)
    binder = _placed(lambda: concept_binder(config), device, dtype)
    c = config.concept
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    pictures = new(c.max_concepts, c.picture_tokens, c.picture_dim)
    label = new(c.max_concepts, c.label_tokens, config.transformer.text_dim)
    mask = torch.ones(label.shape[:2], dtype=torch.bool, device=device)
    return lambda: binder(encoder(pictures), label, mask)


def _condition(config: ModelConfig, device: str) -> Call:
    from conceptmaster.engine.fused import fuse, narrow

    from .model import Inputs, build

    model = fuse(narrow(build(config, device), torch.bfloat16))
    given = Inputs.of(config, device, 2).to(torch.bfloat16)
    return lambda: model.condition(given.text, given.concepts, given.mask)


def _decode(config: ModelConfig, device: str, name: str, later: int) -> Call:
    """The first latent frame, or so many later ones in one call."""
    dtype = getattr(torch, name)
    first, following = fused(config, dtype, device)
    channels, _, height, width = config.latent_shape
    latents = torch.randn(1, channels, 1 + later, height, width, device=device, dtype=dtype)
    if not later:
        return lambda: first(latents)
    _, *states = first(latents[:, :, :1])
    return lambda: following(latents[:, :, 1:], *states)
